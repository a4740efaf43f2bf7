"""One tensor of a merged model: a few rows of ``W0 + Δ'`` at a time, or the base's own bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from streamer.encodings import TORCH_DTYPES, as_tensor, encode, encoding_of
from streamer.linalg.operators import LowRank
from streamer.storage.header import TensorInfo
from streamer.storage.tensorfile import TensorFile
from streamer.targets import Target

BLOCK_BYTES = 4 << 20
"""Rows of this many float32 bytes are merged at a time, so that memory does not depend on the matrix.

Measured with 2 threads, 4096×14336: 4 MB stay in the cache; 16 MB and 2 MB take a tenth longer, below 1 MB the threads' own
cost shows, and many times that where other processes want the same cores.
"""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on the calling thread alone while rows are merged and written.

    The work is bound by memory, hashing and writing. With more threads each small step ends at a barrier, and where other
    processes want the cores the wait there is many times the work: 60 s in place of 12 s for 4 GB on two cores with a load of
    four. And a sum's last bit may depend on the number of threads; so it does not depend on the machine's.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def merged_blocks(file: TensorFile, info: TensorInfo, target: Target, delta: LowRank) -> Iterator[Tensor]:
    """``W0 + Δ'`` a few rows at a time, as the base stores them: summed in the computing dtype, rounded once.

    A delta of zero gives the base's own bytes: adding it would turn −0 into +0. Blocks stand in two buffers by turns: use each
    before asking for the next but one.
    """
    encoding = encoding_of(info, str(file.path))
    change = (delta.T if target.transposed else delta).to(encoding.compute)
    empty = not (change.L.any() and change.R.any())
    m, n = info.shape
    row_bytes = n * encoding.dtype.itemsize
    rows = max(1, BLOCK_BYTES // (n * encoding.compute.itemsize))
    # The same buffers for all: fresh ones are zeroed by the system first, which costs as much as the sum itself.
    values, *rounded = (
        torch.empty((min(rows, m), n), dtype=t) for t in (encoding.compute, encoding.dtype, encoding.dtype)
    )
    for i in range(0, m, rows):
        j = min(m, i + rows)
        raw = as_tensor(file.view(info, i * row_bytes, j * row_bytes), encoding.dtype, (j - i, n))
        if empty:
            yield raw
        else:
            merged = values[: j - i].copy_(raw).addmm_(change.L[i:j], change.R.T)
            yield encode(merged, encoding, raw, info.name, out=rounded[i // rows % 2][: j - i])


def untouched_tensor(file: TensorFile, info: TensorInfo) -> Tensor:
    """A tensor as it stands in the base; of a dtype that torch does not have, its bytes as a flat uint8 tensor."""
    data = bytearray(info.nbytes)
    at = 0
    for piece in file.chunks(info):
        data[at : at + len(piece)] = piece
        at += len(piece)
    if info.dtype not in TORCH_DTYPES:
        return as_tensor(memoryview(data), torch.uint8, (info.nbytes,))
    return as_tensor(memoryview(data), TORCH_DTYPES[info.dtype], info.shape)
