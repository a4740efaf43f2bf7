"""Solvers: what they answer, when the certified one gives up, and that nothing non-finite reaches them; decisions by the dense formula."""

import numpy as np
import pytest
import torch
from helpers import detect, intruding_factors, power_law, spectrum_matrix
from planted import oracle, problem
from seeds import vary

from streamer.detection import intruders
from streamer.detection.intruders import Detection
from streamer.detection.options import DetectionOptions
from streamer.detection.solvers import SOLVERS, SolverResult, Way, cheaper, cost, working_bytes
from streamer.errors import NumericError, UsageError
from streamer.linalg.operators import Dense, LowRank, RowBlocks
from streamer.methods import make_method

SHAPES = [(150, 200), (200, 150), (160, 160)]


def solve(
    name: str, base: Dense, delta: LowRank, k: int = 10, epsilon: float = 0.5, seed: int = 0
) -> SolverResult:
    return SOLVERS[name](base, delta, k, epsilon, torch.Generator().manual_seed(vary(seed)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SOLVERS)
def test_triplets_and_intervals_are_right(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    base, delta = problem(*shape, dtype)
    found = solve(name, base, delta)
    U, S, _, similarity = oracle(base, delta)
    assert found.solver == name
    assert not found.escalated
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(
        found.triplets.S, S, rtol=100 * eps if dtype == torch.float32 else 1e-9
    )
    assert float(found.triplets.residuals.max()) < 1e-4
    angle = 1 - np.abs((found.triplets.U.double().numpy() * U).sum(0))
    assert (angle <= found.triplets.angle_error_estimate.numpy() ** 2 + 50 * eps).all()
    assert (found.bounds.low.numpy() <= similarity + 1e-5).all()
    assert (found.bounds.high.numpy() >= similarity - 1e-5).all()
    assert bool(((found.bounds.low >= 0.5) | (found.bounds.high < 0.5)).all())
    assert (found.bounds.steps > 0) == (found.bounds.products > 0) == (name == "certified")
    of_base = np.linalg.svd(base.matrix.double().numpy(), compute_uv=False)[:10]
    values = found.bounds.values.numpy()
    assert (values <= of_base * (1 + 100 * eps)).all()
    np.testing.assert_allclose(values, of_base, rtol=0.05 if name == "certified" else 100 * eps)


def test_values_of_a_base_are_on_its_own_scale() -> None:
    base, delta = problem(96, 64)
    usual = solve("certified", base, delta).bounds.values
    small = solve(
        "certified", Dense(base.matrix * 2.0**-40), LowRank(delta.L * 2.0**-40, delta.R)
    ).bounds.values
    np.testing.assert_allclose(small, usual * 2.0**-40, rtol=1e-5)
    assert solve("dense", Dense(torch.zeros(96, 64)), delta).bounds.values.tolist() == [0.0] * 10


@pytest.mark.parametrize("shape", SHAPES)
def test_same_seed_same_bits_another_seed_the_same_decisions(shape: tuple[int, int]) -> None:
    base, delta = problem(*shape)
    first, again, other = (solve("certified", base, delta, seed=seed) for seed in (0, 0, 1))
    for name in ("low", "high"):
        assert torch.equal(getattr(first.bounds, name), getattr(again.bounds, name))
    assert torch.equal(first.similarity, again.similarity)
    for name in ("U", "S", "Vh", "residuals"):
        assert torch.equal(getattr(first.triplets, name), getattr(again.triplets, name))
    assert torch.equal(first.similarity < 0.5, other.similarity < 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2.0**-140, 2.0**-100, 2.0**120])
@pytest.mark.parametrize("name", SOLVERS)
def test_decisions_do_not_depend_on_the_scale_of_the_matrix(
    name: str, size: float, dtype: torch.dtype
) -> None:
    """2⁻¹⁴⁰ makes float32 subnormal: the power of two that would undo it overflows."""
    base, delta = problem(150, 200, dtype)
    usual = solve(name, base, delta)
    base = Dense(base.matrix * size)
    delta = LowRank(delta.L * size, delta.R)
    found = solve(name, base, delta)
    _, S, _, _ = oracle(base, delta)
    np.testing.assert_allclose(
        found.triplets.S.double() / size, S / size, rtol=1e-2 if size < 2.0**-126 else 1e-5
    )
    assert torch.equal(found.similarity < 0.5, usual.similarity < 0.5)
    assert bool(torch.isfinite(found.triplets.residuals).all())


@pytest.mark.parametrize("ratio", [1e3, 1e15, 1e25])
def test_a_base_far_below_the_delta_is_judged_on_its_own_scale(ratio: float) -> None:
    """Squares of the base's entries would vanish in float32 at the delta's scale."""
    base, delta = problem(160, 160)
    base = Dense(base.matrix / ratio)
    found = solve("certified", base, delta, k=1)
    similarity = oracle(base, delta, 1)[3]
    assert found.solver == "certified"
    assert float(found.bounds.low[0]) - 1e-5 <= similarity[0] <= float(found.bounds.high[0]) + 1e-5


@pytest.mark.parametrize(
    ("base", "k"),
    [
        (torch.zeros(60, 80), 10),
        (power_law(60, 80), 55),
        (power_law(12, 80), 10),
        (torch.eye(60, 80), 10),
    ],
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
    def reached(*_: object) -> SolverResult:
        raise AssertionError("a solver was called")

    monkeypatch.setattr(intruders, "SOLVERS", dict.fromkeys(SOLVERS, reached))
    base, delta = problem(40, 50)
    {"base": base.matrix, "lora_B": delta.L, "lora_A": delta.R}[where][-1, -1] = bad
    with pytest.raises(
        NumericError,
        match=f"{where}.* holds NaN or Inf" if where != "base" else "the base matrix holds",
    ):
        detect(base, delta, DetectionOptions(solver=solver))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sum_that_overflows_is_refused(solver: str) -> None:
    base = Dense(torch.full((40, 50), 3e38))
    delta = LowRank(torch.full((40, 1), 3e38), torch.ones(50, 1))
    with pytest.raises(NumericError):
        detect(base, delta, DetectionOptions(solver=solver))


def stored_in_bf16(base: Dense) -> tuple[Dense, RowBlocks]:
    """The base rounded to bf16, in memory and by blocks of rows that refuse to be formed."""
    raw = base.matrix.bfloat16()

    class Unformed(RowBlocks):
        def dense(self) -> torch.Tensor:
            raise AssertionError("formed")

    return Dense(raw.float()), Unformed(
        (len(raw), raw.shape[1]), lambda i, j: raw[i:j], torch.empty(0)
    )


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (320, 320)])
def test_without_a_copy_of_the_matrix_the_answer_is_the_same(shape: tuple[int, int]) -> None:
    base, delta = problem(*shape)
    copied, blocks = stored_in_bf16(base)
    _, S, _, similarity = oracle(copied, delta)
    found = SOLVERS["certified"](
        blocks, delta, 10, 0.5, torch.Generator().manual_seed(vary(0)), False
    )
    assert found.solver == "certified"
    np.testing.assert_allclose(found.triplets.S, S, rtol=1e-5)
    assert (found.bounds.low.numpy() <= similarity + 1e-5).all()
    assert (found.bounds.high.numpy() >= similarity - 1e-5).all()
    assert bool(((found.bounds.low >= 0.5) | (found.bounds.high < 0.5)).all())
    assert torch.equal(found.similarity < 0.5, torch.from_numpy(similarity < 0.5))


@pytest.mark.parametrize("shape", [(600, 700), (700, 600)])
def test_what_only_the_dense_solver_could_settle_stays_open_where_there_is_no_room_for_it(
    shape: tuple[int, int],
) -> None:
    """A direction that leans on one vector deep in the bulk by 0.49, and ε = 0.5: no bound of few steps can tell."""
    W0 = spectrum_matrix(*shape, torch.linspace(1.5, 1, min(shape)))
    U0 = torch.linalg.svd(W0, full_matrices=False).U
    u = torch.randn(shape[0], generator=torch.Generator().manual_seed(vary(1)), dtype=torch.float64)
    u -= U0[:, 300] * (U0[:, 300] @ u)
    u = 0.49 * U0[:, 300] + (1 - 0.49**2) ** 0.5 * u / u.norm()
    v = torch.nn.functional.normalize(
        torch.randn(shape[1], 1, generator=torch.Generator().manual_seed(vary(2))), dim=0
    )
    _, blocks = stored_in_bf16(Dense(W0.float()))
    delta = LowRank(40 * u[:, None].float(), v)
    found = SOLVERS["certified"](
        blocks, delta, 1, 0.5, torch.Generator().manual_seed(vary(0)), False
    )
    assert found.solver == "certified"
    assert float(found.bounds.low[0]) < 0.5 <= float(found.bounds.high[0])
    assert float(found.similarity[0]) >= 0.5  # not proven to be an intruder, so not called one
    assert found.limited  # for want of steps, not of precision
    allowed = solve("certified", Dense(W0.float()), delta, k=1)
    assert allowed.solver == "dense"
    assert float(allowed.similarity[0]) == pytest.approx(0.49, abs=0.02)


@pytest.mark.parametrize("shape", [(340, 200), (200, 340)])
@pytest.mark.parametrize("k", [1, 30])
def test_without_room_for_it_no_path_forms_the_matrix(shape: tuple[int, int], k: int) -> None:
    """Stored as it is used, and the other way round, as Conv1D does; a base of zeros; a base without rank."""
    base, delta = problem(*shape)
    low_rank = Dense(base.matrix[:, :40] @ base.matrix[:40])
    for matrix in (base, Dense(torch.zeros(shape)), low_rank):
        _, blocks = stored_in_bf16(matrix)
        _, flipped = stored_in_bf16(Dense(matrix.matrix.T.contiguous()))
        for stored in (blocks, flipped.T):
            found = SOLVERS["certified"](
                stored, delta, k, 0.5, torch.Generator().manual_seed(vary(0)), False
            )
            assert found.solver == "certified"
            assert len(found.bounds.low) == k


def test_the_ways_that_memory_leaves() -> None:
    large = working_bytes((8192, 28672), 10, 16, 4)
    assert large[Way.BLOCKS] < 400e6  # with the process itself below 600 MB
    assert large[Way.WHOLE] < 8192 * 28672 * 4 * 1.25 + 350e6
    assert list(large) == [Way.DENSE, Way.WHOLE, Way.BLOCKS]
    assert large[Way.DENSE] > large[Way.WHOLE] > large[Way.BLOCKS]
    assert list(working_bytes((300, 400), 295, 8, 4)) == [Way.DENSE]  # no room for Krylov
    # A dense delta is a matrix more, and another one while it is formed; it is never multiplied from the disk.
    assert list(working_bytes((8192, 28672), 10, None, 4)) == [Way.DENSE, Way.WHOLE]
    assert (
        working_bytes((8192, 28672), 10, None, 4)[Way.WHOLE] - large[Way.WHOLE]
        > 1.9 * 4 * 8192 * 28672
    )
    base, delta = problem(300, 400)
    assert detect(base, delta, DetectionOptions()).solver == "dense"
    assert detect(base, delta, DetectionOptions(), allow_dense=False).solver == "certified"


def test_the_cost_follows_the_solver_that_runs() -> None:
    """Certified by the products with the matrix, dense by the cube; a forced solver counts as itself."""
    assert (
        cost((8192, 8192), 10)
        == cost((8192, 8192), 10, "certified")
        < cost((8192, 8192), 10, "dense") / 100
    )
    assert cost((300, 300), 10) == cost((300, 300), 10, "dense")
    assert 1.8 < cost((16384, 8192), 10) / cost((8192, 8192), 10) < 2.2
    assert cost((8192, 8192), 40) > 2.5 * cost((8192, 8192), 10)


def test_the_planted_intruder_is_found_with_its_energy() -> None:
    base, delta = problem(80, 80)
    found = detect(base, delta, DetectionOptions())
    assert found.intruders == (1,)  # 0.8 lies between the base's 1 and 0.616
    U, S, Vh, _ = oracle(base, delta)
    np.testing.assert_allclose(np.abs(found.U.numpy().T @ U[:, [1]]), 1, atol=1e-5)
    np.testing.assert_allclose(
        (found.U * found.S) @ found.Vh, (U[:, [1]] * S[1]) @ Vh[[1]], atol=1e-5
    )
    energy = (
        np.linalg.norm(U[:, [1]].T @ delta.dense().numpy()) ** 2
        / np.linalg.norm(delta.dense()) ** 2
    )
    assert found.intruder_energy == pytest.approx(energy, rel=1e-4)
    assert found.delta_norm == pytest.approx(float(np.linalg.norm(delta.dense())), rel=1e-6)
    assert found.certified
    assert found.degenerate == ()


def test_a_degenerate_cluster_is_said() -> None:
    base = Dense(spectrum_matrix(40, 40, torch.ones(40)).float())
    A, B = intruding_factors(40, 40, 2)
    found = detect(base, LowRank(B * 1e-9, A.T), DetectionOptions())
    assert len(found.degenerate) >= 9
    assert not found.certified


def test_zero_delta_changes_nothing() -> None:
    base, delta = problem(64, 64)
    zero = LowRank(torch.zeros_like(delta.L), delta.R)
    found = detect(base, zero, DetectionOptions())
    assert found.intruders == ()
    assert found.delta_norm == 0
    assert found.intruder_energy == 0


def test_rank_above_the_matrix_and_one_row() -> None:
    for m, n in ((3, 50), (1, 9), (9, 1)):
        A, B = intruding_factors(m, n, 8)
        found = detect(Dense(power_law(m, n).float()), LowRank(B, A.T), DetectionOptions())
        assert len(found.singular_values) == min(m, n)
        assert isinstance(found, Detection)


def test_top_k_as_a_count_or_a_share() -> None:
    assert DetectionOptions(top_k=10).directions((64, 4)) == 4
    assert DetectionOptions(top_k=0.25).directions((64, 80)) == 16
    assert DetectionOptions(top_k=0.001).directions((64, 80)) == 1
    assert DetectionOptions(top_k=1.0).directions((64, 80)) == 64
    assert DetectionOptions(top_k=1).directions((64, 80)) == 1
    base, delta = problem(64, 80)
    assert len(detect(base, delta, DetectionOptions(top_k=0.5)).singular_values) == 32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (lambda: DetectionOptions(top_k=0), "top_k: expected a count from 1, or a share"),
        (lambda: DetectionOptions(top_k=1.5), "top_k"),
        (lambda: DetectionOptions(top_k=True), "top_k"),
        (
            lambda: DetectionOptions(threshold_epsilon=0),
            r"threshold_epsilon: expected a number in \(0, 1\]",
        ),
        (lambda: DetectionOptions(threshold_epsilon=float("nan")), "threshold_epsilon"),
        (
            lambda: DetectionOptions(threshold_epsilon="0.5"),
            r"threshold_epsilon: expected a number in .*, found '0.5'",
        ),
        (
            lambda: DetectionOptions(solver="magic"),
            "solver: expected one of auto, certified, dense",
        ),
        (
            lambda: make_method("papre", mitigation_lambda=0.5),
            "method: expected one of paper, project, shrink",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        options()
