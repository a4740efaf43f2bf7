"""Mean coefficients of intruders, against their formula in numpy and what they mean for the delta."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import problem

from streamer.detection.intruders import detect
from streamer.detection.options import DetectionOptions
from streamer.errors import MismatchError
from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Dense
from streamer.methods.coefficient_set import MatrixCoefficients, directions, fitted_delta
from streamer.output.intruder_coefficients import matrix_means, together


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_means_are_their_formula(shape: tuple[int, int]) -> None:
    base, delta = problem(*shape)
    found = detect(base, delta, DetectionOptions())
    U = found.U.double().numpy()
    assert U.shape[1] >= 1
    c = np.array([0.1, 0.9, 0.5, 1.0])
    means = matrix_means(delta, MatrixCoefficients(directions(delta), c), found.U, "x")
    D = delta.dense().double().numpy()
    left, s, _ = np.linalg.svd(D, full_matrices=False)
    w = (s[:4] * (U.T @ left[:, :4])) ** 2
    assert [one.mean for one in means.intruders] == pytest.approx(w @ c / w.sum(1), rel=1e-4)
    assert means.whole.mean == pytest.approx(float(s[:4] ** 2 @ c / (s[:4] ** 2).sum()), rel=1e-6)
    # The weights are energies: of the whole delta, and of what it puts on the intruders.
    assert means.whole.weights == pytest.approx(found.delta_norm**2, rel=1e-6)
    assert together(means.intruders).weights == pytest.approx(found.intruder_energy * found.delta_norm**2, rel=1e-4)
    # With coefficients of 0 and 1 the mean is the share of that energy that is left.
    keeps = np.array([0.0, 1.0, 1.0, 0.0])
    matrix = MatrixCoefficients(directions(delta), keeps)
    left_over = fitted_delta(delta, matrix, "x").projected_norm(found.U) ** 2 / delta.projected_norm(found.U) ** 2
    assert together(matrix_means(delta, matrix, found.U, "x").intruders).mean == pytest.approx(left_over, rel=1e-4)


def test_an_intruder_that_is_one_direction_has_its_coefficient() -> None:
    _, delta = problem(60, 50)
    U = delta.svd()[0][:, [2]]
    means = matrix_means(delta, MatrixCoefficients(directions(delta), np.array([1.0, 0.8, 0.25, 0.5])), U, "x")
    assert [one.mean for one in means.intruders] == pytest.approx([0.25])


def test_a_dense_delta_has_one_mean() -> None:
    base, delta = problem(60, 50)
    dense = Dense(delta.dense())
    found = detect(base, dense, DetectionOptions())
    means = matrix_means(dense, MatrixCoefficients(directions(dense), np.array([0.3])), found.U, "x")
    assert [means.whole.mean, *(one.mean for one in means.intruders)] == pytest.approx([0.3] * (1 + len(found.S)))
    assert together(means.intruders).weights == pytest.approx(found.intruder_energy * found.delta_norm**2, rel=1e-4)


def test_where_nothing_is_there_is_no_mean() -> None:
    zero = LowRank(torch.zeros(6, 2), torch.zeros(5, 2))
    means = matrix_means(zero, MatrixCoefficients(np.zeros(2), np.ones(2)), torch.eye(6)[:, :1], "x")
    assert (means.whole.mean, means.intruders[0].mean) == (None, None)
    assert together(()).mean is None


def test_coefficients_of_another_delta_are_refused() -> None:
    _, delta = problem(30, 20)
    with pytest.raises(MismatchError, match="they belong to another adapter"):
        matrix_means(delta, MatrixCoefficients(directions(delta) * 2, np.ones(4)), torch.eye(30)[:, :1], "x")
