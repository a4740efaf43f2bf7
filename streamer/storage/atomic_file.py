"""Write a file that appears complete or not at all, from pieces of bytes in reused buffers; for several files, see `transaction`.

A planned file is a header and, for each tensor in offset order, pieces of bytes that the writer pulls and releases.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from streamer.errors import InputChangedError, NumericError, StorageError
from streamer.storage import files
from streamer.storage.header import DIGEST, Header, TensorInfo, layout, read_header
from streamer.units import format_sizes

Buffer = bytes | bytearray | memoryview

QUEUE = 3
"""Most pieces of a file that are being written and hashed. A ring that feeds the file needs one more."""

CHECKED = "STREAMER_CHECK_BUFFERS" in os.environ
"""Whether tests check the rules: a released buffer is filled with `RELEASED`, and a piece must not change before its release."""

RELEASED = b"\xff"
"""NaN in every floating-point dtype."""

_GONE = memoryview(b"")
_GONE.release()
"""Takes the place of a piece's own view, which cannot be released itself while an array uses it."""


class Piece:
    """Bytes of a tensor, valid until `release`; ``with piece as view`` releases them at the end of the block.

    Parameters
    ----------
    data
        A buffer that nobody changes before the release.
    size
        Number of first bytes to use; None for all.
    free
        The list to which the buffer returns; None if it is not reused.
    """

    def __init__(
        self, data: Buffer, size: int | None = None, free: list[bytearray | None] | None = None
    ) -> None:
        self.view = memoryview(data).cast("B")[:size] if len(data) else memoryview(b"")
        """The bytes; after the release every use raises `ValueError`."""
        self._free = free

    def release(self) -> None:
        """Release the bytes: their buffer may be leased again."""
        view = self.view
        buffer = self.view.obj
        self.view = _GONE
        if self._free is not None:
            if CHECKED:
                view[:] = RELEASED * len(view)
            self._free.append(buffer)  # type: ignore[arg-type]  # the ring's

    def __enter__(self) -> memoryview:
        return self.view

    def __exit__(self, *_: object) -> None:
        self.release()


class BufferRing:
    """Leases up to `count` buffers of `size` bytes, allocated when they are first needed."""

    def __init__(self, size: int, count: int = QUEUE + 1) -> None:
        self._size = size
        self._free = list[bytearray | None]([None] * count)

    def lease(self, size: int | None = None) -> Piece:
        """Lease a buffer, or the first `size` bytes of one; raise `BufferError` if all are leased."""
        if not self._free:
            raise BufferError(
                "all buffers of a ring are leased, and none was released; please report this"
            )
        return Piece(self._free.pop() or bytearray(self._size), size, self._free)


def views(pieces: Iterable[Piece]) -> Iterator[memoryview]:
    """Yield the bytes of each piece, and release it when the next one is requested."""
    for piece in pieces:
        with piece as view:
            yield view


def gather(pieces: Iterable[Piece], nbytes: int) -> memoryview:
    """Copy pieces into newly allocated memory of `nbytes`, and release each."""
    out = memoryview(bytearray(nbytes))
    at = 0
    for view in views(pieces):
        out[at : at + len(view)] = view
        at += len(view)
    return out


THREADED_BYTES = 1 << 18
"""Pieces of at least this many bytes are hashed and written by threads; smaller ones are not worth it if no others are pending."""

LAG_BYTES = 64 << 20
"""Written pages are dropped when the file has grown by this much more: by then they are on disk."""


PARTIAL = re.compile(r"^\.(?P<name>.+)\.[0-9a-f]{16}\.partial$")


class AtomicFile:
    """A file to write that gets its final name only when it is complete, durable and checked.

    ``with AtomicFile(path, size) as f: f.write(...)`` writes ``.<name>.<unique>.partial`` beside the target. Leaving the
    block without an exception calls `complete`, renames the file and fsyncs the directory; an exception removes the
    partial file. It never follows a symlink, and it replaces an existing file at `path` in one step.

    One thread writes, one hashes, and the caller makes the next piece. Unchanged bytes take this path too: the digest needs them in memory
    anyway, and ``copy_file_range`` was slower (docs/benchmarks.md). Written pages stay in the cache only as long as the disk needs them, so
    their memory is reused, and the fsync at the end finds little left to do.

    Parameters
    ----------
    path
        The final name. Its directory must exist.
    size
        Exact number of bytes to be written; reserved at once, so that a full disk is found before the work is done.
    head
        The first bytes, written on entry.
    renames
        False leaves the complete file under its name `partial`, for `rename_partial`.

    Raises
    ------
    StorageError
        If the system refuses to write. Never retry a failed fsync on the same file.
    """

    def __init__(self, path: Path, size: int, head: bytes = b"", renames: bool = True) -> None:
        self.path = path
        self.size = size
        self.written = 0
        self._fd = -1
        self._at = 0
        self._head = head
        self._renames = renames
        self._is_complete = False
        self.partial = path.with_name(partial_name(path.name))
        self._hash = hashlib.sha256()
        self._threads: tuple[ThreadPoolExecutor, ...] = ()
        self._pending: deque[tuple[Piece, int, tuple[Future[None], ...]]] = deque()

    @property
    def sha256(self) -> str:
        """Return the SHA-256 (hex) of the data appended so far."""
        self.flush()
        return self._hash.hexdigest()

    def append(self, piece: Piece) -> None:
        """Append a whole piece, repeating calls that write less; the piece is released when it is written and hashed.

        Up to `QUEUE` large pieces are still pending when this returns.

        Raises
        ------
        StorageError
            If the system refused this piece or an earlier one.
        """
        self.written += len(piece.view)
        if len(piece.view) < THREADED_BYTES:
            with piece as view:
                if not self._pending:
                    with files.storage_errors(self.path, "write"):
                        self._write(view)
                    self._hash.update(view)
                    return
                piece = Piece(bytes(view))
        self._threads = self._threads or tuple(
            ThreadPoolExecutor(1, "streamer write") for _ in range(2)
        )
        self.flush(QUEUE - 1)
        writer, hasher = self._threads
        view = piece.view
        futures = writer.submit(self._write, view), hasher.submit(self._hash.update, view)
        self._pending.append((piece, zlib.crc32(view) if CHECKED else 0, futures))

    def flush(self, pieces: int = 0) -> None:
        """Wait until at most this many pieces are pending, and raise the errors of the others."""
        while len(self._pending) > pieces:
            piece, checksum, futures = self._pending.popleft()
            with files.storage_errors(self.path, "write"):
                for future in futures:
                    future.result()
            if CHECKED and zlib.crc32(piece.view) != checksum:
                raise BufferError("a piece of a tensor was changed before its release")
            piece.release()

    def close(self) -> None:
        """Close the file: writes that have not begun are dropped, so that none goes to a descriptor that is reused for another file."""
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)
        # A failed close has still closed the descriptor.
        fd = self._fd
        self._fd = -1
        if fd >= 0:
            os.close(fd)

    def _write(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.write(self._fd, view[done : done + files.MAX_CALL_BYTES])
        begun = self._at
        self._at += len(view)
        if len(view) >= THREADED_BYTES:
            # These pages are still dirty, so they stay, but Linux begins to write them.
            files.drop_cached(self._fd, begun, len(view))
            if begun >= LAG_BYTES:
                files.drop_cached(self._fd, begun - LAG_BYTES, len(view))

    def __enter__(self) -> Self:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with files.storage_errors(self.path, "create"):  # an existing file is not ours to discard
            self._fd = os.open(self.partial, flags, 0o666)  # the umask determines the mode
        with contextlib.ExitStack() as undo:
            undo.callback(self._discard)
            with files.storage_errors(self.path, "create"):
                files.reserve(self._fd, self.size)
            self.write(self._head)
            undo.pop_all()
        return self

    def write(self, data: Buffer) -> None:
        """Append bytes that will not change."""
        self.append(Piece(data))

    def copy(self, source: Path) -> None:
        """Append another file, which forms the rest of this one."""
        with files.storage_errors(source, "copy"):
            try:
                file = source.open("rb")
            except FileNotFoundError as e:
                raise InputChangedError.vanished(source) from e
            with file:
                shutil.copyfileobj(file, self, 8 << 20)
        if self.written != self.size:
            wanted, found = format_sizes(self.size, self.written)
            raise InputChangedError(
                f"{source}: expected {wanted}, found {found}: it changed during the run; start again"
            )

    def complete(self) -> None:
        """Check the byte count and fsync, so that only the rename remains; a second call does nothing."""
        if self._is_complete:
            return
        self.flush()
        if self.written != self.size:
            raise StorageError(
                f"{self.path}: expected {self.size} bytes, wrote {self.written}; please report this"
            )
        with files.storage_errors(self.path, "finish"):
            files.sync(self._fd)
            if self.written > LAG_BYTES:
                files.drop_cached(self._fd, 0, self.written)
        self._is_complete = True

    def __exit__(self, kind: object, *_: object) -> None:
        with contextlib.ExitStack() as undo:
            undo.callback(self._discard)
            if kind is None:
                if not self._is_complete:
                    self.complete()
                with files.storage_errors(self.path, "finish"):
                    self.close()
                    if self._renames:
                        os.rename(self.partial, self.path)
                    files.fsync_directory(self.path.parent)
                undo.pop_all()

    def _discard(self) -> None:
        with contextlib.suppress(OSError):
            self.close()
        with contextlib.suppress(OSError):
            os.unlink(self.partial)


def rename_partial(partial: Path, path: Path) -> None:
    """Give a complete partial file its final name, durably."""
    with files.storage_errors(path, "finish"):
        os.rename(partial, path)
        files.fsync_directory(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file atomically."""
    with AtomicFile(path, len(data)) as f:
        f.write(data)


def partial_name(name: str) -> str:
    """Make a unique name that matches `PARTIAL`, such as ``.model.safetensors.0123456789abcdef.partial``."""
    return f".{name}.{secrets.token_hex(8)}.partial"


def partials_of(directory: Path, names: set[str]) -> list[Path]:
    """List the partial files that a killed run left for these final names."""
    with os.scandir(directory) as entries:
        matches = ((PARTIAL.match(entry.name), entry) for entry in entries)
        own = (entry for match, entry in matches if match and match["name"] in names)
        return [Path(entry.path) for entry in own if entry.is_file(follow_symlinks=False)]


def remove_partials(directory: Path, names: set[str]) -> None:
    """Remove the files found by `partials_of`. Call it under the lock."""
    for path in partials_of(directory, names):
        files.remove_file(path)


Shard = Iterable[tuple[TensorInfo, Iterable[Piece]]]
"""The tensors of a file in file order, with the pieces of each."""


@dataclass(frozen=True)
class ShardPlan:
    """Name, header and header bytes of an output file, whose exact size is known before a byte is written."""

    name: str
    header: Header
    raw_header: bytes

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of the whole file."""
        return self.header.file_bytes

    def sealed(self, source: Callable[[TensorInfo], Iterable[Buffer]]) -> ShardPlan:
        """Put the SHA-256 (hex) of the whole file into its metadata in place of `NO_DIGEST`, with which it is computed."""
        digest = hashlib.sha256(self.raw_header)
        for info in self.header.tensors:
            for piece in source(info):
                digest.update(piece)
        return self.with_metadata(DIGEST, digest.hexdigest())

    def with_metadata(self, key: str, value: str) -> ShardPlan:
        """Replace a metadata value by one that is not longer; spaces in the header keep the planned size."""
        if self.header.metadata.get(key) == value:
            return self
        prefix = self.header.prefix
        entries = [(t.name.removeprefix(prefix), t.dtype, t.shape) for t in self.header.tensors]
        header, raw = layout(
            entries, {**self.header.metadata, key: value}, len(self.raw_header) - 8
        )
        if header.file_bytes != self.nbytes:
            raise NumericError(f"{self.name}: its header outgrew the plan; please report this")
        return ShardPlan(self.name, header.prefixed(prefix), raw)


def plan_shard(
    name: str, entries: Iterable[tuple[str, str, Iterable[int]]], metadata: dict[str, str]
) -> ShardPlan:
    """Plan a file from (tensor name, dtype, shape) in file order; the names of a pipeline's tensors begin with their component."""
    prefix = component_prefix(name)
    header, raw = layout(
        [(tensor.removeprefix(prefix), dtype, shape) for tensor, dtype, shape in entries], metadata
    )
    return ShardPlan(name, header.prefixed(prefix), raw)


def component_prefix(name: str) -> str:
    """Return the prefix of the names of a file's tensors: ``unet/diffusion_pytorch_model.safetensors`` → ``unet.``."""
    component, slash, _ = name.rpartition("/")
    return f"{component}." if slash else ""


class ShardFile(AtomicFile):
    """A planned file, written as an `AtomicFile`: its tensors are pulled one by one, in the plan's order."""

    def __init__(self, directory: Path, plan: ShardPlan, renames: bool = True) -> None:
        files.make_directory((directory / plan.name).parent)
        super().__init__(directory / plan.name, plan.nbytes, plan.raw_header, renames)
        self.plan = plan
        self._following = iter(plan.header.tensors)

    def add(self, info: TensorInfo, pieces: Iterable[Piece]) -> None:
        """Pull the next tensor's pieces, hash and write them, and check their total size."""
        begun = self.written
        if next(self._following, None) != info:
            raise NumericError(
                f"tensor {info.name!r}: the plan has another one here; please report this"
            )
        for piece in pieces:
            self.append(piece)
        if (found := self.written - begun) != info.nbytes:
            raise NumericError(
                f"tensor {info.name!r}: planned {info.nbytes} bytes, got {found}; please report this"
            )

    def complete(self) -> None:
        """Check and fsync, then read the header back from disk with the strict reader: it must equal the plan's."""
        super().complete()
        if read_header(self._fd, str(self.path)).digest != self.plan.header.digest:
            raise NumericError(
                f"{self.path}: the header read back differs from what was written; check the disk"
            )


def write_shard(
    directory: Path,
    plan: ShardPlan,
    shard: Shard,
    renames: bool = True,
    before_rename: Callable[[], None] = lambda: None,
) -> ShardFile:
    """Write a planned file, pulling its tensors in the plan's order, and return it closed; `before_rename` may raise to prevent that."""
    with ShardFile(directory, plan, renames) as file:
        for tensor, pieces in shard:
            file.add(tensor, pieces)
        file.complete()
        before_rename()
    return file


def write_sealed(
    directory: Path,
    plan: ShardPlan,
    source: Callable[[TensorInfo], Iterable[Buffer]],
    before_rename: Callable[[], None] = lambda: None,
) -> None:
    """Write a planned file with a digest of all of it, pulling each tensor's bytes twice."""
    shard = ((info, map(Piece, source(info))) for info in plan.header.tensors)
    write_shard(directory, plan.sealed(source), shard, before_rename=before_rename)


def index_bytes(index: dict[str, Any], total_size: int) -> bytes:
    """Make the JSON of an output's index from the base's, with the exact ``total_size``."""
    metadata = index.get("metadata")
    tree = {
        **index,
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": total_size},
    }
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
