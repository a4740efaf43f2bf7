"""Estimate the memory of a gradient pass, and divide a text's sequences into chunks that run together."""

from __future__ import annotations

from streamer.evaluation.memory import TRANSFORMERS_BYTES, parts, rows_within
from streamer.evaluation.sequences import TextSequences
from streamer.streaming.gradients import GRADIENT_LOGIT_BYTES
from streamer.streaming.lazy import BLOCK_BYTES
from streamer.streaming.model import ModelSize, vocabulary_block

ROWS = 1024
"""Tokens that run together where no budget asks for fewer: reading the weights is then less than a tenth of the time."""

LOGIT_COPIES = 8
"""As much memory as the logits that exist at once takes what is computed from them and for their gradient, themselves among it."""

ACTIVATIONS = 3
"""Values that one layer's activations and their gradients take, for each input or output of its matrices."""

STATES = 6
"""Values as wide as the model that exist at once for each token: last hidden states, the reference's, their gradients, and what is read."""


def gradient_bytes(size: ModelSize, resident: int, rows: int, length: int) -> int:
    """Estimate the peak memory of a gradient pass; it does not depend on the number of layers.

    Parameters
    ----------
    resident
        Bytes between two steps; see `plan.memory.resident_bytes`.
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


def inputs_bytes(size: ModelSize, resident: int, rows: int, length: int, tokens: int) -> int:
    """Estimate the peak memory of collecting inputs, and of solving for a layer's factors.

    Parameters
    ----------
    rows
        Tokens that run together.
    length
        Tokens of a sequence.
    tokens
        Tokens of both texts, of which a layer's outputs stay.
    """
    layer = 4 * rows * (ACTIVATIONS * size.layer_width + 2 * size.attention * length) + 3 * size.layer_factors
    weights = 2 * min(BLOCK_BYTES, 4 * size.widest * size.hidden)
    return resident + TRANSFORMERS_BYTES + layer + weights + 8 * tokens * size.hidden + size.moments + size.factors


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
    return list(parts(text, most, size.short, one_length))
