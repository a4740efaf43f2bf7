"""Large matrices are tensors as any other, and their memory goes with them."""

from __future__ import annotations

import pytest
import torch
from measure import kilobytes

from streamer.linalg.allocation import LARGE_BYTES, empty_matrix

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bytes_", [0, 4096, LARGE_BYTES, LARGE_BYTES + 4096])
def test_a_matrix_holds_what_is_put_into_it(bytes_: int, dtype: torch.dtype) -> None:
    shape = (bytes_ // 1024, 1024 // dtype.itemsize)
    matrix = empty_matrix(shape, dtype, CPU)
    assert (tuple(matrix.shape), matrix.dtype, matrix.device) == (shape, dtype, CPU)
    assert matrix.is_contiguous()
    assert matrix.data_ptr() % 64 == 0  # as torch aligns: LAPACK's bits depend on it
    values = torch.arange(matrix.numel(), dtype=dtype).view(shape)
    assert torch.equal(matrix.copy_(values), values)


def test_memory_of_a_large_matrix_goes_with_its_last_view() -> None:
    def held() -> int:
        return kilobytes("/proc/self/status", "RssAnon:")

    before = held()
    view = empty_matrix((64, 1 << 18), torch.float32, CPU).fill_(1.0).T
    assert held() - before > 60_000_000
    assert float(view[-1, -1]) == 1
    del view
    assert held() - before < 10_000_000


def test_too_large_a_matrix_is_refused_in_the_words_of_torch() -> None:
    with pytest.raises(RuntimeError, match="allocate"):
        empty_matrix((1 << 30, 1 << 30), torch.float32, CPU)
