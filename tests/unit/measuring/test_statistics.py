"""Means over tokens and their errors over sequences, against numpy, simulation and bootstrapping; the histogram of divergences."""

import numpy as np
import pytest
from evaluations import evaluation
from seeds import vary

from streamer.measuring.statistics import Estimate, ratio


def test_the_error_of_equal_sequences_is_the_error_of_a_mean() -> None:
    y = np.random.default_rng(vary(0)).normal(3, 1, 50)
    found = ratio(y * 7, np.full(50, 7.0))
    assert found.value == pytest.approx(y.mean(), rel=1e-12)
    assert found.error == pytest.approx(y.std(ddof=1) / np.sqrt(50), rel=1e-12)


def test_the_error_is_the_scatter_of_the_estimate() -> None:
    """Over 4,000 drawn texts, of sequences with other lengths and losses that depend on these."""
    rng = np.random.default_rng(vary(1))
    values = []
    errors = []
    for _ in range(4000):
        x = rng.integers(20, 500, 60).astype(float)
        found = ratio(x * (3 - x / 1000 + rng.normal(0, 0.4, 60)), x)
        values.append(found.value)
        errors.append(found.error)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.05)


def test_the_errors_are_those_of_bootstrapping_sequences() -> None:
    e = evaluation()
    rng = np.random.default_rng(vary(2))
    general = e.general
    task = e.task
    draws: dict[str, list[float]] = {"mean": [], "difference": [], "share": [], "kl": []}
    for _ in range(3000):
        rows = rng.integers(0, 64, 64)
        n = general.tokens[rows].sum()
        loss = general.loss[:, rows].sum(axis=1)
        kl = general.kl[:, rows].sum(axis=1)
        draws["mean"].append(loss[5] / n)
        draws["difference"].append((loss[5] - loss[1]) / n)
        fall = task.loss[:, rows].sum(axis=1)
        draws["share"].append((fall[5] - fall[0]) / (fall[1] - fall[0]))
        draws["kl"].append(kl[5] / kl[1])
    found = {
        "mean": general.mean("loss", 5),
        "difference": general.mean("loss", 5, 1),
        "share": task.share("loss", 5),
        "kl": general.share("kl", 5),
    }
    for name, estimate in found.items():
        assert estimate.value == pytest.approx(np.mean(draws[name]), abs=estimate.error / 5), name
        assert estimate.error == pytest.approx(np.std(draws[name]), rel=0.08), name


def test_pairs_tell_what_means_do_not() -> None:
    general = evaluation().general
    paired = general.mean("loss", 5, 4)
    alone = np.hypot(*(general.mean("loss", v).error for v in (4, 5)))
    assert paired.is_negative
    assert paired.error < alone / 20


def test_a_combination_of_variants_is_that_of_its_sums() -> None:
    general = evaluation().general
    weights = np.zeros(len(general.loss))
    weights[[3, 1]] = 1, -1
    assert general.of("loss", weights) == general.mean("loss", 3, 1)
    assert general.of("kl", weights) == general.mean("kl", 3, 1)


def test_a_share_of_no_difference_is_none() -> None:
    found = ratio(np.ones(3), np.array([1.0, -1.0, 0.0]))
    assert np.isnan(found.value)
    assert not found.is_positive
    assert not found.is_negative


def test_a_difference_of_two_errors_is_significant() -> None:
    assert Estimate(2.1, 1, 64).is_positive
    assert not Estimate(1.9, 1, 64).is_positive
    assert Estimate(-2.1, 1, 64).is_negative
    assert not Estimate(0, 0, 64).is_positive


@pytest.mark.parametrize("sequences", [2, 3, 4, 8, 64])
def test_of_differences_that_are_none_few_are_told(sequences: int) -> None:
    """However few sequences: 2.5 % to each side."""
    y = np.random.default_rng(vary(0)).normal(size=(4000, sequences))
    found = [ratio(one, np.ones(sequences)) for one in y]
    assert sum(e.is_positive for e in found) / 4000 == pytest.approx(0.025, abs=0.008)
    assert sum(e.is_negative for e in found) / 4000 == pytest.approx(0.025, abs=0.008)
