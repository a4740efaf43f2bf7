"""Reuse buffers: a ring leases one for each piece of a tensor, and the last user of the piece releases it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

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

    def __init__(self, data: Buffer, size: int | None = None, free: list[bytearray | None] | None = None) -> None:
        self.view = memoryview(data).cast("B")[:size] if len(data) else memoryview(b"")
        """The bytes; after the release every use raises `ValueError`."""
        self._free = free

    def release(self) -> None:
        """Release the bytes: their buffer may be leased again."""
        view, buffer, self.view = self.view, self.view.obj, _GONE
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
        self._size, self._free = size, list[bytearray | None]([None] * count)

    def lease(self, size: int | None = None) -> Piece:
        """Lease a buffer, or the first `size` bytes of one; raise `BufferError` if all are leased."""
        if not self._free:
            raise BufferError("all buffers of a ring are leased, and none was released; please report this")
        return Piece(self._free.pop() or bytearray(self._size), size, self._free)


def views(pieces: Iterable[Piece]) -> Iterator[memoryview]:
    """Yield the bytes of each piece, and release it when the next one is requested."""
    for piece in pieces:
        with piece as view:
            yield view


def gather(pieces: Iterable[Piece], nbytes: int) -> memoryview:
    """Copy pieces into newly allocated memory of `nbytes`, and release each."""
    out, at = memoryview(bytearray(nbytes)), 0
    for view in views(pieces):
        out[at : at + len(view)] = view
        at += len(view)
    return out
