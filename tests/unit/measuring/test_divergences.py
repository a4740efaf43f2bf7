"""The histogram of divergences: its counts add up, and its quantiles are within 1 % of those of the tokens."""

from __future__ import annotations

import numpy as np
import pytest
from seeds import vary

from streamer.measuring.divergences import BINS, LEAST, counted_bins, from_record, quantile, to_record

SHARES = (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)


@pytest.mark.parametrize("tokens", [1, 2, 999, 20_000])
def test_quantiles_are_within_a_hundredth(tokens: int) -> None:
    """Of divergences spread over fifteen powers of ten; numpy's default is llama.cpp's rule."""
    rng = np.random.default_rng(vary(0))
    kl = 10 ** rng.uniform(-9, 6, (2, tokens, 1))
    bins = counted_bins(kl, np.ones((tokens, 1), bool))
    for v in range(2):
        found = [quantile(bins[v], kl[v].max(), share) for share in SHARES]
        np.testing.assert_allclose(found, np.quantile(kl[v], SHARES), rtol=0.01)
        assert found[-1] == kl[v].max()


def test_counts_add_up_and_leave_out_what_does_not_count() -> None:
    rng = np.random.default_rng(vary(1))
    kl, counted = np.exp(rng.normal(-4, 2, (3, 40, 50))), rng.random((40, 50)) < 0.7
    whole = counted_bins(kl, counted)
    assert (whole.sum(1) == counted.sum()).all()
    np.testing.assert_array_equal(whole, counted_bins(kl[:, :9], counted[:9]) + counted_bins(kl[:, 9:], counted[9:]))
    for row in (*whole, np.zeros(BINS)):
        np.testing.assert_array_equal(from_record(to_record(row)), row)


def test_what_rounding_makes_of_none_is_none_and_no_divergence_is_too_large() -> None:
    kl = np.array([[-1e-8, 0.0, 0.9 * LEAST, LEAST, 1e6, 1e300, np.inf]])
    bins = counted_bins(kl, np.ones(7, bool))[0]
    assert (bins[0], bins[1], bins[-1], bins.sum()) == (3, 1, 3, 7)
    assert quantile(bins, 1e300, 1 / 3) == 0
    assert np.isnan(quantile(from_record(None), 1.0, 0.5))
