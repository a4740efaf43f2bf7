"""Buffers that are used again: a ring leases each for one piece of a tensor, and whoever has used the piece last releases it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

Buffer = bytes | bytearray | memoryview

QUEUE = 3
"""Pieces that a file has in hand at most: being written and hashed. A ring that feeds it needs one more."""

CHECKED = "STREAMER_CHECK_BUFFERS" in os.environ
"""Whether the rules are checked, for tests: a buffer is filled with `RELEASED` on its release, and a piece must not change on its way."""

RELEASED = b"\xff"
"""NaN in every floating-point dtype."""

_GONE = memoryview(b"")
_GONE.release()


class Piece:
    """Bytes of a tensor, valid until `release`; ``with piece as view`` releases them at the end of the block.

    Parameters
    ----------
    data
        A buffer, which nobody changes before the release.
    size
        Only the first bytes of it; None for all.
    free
        The list that it returns to; None if it is not used again.
    """

    def __init__(self, data: Buffer, size: int | None = None, free: list[bytearray | None] | None = None) -> None:
        self.view = memoryview(data).cast("B")[:size] if len(data) else memoryview(b"")
        """The bytes; after the release whatever is done with this raises `ValueError`."""
        self._free = free

    def release(self) -> None:
        """Let the bytes go: their buffer may be leased again."""
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
    """Lease up to `count` buffers of `size` bytes, made when they are first needed."""

    def __init__(self, size: int, count: int = QUEUE + 1) -> None:
        self._size, self._free = size, list[bytearray | None]([None] * count)

    def lease(self, size: int | None = None) -> Piece:
        """Lease a buffer, or the first `size` bytes of one; raise `BufferError` if all are leased."""
        if not self._free:
            raise BufferError("all buffers of a ring are leased, and none was released; please report this")
        return Piece(self._free.pop() or bytearray(self._size), size, self._free)


def views(pieces: Iterable[Piece]) -> Iterator[memoryview]:
    """Yield the bytes of each piece, and release it when the next is asked for."""
    for piece in pieces:
        with piece as view:
            yield view


def gather(pieces: Iterable[Piece], nbytes: int) -> memoryview:
    """Copy pieces into new memory of `nbytes`, and release each."""
    out, at = memoryview(bytearray(nbytes)), 0
    for view in views(pieces):
        out[at : at + len(view)] = view
        at += len(view)
    return out
