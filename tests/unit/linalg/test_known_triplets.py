"""Leading triplets of a base, known beforehand: what they are, what they save, and that nothing rests on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import intruding_factors, spectrum_matrix
from seeds import vary
from torch import Tensor

from streamer.detection.solvers import KnownSource, SolverResult, solve_certified
from streamer.linalg.golub_kahan import KnownTriplets
from streamer.linalg.known_triplets import KNOWN, known_triplets
from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Dense, RowBlocks
from streamer.linalg.overlap_bounds import OverlapProcess

SHAPES = [(300, 420), (420, 300), (360, 360)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(vary(seed))


def falling(p: int, top: int = 40, seed: int = 0) -> Tensor:
    """Singular values ``j^-0.7`` over a bulk at a third of the last of them, as trained weights have."""
    bulk = (0.2 + 0.8 * torch.rand(p, generator=seeded(seed), dtype=torch.float64)).sort(descending=True).values
    head = torch.arange(1, top + 1, dtype=torch.float64).pow(-0.7)
    return torch.cat([head, bulk[top:] * head[-1] / 3])


def problem(shape: tuple[int, int], seed: int = 0, rank: int = 4) -> tuple[Dense, LowRank]:
    A, B = intruding_factors(*shape, rank, seed)
    return Dense(spectrum_matrix(*shape, falling(min(shape), seed=seed), seed).float()), LowRank(B, A.T)


def solve(base: Dense | RowBlocks, delta: LowRank | Dense, known: KnownSource | None = None, **options) -> SolverResult:
    return solve_certified(base, delta, 10, 0.5, seeded(3), known=known, **options)


def similarities(base: Dense, U: np.ndarray) -> np.ndarray:
    U0 = np.linalg.svd(base.matrix.double().numpy(), full_matrices=False)[0]
    return np.abs(U0.T @ U).max(0)


def check(found: SolverResult, base: Dense, delta: LowRank | Dense) -> None:
    """Against numpy's float64 SVD: the triplets, and that each interval holds the similarity and lies on one side."""
    W = (base.matrix.double() + delta.to(torch.float64).dense()).numpy()
    U, S, _ = np.linalg.svd(W, full_matrices=False)
    true = similarities(base, U[:, :10])
    np.testing.assert_allclose(found.triplets.S, S[:10], rtol=1e-5)
    assert (found.low.numpy() <= true + 1e-5).all()
    assert (found.high.numpy() >= true - 1e-5).all()
    assert bool(((found.low >= 0.5) | (found.high < 0.5)).all())


@pytest.mark.parametrize("size", [1.0, 1e-12])
@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_the_singular_triplets(shape: tuple[int, int], size: float) -> None:
    matrix = spectrum_matrix(*shape, falling(min(shape))).float()
    scale = 2.0 ** -round(np.log2(size))
    known = known_triplets(Dense(matrix * size, scale), seeded()).scaled(1 / scale)
    q = len(known.S)
    assert 20 <= q <= KNOWN
    true = np.linalg.svd((matrix * size).double().numpy(), compute_uv=False)
    np.testing.assert_allclose(known.S, true[:q], rtol=2e-5, atol=1e-6 * true[0])
    for left, right, M in ((known.U, known.V, matrix), (known.V, known.U, matrix.T)):
        assert float((left.double().T @ left.double() - torch.eye(q)).abs().max()) < 1e-5
        residual = torch.linalg.vector_norm(M.double() @ right.double() * size - left.double() * known.S, dim=0)
        assert float(residual.max()) < 2e-6 * true[0]


@pytest.mark.parametrize("matrix", [torch.zeros(300, 300), torch.randn(1200, 1200, generator=seeded())])
def test_a_flat_spectrum_has_none_that_converge(matrix: Tensor) -> None:
    assert len(known_triplets(Dense(matrix), seeded()).S) == 0


def test_a_matrix_of_lower_rank_has_no_more_than_that() -> None:
    matrix = spectrum_matrix(200, 300, torch.cat([torch.arange(9, 0, -1.0), torch.zeros(191)])).float()
    assert len(known_triplets(Dense(matrix), seeded()).S) == 9


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_decisions_are_the_same_at_less_cost(shape: tuple[int, int], seed: int, blocks: bool) -> None:
    base, delta = problem(shape, seed)
    weight = base.matrix
    given = RowBlocks(shape, lambda i, j: weight[i:j], torch.empty(0)) if blocks else base
    plain, found = solve(given, delta), solve(given, delta, lambda scaled: known_triplets(scaled, seeded()))
    check(plain, base, delta)
    check(found, base, delta)
    assert (found.similarity < 0.5).tolist() == (plain.similarity < 0.5).tolist()
    assert found.solver == "certified"
    assert found.products < plain.products
    assert torch.equal(found.triplets.U, plain.triplets.U)


def test_a_direction_that_is_in_neither_span_is_found() -> None:
    """Sixteen directions of Δ damp the base's leading ones; the next is new. A start from both spans missed it, and was certified."""
    n = 700
    values = torch.cat([torch.linspace(2.4, 2.0, 16), torch.linspace(1.4, 1.1, 24), torch.linspace(0.3, 0.05, n - 40)])
    base = Dense(spectrum_matrix(n, n, values).float())
    U, _, Vh = torch.linalg.svd(base.matrix.double())
    new = [basis[:, 40:] @ torch.randn(n - 40, 1, generator=seeded(), dtype=torch.float64) for basis in (U, Vh.T)]
    left, right = (torch.cat([b[:, :16], x / x.norm()], 1).float() for b, x in zip((U, Vh.T), new, strict=True))
    delta = LowRank(left * torch.tensor([-1.5] * 16 + [1.36]), right)
    found = solve(base, delta, lambda scaled: known_triplets(scaled, seeded()))
    check(found, base, delta)
    assert int((found.similarity < 0.5).sum()) == 1


def test_a_delta_without_factors_and_a_rank_of_many() -> None:
    base, delta = problem((360, 360))
    wide = delta + LowRank(torch.zeros(360, 60), torch.randn(360, 60, generator=seeded(5)))
    for given in (Dense(delta.dense()), wide):
        check(solve(base, given, lambda scaled: known_triplets(scaled, seeded())), base, given)


@pytest.mark.parametrize("shape", SHAPES)
def test_triplets_of_another_matrix_settle_nothing_and_do_no_harm(shape: tuple[int, int]) -> None:
    base, delta = problem(shape)
    other = known_triplets(problem(shape, seed=9)[0], seeded())
    mixed = KnownTriplets(other.U, known_triplets(base, seeded()).S[: len(other.S)], other.V)
    for known in (other, mixed):
        check(solve(base, delta, lambda _, known=known: known), base, delta)


def test_a_bound_holds_from_triplets_that_are_wrong() -> None:
    """A direction that is a base vector, in a space that begins with triplets which hide that vector: nothing is claimed."""
    matrix = spectrum_matrix(300, 300, falling(300)).float()
    base = Dense(matrix)
    true = known_triplets(base, seeded())
    turned = torch.linalg.qr(torch.randn(300, len(true.S), generator=seeded(1))).Q
    U0 = np.linalg.svd(matrix.double().numpy(), full_matrices=False)[0]
    U = torch.tensor(U0[:, [0, 5, 50]]).float()
    for known in (KnownTriplets(turned, true.S, turned), KnownTriplets(true.U[:, [1]], true.S[:1], true.V[:, [1]])):
        process = OverlapProcess(base, U, seeded(2), known=known)
        for _ in range(8):
            process.step()
        bounds = process.bounds(0.5, final=True)
        assert bool((bounds.high > 0.999).all())
