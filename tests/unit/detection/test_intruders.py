"""Decisions on one matrix, against the dense formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import intruding_factors, power_law, spectrum_matrix
from planted import oracle, problem

from streamer.detection.intruders import Detection, detect
from streamer.detection.options import DetectionOptions
from streamer.errors import NumericError, UsageError
from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Dense
from streamer.methods import make_method

SHAPES = [(96, 64), (64, 96), (80, 80), (61, 67)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("epsilon", [0.1, 0.3, 0.5, 0.8])
def test_decisions_equal_the_dense_formula(shape: tuple[int, int], dtype: torch.dtype, epsilon: float) -> None:
    for seed in range(3):
        base, delta = problem(*shape, dtype, seed)
        found = detect(base, delta, DetectionOptions(threshold_epsilon=epsilon))
        _, S, _, similarity = oracle(base.matrix, delta.dense(), 10)
        np.testing.assert_allclose(found.singular_values, S, rtol=1e-5)
        assert all(
            low - 1e-4 <= s <= high + 1e-4
            for low, s, high in zip(found.similarity_low, similarity, found.similarity_high, strict=True)
        )
        clear = np.flatnonzero(np.abs(similarity - epsilon) > 1e-4)
        assert [j for j in found.intruders if j in clear] == [j for j in clear if similarity[j] < epsilon]


def test_the_planted_intruder_is_found_with_its_energy() -> None:
    base, delta = problem(80, 80)
    found = detect(base, delta, DetectionOptions())
    assert found.intruders == (1,)  # 0.8 lies between the base's 1 and 0.616
    U, S, Vh, _ = oracle(base.matrix, delta.dense(), 10)
    np.testing.assert_allclose(np.abs(found.U.numpy().T @ U[:, [1]]), 1, atol=1e-5)
    np.testing.assert_allclose((found.U * found.S) @ found.Vh, (U[:, [1]] * S[1]) @ Vh[[1]], atol=1e-5)
    energy = np.linalg.norm(U[:, [1]].T @ delta.dense().numpy()) ** 2 / np.linalg.norm(delta.dense()) ** 2
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


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_decisions_do_not_depend_on_the_scale(scale: float) -> None:
    base, delta = problem(64, 80)
    found = detect(Dense(base.matrix * scale), delta.scaled(scale), DetectionOptions())
    assert found.intruders == detect(base, delta, DetectionOptions()).intruders
    assert found.certified


def test_zero_delta_changes_nothing() -> None:
    base, delta = problem(64, 64)
    zero = LowRank(torch.zeros_like(delta.L), delta.R)
    found = detect(base, zero, DetectionOptions())
    assert found.intruders == ()
    assert found.delta_norm == 0
    assert found.intruder_energy == 0


@pytest.mark.parametrize(
    ("where", "bad"), [("base", float("nan")), ("base", float("inf")), ("B", float("nan")), ("A", -float("inf"))]
)
def test_non_finite_inputs_are_found_before_the_solver(where: str, bad: float) -> None:
    base, delta = problem(20, 30)
    what = {"base": "the base matrix", "B": "lora_B", "A": "lora_A"}[where]
    {"base": base.matrix, "B": delta.L, "A": delta.R}[where][0, 1] = bad
    with pytest.raises(NumericError, match=f"{what} holds NaN or Inf"):
        detect(base, delta, DetectionOptions())


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
        (lambda: DetectionOptions(threshold_epsilon=0), r"threshold_epsilon: expected a number in \(0, 1\]"),
        (lambda: DetectionOptions(threshold_epsilon=float("nan")), "threshold_epsilon"),
        (lambda: DetectionOptions(threshold_epsilon="0.5"), r"threshold_epsilon: expected a number in .*, found '0.5'"),
        (lambda: DetectionOptions(solver="magic"), "solver: expected one of auto, certified, dense"),
        (lambda: make_method("papre", 0.5), "method: expected one of paper, project, shrink"),
        (lambda: make_method("paper", 0.5, "some"), "select: expected one of all, first"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        options()
