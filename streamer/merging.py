"""One tensor of a merged model: a few rows of ``W0 + Δ'`` at a time, or the base's own bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from streamer.bases.weight import Weight
from streamer.encodings import TORCH_DTYPES, as_tensor, encode
from streamer.linalg.operators import LowRank
from streamer.storage.header import TensorInfo
from streamer.storage.tensorfile import TensorFile
from streamer.targets import Target

BLOCK_BYTES = 4 << 20
"""Rows of this many float32 bytes are merged at a time, so that memory does not depend on the matrix.

CPU seconds for 4 GB of a width of 4096, one thread, three rounds on a busy machine: 2 MB 2.3 to 2.4; 4 MB 2.1 to 3.2; 8 MB 2.2 to
3.7; 0.5 MB 3.2 to 3.7. From 2 MB on the noise is larger than any difference; below, the calls' own cost shows.
"""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on the calling thread alone while rows are merged and written.

    With more threads each small step ends at a barrier, and where other processes want the cores the wait there is many times
    the work: on two busy cores 4 GB took 33 to 91 s with two threads, and 13 to 21 s with one, in runs that were not interleaved.
    And a sum's last bit may depend on the number of threads (seen for one shape and block size); so it does not depend on it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def merged_blocks(weight: Weight, target: Target, delta: LowRank) -> Iterator[Tensor]:
    """``W0 + Δ'`` a few rows at a time, as the base stores them: summed in the computing dtype, rounded once.

    A delta of zero gives the base's own bytes: adding it would turn −0 into +0. Blocks stand in two buffers by turns: use each
    before asking for the next but one.
    """
    encoding = weight.encoding
    assert encoding is not None
    change = (delta.T if target.transposed else delta).to(encoding.compute)
    empty = not (change.L.any() and change.R.any())
    m, n = weight.matrix
    rows = max(1, BLOCK_BYTES // (n * encoding.compute.itemsize))
    # The same buffers for all: fresh ones are zeroed by the system first, which costs as much as the sum itself.
    values, *rounded = (
        torch.empty((min(rows, m), n), dtype=t) for t in (encoding.compute, encoding.dtype, encoding.dtype)
    )
    for i in range(0, m, rows):
        j = min(m, i + rows)
        raw = weight.rows(i, j)
        if empty:
            yield raw
        else:
            merged = values[: j - i].copy_(raw).addmm_(change.L[i:j], change.R.T)
            yield encode(merged, encoding, raw, weight.name, out=rounded[i // rows % 2][: j - i])


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
