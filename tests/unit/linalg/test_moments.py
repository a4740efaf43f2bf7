"""Leading vectors of inputs, and what stays of a delta by their spectrum, against dense decompositions in float64 by numpy."""

import numpy as np
import pytest
import torch
from fitted import answer
from seeds import vary

from streamer.linalg.moments import Spectrum, leading_vectors, reduced
from streamer.linalg.operators import Delta, Dense, LowRank


@pytest.mark.parametrize("n", [40, 700])
def test_leading_vectors(n: int) -> None:
    """By a whole decomposition, and by products where the moments are too large to be formed; of inputs in parts, for more tokens."""
    draw = np.random.default_rng(vary(0))
    x = draw.normal(size=(900, n)) * 0.8 ** np.arange(n) * 30 + 0.01 * draw.normal(size=(900, n))
    values, vectors = leading_vectors(torch.split(torch.from_numpy(x).float(), 600), 1000, 16)
    exact, V = np.linalg.eigh(x.T @ x / 1000)
    np.testing.assert_allclose(values, exact[::-1][:16], rtol=1e-4)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(16), atol=1e-9)
    for i in range(8):
        assert abs(float(vectors[:, i] @ torch.from_numpy(V[:, -1 - i].copy()))) > 1 - 1e-5


def test_no_more_vectors_than_inputs() -> None:
    values, vectors = leading_vectors([torch.randn(5, 3)], 5, 16)
    assert (values.shape, vectors.shape) == ((3,), (3, 3))


ROWS = 14
COLUMNS = 20
RANK = 4
KEPT = 5


def made(kind: str) -> tuple[Delta, Spectrum, np.ndarray]:
    draw = np.random.default_rng(vary(0))
    delta = LowRank(*(torch.from_numpy(draw.normal(size=(side, RANK))) for side in (ROWS, COLUMNS)))
    if kind == "one-hot":
        counts = draw.integers(0, 5, COLUMNS) / 100
        return delta, Spectrum(torch.from_numpy(counts)), np.diag(counts)
    V = np.linalg.qr(draw.normal(size=(COLUMNS, KEPT)))[0]
    values = 10.0 ** np.arange(4, 4 - KEPT, -1)
    rest = 0.2
    C = (V * (values - rest)) @ V.T + rest * np.eye(COLUMNS)
    spectrum = Spectrum(torch.from_numpy(values), rest, torch.from_numpy(V))
    return (Dense(delta.dense()) if kind == "dense" else delta), spectrum, C


@pytest.mark.parametrize("kind", ["factors", "dense", "one-hot"])
@pytest.mark.parametrize("share", [0.99, 0.6, 0.01])
def test_the_formula(kind: str, share: float) -> None:
    delta, spectrum, C = made(kind)
    found = reduced(delta, spectrum, share)
    before = delta.dense().numpy()
    after = found.dense().numpy()
    np.testing.assert_allclose(after, answer(before, C, share), atol=1e-9 * np.abs(before).max())
    assert np.sum((after @ C) * after) == pytest.approx(
        share * np.sum((before @ C) * before), rel=1e-7
    )
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
    assert reduced(delta, Spectrum(torch.zeros(COLUMNS, dtype=torch.float64)), 0.5) is delta
    factors, whole, _ = made("factors")
    assert not reduced(factors, whole, 0.0).dense().any()
