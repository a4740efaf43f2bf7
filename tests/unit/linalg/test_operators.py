"""Operators multiply as their dense forms do, whole and by rows; deltas and SVDs do what numpy does; large matrices are tensors."""

import math

import numpy as np
import pytest
import torch
from helpers import power_law, spectrum_matrix
from measure import kilobytes
from seeds import vary

from streamer.linalg import operators
from streamer.linalg.operators import (
    Delta,
    Dense,
    LowRank,
    RowBlocks,
    Sum,
    all_finite,
    skinny_product,
)
from streamer.linalg.svd import dense_triplets, residuals
from streamer.linalg.torch_state import LARGE_BYTES, empty_matrix

SHAPES = [(17, 29), (29, 17), (23, 23), (1, 13), (13, 1)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(vary(seed)), dtype=torch.float64
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_every_operator_multiplies_as_its_dense_form(shape: tuple[int, int]) -> None:
    m, n = shape
    low = LowRank(random(m, 3), random(n, 3, seed=1))
    matrix = random(m, n, seed=2)
    dense = Dense(matrix)
    blocks = RowBlocks((m, n), lambda i, j: matrix[i:j], matrix.new_empty(0))
    flipped = RowBlocks((n, m), lambda i, j: matrix.T[i:j], matrix.new_empty(0)).T
    for op in (
        low,
        dense,
        Sum(dense, low),
        low.T.T,
        low + low.scaled(-0.5),
        dense.scaled(0.25),
        dense.T.scaled(4.0).T,
        blocks,
        flipped,
        blocks.scaled(0.25),
        flipped.T.T.scaled(8.0),
    ):
        assert op.shape == shape
        X = random(n, 4, seed=3)
        Y = random(m, 4, seed=4)
        torch.testing.assert_close(op.matmat(X), op.dense() @ X)
        torch.testing.assert_close(op.rmatmat(Y), op.dense().T @ Y)


@pytest.mark.parametrize("m", [1, 500, 1024, 1031, 2050, 10007])
@pytest.mark.parametrize("layout", ["rows", "columns", "neither"])
@pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "pieces"])
def test_a_skinny_product_is_the_product(
    m: int, layout: str, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With oneDNN and without; lengths that do not divide by the number of pieces, long rows, and layouts that cannot be cut."""
    if onednn and not operators._has_fast_onednn():
        pytest.skip("oneDNN's products are not used here")
    monkeypatch.setattr(operators, "_has_fast_onednn", lambda: onednn)
    M = {
        "rows": random(m, 40).float(),
        "columns": random(40, m).float().T,
        "neither": random(m, 80).float()[:, ::2],
    }[layout]
    assert (M.is_contiguous(), M.T.is_contiguous()) == (
        layout == "rows",
        layout == "columns",
    ) or m == 1
    for c in (1, 10, 16, 17):
        for A, X in ((M, random(40, c, seed=1).float()), (M.T, random(m, c, seed=2).float())):
            exact = A.double() @ X.double()
            size = A.double().abs() @ X.double().abs()
            rounding = (
                A.shape[1] * torch.finfo(torch.float32).eps * size
            )  # of a sum in any order (Higham 2002, 3.5)
            assert bool(((skinny_product(A, X).double() - exact).abs() <= rounding).all())


@pytest.mark.skipif(not operators._has_fast_onednn(), reason="oneDNN's products are not used here")
@pytest.mark.parametrize(
    ("n", "longest", "calls"), [(500, 500, 1), (499, 500, 2), (10007, math.inf, 2)]
)
def test_onednn_multiplies_transposes_of_short_rows(
    n: int, longest: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer rows are BLAS's on the processors whose BLAS is faster; the matrix itself is oneDNN's in any case."""
    asked = []
    real = operators._onednn_linear
    monkeypatch.setattr(operators, "_long_rows", lambda: longest)
    monkeypatch.setattr(
        operators, "_onednn_linear", lambda *both: asked.append(both) or real(*both)
    )
    M = random(40, n).float()
    skinny_product(M, random(n, 10).float())
    skinny_product(M.T, random(40, 10).float())
    assert len(asked) == calls


@pytest.mark.parametrize("sides", [(0, 40), (40, 0), (0, 0)])
@pytest.mark.parametrize("c", [0, 16])
def test_a_skinny_product_of_nothing_is_zero(sides: tuple[int, int], c: int) -> None:
    """oneDNN refuses such shapes."""
    m, n = sides
    assert torch.equal(skinny_product(torch.ones(m, n), torch.ones(n, c)), torch.zeros(m, c))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_row_blocks_read_a_few_rows_at_a_time(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = random(103, 20).to(dtype)
    asked = []

    def read(i: int, j: int) -> torch.Tensor:
        asked.append((i, j))
        return stored[i:j]

    monkeypatch.setattr(operators, "BLOCK_BYTES", 10 * 20 * 4)
    M = RowBlocks((103, 20), read, torch.empty(0))
    X = random(20, 3).float()
    torch.testing.assert_close(M.matmat(X), stored.float() @ X)
    assert asked == [(i, min(i + 10, 103)) for i in range(0, 103, 10)]
    assert torch.equal(M.dense(), stored.float())
    assert torch.equal(torch.cat([rows.clone() for rows in M.rows()]), stored.float())
    assert M.T.rows() is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["factors", "dense", "dense, scaled", "transposes"])
def test_both_forms_of_a_delta_do_the_same(shape: tuple[int, int], form: str) -> None:
    """Each method of a delta against its formula on the dense matrix."""
    (m, n), low = shape, LowRank(random(shape[0], 3), random(shape[1], 3, seed=1))
    matrix = low.dense()
    delta: Delta = {
        "factors": low,
        "dense": Dense(matrix),
        "dense, scaled": Dense(matrix * 4, 0.25),
        "transposes": Dense(matrix.T).T,
    }[form]
    U = torch.linalg.qr(random(m, 2, seed=2)).Q
    S = torch.tensor([3.0, 2.0]).double()
    V = random(n, 2, seed=3)
    i = m // 3
    j = max(m // 3 + 1, m // 2)
    torch.testing.assert_close(delta.dense(), matrix)
    assert delta.norm() == pytest.approx(float(matrix.norm()))
    assert float(matrix.abs().max()) <= 3 * delta.largest_estimate() * (1 + 1e-12)
    assert delta.projected_norm(U) == pytest.approx(float((U.T @ matrix).norm()))
    torch.testing.assert_close(delta.row_slice(i, j).dense(), matrix[i:j])
    rows = random(j - i, n, seed=4)
    expected = rows + matrix[i:j]
    delta.add_rows(rows, i, j)
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(
        delta.plus_projection(U, -0.5).dense(), matrix - 0.5 * U @ (U.T @ matrix)
    )
    torch.testing.assert_close(
        delta.plus_triplets(U, S, V.T, -0.5).dense(), matrix - 0.5 * (U * S) @ V.T
    )
    other = LowRank(random(m, 2, seed=5), random(n, 2, seed=6))
    assert delta.distance(other) == pytest.approx(float((matrix - other.dense()).norm()))
    nearest = delta.nearest(
        1, lambda dense, _: torch.linalg.svd(dense.dense(), full_matrices=False)
    )
    best = float(torch.linalg.svdvals(matrix)[1:].norm())
    assert delta.distance(nearest) == pytest.approx(best, abs=1e-12)
    assert not delta.is_zero()
    assert delta.row_slice(0, 0).is_zero()
    assert [t.dtype for _, t in delta.to(torch.float32).named_tensors()] == [torch.float32] * len(
        delta.named_tensors()
    )


def test_norm_survives_cancellation() -> None:
    """tr(LᵀL RᵀR) in float64 would give 1e-8 of noise here, or a negative square."""
    A = LowRank(random(40, 2), random(30, 2, seed=1))
    tiny = LowRank(random(40, 1, seed=2) * 1e-12, random(30, 1, seed=3))
    difference = A + tiny + A.scaled(-1)
    assert difference.norm() == pytest.approx(tiny.norm(), rel=1e-2)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64)])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_dense_triplets_satisfy_their_identities(
    shape: tuple[int, int], dtype: torch.dtype, scale: float
) -> None:
    W = (power_law(*shape) * scale).to(dtype)
    t = dense_triplets(Dense(W), 10)
    eps = torch.finfo(dtype).eps
    sigma1 = float(t.S[0])
    assert float(t.residuals.max()) <= 50 * eps * sigma1
    torch.testing.assert_close(t.U.T @ t.U, torch.eye(10, dtype=dtype), rtol=0, atol=50 * eps)
    torch.testing.assert_close(t.Vh @ t.Vh.T, torch.eye(10, dtype=dtype), rtol=0, atol=50 * eps)
    expected = np.linalg.svd(W.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(t.S.double(), expected[:10], rtol=100 * eps)
    gaps = np.minimum(
        np.abs(expected[:-1] - expected[1:])[:10],
        np.r_[np.inf, np.abs(expected[:-1] - expected[1:])[:9]],
    )
    np.testing.assert_allclose(t.gaps, gaps, rtol=1e-3)


def test_residuals_see_a_wrong_vector() -> None:
    W = Dense(power_law(30, 20))
    t = dense_triplets(W, 3)
    spoiled = t.U.clone()
    spoiled[:, 1] = torch.nn.functional.normalize(spoiled[:, 1] + 1e-3 * random(30), dim=0)
    r = residuals(W, spoiled, t.S, t.Vh)
    assert float(r[1]) > 1e-5
    assert float(r[0]) < 1e-13


def test_angle_error_is_large_in_a_cluster_only() -> None:
    sigma = torch.tensor([3.0, 2.0, 1.0 + 1e-9, 1.0, 0.5, 0.25])
    t = dense_triplets(Dense(spectrum_matrix(6, 8, sigma).float()), 5)
    error = t.angle_error_estimate
    assert float(error[2]) > 0.1
    assert float(error[3]) > 0.1
    assert float(error[[0, 1, 4]].max()) < 1e-5


def test_all_finite_finds_nan_and_infinity() -> None:
    assert all_finite(torch.empty(0))
    assert all_finite(torch.tensor([1e38, -1e38]))
    for bad in (float("nan"), float("inf"), -float("inf")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert not all_finite(torch.tensor([0.0, bad, 1.0], dtype=dtype))
