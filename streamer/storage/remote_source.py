"""Read a safetensors file at a URL by ranges, several at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from streamer.errors import FormatError, InputChangedError, InputError, StorageError
from streamer.storage.byte_source import ByteSource
from streamer.storage.header import Header, check_length, parse_header
from streamer.storage.remote_access import check_version
from streamer.storage.remote_manifest import RemoteFile
from streamer.storage.remote_retries import in_context, read_range, stat_remote

IN_FLIGHT = 8
"""Most ranges requested at a time, over all files."""

RANGE_BYTES = 8 << 20
"""Most bytes of a range."""

LEAST_BYTES = 1 << 20
"""Least bytes of a range when a tensor is divided: a request needs about as long as this many bytes."""

AHEAD_BYTES = 6 * RANGE_BYTES
"""Bytes that are requested or read ahead of a sequential reader."""


@dataclass(frozen=True)
class _Range:
    start: int
    data: memoryview
    future: Future[None]

    @property
    def stop(self) -> int:
        return self.start + len(self.data)


class RemoteSource(ByteSource):
    """Ranges of one version of a file; see `read_range`."""

    remote: ClassVar[bool] = True

    def __init__(self, file: RemoteFile) -> None:
        self.file = file
        self.io, self.stamp = "pread", file.stamp
        self._ahead: deque[_Range] = deque()
        self._lock = threading.Lock()

    def header(self) -> Header:
        """Read the header by two small ranges and validate it."""
        file = self.file
        if file.size < 8:
            raise FormatError(f"{file.shown}: expected a safetensors file, found {file.size} bytes; check the address")
        first = memoryview(bytearray(8))
        read_range(file, first, 0)
        n = int.from_bytes(first, "little")
        check_length(n, file.size, file.shown, lambda: self._read(min(256, file.size), 0))
        return parse_header(bytes(first) + self._read(n, 8), file.size, file.shown)

    def view(self, at: int, length: int) -> memoryview:
        """Read bytes into a new buffer."""
        out = memoryview(bytearray(length))
        self.read_into(out, at)
        return out

    def read_pieces(self, pieces: Iterable[tuple[memoryview, int]]) -> None:
        """Read all pieces at once."""
        _finish([_submitted(self.file, out, at) for out, at in pieces if len(out)])

    def read_into(self, out: memoryview, at: int) -> None:
        """Return bytes that were read ahead, and read the rest."""
        if not self._ahead:  # several threads may read at once
            self._read_ranges(out, at)
            return
        with self._lock:
            self._take(out, at)

    def _take(self, out: memoryview, at: int) -> None:
        done = 0
        while done < len(out):
            while self._ahead and self._ahead[0].stop <= at + done:
                self._ahead.popleft()
            first = self._ahead[0] if self._ahead else None
            if first is None or not first.start <= at + done:
                self._read_ranges(out[done:], at + done)
                return
            first.future.result()
            skipped = at + done - first.start
            piece = first.data[skipped : skipped + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)

    def prefetch(self, start: int, stop: int, end: int) -> None:
        """Request what follows `start`, up to `AHEAD_BYTES` and before `end`."""
        with self._lock:
            ahead = self._ahead
            while ahead and ahead[0].stop <= start:
                ahead.popleft()
            if ahead and not ahead[0].start <= start:  # the reader is elsewhere in the file
                self._forget()
            following = ahead[-1].stop if ahead else start
            while following < min(end, max(stop, start + AHEAD_BYTES)):
                data = memoryview(bytearray(min(RANGE_BYTES, end - following)))
                ahead.append(_Range(following, data, _submitted(self.file, data, following)))
                following += len(data)

    def check_unchanged(self) -> None:
        """Request size and version again."""
        file = self.file
        try:
            stat = stat_remote(file.url, file.shown, token=file.token)
        except InputError as e:  # access was allowed when the run began
            raise StorageError(f"{e}; then run the same command again") from e
        if stat is None:
            raise InputChangedError.vanished(file.shown)
        check_version(file, stat.version, stat.size)

    def close(self) -> None:
        """Cancel requests that have not begun."""
        self._forget()

    def _forget(self) -> None:
        while self._ahead:
            self._ahead.pop().future.cancel()

    def _read(self, length: int, at: int) -> bytes:
        out = memoryview(bytearray(length))
        self._read_ranges(out, at)
        return bytes(out)

    def _read_ranges(self, out: memoryview, at: int) -> None:
        """Read bytes by as many ranges as may be requested at a time, unless they would be too small."""
        step = min(RANGE_BYTES, max(LEAST_BYTES, -(-len(out) // IN_FLIGHT)))
        _finish([_submitted(self.file, out[i : i + step], at + i) for i in range(0, len(out), step)])


def _submitted(file: RemoteFile, out: memoryview, at: int) -> Future[None]:
    """Request a range."""
    return _pool().submit(in_context(read_range), file, out, at)


def _finish(ranges: list[Future[None]]) -> None:
    """Wait for all ranges, and raise the error of the first that failed; cancel the others."""
    try:
        for one in ranges:
            one.result()
    finally:
        for one in ranges:
            one.cancel()
        wait(ranges)  # so that none writes to a buffer after its owner has left


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="streamer range")
