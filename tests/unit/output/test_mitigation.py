"""Mitigated deltas of one matrix: λ and back-projection, against the dense formula in float64."""

import itertools

import numpy as np
import pytest
import torch
from helpers import detect, power_law
from planted import oracle, problem

from streamer.detection.options import DetectionOptions
from streamer.linalg.operators import Dense
from streamer.methods import METHODS, Paper, Project, Shrink
from streamer.output.factors import back_project

SHAPES = [(96, 64), (64, 96), (80, 80), (61, 67)]


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.75, 1.5, -0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_paper_and_project_are_their_formulas(shape: tuple[int, int], lam: float) -> None:
    base, delta = problem(*shape)
    found = detect(base, delta, DetectionOptions())
    assert found.intruders
    U, S, Vh, _ = oracle(base, delta)
    I = list(found.intruders)  # noqa: E741
    D = delta.dense().double().numpy()
    paper = Paper(lam, amplify=True).mitigated(delta, found)
    np.testing.assert_allclose(paper.dense(), D + (lam - 1) * (U[:, I] * S[I]) @ Vh[I], atol=2e-5)
    project = Project(lam, amplify=True).mitigated(delta, found)
    np.testing.assert_allclose(
        project.dense(), D - (1 - lam) * U[:, I] @ (U[:, I].T @ D), atol=2e-5
    )
    assert project.rank == delta.rank
    assert project.R is not delta.L
    torch.testing.assert_close(project.R, delta.R.double(), rtol=0, atol=0)
    shrink = Shrink(lam, amplify=True).mitigated(delta, None)
    np.testing.assert_allclose(
        shrink.dense(), lam * D, rtol=1e-6, atol=1e-7
    )  # D was formed in float32


def test_lambda_one_and_no_intruders_give_the_delta_itself() -> None:
    base, delta = problem(64, 64)
    found = detect(base, delta, DetectionOptions())
    for method in ("paper", "project", "shrink"):
        assert METHODS[method](1.0).mitigated(delta, found) is delta
    quiet = detect(base, delta.scaled(1e-6), DetectionOptions())
    assert quiet.intruders == ()
    assert Paper(0.0).mitigated(delta, quiet) is delta


def test_first_scales_only_the_highest_ranked() -> None:
    base = Dense(power_law(80, 80).float())
    deltas = (
        problem(80, 80, seed=i)[1].scaled(1.8) + problem(80, 80, seed=i + 1)[1]
        for i in itertools.count(1)
    )
    delta = next(d for d in deltas if (oracle(base, d)[3] < 0.5).sum() == 2)
    found = detect(base, delta, DetectionOptions())
    assert len(found.intruders) == 2
    U, S, Vh, _ = oracle(base, delta)
    j = found.intruders[0]
    after = Paper(0.0, "first").mitigated(delta, found)
    np.testing.assert_allclose(
        after.dense(), delta.dense().numpy() - S[j] * np.outer(U[:, j], Vh[j]), atol=2e-5
    )


@pytest.mark.parametrize("rank", [1, 4])
def test_back_projection_is_the_nearest_of_its_rank_and_says_what_it_dropped(rank: int) -> None:
    base, delta = problem(96, 64)
    found = detect(base, delta, DetectionOptions(), rank=rank)
    after = Paper(0.0).mitigated(delta, found)
    B, A, dropped = back_project(after, rank, scaling=2.5)
    D = after.dense().numpy()
    U, S, Vh = np.linalg.svd(D, full_matrices=False)
    np.testing.assert_allclose(2.5 * B @ A, (U[:, :rank] * S[:rank]) @ Vh[:rank], atol=1e-9)
    assert dropped == pytest.approx(np.linalg.norm(S[rank:]) / np.linalg.norm(S), abs=1e-9)
    assert dropped > 0
    assert found.dropped_at_zero == pytest.approx(dropped, rel=1e-4)


def test_back_projection_at_a_rank_that_suffices_is_exact() -> None:
    _, delta = problem(30, 20)
    B, A, dropped = back_project(delta, 4, 0.5)
    assert dropped == 0
    torch.testing.assert_close(0.5 * B @ A, delta.dense().double(), rtol=1e-6, atol=1e-7)
