"""Deltas, factored and dense: their norms, singular values, truncations and products, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matrices import SHAPES, random

from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Delta, Dense


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_low_rank_norm_and_svd_equal_numpys(shape: tuple[int, int], rank: int) -> None:
    m, n = shape
    low = LowRank(random(m, rank), random(n, rank, seed=1))
    M = low.dense().numpy()
    U, S, Vh = low.svd()
    np.testing.assert_allclose(low.norm(), np.linalg.norm(M), rtol=1e-12)
    np.testing.assert_allclose((U * S) @ Vh, M, atol=1e-12 * np.linalg.norm(M))
    expected = np.linalg.svd(M, compute_uv=False)[: len(S)]
    np.testing.assert_allclose(S, np.pad(expected, (0, len(S) - len(expected))), atol=1e-12 * expected[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["factors", "dense", "dense, scaled", "transposes"])
def test_both_forms_of_a_delta_do_the_same(shape: tuple[int, int], form: str) -> None:
    """Each method of a delta against its formula on the dense matrix."""
    (m, n), low = shape, LowRank(random(shape[0], 3), random(shape[1], 3, seed=1))
    matrix = low.dense()
    delta: Delta = {
        "factors": low, "dense": Dense(matrix), "dense, scaled": Dense(matrix * 4, 0.25), "transposes": Dense(matrix.T).T,
    }[form]  # fmt: skip
    U, S, V = torch.linalg.qr(random(m, 2, seed=2)).Q, torch.tensor([3.0, 2.0]).double(), random(n, 2, seed=3)
    i, j = m // 3, max(m // 3 + 1, m // 2)
    torch.testing.assert_close(delta.dense(), matrix)
    assert delta.norm() == pytest.approx(float(matrix.norm()))
    assert float(matrix.abs().max()) <= 3 * delta.largest_estimate() * (1 + 1e-12)
    assert delta.projected_norm(U) == pytest.approx(float((U.T @ matrix).norm()))
    torch.testing.assert_close(delta.row_slice(i, j).dense(), matrix[i:j])
    rows = random(j - i, n, seed=4)
    expected = rows + matrix[i:j]
    delta.add_rows(rows, i, j)
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(delta.plus_projection(U, -0.5).dense(), matrix - 0.5 * U @ (U.T @ matrix))
    torch.testing.assert_close(delta.plus_triplets(U, S, V.T, -0.5).dense(), matrix - 0.5 * (U * S) @ V.T)
    other = LowRank(random(m, 2, seed=5), random(n, 2, seed=6))
    assert delta.distance(other) == pytest.approx(float((matrix - other.dense()).norm()))
    nearest = delta.nearest(1, lambda dense, _: torch.linalg.svd(dense.dense(), full_matrices=False))
    best = float(torch.linalg.svdvals(matrix)[1:].norm())
    assert delta.distance(nearest) == pytest.approx(best, abs=1e-12)
    assert not delta.is_zero()
    assert delta.row_slice(0, 0).is_zero()
    assert [t.dtype for _, t in delta.to(torch.float32).named_tensors()] == [torch.float32] * len(delta.named_tensors())


def test_norm_survives_cancellation() -> None:
    """tr(LᵀL RᵀR) in float64 would give 1e-8 of noise here, or a negative square."""
    A = LowRank(random(40, 2), random(30, 2, seed=1))
    tiny = LowRank(random(40, 1, seed=2) * 1e-12, random(30, 1, seed=3))
    difference = A + tiny + A.scaled(-1)
    assert difference.norm() == pytest.approx(tiny.norm(), rel=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep", [1, 2, 5, 40])
def test_truncation_is_eckart_youngs(shape: tuple[int, int], keep: int) -> None:
    m, n = shape
    low = LowRank(random(m, 5), random(n, 5, seed=1))
    cut, dropped = low.truncated(keep)
    M = low.dense().numpy()
    U, S, Vh = np.linalg.svd(M, full_matrices=False)
    best = (U[:, :keep] * S[:keep]) @ Vh[:keep]
    assert cut.rank == keep
    np.testing.assert_allclose(cut.dense(), best, atol=1e-10)
    assert dropped == pytest.approx(np.linalg.norm(M - best) / np.linalg.norm(M), abs=1e-12)
    np.testing.assert_allclose(
        torch.linalg.vector_norm(cut.L, dim=0), torch.linalg.vector_norm(cut.R, dim=0), atol=1e-10
    )


def test_truncating_zero_is_zero() -> None:
    cut, dropped = LowRank(torch.zeros(6, 3), torch.zeros(5, 3)).truncated(2)
    assert dropped == 0
    assert not cut.dense().any()
