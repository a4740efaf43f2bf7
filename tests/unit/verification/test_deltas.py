"""Deltas as verification computes them, beside the product's own."""

import numpy as np
import pytest
import torch
from seeds import vary

from streamer.linalg.moments import Spectrum, reduced
from streamer.linalg.operators import LowRank
from streamer.verification import deltas

M = 20
N = 30
K = 6
R = 4


@pytest.mark.parametrize(
    "share", [0.0, 1e-300, 1e-30, 3e-22, 1e-21, 1e-6, 0.5, 1 - 1e-12, np.nextafter(1.0, 0)]
)
@pytest.mark.parametrize("one_hot", [False, True])
def test_any_share_is_computed_alike(share: float, one_hot: bool) -> None:
    """Shares below what the largest ν leaves, or above what the smallest does, as well."""
    rng = np.random.default_rng(vary(0))
    L = rng.standard_normal((M, R))
    right = rng.standard_normal((N, R))
    values = np.sort(np.exp(rng.uniform(-6, 3, N if one_hot else K)))[::-1].copy()
    V = None if one_hot else np.linalg.qr(rng.standard_normal((N, K)))[0]
    rest = 0.0 if one_hot else 1e-3
    spectrum = Spectrum(torch.from_numpy(values), rest, None if V is None else torch.from_numpy(V))
    made = (
        reduced(LowRank(torch.from_numpy(L), torch.from_numpy(right)), spectrum, share)
        .dense()
        .numpy()
    )
    factors = deltas.LowRank(L, right)
    np.testing.assert_allclose(
        deltas.by_spectrum(factors, values, V, rest, share).dense(), made, atol=1e-12
    )
    if V is not None:
        dense = deltas.Delta(factors.shape, factors.rows, R)
        np.testing.assert_allclose(
            deltas.by_spectrum(dense, values, V, rest, share).dense(), made, atol=1e-12
        )


def test_errors_of_vectors_that_are_close() -> None:
    """A pair mixes freely where both are chosen, since their span stays; either by itself is not defined."""
    triplets = deltas.Triplets(
        np.eye(9)[:, :4], np.array([3.0, 2.0, 2.0 - 1e-7, 1.0, 0.5]), np.eye(9)[:, :4], 2e-5
    )
    assert triplets.angle_errors([0, 1]) == pytest.approx(
        [2e-5 + deltas.ROUNDINGS * 3, 1], rel=1e-3
    )
    assert max(triplets.angle_errors([1, 2])) == pytest.approx(
        2e-5 + deltas.ROUNDINGS * 3, rel=1e-3
    )
