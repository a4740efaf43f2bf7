"""Operators multiply as their dense forms do, whole and by rows."""

from __future__ import annotations

import math

import pytest
import torch
from matrices import SHAPES, random

from streamer.linalg import operators, skinny_products
from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Dense, RowBlocks, Sum
from streamer.linalg.skinny_products import skinny_product


@pytest.mark.parametrize("shape", SHAPES)
def test_every_operator_multiplies_as_its_dense_form(shape: tuple[int, int]) -> None:
    m, n = shape
    low = LowRank(random(m, 3), random(n, 3, seed=1))
    matrix = random(m, n, seed=2)
    dense, blocks = Dense(matrix), RowBlocks((m, n), lambda i, j: matrix[i:j], matrix.new_empty(0))
    flipped = RowBlocks((n, m), lambda i, j: matrix.T[i:j], matrix.new_empty(0)).T
    for op in (low, dense, Sum(dense, low), low.T.T, low + low.scaled(-0.5), dense.scaled(0.25), dense.T.scaled(4.0).T,
               blocks, flipped, blocks.scaled(0.25), flipped.T.T.scaled(8.0)):  # fmt: skip
        assert op.shape == shape
        X, Y = random(n, 4, seed=3), random(m, 4, seed=4)
        torch.testing.assert_close(op.matmat(X), op.dense() @ X)
        torch.testing.assert_close(op.rmatmat(Y), op.dense().T @ Y)


@pytest.mark.parametrize("m", [1, 500, 1024, 1031, 2050, 10007])
@pytest.mark.parametrize("layout", ["rows", "columns", "neither"])
@pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "pieces"])
def test_a_skinny_product_is_the_product(m: int, layout: str, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With oneDNN and without; lengths that do not divide by the number of pieces, long rows, and layouts that cannot be cut."""
    if onednn and not skinny_products._has_fast_onednn():
        pytest.skip("oneDNN's products are not used here")
    monkeypatch.setattr(skinny_products, "_has_fast_onednn", lambda: onednn)
    M = {"rows": random(m, 40).float(), "columns": random(40, m).float().T, "neither": random(m, 80).float()[:, ::2]}[
        layout
    ]
    assert (M.is_contiguous(), M.T.is_contiguous()) == (layout == "rows", layout == "columns") or m == 1
    for c in (1, 10, 16, 17):
        for A, X in ((M, random(40, c, seed=1).float()), (M.T, random(m, c, seed=2).float())):
            exact, size = A.double() @ X.double(), A.double().abs() @ X.double().abs()
            rounding = A.shape[1] * torch.finfo(torch.float32).eps * size  # of a sum in any order (Higham 2002, 3.5)
            assert bool(((skinny_product(A, X).double() - exact).abs() <= rounding).all())


@pytest.mark.skipif(not skinny_products._has_fast_onednn(), reason="oneDNN's products are not used here")
@pytest.mark.parametrize(("n", "longest", "calls"), [(500, 500, 1), (499, 500, 2), (10007, math.inf, 2)])
def test_onednn_multiplies_transposes_of_short_rows(
    n: int, longest: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer rows are BLAS's on the processors whose BLAS is faster; the matrix itself is oneDNN's in any case."""
    asked, real = [], skinny_products._onednn_linear
    monkeypatch.setattr(skinny_products, "_long_rows", lambda: longest)
    monkeypatch.setattr(skinny_products, "_onednn_linear", lambda *both: asked.append(both) or real(*both))
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
def test_row_blocks_read_a_few_rows_at_a_time(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
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
