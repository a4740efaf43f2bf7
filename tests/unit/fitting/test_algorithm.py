"""What is asked for, in which order, and that few gradients come near the best coefficients there are."""

from __future__ import annotations

import numpy as np
import pytest
from fitted_worlds import World, world
from scipy.optimize import minimize

from streamer.fitting.algorithm import Gradient, Measure, Problem, fit_steps

P = 40


def best_forgetting(w: World, kept: float) -> float:
    """The least forgetting at a share kept, by scipy on the functions themselves."""
    front = []
    for log_weight in np.linspace(-5, 9, 29):
        weight = np.exp(log_weight)

        def both(c: np.ndarray, weight: float = weight) -> tuple[float, np.ndarray]:
            slope = w.slope("general", c) + weight * w.slope("task", c)
            value = w.value("general", c) + weight * w.value("task", c)
            return value / (1 + weight), slope / (1 + weight)

        found = minimize(both, np.full(P, 0.5), jac=True, method="L-BFGS-B", bounds=[(0, 1)] * P,
                         options={"maxiter": 2000, "maxfun": 5000, "ftol": 1e-14, "gtol": 1e-10})  # fmt: skip
        front.append((w.kept(found.x), w.forgetting(found.x)))
    front.sort()
    return float(np.interp(kept, *np.transpose(front)))


@pytest.mark.parametrize("quartic", [0.0, 0.002])
@pytest.mark.parametrize("seed", [0, 1])
def test_few_gradients_come_near_the_best_coefficients(seed: int, quartic: float) -> None:
    w = world(P, seed, quartic=quartic)
    (found,) = w.fit(Problem(P, (0.9,)))
    assert sum(isinstance(r, Gradient) for r in w.asked) == 8
    assert found.keep == 0.9
    assert found.kept.value == pytest.approx(w.kept(found.coefficients), rel=1e-9)
    assert found.forgetting.value == pytest.approx(w.forgetting(found.coefficients), rel=1e-9)
    assert 0.9 - 1e-9 <= found.kept.value < 0.915
    (shrink,) = w.one_for_all().fit(Problem(1, (found.kept.value,)))
    best = best_forgetting(w, found.kept.value)
    assert found.forgetting.value - best < 0.15 * (shrink.forgetting.value - best)


def test_several_shares_share_gradients_and_more_steps_come_nearer() -> None:
    w = world(P, 3)
    gaps = []
    for steps in (1, 6, 12):
        w.asked.clear()
        points = w.fit(Problem(P, (0.95, 0.9, 0.8), steps=steps))
        assert sum(isinstance(r, Gradient) for r in w.asked) == 2 + 2 * steps
        gaps.append(max(p.forgetting.value - best_forgetting(w, p.kept.value) for p in points))
        assert [p.keep for p in points] == [0.95, 0.9, 0.8]
        assert all(p.kept.value == pytest.approx(p.keep, abs=0.015) for p in points)
    assert gaps[-1] < 0.01
    assert gaps[-1] < gaps[1] < gaps[0]


def test_requests_come_in_their_order() -> None:
    w = world(P)
    w.fit(Problem(P, (0.9, 0.8)))
    general, task, *rest = w.asked
    assert (general.text, task.text) == ("general", "task")
    assert (general.coefficients == 1).all()
    assert (task.coefficients == 0).all()
    *sampled, tried, chosen = rest
    assert len(sampled) == 2 * 4
    for one, other in zip(sampled[::2], sampled[1::2], strict=True):
        assert (one.text, other.text) == ("general", "task")
        np.testing.assert_array_equal(one.coefficients, other.coefficients)
    assert len(tried.coefficients) == 5  # 0.7, 0.8, 0.85, 0.9 (of both), 0.95
    assert len(chosen.coefficients) == 4  # two of each share
    for request in w.asked:
        for c in request.coefficients if isinstance(request, Measure) else [request.coefficients]:
            assert c.shape == (P,)
            assert ((c >= 0) & (c <= 1)).all()


def test_losses_are_asked_for_at_both_ends() -> None:
    w = world(P)
    w.fit(Problem(P, objective="loss"))
    ends = [(r.text, float(r.coefficients.mean())) for r in w.asked[:4]]
    assert ends == [("general", 0.0), ("general", 1.0), ("task", 1.0), ("task", 0.0)]


def test_what_is_kept_without_coefficients_is_no_learning_of_theirs() -> None:
    """An adapter that saves a module: c = 0 is not the base, and keeps a share; G is neither 0 nor flat there."""
    w = world(P, beside=0.5)
    nothing = w.kept(np.zeros(P))
    assert 0.4 < nothing < 0.6
    *found, least = w.fit(Problem(P, (0.9, 0.7, 0.3), base_at_zero=False))
    for point, keep in zip(found, (0.9, 0.7), strict=True):
        assert point.kept.value == pytest.approx(w.kept(point.coefficients), abs=1e-9)
        assert point.kept.value == pytest.approx(keep, abs=0.02)
        assert point.coefficients.std() > 0.05, "it is no shrink"
    assert (least.coefficients == 0).all()
    assert least.kept.value == pytest.approx(nothing)
    assert np.isnan(least.weight)
    assert [(r.text, r.coefficients.mean()) for r in w.asked[1:4]] == [
        ("general", 0.0),
        ("general", 1.0),
        ("task", 0.0),
    ]
    w.asked.clear()
    w.fit(Problem(P, (0.3,), base_at_zero=False))
    assert all(isinstance(r, Measure) for r in w.asked), "nothing is fitted where nothing has to be"


def test_the_same_answers_give_the_same_questions_and_coefficients() -> None:
    w = world(P)
    options = Problem(P, (0.9, 0.8))
    whole = w.fit(options)
    requests = list(w.asked)
    answers = [w.answer(r) for r in requests]
    steps, replayed = fit_steps(options), []
    request = next(steps)
    try:
        for answer in answers:
            replayed.append(request)
            request = steps.send(answer)
    except StopIteration as end:
        for one, other in zip(end.value, whole, strict=True):
            assert one.coefficients.tobytes() == other.coefficients.tobytes()
            assert (one.weight, one.kept) == (other.weight, other.kept)
    assert len(replayed) == len(requests)
    for one, other in zip(replayed, requests, strict=True):
        assert type(one) is type(other)
        assert np.asarray(one.coefficients).tobytes() == np.asarray(other.coefficients).tobytes()


def test_low_shares_are_kept_too() -> None:
    w = world(P)
    assert w.fit(Problem(P, (0.2,)))[0].kept.value == pytest.approx(0.2, abs=0.05)


def test_an_adapter_that_changes_nothing_gives_finite_coefficients() -> None:
    w = World(np.zeros((P, P)), np.zeros((P, P)))
    assert np.isfinite(w.fit(Problem(P))[0].coefficients).all()


def test_a_single_coefficient_is_the_scale_and_takes_no_gradient() -> None:
    w = world(P).one_for_all()
    found = w.fit(Problem(1, (0.95, 0.8)))
    assert all(isinstance(r, Measure) for r in w.asked)
    for point in found:
        assert point.coefficients[0] == pytest.approx(1 - np.sqrt(1 - point.keep), abs=0.02)
        assert point.kept.value == pytest.approx(point.keep, abs=0.01)
        assert np.isnan(point.weight)


def test_what_is_not_told_from_noise_gives_finite_coefficients_too() -> None:
    """Whether it is worth a fit is for the caller to say."""
    noisy, harmless = world(P, scatter=5.0), world(P)
    harmless.H = np.zeros((P, P))
    for w in (noisy, harmless):
        (found,) = w.fit(Problem(P))
        assert np.isfinite(found.coefficients).all()
