"""The minimum between bounds satisfies its conditions, and is the one that trying every set of bounds finds."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from seeds import vary

from streamer.fitting.quadratic import Curvature, minimize_in_box


def curvature(P: int, k: int, seed: int) -> tuple[Curvature, np.ndarray]:
    """A positive definite one with columns of both signs, and the matrix that it stands for."""
    rng = np.random.default_rng(vary(seed))
    d, W = rng.uniform(0.5, 2, P), rng.normal(size=(P, k)) / np.sqrt(P)
    signs = np.where(np.arange(k) % 2, -0.3, 1.5)
    return Curvature(d, W, signs), np.diag(d) + W @ np.diag(signs) @ W.T


def test_products_sums_and_solutions_are_those_of_the_matrix() -> None:
    (A, dense), (B, other) = curvature(30, 4, 0), curvature(30, 2, 1)
    x = np.random.default_rng(vary(2)).normal(size=30)
    np.testing.assert_allclose(A @ x, dense @ x, rtol=1e-12)
    np.testing.assert_allclose(A.plus(B, 0.7) @ x, (dense + 0.7 * other) @ x, rtol=1e-12)
    np.testing.assert_allclose(A.plus(B, 0.0) @ x, dense @ x, rtol=1e-12)
    free = np.arange(30) % 3 > 0
    solved = A.solve(x, free)
    assert not solved[~free].any()
    np.testing.assert_allclose(dense[np.ix_(free, free)] @ solved[free], x[free], rtol=1e-10)
    np.testing.assert_allclose(A.plus(B, 0.0).solve(x, free), solved, rtol=1e-12)
    assert Curvature.of_diagonal(np.array([2.0, 4.0])).solve(np.array([1.0, 1.0]), np.array([True, True])).tolist() == [
        0.5,
        0.25,
    ]


@pytest.mark.parametrize("seed", range(20))
def test_every_condition_of_the_minimum_holds(seed: int) -> None:
    A, dense = curvature(200, 12, seed)
    rng = np.random.default_rng(vary(seed))
    at, start = rng.uniform(size=200), rng.integers(0, 2, 200).astype(float)
    gradient = 3 * rng.normal(size=200)
    x = minimize_in_box(A, gradient, start, at)
    slope = gradient + dense @ (x - at)
    assert (x >= 0).all()
    assert (x <= 1).all()
    small = 1e-8 * np.abs(gradient).max()
    assert (slope[x == 0] >= -small).all()
    assert (slope[x == 1] <= small).all()
    assert np.abs(slope[(x > 0) & (x < 1)]).max() <= small
    assert {0.0, 1.0} < set(x.tolist())
    assert minimize_in_box(A, gradient, start, at).tobytes() == x.tobytes()


def test_the_minimum_is_the_one_that_trying_all_bounds_finds() -> None:
    A, dense = curvature(5, 3, 3)
    at, gradient = np.full(5, 0.5), np.array([1.0, -1.0, 0.2, -0.1, 3.0])
    best, value = None, np.inf
    for sides in product((0.0, None, 1.0), repeat=5):
        free = np.array([side is None for side in sides])
        x = np.array([0.5 if side is None else side for side in sides])
        if free.any():
            rest = gradient + dense @ np.where(free, 0.0, x - at)
            x[free] = at[free] + np.linalg.solve(dense[np.ix_(free, free)], -rest[free])
        d = x - at
        if (x >= 0).all() and (x <= 1).all() and (found := gradient @ d + 0.5 * d @ dense @ d) < value:
            best, value = x, found
    np.testing.assert_allclose(minimize_in_box(A, gradient, np.zeros(5), at), best, atol=1e-9)


def test_where_the_start_is_the_minimum_it_stays() -> None:
    A, _ = curvature(6, 2, 4)
    assert minimize_in_box(A, np.ones(6), np.zeros(6)).tolist() == [0.0] * 6
    assert minimize_in_box(A, np.zeros(6), np.full(6, 0.25)).tolist() == [0.25] * 6
