"""Divide texts into sequences that run together, as many as a budget of memory allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from streamer.measuring.sequences import TextsByName, TextSequences, TokenIds
from streamer.plan.plan import fits, too_little_memory
from streamer.streaming.checks import changed_by_padding, check_logits
from streamer.streaming.groups import Group
from streamer.streaming.size import LOGIT_BYTES, ModelSize
from streamer.streaming.sweep import SweepModel
from streamer.streaming.turn import Stop
from streamer.streaming.values import READ_BYTES, ROOM

TRANSFORMERS_BYTES = 150 << 20
"""Anonymous memory for importing transformers and building a model, in addition to `plan.plan.resident_bytes`."""

MOST_ROWS = 1024
"""Most tokens that run together unless a budget asks for fewer: reading the weights then needs less than a tenth of the time."""

LOGIT_COPIES = 5
"""Memory for logits and everything computed from them, as a multiple of the logits that exist at one time."""

WIDTHS = 5
"""Number of activations of the widest layer's width that exist at one time for each row of a group, and of the model's width."""

STATE_WIDTHS = 3
"""Values of the model's width that each row keeps between two layers: its state, the state before, and a share of embeddings."""

STOPPED_WIDTHS = 5
"""Such values while the row's group has stopped at a site: what attention and the residual hold as well."""

CALL = 5_000_000
"""Multiplications that take as long as the fixed cost of a module's call, about half a millisecond."""


def sweep_cost(size: ModelSize, rows: int, groups: int = 1) -> int:
    """Count the multiplications of a sweep of so many rows in so many groups, each of which calls every module."""
    return sum(size.products.values()) * rows + groups * CALL * len(size.products)


class Limits(NamedTuple):
    """How a sweep fits a budget.

    Attributes
    ----------
    rows
        Most tokens that run together.
    room
        Bytes for values of one layer that groups share.
    spools
        Whether states lie in a spool while other groups run.
    """

    rows: int
    room: int
    spools: bool


@dataclass(frozen=True)
class Work:
    """Rows of a sweep, which decide its memory.

    Attributes
    ----------
    riding, fitted
        Rows of riders, and of groups of a fit.
    length
        Tokens of the longest sequence.
    """

    riding: int
    length: int
    fitted: int = 0

    def nbytes(self, size: ModelSize, resident: int, limits: Limits) -> int:
        """Estimate the peak memory of a sweep.

        Parameters
        ----------
        resident
            Bytes in use between two steps; see `plan.plan.resident_bytes`.
        """
        rows = limits.rows
        kept = STATE_WIDTHS * (rows if limits.spools else self.riding) + self.riding
        states = 4 * kept * size.hidden
        inputs = 4 * self.fitted * (STOPPED_WIDTHS * size.hidden + size.widest)
        row = WIDTHS * (size.widest + size.hidden) + size.attention * self.length
        logits = LOGIT_COPIES * LOGIT_BYTES + 40 * self.riding
        computed = states + max(inputs + 4 * rows * row, logits)
        weights = 2 * min(READ_BYTES, 4 * max(size.widest, size.vocabulary) * size.hidden)
        model = weights + size.dense + size.factors
        return resident + TRANSFORMERS_BYTES + computed + model + limits.room

    def limits(self, size: ModelSize, resident: int, max_memory: int | None) -> Limits:
        """Choose how a sweep fits a budget; states go to a spool if it is too small for them.

        Raises
        ------
        UsageError
            If the budget is too small for one sequence; the message names the smallest budget.
        """
        for least in self._ever_less():
            needed = self.nbytes(size, resident, least)
            if fits(needed, max_memory):
                room = ROOM if max_memory is None else min(ROOM, max_memory - needed)
                return least._replace(room=room)
        step = f"a sweep of {self.fitted + self.riding} tokens"
        advice = ", and less with a smaller --length or fewer --sequences"
        raise too_little_memory(max_memory or 0, step, needed, advice)

    def _ever_less(self) -> Iterator[Limits]:
        """List the limits to try: the states in memory, in a spool, and then with ever fewer rows that run together."""
        rows = max(self.length, MOST_ROWS)
        yield Limits(rows, 0, False)
        while rows > self.length:
            yield Limits(rows, 0, True)
            rows >>= 1
        yield Limits(self.length, 0, True)


@dataclass(frozen=True)
class Batch:
    """Sequences that run together, with their numbers in the text of this name, and their groups, one for each variant."""

    name: str
    numbers: tuple[int, ...]
    text: TextSequences
    groups: tuple[Group, ...]


def batch_numbers(
    text: TextSequences, tokens: int, short: int | None, one_length: bool
) -> Iterator[tuple[int, ...]]:
    """Divide sequences, the longest first, into batches with at most this many padded tokens, and at least one sequence each.

    Short sequences are not padded to a length at which the model's rotary embeddings change. With `one_length`, nothing is padded. The
    last bits of a sum depend on what runs together; the division depends only on the texts and the budget.
    """
    numbers: list[int] = []
    longest = 0
    for i in sorted(range(len(text.ids)), key=lambda i: -len(text.ids[i])):
        length = len(text.ids[i])
        full = (len(numbers) + 1) * longest > tokens
        apart = length != longest if one_length else short is not None and length <= short < longest
        if numbers and (full or apart):
            yield tuple(numbers)
            numbers = []
        if not numbers:
            longest = length
        numbers.append(i)
    if numbers:
        yield tuple(numbers)


def batches(
    texts: TextsByName, variants: int, size: ModelSize, rows: int, one_length: bool
) -> list[Batch]:
    """Make the groups that measure texts under each of so many variants."""
    found = []
    for name, text in texts.items():
        for numbers in batch_numbers(text, rows, size.short, one_length):
            part = text.take(numbers)
            groups = (Group(part.padded_ids, variant) for variant in range(variants))
            found.append(Batch(name, numbers, part, tuple(groups)))
    return found


def groups_to_fit(
    text: TextSequences, rows: int, size: ModelSize, variant: int, stream: object
) -> list[Group]:
    """Make the groups of a text to fit on, which are not padded."""
    cut = of_few_lengths(text)
    return [
        Group(cut.take(numbers).padded_ids, variant, stream)
        for numbers in batch_numbers(cut, rows, size.short, one_length=True)
    ]


def longest_padded(texts: Iterable[TextSequences]) -> tuple[TokenIds, int] | None:
    """Find the longest sequence to which others are padded, and the length of the next longest in its batch; None if none is padded.

    Parameters
    ----------
    texts
        The sequences of each batch.
    """
    found = None
    for text in texts:
        *shorter, longest = sorted({len(ids) for ids in text.ids})
        if shorter and (found is None or longest > len(found[0])):
            found = (max(text.ids, key=len), max(shorter))
    return found


def needs_one_length(model: SweepModel, texts: TextsByName, rows: int, checkpoint: Stop) -> bool:
    """Check the logits of a model, and test whether only sequences of one length may run together: padding would change the logits.

    Raises
    ------
    UnsupportedError
        If losses would be meaningless; see `check_logits`.
    """
    model.limit(0, False)  # one group shares nothing with others
    parts = [batch.text for batch in batches(texts, 1, model.size, rows, False)]
    check_logits(model, parts[0].ids[0], checkpoint)
    keys = model.size.keys
    if keys is not None and any(text.longest > keys for text in texts.values()):
        return True  # attention selects some of the keys, and the number of all keys decides ties
    padded = longest_padded(parts)
    return padded is not None and changed_by_padding(
        model, *padded, logits_together(len(padded[0])), checkpoint
    )


def logits_together(rows: int) -> int:
    """Choose how many logits of each of so many rows exist at a time."""
    return max(64, LOGIT_BYTES // (4 * rows))


LENGTHS = 8
"""Most different lengths of a text's sequences in a fit, which are not padded: a group has sequences of one length."""


def of_few_lengths(text: TextSequences) -> TextSequences:
    """Cut the ends of sequences, if necessary, so that they have at most `LENGTHS` lengths.

    It drops the length that costs the fewest tokens, again and again.
    """
    counts = Counter(len(ids) for ids in text.ids)

    def tokens_lost(neighbours: tuple[int, int]) -> int:
        shorter, longer = neighbours
        return counts[longer] * (longer - shorter)

    while len(counts) > LENGTHS:
        shorter, longer = min(pairwise(sorted(counts)), key=tokens_lost)
        counts[shorter] += counts.pop(longer)
    lengths = [max(length for length in counts if length <= len(ids)) for ids in text.ids]
    return replace(
        text,
        ids=tuple(ids[:length] for ids, length in zip(text.ids, lengths, strict=True)),
        counted=tuple(marks[:length] for marks, length in zip(text.counted, lengths, strict=True)),
    )
