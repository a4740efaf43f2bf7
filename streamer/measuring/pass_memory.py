"""Estimate the memory of a pass, and choose how many rows run together. A row is one token of one variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from streamer.errors import UsageError
from streamer.measuring.sequences import TextSequences
from streamer.streaming.lazy import BLOCK_BYTES
from streamer.streaming.model import ModelSize, vocabulary_block

TRANSFORMERS_BYTES = 150 << 20
"""Anonymous memory for importing transformers and building a model, in addition to `plan.memory_estimate.resident_bytes`."""

ROWS = 4096
"""Rows that run together if no budget requires fewer; reading the weights is then about a hundredth of the time."""

LOGIT_COPIES = 5
"""Memory for logits and everything computed from them, as a multiple of the logits that exist at one time."""

WIDTHS = 5
"""Number of activations of the widest layer's width that exist at one time for each row, and of the model's width."""


@dataclass(frozen=True)
class Pass:
    """Sequences and variants that run together.

    Attributes
    ----------
    text
        ``general``, ``task``, or the name of another.
    sequences
        Numbers of the sequences.
    variants
        Numbers of the variants, without the base, which is in every pass.
    """

    text: str
    sequences: tuple[int, ...]
    variants: tuple[int, ...]


def pass_bytes(size: ModelSize, resident: int, rows: int, length: int) -> int:
    """Estimate the peak memory of a pass.

    Parameters
    ----------
    resident
        Bytes in use between two steps; see `plan.memory_estimate.resident_bytes`.
    rows
        Tokens, counted for each variant.
    length
        Tokens per sequence.
    """
    activations = 4 * rows * (WIDTHS * (size.widest + size.hidden) + size.attention * length)
    logits = LOGIT_COPIES * 4 * rows * min(size.vocabulary, vocabulary_block(rows))
    weights = 2 * min(BLOCK_BYTES, 4 * max(size.widest, size.vocabulary) * size.hidden)
    computed = max(activations, logits + 8 * rows * size.hidden)
    return resident + TRANSFORMERS_BYTES + computed + weights + size.dense + size.factors


def measured_bytes(passes: Sequence[Pass], texts: Mapping[str, TextSequences], size: ModelSize, resident: int) -> int:
    """Estimate the peak memory over all passes; see `pass_bytes`."""
    most = 0
    for one in passes:
        length = max(len(texts[one.text].ids[i]) for i in one.sequences)
        most = max(most, pass_bytes(size, resident, (1 + len(one.variants)) * len(one.sequences) * length, length))
    return most


def plan_passes(
    texts: Mapping[str, TextSequences],
    variants: int,
    size: ModelSize,
    resident: int,
    max_memory: int | None,
    one_length: bool,
) -> list[Pass]:
    """Divide sequences and variants into passes that fit the budget, grouping sequences of similar length to reduce padding.

    The last bits of a sum depend on what runs together. Therefore the division depends only on what is measured and on the budget, and not
    on who runs the passes: any number of processes gives the same bytes.

    Parameters
    ----------
    variants
        Number of variants, including the base.
    one_length
        Whether only sequences of equal length run together, without padding.

    Raises
    ------
    UsageError
        If the budget is too small for one sequence under the base and one variant; the message names the smallest budget.
    """
    longest = max(text.longest for text in texts.values())
    most = rows_within(max_memory, 2 * longest, ROWS, lambda rows: pass_bytes(size, resident, rows, longest),
                       f"a sequence of {longest} tokens under two variants")  # fmt: skip
    together = variants if max_memory is None else max(2, min(variants, most // longest))
    others = range(1, variants)
    chunks = [tuple(others[i : i + together - 1]) for i in range(0, variants - 1, together - 1)]
    passes = []
    for name, text in texts.items():
        for part in parts(text, range(len(text.ids)), max(1, most // together), size.short, one_length):
            passes += [Pass(name, part, chunk) for chunk in chunks]
    return passes


def rows_within(max_memory: int | None, least: int, most: int, needed: Callable[[int], int], what: str) -> int:
    """Find how many rows run together: as many as fit the budget, but at most `most` and at least `least`.

    Parameters
    ----------
    needed
        Returns the bytes that a number of rows needs.
    what
        Description of the least rows, for a message.

    Raises
    ------
    UsageError
        If the budget is too small for the least rows; the message names the smallest budget.
    """
    if max_memory is None:
        return most
    if needed(least) > max_memory:
        raise UsageError(
            f"max_memory: {max_memory >> 20}M is not enough for {what}; it needs {-(-needed(least) >> 20)}M, and less with a smaller "
            "--length or fewer --sequences"
        )
    return max(rows for rows in range(least, max(least, most) + 1, 64) if needed(rows) <= max_memory)


def parts(
    text: TextSequences, rows: Sequence[int], tokens: int, short: int | None, one_length: bool
) -> Iterator[tuple[int, ...]]:
    """Divide sequences, the longest first, into parts with at most this many padded tokens, and at least one sequence each.

    Short sequences are not padded to a length at which the model's rotary embeddings change. With `one_length`, nothing is padded.
    """
    group: list[int] = []
    for i in sorted(rows, key=lambda i: (-len(text.ids[i]), i)):
        own, longest = len(text.ids[i]), len(text.ids[group[0]]) if group else 0
        full = (len(group) + 1) * longest > tokens
        apart = own != longest if one_length else short is not None and own <= short < longest
        if group and (full or apart):
            yield tuple(group)
            group = []
        group.append(i)
    if group:
        yield tuple(group)
