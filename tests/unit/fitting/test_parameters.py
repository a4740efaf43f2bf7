"""Parameters of directions, of matrices, and one for all; coefficients and gradients are carried between the two."""

from __future__ import annotations

import numpy as np
import pytest
from seeds import vary

from streamer.fitting.parameters import Parameters

SPECTRA = {
    "q": np.array([3.0, 2.0, 2.0 * (1 - 1e-9), 1e-9]),
    "v": np.array([5.0]),
    "zero": np.zeros(2),
}


@pytest.mark.parametrize(("grain", "count", "q", "v"), [
    ("direction", 3, [0, 1, 1, -1], [2]),
    ("matrix", 2, [0, 0, 0, -1], [1]),
    ("all", 1, [0, 0, 0, -1], [0]),
])  # fmt: skip
def test_numbers(grain: str, count: int, q: list[int], v: list[int]) -> None:
    found = Parameters.of(SPECTRA, grain)  # type: ignore[arg-type]
    assert found.count == count
    assert {name: own.tolist() for name, own in found.numbers.items()} == {"q": q, "v": v, "zero": [-1, -1]}


def test_directions_that_do_nothing_keep_the_coefficient_1() -> None:
    found = Parameters.of(SPECTRA, "direction").coefficients(np.array([0.1, 0.2, 0.3]))
    assert {name: own.tolist() for name, own in found.items()} == {"q": [0.1, 0.2, 0.2, 1], "v": [0.3], "zero": [1, 1]}


@pytest.mark.parametrize("grain", ["direction", "matrix", "all"])
def test_a_gradient_is_gathered_by_the_chain_rule(grain: str) -> None:
    """⟨∇f(c), dc⟩ is the same in coefficients and in parameters."""
    parameters, rng = Parameters.of(SPECTRA, grain), np.random.default_rng(vary(0))  # type: ignore[arg-type]
    gradient = {name: rng.normal(size=len(s)) for name, s in SPECTRA.items()}
    theta, step = rng.uniform(size=parameters.count), rng.normal(size=parameters.count)
    before, after = parameters.coefficients(theta), parameters.coefficients(theta + step)
    along = sum(float(gradient[name] @ (after[name] - before[name])) for name in SPECTRA)
    assert parameters.gather(gradient) @ step == pytest.approx(along, rel=1e-12)


def test_a_set_of_coefficients() -> None:
    made = Parameters.of(SPECTRA, "all").coefficient_set(0.9, np.array([0.5]))
    assert (made.keep, list(made.matrices)) == (0.9, list(SPECTRA))
    assert made.matrices["q"].values.tolist() == [0.5, 0.5, 0.5, 1]
    assert made.matrices["q"].singular_values is SPECTRA["q"]


def test_of_deltas_that_are_zero_there_is_none() -> None:
    assert Parameters.of({"zero": np.zeros(2)}, "all").count == 0
