"""Assign a parameter to each singular direction of each delta, and convert coefficients and gradients between the two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamer.errors import UnsupportedError
from streamer.events import Event, Monitor
from streamer.fitting.options import FitOptions, Grain
from streamer.linalg.torch_state import threads
from streamer.methods.coefficient_set import CoefficientSet, Floats, MatrixCoefficients, directions, groups
from streamer.plan.plan import Plan
from streamer.units import counted


@dataclass(frozen=True, eq=False)
class Parameters:
    """The parameters of a fit, θ (P,), and the coefficients that they determine.

    Attributes
    ----------
    singular_values
        (p,) singular values of each matrix, by `Target.tensor`; see `coefficients.directions`.
    numbers
        (p,) index of each direction's parameter; −1 for a direction without effect, whose coefficient stays 1.
    count
        P, the number of parameters.
    """

    singular_values: Mapping[str, Floats]
    numbers: Mapping[str, NDArray[np.int64]]
    count: int

    @classmethod
    def of(cls, singular_values: Mapping[str, Floats], grain: Grain) -> Parameters:
        """Number the parameters: by cluster of singular values, by matrix, or one for all.

        >>> s = {"q": np.array([2.0, 2.0, 1.0]), "v": np.array([1.0, 0.0])}
        >>> [Parameters.of(s, grain).numbers["q"].tolist() for grain in ("direction", "matrix", "all")]
        [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
        >>> [Parameters.of(s, grain).numbers["v"].tolist() for grain in ("direction", "matrix", "all")]
        [[2, -1], [1, -1], [0, -1]]
        """
        numbers, count = {}, 0
        for tensor, s in singular_values.items():
            own = groups(s)
            if grain != "direction":
                own = np.minimum(own, 0)
            first = 0 if grain == "all" else count
            numbers[tensor] = np.where(own >= 0, own + first, -1)
            count = max(count, int(numbers[tensor].max(initial=-1)) + 1)
        return cls(singular_values, numbers, count)

    def coefficients(self, theta: Floats) -> dict[str, Floats]:
        """Return the coefficients (p,) of each matrix for parameters θ (P,)."""
        values = np.append(theta, 1.0)  # index −1 is the last
        return {tensor: values[own] for tensor, own in self.numbers.items()}

    def coefficient_set(self, keep: float, theta: Floats) -> CoefficientSet:
        """Make the set of coefficients for parameters θ (P,) and the share of the learning that they keep."""
        values = self.coefficients(theta)
        return CoefficientSet(
            keep, {tensor: MatrixCoefficients(s, values[tensor]) for tensor, s in self.singular_values.items()}
        )

    def gather(self, gradient: Mapping[str, Floats]) -> Floats:
        """Convert a gradient by the coefficients (p,) of each matrix into the gradient (P,) by the parameters."""
        out = np.zeros(self.count + 1)
        for tensor, own in self.numbers.items():
            np.add.at(out, own, gradient[tensor])
        return out[:-1]


def singular_values_of(plan: Plan, monitor: Monitor) -> dict[str, Floats]:
    """Compute the singular values of every delta, in the order of the plan's targets, checking for a request to stop between deltas.

    Raises
    ------
    NumericError
        If a delta holds NaN or Inf.
    """
    found = {}
    with threads():  # for the same bits on any number of cores
        for target in plan.targets:
            monitor.checkpoint()
            found[target.tensor] = directions(plan.finite_delta(target))
    return found


def chosen_grain(plan: Plan, options: FitOptions, monitor: Monitor) -> Grain:
    """Choose what is fitted, if the options do not: right factors to inputs, or coefficients if a delta has no factors.

    Raises
    ------
    UnsupportedError
        If inputs are requested but a delta has no factors.
    """
    dense = [target.tensor for target in plan.targets if not target.module.low_rank]
    if not dense:
        return options.grain or "inputs"
    what = f"the deltas of {counted(len(dense), 'matrix')} have no factors, {dense[0]!r} first"
    if options.grain == "inputs":
        raise UnsupportedError(
            f"{plan.adapter.path}: {what}, and grain 'inputs' changes factors; use grain 'direction'"
        )
    if options.grain is None:
        monitor.emit(Event("note", f"{what}: coefficients by direction are fitted"))
    return options.grain or "direction"
