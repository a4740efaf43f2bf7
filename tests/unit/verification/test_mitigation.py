"""Deltas by coefficients as verification computes them: their formula, and what the rounding of factors is permitted to change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from seeds import vary

from streamer.verification.deltas import LowRankDelta
from streamer.verification.mitigation import by_coefficients, coefficient_count


def orthonormal(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(vary(seed)).standard_normal((rows, columns)))[0]


def delta(s: list[float], m: int = 40, n: int = 30) -> LowRankDelta:
    """A product of factors with these singular values."""
    mixing = orthonormal(len(s), len(s), 3)
    return LowRankDelta(orthonormal(m, len(s), 1) * s @ mixing, orthonormal(n, len(s), 2) @ mixing)


def rows(found: Any, m: int, n: int) -> np.ndarray:
    return found.rows(0, m, np.zeros((m, n)))[1]


BASE: Any = SimpleNamespace(shape=(40, 30))


def test_it_is_its_formula() -> None:
    own, c = delta([3.0, 2.0, 0.5]), np.array([0.25, 1.0, 0.0])
    U, s, Vh = np.linalg.svd(own.L @ own.R.T, full_matrices=False)
    found = by_coefficients(BASE, own, c.tolist())
    np.testing.assert_allclose(rows(found, 40, 30), (U[:, :3] * s[:3] * c) @ Vh[:3], atol=1e-14)
    assert found.error < 1e-5
    assert coefficient_count(own) == 3
    assert coefficient_count(LowRankDelta(np.ones((4, 9)), np.ones((5, 9)))) == 4


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_equal_coefficients_are_a_factor(value: float) -> None:
    own = delta([3.0, 2.0])
    found = by_coefficients(BASE, own, [value, value])
    np.testing.assert_allclose(rows(found, 40, 30), value * own.L @ own.R.T, atol=1e-15)
    assert found.error == 0


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-5])
def test_rounded_factors_stay_within_what_is_permitted(gap: float) -> None:
    """Directions that lie close together are mixed by the rounding: by more than it, and by no more than is permitted."""
    own, c = delta([3.0, 2.0 + gap, 2.0, 0.5]), [0.2, 0.9, 0.1, 0.5]
    rounded = LowRankDelta(own.L.astype(np.float32).astype(float), own.R)
    exact, other = by_coefficients(BASE, own, c), by_coefficients(BASE, rounded, c)
    off = np.abs(rows(exact, 40, 30) - rows(other, 40, 30))
    permitted = exact.row_error[:, None] + exact.column_error
    assert (off <= permitted + 1e-6).all()
    assert np.linalg.norm(off) <= exact.error + 1e-6
    assert exact.error < 1.0
