"""Closed forms over inputs and what stays of a delta by their spectrum, against dense solves in float64 by numpy."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from mapped import answer
from seeds import vary

from streamer.errors import NumericError
from streamer.linalg import regmean
from streamer.linalg.moments import OneHotMoments, RowMoments, Spectrum, leading, reduced
from streamer.linalg.operators import Delta, Dense, LowRank
from streamer.linalg.regmean import DIRECT_BYTES, RIDGE, InputPair, WeightDelta, answers, corrected

WEIGHTS = (0.05, 1.0, 20.0)


def inputs(rng: np.random.Generator, n: int, tokens: int, massive: float = 1.0) -> np.ndarray:
    """Inputs (tokens, n) with a decaying spectrum, one of which is much larger than the others."""
    x = rng.standard_normal((tokens, n)) * np.arange(1, n + 1) ** -0.5
    x[:, n // 2] *= massive
    return x.astype(np.float32)


def matrix(x: np.ndarray) -> np.ndarray:
    """Second moments of inputs."""
    return x.T.astype(float) @ x / len(x)


def rows(x: np.ndarray, block: int = 7) -> RowMoments:
    """The same, of inputs that are read in blocks."""
    trace = float((x.astype(float) ** 2).sum()) / len(x)
    return RowMoments(x.shape[1], len(x), trace, lambda: iter(torch.split(torch.tensor(x), block)))


def expected(
    L: np.ndarray, R: np.ndarray, task: np.ndarray, general: np.ndarray, mu: float, ridge: float
) -> np.ndarray:
    """Δ' by the formula, with whole matrices."""
    kept = task + ridge * np.trace(task) / len(task) * np.eye(len(task))
    return L @ R.T @ kept @ np.linalg.inv(kept + mu * general)


@pytest.mark.parametrize("massive", [1.0, 300.0])
@pytest.mark.parametrize("tokens", [400, 20])
def test_it_is_the_formula(tokens: int, massive: float) -> None:
    rng = np.random.default_rng(vary(0))
    task, general = inputs(rng, 48, tokens, massive), inputs(rng, 48, tokens, massive)
    factors = [(rng.standard_normal((m, r)), rng.standard_normal((48, r))) for m, r in ((32, 4), (64, 2))]
    given = [(torch.tensor(L), torch.tensor(R)) for L, R in factors]
    rights, ridge = answers(given, rows(task), rows(general), WEIGHTS, "q")
    assert ridge == RIDGE or tokens < 48 or massive > 1  # short texts, and massive inputs, may make Δ' grow much
    for (L, R), own in zip(factors, rights, strict=True):
        for mu, right in zip(WEIGHTS, own, strict=True):
            wanted = expected(L, R, matrix(task), matrix(general), mu, ridge)
            assert np.linalg.norm(L @ right.numpy().T - wanted) <= 1e-9 * np.linalg.norm(wanted)


@pytest.mark.parametrize("massive", [1.0, 3e4])
@pytest.mark.parametrize("tokens", [450, 75])
def test_by_products_it_is_the_formula_too(tokens: int, massive: float) -> None:
    """Modules that share inputs, of very different sizes, one of which is zero."""
    rng = np.random.default_rng(vary(5))
    n = 200
    task, general = inputs(rng, n, tokens, massive), inputs(rng, n, tokens, massive)
    turned = np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32)
    task, general = task @ turned, general @ turned
    factors = [
        (rng.standard_normal((m, r)), by * rng.standard_normal((n, r)))
        for m, r, by in ((32, 4, 1e-9), (64, 2, 1e4), (8, 2, 0))
    ]
    given = [(torch.tensor(L), torch.tensor(R)) for L, R in factors]
    whole = regmean.MATRICES_BYTES * n * n
    rights, ridge = answers(given, rows(task, 64), rows(general, 64), WEIGHTS, "q", whole - 1)
    direct, same = answers(given, rows(task, 64), rows(general, 64), WEIGHTS, "q", whole)
    assert ridge == same
    for (L, R), own, other in zip(factors, rights, direct, strict=True):
        for mu, right, by_matrix in zip(WEIGHTS, own, other, strict=True):
            wanted = expected(L, R, matrix(task), matrix(general), mu, ridge)
            for found in (right, by_matrix):
                assert np.linalg.norm(L @ found.numpy().T - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_it_is_the_least_of_what_it_makes_small() -> None:
    rng = np.random.default_rng(vary(1))
    task, general = inputs(rng, 24, 200), inputs(rng, 24, 200)
    L, R = rng.standard_normal((16, 3)), rng.standard_normal((24, 3))
    ((right,),), _ = answers([(torch.tensor(L), torch.tensor(R))], rows(task), rows(general), [0.7], "q")
    task, general = matrix(task), matrix(general)
    kept = task + RIDGE * np.trace(task) / 24 * np.eye(24)

    def cost(factor: np.ndarray) -> float:
        change, left = L @ (factor - R).T, L @ factor.T
        return float(np.trace(change @ kept @ change.T) + 0.7 * np.trace(left @ general @ left.T))

    least = cost(right.numpy())
    for _ in range(20):
        assert cost(right.numpy() + 1e-3 * rng.standard_normal(R.shape)) > least


def test_one_text_for_both_is_a_shrink() -> None:
    rng = np.random.default_rng(vary(2))
    x = inputs(rng, 24, 200)
    L, R = torch.tensor(rng.standard_normal((16, 3))), torch.tensor(rng.standard_normal((24, 3)))
    ((right,),), ridge = answers([(L, R)], rows(x), rows(x), [1.0], "q")
    cosine = float((right * R).sum() / (right.norm() * R.norm()))
    assert cosine > 0.99
    # Along an eigenvector it is scaled by (c + s) / (2 c + s), where s is the ridge: by half, and by more where c is small.
    c, s = np.linalg.eigvalsh(matrix(x)), ridge * np.trace(matrix(x)) / 24
    assert 0.5 < float(right.norm() / R.norm()) < (c[0] + s) / (2 * c[0] + s)


def test_one_hot_inputs_are_scaled_by_their_counts() -> None:
    rng = np.random.default_rng(vary(3))
    task, general = (torch.tensor(rng.integers(0, 5, 30).astype(float)) for _ in range(2))
    L, R = torch.tensor(rng.standard_normal((16, 3))), torch.tensor(rng.standard_normal((30, 3)))
    ((right,),), _ = answers([(L, R)], OneHotMoments(task / 64), OneHotMoments(general / 64), [0.5], "embed")
    whole = [np.diag(counts.sqrt().float().numpy()) for counts in (task, general)]
    ((dense,),), _ = answers([(L, R)], *(rows(x) for x in whole), [0.5], "embed")
    torch.testing.assert_close(right, dense, rtol=1e-5, atol=1e-7)


def test_a_delta_that_would_grow_has_its_ridge_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of the task all along a direction of general text, which Δ' leaves by growing elsewhere."""
    monkeypatch.setattr(regmean, "GROWTH", 1.1)
    rng = np.random.default_rng(vary(4))
    n = 40
    u, v = np.linalg.qr(rng.standard_normal((n, 2)))[0].T
    task, general = (10 * x[None].astype(np.float32) for x in (u + 0.02 * v, u))
    L, R = torch.tensor(rng.standard_normal((16, 1))), torch.tensor(u[:, None])
    ((right,),), ridge = answers([(L, R)], rows(task), rows(general), [50.0], "q")
    assert float(right.norm()) <= 1.1
    assert ridge > RIDGE


def test_a_factor_of_zeros_stays() -> None:
    rng = np.random.default_rng(vary(6))
    C = rows(inputs(rng, 12, 100))
    L, zero, R = torch.ones(4, 2), torch.zeros(12, 2), torch.tensor(rng.standard_normal((12, 2)))
    (alone,), _ = answers([(L, zero)], C, C, [0.5], "q")
    (first, second), _ = answers([(L, zero), (L, R)], C, C, [0.5], "q")
    assert not alone[0].any()
    assert not first[0].any()
    assert second[0].any()


@pytest.mark.parametrize("memory", [regmean.DIRECT_BYTES, 0], ids=["whole", "by products"])
def test_what_cannot_be_solved_is_refused(memory: int) -> None:
    L, R, nan, one = (
        torch.ones(4, 1),
        torch.ones(6, 1),
        np.full((6, 6), np.nan, np.float32),
        np.eye(6, dtype=np.float32),
    )
    with pytest.raises(NumericError, match=r"q: its inputs give no delta that can be computed; give more text"):
        answers([(L, R)], rows(nan), rows(one), [1.0], "q", memory)


ROWS, COLUMNS, RANK, KEPT = 14, 20, 4, 5


def made(kind: str) -> tuple[Delta, Spectrum, np.ndarray]:
    draw = np.random.default_rng(vary(0))
    delta = LowRank(*(torch.from_numpy(draw.normal(size=(side, RANK))) for side in (ROWS, COLUMNS)))
    if kind == "one-hot":
        counts = draw.integers(0, 5, COLUMNS) / 100
        return delta, Spectrum(torch.from_numpy(counts)), np.diag(counts)
    V = np.linalg.qr(draw.normal(size=(COLUMNS, KEPT)))[0]
    values, rest = 10.0 ** np.arange(4, 4 - KEPT, -1), 0.2
    C = (V * (values - rest)) @ V.T + rest * np.eye(COLUMNS)
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
    assert reduced(delta, Spectrum(torch.zeros(COLUMNS, dtype=torch.float64)), 0.5) is delta
    factors, whole, _ = made("factors")
    assert not reduced(factors, whole, 0.0).dense().any()


def test_leading_values_within_a_span() -> None:
    draw = torch.from_numpy(np.random.default_rng(vary(1)).normal(size=(COLUMNS, COLUMNS)))
    C, V = draw @ draw.T, torch.linalg.qr(draw[:, :KEPT])[0]
    values, vectors = leading(V, C @ V)
    np.testing.assert_allclose(vectors.T @ C @ vectors, torch.diag(values), atol=1e-9 * float(values[0]))
    np.testing.assert_allclose(vectors @ vectors.T, V @ V.T, atol=1e-12)
    assert bool((values.diff() <= 0).all())


N, M, TOKENS = 24, 20, 200


def pair(before: torch.Tensor, now: torch.Tensor) -> InputPair:
    def moments(x: torch.Tensor) -> RowMoments:
        def blocks() -> Iterator[torch.Tensor]:
            yield from x.split(64)

        return RowMoments(N, TOKENS, float((x**2).sum()) / TOKENS, blocks)

    return InputPair(moments(before), moments(now))


@pytest.mark.parametrize("memory", [DIRECT_BYTES, 0])
def test_a_factor_of_fewer_directions_than_columns_gives_the_delta_of_those_that_it_has(memory: int) -> None:
    W, L, R = torch.randn(M, N), torch.randn(M, 3), torch.randn(N, 3)
    task, general = torch.randn(TOKENS, N), torch.randn(TOKENS, N)
    pairs = pair(task, task + 0.1 * torch.randn(TOKENS, N)), pair(general, general + 0.1 * torch.randn(TOKENS, N))

    def of(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        found = corrected([WeightDelta(left, right, lambda Q: W.double().T @ Q)], *pairs, 0.5, memory)
        assert found is not None
        return left.double() @ found[0].T

    expected = of(L, R)
    assert float((expected - L.double() @ R.double().T).norm()) > 0.01 * float(expected.norm())
    wide = torch.cat([L, L[:, :1], torch.zeros(M, 1), 1e-9 * torch.randn(M, 1)], 1)
    found = of(wide, torch.cat([R, torch.zeros(N, 2), torch.randn(N, 1)], 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.norm()))
