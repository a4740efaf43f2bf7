"""Refitted right factors, against dense least squares in float64 by numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from seeds import vary

from streamer.linalg.moments import (
    GENERAL_RIDGE,
    RIDGE,
    SOLVE_TOLERANCE,
    Refit,
    System,
    TextInputs,
    basis,
    refit,
    refit_one_hot,
)

N = 48
M = 32
"""Inputs and outputs of a module."""

WEIGHTS = (0.05, 1.0, 20.0)
FEW = 20
MANY = 400
"""Tokens of each text: fewer than inputs, and more."""


def inputs(rng: np.random.Generator, tokens: int, massive: float = 1.0) -> np.ndarray:
    """Inputs (tokens, n) with a decaying spectrum, and one direction along which they are so many times larger."""
    x = rng.standard_normal((tokens, N)) * np.arange(1, N + 1) ** -0.5
    x[:, N // 2] *= massive
    turned = np.linalg.qr(np.random.default_rng(vary(9)).standard_normal((N, N)))[
        0
    ]  # the same for all texts
    return (x @ turned).astype(np.float32)


def texts(rng: np.random.Generator, tokens: int, massive: float = 1.0) -> dict[str, np.ndarray]:
    """Inputs on both texts, in the model to imitate and now."""
    found = {name: inputs(rng, tokens, massive) for name in ("task", "general")}
    moved = {f"{name} now": x + 0.1 * inputs(rng, tokens) for name, x in found.items()}
    return {**found, **moved}


def refitted(
    W: np.ndarray, L: np.ndarray, R: np.ndarray, given: dict[str, np.ndarray], mu: float
) -> np.ndarray:
    """R'."""
    x = {name: torch.from_numpy(own).tensor_split([len(own) // 3]) for name, own in given.items()}
    tokens = len(given["task"]), len(given["general"])
    Q, T = basis(torch.from_numpy(L))
    of = Refit(torch.from_numpy(R), T, torch.from_numpy(R) @ T.T, torch.from_numpy(W).T @ Q)
    system = System(x["task now"], x["general now"], tokens, mu)
    task, general = (
        TextInputs(x[name], x[f"{name} now"], n)
        for name, n in zip(("task", "general"), tokens, strict=True)
    )
    found = refit(of, task, general, mu, system)
    assert found is not None
    right: np.ndarray = found.numpy()
    return right


def expected(
    W: np.ndarray, L: np.ndarray, R: np.ndarray, given: dict[str, np.ndarray], mu: float
) -> np.ndarray:
    """Δ' (m, n) by least squares as they are written down, of all rows of the norms."""
    x, y, u, v = (
        given[name].astype(float) for name in ("task", "task now", "general", "general now")
    )
    delta = L @ R.T
    s = RIDGE * np.sum(y**2) / len(y) / N
    g = GENERAL_RIDGE * np.sum(v**2) / len(v) / N
    Q = np.linalg.svd(L, full_matrices=False)[0][:, : np.linalg.matrix_rank(L, rtol=1e-3)]
    rows = [
        y / len(y) ** 0.5,
        v * (mu / len(v)) ** 0.5,
        s**0.5 * np.eye(N),
        (mu * g) ** 0.5 * np.eye(N),
    ]
    wanted = [
        (x @ (W + delta).T - y @ W.T) / len(y) ** 0.5,
        (u - v) @ W.T * (mu / len(v)) ** 0.5,
        s**0.5 * delta.T,
        np.zeros((N, len(W))),
    ]
    D = np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted) @ Q, rcond=None)[0]
    return Q @ D.T


def drawn(rng: np.random.Generator, rank: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W, L and R."""
    return (
        rng.standard_normal((M, N)),
        rng.standard_normal((M, rank)),
        rng.standard_normal((N, rank)),
    )


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("mu", WEIGHTS)
@pytest.mark.parametrize("tokens", [FEW, MANY, (N - 1) // 2, (N + 1) // 2])
def test_factors_equal_the_dense_formula(tokens: int, mu: float) -> None:
    rng = np.random.default_rng(vary(0))
    (W, L, R), given = drawn(rng), texts(rng, tokens)
    right = refitted(W, L, R, given, mu)
    assert relative(L @ right.T, expected(W, L, R, given, mu)) <= 1e-5
    same = {**given, "task now": given["task"], "general now": given["general"]}
    assert relative(expected(W, L, R, given, mu), expected(W, L, R, same, mu)) > 0.01, (
        "the correction matters"
    )


@pytest.mark.parametrize("massive", [1e2, 1e4])
@pytest.mark.parametrize("kind", ["both", "general"])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_one_direction_is_much_larger(tokens: int, kind: str, massive: float) -> None:
    """In both texts, where the ridge grows with it, or in the general one alone, where products in float32 do not solve the system."""
    rng = np.random.default_rng(vary(1))
    task = inputs(rng, tokens, massive if kind == "both" else 1.0)
    general = inputs(rng, tokens, massive)
    for mu in WEIGHTS:
        system = System(
            [torch.from_numpy(task)],
            torch.from_numpy(general).tensor_split([5]),
            (tokens, tokens),
            mu,
        )
        assert system.few == (tokens == FEW)
        rows = np.concatenate([task.astype(float), general * mu**0.5]) / tokens**0.5
        traces = (np.sum(own.astype(float) ** 2) / tokens / N for own in (task, general))
        s = sum(
            share * trace for share, trace in zip((RIDGE, mu * GENERAL_RIDGE), traces, strict=True)
        )
        B = torch.from_numpy(rng.standard_normal((N, 3))) * torch.tensor([1.0, 1e-9, 1e6])
        found = system.solve(B)
        assert found is not None
        wanted = np.linalg.solve(rows.T @ rows + s * np.eye(N), B.numpy())
        assert (
            np.linalg.norm(found.numpy() - wanted, axis=0)
            <= 2 * SOLVE_TOLERANCE * np.linalg.norm(wanted, axis=0)
        ).all()


def test_what_cannot_be_solved_is_none() -> None:
    nan = torch.full((4, 6), torch.nan)
    one = torch.eye(6)
    assert System([nan], [one], (4, 6), 1.0).solve(torch.ones(6, 1, dtype=torch.float64)) is None
    assert System([one], [nan], (6, 4), 1.0).solve(torch.ones(6, 1, dtype=torch.float64)) is None


def test_a_left_factor_of_fewer_directions_than_columns_gives_the_delta_of_those_that_it_has() -> (
    None
):
    rng = np.random.default_rng(vary(3))
    (W, L, R), given = drawn(rng), texts(rng, MANY)
    of = L @ refitted(W, L, R, given, 1.0).T
    wide = np.concatenate([L, L[:, :1], np.zeros((M, 1)), 1e-9 * rng.standard_normal((M, 1))], 1)
    more = np.concatenate([R, np.zeros((N, 2)), rng.standard_normal((N, 1))], 1)
    found = refitted(W, wide, more, given, 1.0)
    assert relative(wide @ found.T, of) <= 1e-5
    assert np.linalg.norm(found) < 100 * np.linalg.norm(more), "no factor grows along what L lacks"
    single = np.outer(L[:, 0], np.ones(2)), R[:, :2]  # twice the same column
    assert (
        relative(single[0] @ refitted(W, *single, given, 1.0).T, expected(W, *single, given, 1.0))
        <= 1e-5
    )


def test_without_counterparts_it_is_the_regression_mean_of_the_delta_and_zero() -> None:
    """As for experts: Δ' = Δ (C_t + s I)(C_t + s I + μ (C_g + g I))⁻¹, of whose tokens an expert received some."""
    rng = np.random.default_rng(vary(4))
    _, L, R = drawn(rng)
    y = inputs(rng, 60)
    v = inputs(rng, 30)
    tokens = (100, 80)
    _, T = basis(torch.from_numpy(L))
    task, general = (
        TextInputs([x], [x], n) for x, n in zip(map(torch.from_numpy, (y, v)), tokens, strict=True)
    )
    of = Refit(torch.from_numpy(R), T, torch.from_numpy(R) @ T.T, torch.empty(0))
    found = refit(of, task, general, 2.0, System(task.now, general.now, tokens, 2.0))
    assert found is not None
    C, G = (x.T.astype(float) @ x / n for x, n in zip((y, v), tokens, strict=True))
    kept, lost = (
        own + share * np.trace(own) / N * np.eye(N)
        for own, share in ((C, RIDGE), (G, GENERAL_RIDGE))
    )
    assert relative(found.numpy(), np.linalg.solve(kept + 2.0 * lost, kept @ R)) <= 1e-5


def test_one_text_for_both_is_a_shrink() -> None:
    rng = np.random.default_rng(vary(5))
    (W, L, R), x = drawn(rng), inputs(rng, MANY)
    right = refitted(W, L, R, dict.fromkeys(("task", "general", "task now", "general now"), x), 1.0)
    cosine = np.sum(right * R) / np.linalg.norm(right) / np.linalg.norm(R)
    assert cosine > 0.99
    # Along an eigenvector it is scaled by (c + s) / (2 c + s + g): by half, and by more where c is small.
    C = x.T.astype(float) @ x / len(x)
    least, s, g = (
        np.linalg.eigvalsh(C)[0],
        *(share * np.trace(C) / N for share in (RIDGE, GENERAL_RIDGE)),
    )
    assert 0.5 < np.linalg.norm(right) / np.linalg.norm(R) < (least + s) / (2 * least + s + g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_hot_inputs_are_scaled_by_their_counts(dtype: torch.dtype) -> None:
    """As the formula for inputs that no module changes, whose moments are diagonal; what no text has stays."""
    rng = np.random.default_rng(vary(7))
    counts: list[Any] = [torch.tensor(rng.integers(0, 3, N).astype(float)) for _ in range(2)]
    frequencies = [own / own.sum() for own in counts]
    R = torch.tensor(rng.standard_normal((N, 3)), dtype=dtype)
    found = refit_one_hot(R, *frequencies, 0.5)
    C, G = (np.diag(own.numpy()) for own in frequencies)
    kept = C + RIDGE * np.trace(C) / N * np.eye(N)
    wanted = np.linalg.solve(kept + 0.5 * G, kept @ R.double().numpy())
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    unseen = counts[1] == 0
    assert bool(unseen.any())
    assert torch.equal(found[unseen], R.double()[unseen])
