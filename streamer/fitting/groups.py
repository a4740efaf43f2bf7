"""Divide the texts whose inputs are collected into groups of sequences, which take turns, and count the multiplications of a fit."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from streamer.fitting.fit_memory import columns_of_inputs
from streamer.fitting.options import CORRECTIONS, WEIGHTS
from streamer.fitting.prepare import PreparedFit
from streamer.fitting.result import SHRINKS
from streamer.linalg.conjugate_gradients import sketch_size
from streamer.linalg.regmean import is_direct
from streamer.measuring.pass_memory import parts
from streamer.measuring.progress import RunProgress, pass_cost
from streamer.measuring.sequences import GENERAL, TASK, TextSequences
from streamer.streaming.streams import GENERAL_AS, GENERAL_CORRECTED, TASK_AS, TASK_CORRECTED, Group

RUNS_CORRECTED = 2
"""Runs of a layer for its correction: up to each of its inputs, and to its end."""

STEPS = 150
"""Approximate number of conjugate gradient steps to solve by products."""

FLOAT64_COST = 5
"""Most multiplications in float32 that need the time of one in float64 for moments and their factors."""

CORRECTED = GENERAL_CORRECTED, TASK_CORRECTED

Divided = tuple[TextSequences, int]
"""Sequences that run together, and their stream: one of `streams`."""

LENGTHS = 32
"""Most different lengths of a text's sequences while inputs are collected: a group of each length runs in its own thread."""


def of_few_lengths(text: TextSequences) -> TextSequences:
    """Cut the ends of sequences, if necessary, so that they have at most `LENGTHS` lengths: sequences of one length run together.

    It drops the length that costs the fewest tokens, again and again.
    """
    counts = Counter(len(ids) for ids in text.ids)
    while len(counts) > LENGTHS:
        _, size, below = min((counts[size] * (size - below), size, below) for below, size in pairwise(sorted(counts)))
        counts[below] += counts.pop(size)
    kept = sorted(counts)
    sizes = [kept[bisect_right(kept, len(ids)) - 1] for ids in text.ids]
    cut = tuple(ids[:n] for ids, n in zip(text.ids, sizes, strict=True))
    return TextSequences(cut, tuple(c[:n] for c, n in zip(text.counted, sizes, strict=True)), text.name)


def divided(prepared: PreparedFit, streams: Mapping[int, str]) -> list[Divided]:
    """Divide the texts of each stream into groups of one length."""
    found: list[Divided] = []
    for stream, name in streams.items():
        whole = of_few_lengths(prepared.texts[name].fitted)
        short = parts(whole, range(len(whole.ids)), prepared.rows_of_inputs, prepared.model.size.short, True)
        found += [(whole.take(rows), stream) for rows in short]
    return found


def group_costs(prepared: PreparedFit, groups: Sequence[Divided]) -> list[int]:
    """Count the multiplications of groups that take turns, plus each group's part, by its tokens, of solving between layers."""
    corrects = any(stream in CORRECTED for _, stream in groups)
    solving = _solving_cost(prepared, 1 if corrects else len(WEIGHTS))
    tokens = [len(text.ids) * text.longest for text, _ in groups]
    runs = [_runs(stream) for _, stream in groups]
    return [
        pass_cost(prepared.model.size, text, times, times) + solving * own // sum(tokens)
        for (text, _), times, own in zip(groups, runs, tokens, strict=True)
    ]


def _solving_cost(prepared: PreparedFit, weights: int) -> int:
    """Count the multiplications to solve for this many weights; float64 costs up to `FLOAT64_COST` beyond the caches."""
    tokens, count = prepared.fitted_tokens, 0
    for n, columns in columns_of_inputs(prepared.plan):
        if is_direct(n, prepared.matrices_bytes):
            count += min(FLOAT64_COST, max(1, n // 800)) * (tokens * n * n + weights * n**3 // 3)
        else:
            count += 2 * tokens * n * (sketch_size(n) + STEPS * columns * weights)
    return count


@dataclass(frozen=True)
class Costs:
    """Multiplications of each expected group whose inputs are collected, and of each pass over the held-out sequences.

    Attributes
    ----------
    variants
        Most models that run in such a pass, including the base.
    """

    groups: list[int]
    passes: list[int]
    variants: int


def expected_costs(prepared: PreparedFit) -> Costs:
    """Count the pass that collects inputs, the corrections, and the passes that measure shrinks, the grid, and each share twice."""
    count = len(prepared.options.keep)
    measured = [2 + len(SHRINKS) + len(prepared.scaling), 1 + len(WEIGHTS), *[1 + count] * 2]
    measured += [2] * (CORRECTIONS + 1) * count
    before = {GENERAL_AS: GENERAL, TASK_AS: TASK}
    again = {**before, GENERAL_CORRECTED: GENERAL, TASK_CORRECTED: TASK}
    once, corrected = (group_costs(prepared, divided(prepared, streams)) for streams in (before, again))
    passes = [
        pass_cost(prepared.model.size, prepared.texts[one.text].held_out.take(one.sequences), 1 + len(one.variants))
        for variants in measured
        for one in prepared.passes(variants)
    ]
    return Costs(once + CORRECTIONS * count * corrected, passes, max(measured))


def groups_of(prepared: PreparedFit, progress: RunProgress, streams: Mapping[int, str]) -> list[Group]:
    """Make the groups of the texts of each stream."""
    groups = divided(prepared, streams)
    hooks = progress.readings(group_costs(prepared, groups), [_runs(stream) for _, stream in groups])
    return [Group(*one, hook) for one, hook in zip(groups, hooks, strict=True)]


def advance(prepared: PreparedFit, progress: RunProgress, groups: Sequence[Group]) -> None:
    """Count groups as done."""
    for cost in group_costs(prepared, [(group.text, group.stream) for group in groups]):
        progress.advance(cost)


def _runs(stream: int) -> int:
    """Return the number of runs of each layer."""
    return RUNS_CORRECTED if stream in CORRECTED else 1
