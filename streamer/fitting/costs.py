"""Count the multiplications that a fit takes, chunk by chunk, for its progress and its forecast."""

from __future__ import annotations

from dataclasses import dataclass

from streamer.evaluation.sequences import TextSequences
from streamer.fitting.algorithm import EXPECTED
from streamer.fitting.prepare import PreparedFit
from streamer.fitting.result import SHRINKS

GRADIENT = 4
"""Passes over the base's weights for a gradient: the model that is compared with, the fitted one, and it once more and back by layer."""

MOST_MEASURED = max([len(SHRINKS), *(asked for asked in EXPECTED if not isinstance(asked, str))])
"""Models that are measured together, at most, beside the base."""


@dataclass(frozen=True)
class Costs:
    """Multiplications of each chunk that is expected: of gradients, and of passes over the sequences held apart."""

    gradients: list[int]
    passes: list[int]


def chunk_cost(prepared: PreparedFit, text: TextSequences, passes: int) -> int:
    """Count the multiplications of so many passes over sequences that run together."""
    return sum(prepared.model.size.products.values()) * passes * len(text.ids) * text.longest


def gradient_costs(prepared: PreparedFit, text: str) -> list[int]:
    """Count those of each chunk of a gradient on a text."""
    fitted = prepared.texts[text].fitted
    return [chunk_cost(prepared, fitted.take(rows), GRADIENT) for rows in prepared.chunks[text]]


def pass_costs(prepared: PreparedFit, variants: int) -> list[int]:
    """Count those of each pass over the sequences held apart, under so many variants, the base among them."""
    return [
        chunk_cost(prepared, prepared.texts[one.text].held.take(one.sequences), 1 + len(one.variants))
        for one in prepared.passes(variants)
    ]


def expected_costs(prepared: PreparedFit) -> Costs:
    """Count those of a whole fit, as far as the algorithm tells what it will ask for."""
    costs = Costs([], [])
    for asked in EXPECTED:
        if isinstance(asked, str):
            costs.gradients.extend(gradient_costs(prepared, asked))
        else:
            costs.passes.extend(pass_costs(prepared, 1 + asked))
    costs.passes.extend(pass_costs(prepared, 1 + len(SHRINKS)))
    return costs
