"""Keep tensors in a temporary file while they are not needed."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from streamer.errors import StorageError
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
        self.directory = directory or Path(tempfile.gettempdir())
        with storage_errors(self.directory, "make a temporary file"):
            # Where the file system allows it, the file never has a name that a kill or a power cut could leave behind.
            file = tempfile.TemporaryFile(buffering=0, prefix=".streamer-", dir=self.directory)  # noqa: SIM115  # `close` does
        self._fd = file.fileno()
        self.close = weakref.finalize(self, file.close)
        """Frees the file's blocks."""
        self.end = 0

    def write(self, tensors: Sequence[Tensor], over: Spooled | None = None) -> Spooled:
        """Append tensors, or write them `over` earlier ones of the same size.

        Raises
        ------
        StorageError
            If the disk has no room for them.
        """
        nbytes = sum(tensor.nbytes for tensor in tensors)
        start = over.start if over is not None and over.nbytes == nbytes else self.end
        at = start
        for tensor in tensors:
            data = _bytes(tensor.detach().cpu().contiguous())
            while data:
                with storage_errors(self.directory, "write a temporary file"):
                    done = os.pwrite(self._fd, data[:MAX_CALL_BYTES], at)
                data = data[done:]
                at += done
        self.end = max(self.end, at)
        return Spooled(start, nbytes, tuple((t.shape, t.dtype, t.device) for t in tensors))

    def read(self, place: Spooled) -> list[Tensor]:
        """Read tensors into new memory on their devices."""
        at = place.start
        tensors = []
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
                data = data[done:]
                at += done
            tensors.append(tensor.to(device))
        drop_cached(self._fd, place.start, place.nbytes)
        return tensors


def in_file(directory: Path, write: Callable[[IO[bytes]], object]) -> Tensor:
    """Write bytes to a file without a name, and return them; the system may take their memory back, and read them again.

    Raises
    ------
    StorageError
        If the disk has no room for them.
    """
    with (
        storage_errors(directory, "write a temporary file"),
        tempfile.TemporaryFile(prefix=".streamer-", dir=directory) as file,
    ):
        write(file)
        file.flush()
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(memory, dtype=torch.uint8)


def moved_to_file(tensor: Tensor, directory: Path) -> Tensor:
    """Copy a tensor to a file; see `in_file`."""
    data = _bytes(tensor.contiguous())
    return in_file(directory, lambda file: file.write(data)).view(tensor.dtype).view(tensor.shape)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
