"""Models from gradients agree with the gradients, and are positive definite whatever these are."""

from __future__ import annotations

import numpy as np
from seeds import vary

from streamer.fitting.quadratic import FLOOR, secant_curvature, secant_diagonal, secant_pairs


def dense(points: list, gradients: list) -> np.ndarray:
    H = secant_curvature(points, gradients)
    return np.stack([H @ e for e in np.eye(len(points[0]))], axis=1)


def test_a_point_is_paired_with_the_nearest_before_it_but_not_with_its_equal() -> None:
    points = [np.array(p, float) for p in ((0, 0), (1, 1), (0.9, 0.8), (0.1, 0), (1, 1))]
    assert secant_pairs(points) == [(1, 0), (2, 1), (3, 0)]


def test_the_diagonal_of_a_separable_quadratic_is_found_and_kept() -> None:
    d, rng = np.array([0.5, 1.0, 2.0, 4.0]), np.random.default_rng(vary(0))
    points = [np.zeros(4), np.ones(4), *rng.uniform(size=(3, 4))]
    np.testing.assert_allclose(dense(points, [d * p for p in points]), np.diag(d), atol=1e-12)


def test_the_last_pair_is_met_exactly() -> None:
    rng = np.random.default_rng(vary(1))
    root = rng.normal(size=(8, 8))
    H = root @ root.T
    points = [np.zeros(8), np.ones(8), *rng.uniform(size=(4, 8))]
    gradients = [H @ p for p in points]
    j, i = secant_pairs(points)[-1]
    np.testing.assert_allclose(
        secant_curvature(points, gradients) @ (points[j] - points[i]), gradients[j] - gradients[i], rtol=1e-9
    )


def test_conjugate_pairs_are_all_met() -> None:
    """A quadratic's curvature is met along its own eigenvectors, all at once."""
    rng = np.random.default_rng(vary(2))
    Q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    H = Q @ np.diag([1, 2, 3, 4, 5, 6.0]) @ Q.T
    points = [np.zeros(6)]
    for q in Q.T:
        points.append(points[-1] + q)
    assert secant_pairs(points) == [(j, j - 1) for j in range(1, 7)]
    np.testing.assert_allclose(dense(points, [H @ p for p in points]), H, atol=1e-9)


def test_it_is_positive_definite_where_the_function_is_not_convex() -> None:
    rng = np.random.default_rng(vary(3))
    for _ in range(20):
        points = [np.zeros(10), np.ones(10), *rng.uniform(size=(5, 10))]
        H = dense(points, [rng.normal(size=10) for _ in points])
        np.testing.assert_allclose(H, H.T, atol=1e-9 * np.abs(H).max())
        assert np.linalg.eigvalsh(H).min() > 0


def test_gradients_that_do_not_change_give_no_division_by_zero() -> None:
    H = dense([np.zeros(3), np.ones(3)], [np.ones(3), np.ones(3)])
    assert np.isfinite(H).all()
    assert np.linalg.eigvalsh(H).min() > 0


def test_the_diagonal_has_a_floor_and_the_mean_where_nothing_moved() -> None:
    d = secant_diagonal([(np.array([1.0, 1.0, 0.0]), np.array([-2.0, 0.0, 5.0]))])
    assert d.tolist() == [2.0, FLOOR, 1.0]
