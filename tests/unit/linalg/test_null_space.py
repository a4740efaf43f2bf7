"""What stays of a delta by the spectrum of its inputs, against a solve with the whole matrix by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mapped import answer
from seeds import vary

from streamer.linalg.low_rank import LowRank
from streamer.linalg.null_space import Spectrum, leading, reduced
from streamer.linalg.operators import Delta, Dense

M, N, R, K = 14, 20, 4, 5


def made(kind: str) -> tuple[Delta, Spectrum, np.ndarray]:
    draw = np.random.default_rng(vary(0))
    delta = LowRank(*(torch.from_numpy(draw.normal(size=(side, R))) for side in (M, N)))
    if kind == "one-hot":
        counts = draw.integers(0, 5, N) / 100
        return delta, Spectrum(torch.from_numpy(counts)), np.diag(counts)
    V = np.linalg.qr(draw.normal(size=(N, K)))[0]
    values, rest = 10.0 ** np.arange(4, 4 - K, -1), 0.2
    C = (V * (values - rest)) @ V.T + rest * np.eye(N)
    spectrum = Spectrum(torch.from_numpy(values), rest, torch.from_numpy(V))
    return (Dense(delta.dense()) if kind == "dense" else delta), spectrum, C


@pytest.mark.parametrize("kind", ["factors", "dense", "one-hot"])
@pytest.mark.parametrize("share", [0.99, 0.6, 0.01])
def test_the_formula(kind: str, share: float) -> None:
    delta, spectrum, C = made(kind)
    found = reduced(delta, spectrum, share)
    before, after = delta.dense().numpy(), found.dense().numpy()
    np.testing.assert_allclose(after, answer(before, C, share), atol=1e-9 * np.abs(before).max())
    assert np.sum((after @ C) * after) == pytest.approx(share * np.sum((before @ C) * before), rel=1e-7)
    if isinstance(delta, LowRank):
        assert isinstance(found, LowRank)
        assert torch.equal(found.L, delta.L)
    else:
        assert isinstance(found, Dense)


def test_a_dense_delta_keeps_its_dtype() -> None:
    delta, spectrum, C = made("dense")
    found = reduced(delta.to(torch.float32), spectrum, 0.5).dense()
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, answer(delta.dense().numpy(), C, 0.5), atol=1e-5)


def test_all_and_nothing_and_what_no_input_reaches() -> None:
    delta, spectrum, _ = made("one-hot")
    assert reduced(delta, spectrum, 1.0) is delta
    left = reduced(delta, spectrum, 0.0).dense()
    unseen = spectrum.values == 0
    assert bool(unseen.any())
    assert not left[:, ~unseen].any()
    assert torch.equal(
        left[:, unseen], delta.precise().dense()[:, unseen]
    )  # a token that the text lacks stays as it is
    assert reduced(delta, Spectrum(torch.zeros(N, dtype=torch.float64)), 0.5) is delta
    factors, whole, _ = made("factors")
    assert not reduced(factors, whole, 0.0).dense().any()


def test_leading_values_within_a_span() -> None:
    draw = torch.from_numpy(np.random.default_rng(vary(1)).normal(size=(N, N)))
    C, V = draw @ draw.T, torch.linalg.qr(draw[:, :K])[0]
    values, vectors = leading(V, C @ V)
    np.testing.assert_allclose(vectors.T @ C @ vectors, torch.diag(values), atol=1e-9 * float(values[0]))
    np.testing.assert_allclose(vectors @ vectors.T, V @ V.T, atol=1e-12)
    assert bool((values.diff() <= 0).all())
