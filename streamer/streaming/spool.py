"""Keep tensors in an unnamed temporary file, so that memory does not grow with their number.

Keep the inputs of a module in a temporary file, and compute their second moments.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamer.errors import StorageError
from streamer.linalg.moments import Moments, OneHotMoments, RowMoments
from streamer.storage.files import MAX_CALL_BYTES, drop_cached, read_at, storage_errors


@dataclass(frozen=True)
class Spooled:
    """Position of consecutive tensors in a spool.

    Attributes
    ----------
    start, nbytes
        Offset and length in bytes.
    tensors
        Shape, dtype and device of each tensor.
    """

    start: int
    nbytes: int
    tensors: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]


class Spool:
    """File that disappears with the process, and the tensors written to it.

    Parameters
    ----------
    directory
        Directory whose disk holds the file; by default the system's directory for temporary files.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = Path(tempfile.gettempdir()) if directory is None else directory
        with storage_errors(self.directory, "make a temporary file"):
            # Where the file system allows it, the file never has a name that a kill or a power cut could leave behind.
            file = tempfile.TemporaryFile(buffering=0, prefix=".streamer-", dir=self.directory)  # noqa: SIM115  # `close` does
        self._fd = file.fileno()
        self.close = weakref.finalize(self, file.close)
        """Frees the file's blocks."""
        self.end = 0

    def write(self, tensors: Sequence[Tensor]) -> Spooled:
        """Append tensors.

        Raises
        ------
        StorageError
            If the disk has no room for them.
        """
        start, at = self.end, self.end
        for tensor in tensors:
            data = _bytes(tensor.detach().cpu().contiguous())
            while data:
                with storage_errors(self.directory, "write a temporary file"):
                    done = os.pwrite(self._fd, data[:MAX_CALL_BYTES], at)
                at, data = at + done, data[done:]
        self.end = at
        return Spooled(start, at - start, tuple((t.shape, t.dtype, t.device) for t in tensors))

    def clear(self) -> None:
        """Drop all tensors and free their blocks."""
        with storage_errors(self.directory, "shorten a temporary file"):
            os.ftruncate(self._fd, 0)
        self.end = 0

    def read(self, place: Spooled, *, again: bool = False) -> list[Tensor]:
        """Read tensors into new memory on their devices; with `again`, they stay in the page cache for another read."""
        at, out = place.start, []
        for shape, dtype, device in place.tensors:
            tensor = torch.empty(shape, dtype=dtype)
            data = _bytes(tensor)
            while data:
                with storage_errors(self.directory, "read a temporary file"):
                    done = read_at(self._fd, data, at)
                if not done:
                    raise StorageError(
                        f"{self.directory}: a temporary file is shorter than what was written to it; run the same command again"
                    )
                at, data = at + done, data[done:]
            out.append(tensor.to(device))
        if not again:
            drop_cached(self._fd, place.start, place.nbytes)
        return out


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer


ROWS = 512
"""Number of inputs to write or read at a time."""


@dataclass(frozen=True)
class Written:
    """Inputs (t, n) in a spool, their number t, and the sum of their squares."""

    places: list[Spooled]
    rows: int
    squares: float

    @classmethod
    def to(cls, spool: Spool, x: Tensor) -> Written:
        """Write inputs."""
        squares = float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
        return cls([spool.write([x[i : i + ROWS]]) for i in range(0, len(x), ROWS)], len(x), squares)


class Inputs:
    """Inputs of a module on one text, in a spool; for one-hot inputs, the count of each value."""

    def __init__(self, spool: Spool) -> None:
        self.spool, self.places = spool, list[Spooled]()
        self.squares = 0.0
        """Sum of the squares of all inputs."""
        self.rows = 0
        self.counts: Tensor | None = None

    def add(self, x: Written) -> None:
        """Add inputs (t, n)."""
        self.places += x.places
        self.rows += x.rows
        self.squares += x.squares

    def count(self, ids: Tensor, size: int) -> None:
        """Add one-hot inputs by their indices, of `size` possible ones."""
        counts = torch.bincount(ids.flatten(), minlength=size).double()
        self.counts = counts if self.counts is None else self.counts + counts
        self.squares += ids.numel()

    def moments(self, tokens: int) -> Moments:
        """Return the moments as means over this many tokens; they can be read as long as the spool holds the inputs."""
        if self.counts is not None:
            return OneHotMoments(self.counts / tokens)
        return self.row_moments(tokens)

    def row_moments(self, tokens: int) -> RowMoments:
        """Return the moments of inputs that are not one-hot."""
        (shape, _, device), *_ = self.places[0].tensors
        return RowMoments(shape[1], tokens, self.squares / tokens, self._read, device)

    def _read(self) -> Iterator[Tensor]:
        """Read the inputs; small pieces, such as an expert's, are joined up to `ROWS` at a time."""
        rows, count = list[Tensor](), 0
        for place in self.places:
            if count + place.tensors[0][0][0] > ROWS:
                yield torch.cat(rows)
                rows, count = [], 0
            rows.append(self.spool.read(place, again=True)[0])
            count += len(rows[-1])
        yield torch.cat(rows)
