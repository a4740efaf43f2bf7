"""Estimate the memory of a gradient pass, and divide a text's sequences into chunks that run together."""

from __future__ import annotations

from streamer.fitting.options import WEIGHTS
from streamer.linalg import conjugate_gradients, regmean
from streamer.measuring.pass_memory import TRANSFORMERS_BYTES, parts, rows_within
from streamer.measuring.sequences import TextSequences
from streamer.plan.plan import Plan
from streamer.streaming.gradients import GRADIENT_LOGIT_BYTES
from streamer.streaming.lazy import BLOCK_BYTES
from streamer.streaming.model import ModelSize, vocabulary_block
from streamer.streaming.spooled_inputs import ROWS as ROWS_OF_INPUTS

ROWS = 1024
"""Tokens that run together where no budget asks for fewer: reading the weights is then less than a tenth of the time."""

LOGIT_COPIES = 8
"""As much memory as the logits that exist at once takes what is computed from them and for their gradient, themselves among it."""

ACTIVATIONS = 3
"""Values that one layer's activations and their gradients take, for each input or output of its matrices."""

STATES_OF_INPUTS = 2
"""Values as wide as the model that stay for each token of both texts as inputs are collected: embeddings, and a layer's outputs."""

INPUT_COPIES = 4
"""Inputs that are read together are there once in float32, and in float64, and once more as they are joined."""

STATES = 6
"""Values as wide as the model that exist at once for each token: last hidden states, the reference's, their gradients, and what is read."""


def gradient_bytes(size: ModelSize, resident: int, rows: int, length: int) -> int:
    """Estimate the peak memory of a gradient pass; it does not depend on the number of layers.

    Parameters
    ----------
    resident
        Bytes between two steps; see `plan.memory_estimate.resident_bytes`.
    rows
        Tokens that run together.
    length
        Tokens of a sequence.
    """
    layer = 4 * rows * (ACTIVATIONS * size.layer_width + 2 * size.attention * length) + 3 * size.layer_factors
    block = min(size.vocabulary, vocabulary_block(rows, GRADIENT_LOGIT_BYTES))
    logits = LOGIT_COPIES * 4 * rows * block
    weights = 2 * min(BLOCK_BYTES, 4 * max(size.widest, block) * size.hidden)
    states = 4 * rows * STATES * size.hidden
    return resident + TRANSFORMERS_BYTES + max(layer, logits) + states + weights + size.dense + size.factors


def states_bytes(size: ModelSize, resident: int, tokens: int) -> int:
    """Estimate the memory between two layers as inputs are collected, for so many tokens of both texts."""
    return resident + TRANSFORMERS_BYTES + STATES_OF_INPUTS * 4 * tokens * size.hidden


def collecting_bytes(size: ModelSize, rows: int, length: int) -> int:
    """Estimate what running a layer takes besides, for so many tokens together, in sequences of a length."""
    layer = 4 * rows * (ACTIVATIONS * size.layer_width + 2 * size.attention * length) + 3 * size.layer_factors
    return layer + 2 * min(BLOCK_BYTES, 4 * size.widest * size.hidden) + size.factors


def reading_bytes(plan: Plan) -> int:
    """Estimate what reading inputs takes, and computing with them."""
    return (
        INPUT_COPIES
        * 4
        * ROWS_OF_INPUTS
        * max((t.module.shape[1] for t in plan.targets if t.module.form != "embedding"), default=0)
    )


def solving_bytes(plan: Plan, memory: int) -> int:
    """Estimate what solving for factors takes between two layers, of which matrices of moments may take so much memory."""
    most = 0
    for n, count in columns_of_inputs(plan):
        by_products = conjugate_gradients.solving_bytes(n, count, len(WEIGHTS))
        most = max(most, regmean.matrices_bytes(n) if regmean.is_direct(n, memory) else by_products)
    return most + reading_bytes(plan)


def columns_of_inputs(plan: Plan) -> list[tuple[int, int]]:
    """List how many inputs modules share, and how many columns their right factors have together."""
    columns: dict[tuple[str, str, int], int] = {}
    for target in plan.targets:
        if target.module.form != "embedding":  # which looks rows up
            # Those with as many inputs in one module of the model may share them.
            parent, _, name = target.tensor.removesuffix(".weight").rpartition(".")
            key = parent, name.partition("[")[2], target.module.shape[1]
            columns[key] = columns.get(key, 0) + target.module.factor_rank
    return [(n, count) for (*_, n), count in columns.items()]


def plan_chunks(
    text: TextSequences, size: ModelSize, resident: int, max_memory: int | None, one_length: bool
) -> list[tuple[int, ...]]:
    """Divide sequences into chunks that fit the budget; long ones go together, so that little is padded.

    Parameters
    ----------
    one_length
        Whether only sequences of one length run together, without padding.

    Returns
    -------
    list of tuple of int
        Numbers of the sequences that run together.

    Raises
    ------
    UsageError
        If the budget does not hold the longest sequence; it names the smallest that does.
    """
    longest = text.longest
    most = rows_within(max_memory, longest, ROWS, lambda rows: gradient_bytes(size, resident, rows, longest),
                       f"the gradient on a sequence of {longest} tokens")  # fmt: skip
    return list(parts(text, range(len(text.ids)), most, size.short, one_length))
