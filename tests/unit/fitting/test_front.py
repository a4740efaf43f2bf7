"""Fronts are exact where the models are, and choices among measured points keep what is wanted."""

from __future__ import annotations

import numpy as np
import pytest

from streamer.fitting.front import Front, FrontPoint, Sample, choose

g, t = np.array([1.0, 2.0, 0.5, 4.0]), np.array([2.0, 1.0, 3.0, 0.25])
ZERO, ONE = np.zeros(4), np.ones(4)


def separable() -> Front:
    """``G = ½ Σ g c²``, ``T = ½ Σ t (1 − c)²``, known at their ends alone."""
    return Front(
        (Sample(ZERO, 0.0, ZERO), Sample(ONE, g.sum() / 2, g)),
        (Sample(ONE, 0.0, ZERO), Sample(ZERO, t.sum() / 2, -t)),
    )


@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
def test_two_gradients_give_the_closed_form_of_separable_functions(weight: float) -> None:
    front = separable()
    c = front.coefficients(weight)
    np.testing.assert_allclose(c, weight * t / (g + weight * t), rtol=1e-8)
    assert front.kept(weight, c) == pytest.approx(1 - (t * (1 - c) ** 2).sum() / t.sum(), rel=1e-8)


@pytest.mark.parametrize("kept", [0.3, 0.8, 0.95])
def test_the_weight_is_found_that_keeps_a_share(kept: float) -> None:
    point = separable().at(kept)
    assert point.kept == pytest.approx(kept, abs=1e-6)
    np.testing.assert_allclose(point.coefficients, point.weight * t / (g + point.weight * t), rtol=1e-8)


def test_models_begin_from_the_best_point_sampled_inside() -> None:
    front = separable()
    points = [np.full(4, 0.2), np.full(4, 0.7)]
    general = (*front.general, *(Sample(c, float(g @ c**2) / 2, g * c) for c in points))
    task = (*front.task, *(Sample(c, float(t @ (1 - c) ** 2) / 2, -t * (1 - c)) for c in points))
    front = Front(general, task)
    for weight in (0.05, 20.0):
        values = [(g @ c**2 + weight * (t @ (1 - c) ** 2)) / 2 for c in points]
        assert front.anchors(weight)[0].point is points[int(np.argmin(values))]
    # The gradients are those of separable quadratics still: only the share added to the diagonal holds the point back.
    best, c = np.full(4, 0.7), 20 * t / (g + 20 * t)
    np.testing.assert_allclose(front.coefficients(20.0) - best, (c - best) / 1.2, rtol=1e-6)


def test_distance_is_to_the_nearest_sampled_point() -> None:
    front = separable()
    near, far = front.at(0.05), front.at(0.6)
    assert 0 < front.distance(near) < front.distance(far)
    assert front.distance(FrontPoint(1.0, ONE, 1.0)) == 0


def point(kept: float, c: float, weight: float = 1.0, loss: float | None = None) -> FrontPoint:
    """A measured point; by default of a loss that grows as the square of what is kept."""
    return FrontPoint(weight, np.full(2, c), kept, kept**2 if loss is None else loss)


NOTHING = FrontPoint(float("nan"), np.zeros(2), 0.0, 0.0)
ALL = FrontPoint(float("inf"), np.ones(2), 1.0, 1.0)


def test_between_two_candidates_it_is_on_their_line() -> None:
    found = choose(NOTHING, [point(0.85, 0.5, 2.0), point(0.95, 0.7, 4.0), point(0.7, 0.3, 1.0)], ALL, 0.92)
    np.testing.assert_allclose(found.coefficients, 0.64)
    assert (found.weight, found.kept) == (4.0, 0.92)


def test_beyond_all_candidates_the_ends_serve() -> None:
    candidates = [point(0.8, 0.6, 3.0)]
    np.testing.assert_allclose(choose(NOTHING, candidates, ALL, 0.9).coefficients, 0.8)
    np.testing.assert_allclose(choose(NOTHING, candidates, ALL, 0.4).coefficients, 0.3)
    assert choose(NOTHING, candidates, ALL, 0.9).weight == 3.0
    assert choose(NOTHING, candidates, ALL, 0.4).weight == 3.0


def test_candidates_that_keep_more_than_all_take_the_place_of_the_adapter_as_it_is() -> None:
    found = choose(NOTHING, [point(1.02, 0.9, loss=0.8), point(-0.1, 0.2)], ALL, 0.9)
    np.testing.assert_allclose(found.coefficients, 0.9 * 0.9 / 1.02)
    candidates = [point(1.2, 0.5, loss=0.9), point(1.05, 0.4, loss=0.6)]
    np.testing.assert_allclose(choose(NOTHING, candidates, ALL, 0.9).coefficients, 0.4 * 0.9 / 1.05)


def test_the_least_loss_of_all_lines_and_points_that_keep_enough_is_taken() -> None:
    lossy, far, good = point(0.85, 0.5, loss=0.9), point(0.7, 0.3, loss=0.1), point(0.95, 0.8, loss=0.35)
    found = choose(NOTHING, [lossy, far, good], ALL, 0.9)
    np.testing.assert_allclose(found.coefficients, 0.3 + 0.8 * 0.5)  # not through the nearest, which lost more
    assert found.loss == pytest.approx(0.1 + 0.8 * 0.25)
    least = point(0.95, 0.8, loss=0.05)
    assert choose(NOTHING, [lossy, point(0.7, 0.3, loss=0.6), least], point(1.0, 1.0), 0.9).loss < 0.05 + 1e-12
    alone = point(0.95, 0.8, loss=-0.1)
    assert choose(NOTHING, [lossy, alone], ALL, 0.9) is alone


def test_the_end_without_coefficients_keeps_what_it_was_measured_to() -> None:
    some = FrontPoint(float("nan"), np.zeros(2), 0.5, 0.25)
    np.testing.assert_allclose(choose(some, [point(0.8, 0.6)], ALL, 0.65).coefficients, 0.3)
    assert choose(some, [], ALL, 0.5) is some
    less = FrontPoint(float("nan"), np.zeros(2), -0.2, 0.0)
    np.testing.assert_allclose(choose(less, [point(0.8, 0.6)], ALL, 0.3).coefficients, 0.3)
