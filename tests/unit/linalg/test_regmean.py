"""The closed form over inputs, against a dense solve in float64 by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from seeds import vary

from streamer.errors import NumericError
from streamer.linalg import regmean
from streamer.linalg.regmean import RIDGE, answers
from streamer.linalg.second_moments import OneHotMoments, RowMoments

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


def test_by_products_what_cannot_be_solved_is_refused() -> None:
    L, R = torch.ones(4, 1), torch.ones(6, 1)
    with pytest.raises(NumericError, match=r"q: its inputs give no delta that can be computed; give more text"):
        answers([(L, R)], rows(np.full((6, 6), np.nan, np.float32)), rows(np.eye(6, dtype=np.float32)), [1.0], "q", 0)


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


def test_what_cannot_be_solved_is_refused() -> None:
    L, R = torch.ones(4, 1), torch.ones(6, 1)
    with pytest.raises(NumericError, match=r"q: its inputs give no delta that can be computed; give more text"):
        answers([(L, R)], rows(np.full((6, 6), np.nan, np.float32)), rows(np.eye(6, dtype=np.float32)), [1.0], "q")
