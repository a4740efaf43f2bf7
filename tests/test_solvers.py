"""Solvers: what they answer, when the certified one gives up, and that nothing non-finite reaches them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import intruding_factors, power_law, spectrum_matrix

from streamer import intruders
from streamer.errors import NumericError
from streamer.intruders import DetectionOptions, detect
from streamer.linalg.operators import Dense, LowRank
from streamer.solvers import SOLVERS, Spectrum, cheaper

SHAPES = [(150, 200), (200, 150), (160, 160)]


def problem(m: int, n: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> tuple[Dense, LowRank]:
    A, B = intruding_factors(m, n, 4)
    return Dense((power_law(m, n) * size).to(dtype)), LowRank((B * size).to(dtype), A.T.to(dtype))


def solve(name: str, base: Dense, delta: LowRank, k: int = 10, epsilon: float = 0.5, seed: int = 0) -> Spectrum:
    return SOLVERS[name](base, delta, k, epsilon, torch.Generator().manual_seed(seed))


def oracle(base: Dense, delta: LowRank, k: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, S and the similarities in float64."""
    W0 = base.matrix.double().numpy()
    U0 = np.linalg.svd(W0, full_matrices=False)[0]
    U, S, _ = np.linalg.svd(W0 + delta.to(torch.float64).dense().numpy(), full_matrices=False)
    return U[:, :k], S[:k], np.abs(U0.T @ U[:, :k]).max(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SOLVERS)
def test_triplets_and_intervals_are_right(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    base, delta = problem(*shape, dtype)
    found = solve(name, base, delta)
    U, S, similarity = oracle(base, delta)
    assert found.solver == name
    assert not found.escalated
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(found.triplets.S, S, rtol=100 * eps if dtype == torch.float32 else 1e-9)
    assert float(found.triplets.residuals.max()) < 1e-4
    angle = 1 - np.abs((found.triplets.U.double().numpy() * U).sum(0))
    assert (angle <= found.triplets.angle_error_estimate.numpy() ** 2 + 50 * eps).all()
    assert (found.low.numpy() <= similarity + 1e-5).all()
    assert (found.high.numpy() >= similarity - 1e-5).all()
    assert bool(((found.low >= 0.5) | (found.high < 0.5)).all())
    assert (found.steps > 0) == (found.products > 0) == (name == "certified")


@pytest.mark.parametrize("shape", SHAPES)
def test_same_seed_same_bits_another_seed_the_same_decisions(shape: tuple[int, int]) -> None:
    base, delta = problem(*shape)
    first, again, other = (solve("certified", base, delta, seed=seed) for seed in (0, 0, 1))
    for name in ("low", "high", "similarity"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    for name in ("U", "S", "Vh", "residuals"):
        assert torch.equal(getattr(first.triplets, name), getattr(again.triplets, name))
    assert torch.equal(first.similarity < 0.5, other.similarity < 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2.0**-140, 2.0**-120, 2.0**-100, 2.0**100, 2.0**120])
@pytest.mark.parametrize("name", SOLVERS)
def test_size_does_not_matter(name: str, size: float, dtype: torch.dtype) -> None:
    """2⁻¹⁴⁰ makes float32 subnormal: the power of two that would undo it overflows."""
    base, delta = problem(150, 200, dtype, size)
    found = solve(name, base, delta)
    _, S, _ = oracle(base, delta)
    np.testing.assert_allclose(found.triplets.S.double() / size, S / size, rtol=1e-2 if size < 2.0**-126 else 1e-5)
    assert torch.equal(found.similarity < 0.5, solve(name, *problem(150, 200, dtype)).similarity < 0.5)
    assert bool(torch.isfinite(found.triplets.residuals).all())


@pytest.mark.parametrize("ratio", [1e3, 1e15, 1e25])
def test_a_base_far_below_the_delta_is_judged_on_its_own_scale(ratio: float) -> None:
    """Squares of the base's entries would vanish in float32 at the delta's scale."""
    base, delta = problem(160, 160)
    base = Dense(base.matrix / ratio)
    found = solve("certified", base, delta, k=1)
    similarity = oracle(base, delta, 1)[2]
    assert found.solver == "certified"
    assert float(found.low[0]) - 1e-5 <= similarity[0] <= float(found.high[0]) + 1e-5


@pytest.mark.parametrize(
    ("base", "k"),
    [(torch.zeros(60, 80), 10), (power_law(60, 80), 55), (power_law(12, 80), 10), (torch.eye(60, 80), 10)],
    ids=["zero base", "most directions", "few rows", "degenerate"],
)
def test_what_cannot_be_certified_is_escalated_and_said(base: torch.Tensor, k: int) -> None:
    A, B = intruding_factors(*base.shape, 2)
    found = solve("certified", Dense(base.float()), LowRank(B, A.T), k=k)
    assert found.escalated
    assert found.solver == "dense"
    assert found.triplets.S.shape == (k,)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_last_direction_of_a_tall_matrix_has_a_neighbour_at_zero(name: str) -> None:
    """With σ_n small against σ_1, u_n turns into the vectors outside the range: its gap is σ_n, not its distance to σ_{n−1}."""
    W0 = spectrum_matrix(70, 40, torch.tensor([1.0] * 39 + [1e-6])).float()
    zero = LowRank(torch.zeros(70, 1), torch.zeros(40, 1))
    found = solve(name, Dense(W0), zero, k=40)
    assert float(found.triplets.gaps[-1]) < 2e-6
    assert float(found.triplets.angle_error_estimate[-1]) > 0.05


def test_the_cheaper_solver() -> None:
    assert cheaper((4096, 4096), 10) == "certified"
    assert cheaper((4096, 4096), 1000) == "dense"
    assert cheaper((64, 4096), 10) == "dense"


@pytest.mark.parametrize("solver", ["auto", *SOLVERS])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["base", "lora_B", "lora_A"])
def test_nothing_non_finite_reaches_a_solver(
    where: str, bad: float, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: object) -> Spectrum:
        raise AssertionError("a solver was called")

    monkeypatch.setattr(intruders, "SOLVERS", dict.fromkeys(SOLVERS, reached))
    base, delta = problem(40, 50)
    {"base": base.matrix, "lora_B": delta.L, "lora_A": delta.R}[where][-1, -1] = bad
    with pytest.raises(
        NumericError, match=f"{where}.* holds NaN or Inf" if where != "base" else "the base matrix holds"
    ):
        detect(base, delta, DetectionOptions(solver=solver))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sum_that_overflows_is_refused(solver: str) -> None:
    base = Dense(torch.full((40, 50), 3e38))
    delta = LowRank(torch.full((40, 1), 3e38), torch.ones(50, 1))
    with pytest.raises(NumericError):
        detect(base, delta, DetectionOptions(solver=solver))
