"""Estimate the memory of a fit: of collecting inputs, and of solving between layers."""

from __future__ import annotations

from streamer.fitting.options import WEIGHTS
from streamer.linalg import conjugate_gradients, regmean
from streamer.measuring.pass_memory import TRANSFORMERS_BYTES
from streamer.plan.plan import Plan
from streamer.streaming.lazy import BLOCK_BYTES
from streamer.streaming.model import ModelSize
from streamer.streaming.spooled_inputs import ROWS as ROWS_OF_INPUTS

ROWS = 1024
"""Most tokens that run together unless a budget asks for fewer: reading the weights then needs less than a tenth of the time."""

ACTIVATIONS = 3
"""Values of one layer's activations, for each input or output of its matrices."""

STATES_OF_INPUTS = 2
"""Values of the model's width that stay for each token of both texts while inputs are collected: embeddings, and a layer's outputs."""

INPUT_COPIES = 4
"""Copies of inputs that are read together, in float32 units: one in float32, one in float64, and one more while they are joined."""


def states_bytes(size: ModelSize, resident: int, tokens: int) -> int:
    """Estimate the memory between two layers while inputs are collected, for this many tokens of both texts."""
    return resident + TRANSFORMERS_BYTES + STATES_OF_INPUTS * 4 * tokens * size.hidden


def collecting_bytes(size: ModelSize, rows: int, length: int) -> int:
    """Estimate the additional memory of running a layer on this many tokens together, in sequences of this length."""
    layer = 4 * rows * (ACTIVATIONS * size.layer_width + 2 * size.attention * length) + 3 * size.layer_factors
    return layer + 2 * min(BLOCK_BYTES, 4 * size.widest * size.hidden) + size.factors


def reading_bytes(plan: Plan) -> int:
    """Estimate the memory of reading inputs and computing with them."""
    return INPUT_COPIES * 4 * ROWS_OF_INPUTS * widest_input(plan)


def widest_input(plan: Plan) -> int:
    """Return the number of inputs of the widest matrix that multiplies them."""
    return max((t.module.shape[1] for t in plan.targets if not t.is_embedding), default=0)


def solving_bytes(plan: Plan, memory: int) -> int:
    """Estimate the memory to solve for factors between two layers, if matrices of moments may use `memory` bytes."""
    most = 0
    for n, count in columns_of_inputs(plan):
        by_products = conjugate_gradients.solving_bytes(n, count, len(WEIGHTS))
        most = max(most, regmean.matrices_bytes(n) if regmean.is_direct(n, memory) else by_products)
    return most + reading_bytes(plan)


def columns_of_inputs(plan: Plan) -> list[tuple[int, int]]:
    """List the number of inputs that modules share, and the number of columns of their right factors together."""
    columns: dict[tuple[str, str, int], int] = {}
    for target in plan.targets:
        if not target.is_embedding:  # embeddings look rows up
            # Modules with as many inputs in one parent module may share them.
            parent, _, name = target.tensor.removesuffix(".weight").rpartition(".")
            key = parent, name.partition("[")[2], target.module.shape[1]
            columns[key] = columns.get(key, 0) + target.module.factor_rank
    return [(n, count) for (*_, n), count in columns.items()]
