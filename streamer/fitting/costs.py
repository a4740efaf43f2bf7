"""Count the multiplications that a fit needs, chunk by chunk, for its progress and its forecast."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from streamer.evaluation.steps import answered
from streamer.fitting.algorithm import Answer, Gradient, HeldOutAnswer, Request, Slope, fit_steps
from streamer.fitting.groups import divided, group_costs
from streamer.fitting.options import CORRECTIONS, WEIGHTS, FitOptions
from streamer.fitting.prepare import PreparedFit
from streamer.fitting.result import SHRINKS
from streamer.measuring.progress import pass_cost
from streamer.measuring.sequences import GENERAL, TASK
from streamer.measuring.statistics import SequenceSums
from streamer.streaming.streams import GENERAL_AS, GENERAL_CORRECTED, TASK_AS, TASK_CORRECTED

GRADIENT = 3
"""Passes over the base's weights for a gradient: one forward, then, from the last layer to the first, forward again and backward. The first
gradient of a chunk needs one more, of the reference model."""


@dataclass(frozen=True)
class Costs:
    """Multiplications of each expected chunk: of gradients, and of passes over the held-out sequences.

    Attributes
    ----------
    variants
        Most models that run in such a pass, including the base.
    """

    gradients: list[int]
    passes: list[int]
    variants: int


def gradient_costs(prepared: PreparedFit, text: str) -> list[int]:
    """Count the multiplications of each chunk of a gradient on a text."""
    fitted = prepared.texts[text].fitted
    return [pass_cost(prepared.model.size, fitted.take(rows), GRADIENT, GRADIENT) for rows in prepared.chunks[text]]


def pass_costs(prepared: PreparedFit, variants: int) -> list[int]:
    """Count the multiplications of each pass over the held-out sequences with this many variants, including the base."""
    return [
        pass_cost(prepared.model.size, prepared.texts[one.text].held_out.take(one.sequences), 1 + len(one.variants))
        for one in prepared.passes(variants)
    ]


def expected_costs(prepared: PreparedFit) -> Costs:
    """Count the multiplications of a whole fit."""
    if prepared.by_inputs:
        return _costs_of_inputs(prepared)
    several, base_at_zero = prepared.parameters.count > 1, not prepared.unchanged
    measured = [2 + len(SHRINKS) - base_at_zero + len(prepared.scaling)]
    gradients: list[int] = []
    for asked in expected_requests(prepared.options, several, base_at_zero):
        if isinstance(asked, str):
            gradients += gradient_costs(prepared, asked)
        elif asked:
            measured.append(1 + asked)
    return Costs(gradients, [cost for count in measured for cost in pass_costs(prepared, count)], max(measured))


def _costs_of_inputs(prepared: PreparedFit) -> Costs:
    """Count the pass that collects inputs, the corrections, and the passes that measure shrinks, the grid, and each share twice."""
    count = len(prepared.options.keep)
    measured = [2 + len(SHRINKS) + len(prepared.scaling), 1 + len(WEIGHTS), *[1 + count] * 2]
    measured += [2] * (CORRECTIONS + 1) * count
    before = {GENERAL_AS: GENERAL, TASK_AS: TASK}
    again = {**before, GENERAL_CORRECTED: GENERAL, TASK_CORRECTED: TASK}
    once, corrected = (group_costs(prepared, divided(prepared, streams)) for streams in (before, again))
    collected = once + CORRECTIONS * count * corrected
    return Costs(collected, [cost for count in measured for cost in pass_costs(prepared, count)], max(measured))


@cache
def expected_requests(options: FitOptions, several: bool, base_at_zero: bool) -> tuple[str | int, ...]:
    """List the algorithm's requests: a text for its gradient, or a number of models to measure. They depend only on the options.

    Parameters
    ----------
    several
        Whether there is more than one coefficient.
    base_at_zero
        Whether coefficients of 0 give the base.
    """
    asked: list[str | int] = []

    def answer(request: Request) -> Answer:
        """Answer as quadratic functions of one or two coefficients would."""
        if isinstance(request, Gradient):
            asked.append(request.text)
            c = request.coefficients - (request.text == TASK)
            return Slope(float(c @ c) / 2, c)
        # With coefficients of 0 the model is the base, or was measured among the shrinks.
        asked.append(sum(bool(c.any()) for c in request.coefficients))
        rows = [np.zeros(1), np.ones(1), *request.coefficients]
        return HeldOutAnswer(_sums([row.mean() ** 2 for row in rows]), _sums([(row.mean() - 1) ** 2 for row in rows]))

    answered(fit_steps(options.of_algorithm(2 if several else 1, base_at_zero)), answer)
    return tuple(asked)


def _sums(losses: list[float]) -> SequenceSums:
    """Make sums of two equal sequences."""
    each = np.repeat(np.array(losses)[:, None], 2, 1)
    return SequenceSums(np.ones(2), each, each, each)
