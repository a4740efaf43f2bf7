"""Means and their standard errors, against NumPy's and against repeated draws."""

from __future__ import annotations

import numpy as np
import pytest

from streamer.evaluation.statistics import mean_of


def test_of_equal_lengths_it_is_the_error_of_the_mean() -> None:
    means = np.random.default_rng(0).normal(3, 1, 20)
    mean = mean_of(means * 7, np.full(20, 7.0))
    assert mean.value == pytest.approx(means.mean(), rel=1e-12)
    assert mean.error == pytest.approx(means.std(ddof=1) / 20**0.5, rel=1e-12)


def test_of_unequal_lengths_it_is_the_spread_of_repeated_draws() -> None:
    rng = np.random.default_rng(1)

    def draw() -> tuple[float, float]:
        tokens = rng.integers(10, 200, 60).astype(float)
        sums = tokens * rng.normal(2, 0.5, 60) + rng.normal(0, 1, 60) * np.sqrt(tokens)
        mean = mean_of(sums, tokens)
        assert mean.error is not None
        return mean.value, mean.error

    values, errors = np.array([draw() for _ in range(4000)]).T
    assert np.mean(errors) == pytest.approx(values.std(), rel=0.05)


def test_one_sequence_has_no_error() -> None:
    assert mean_of(np.array([6.0]), np.array([3.0])) == (2.0, None)
