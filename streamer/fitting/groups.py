"""Divide the texts that inputs are collected of into groups of sequences, which run by turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streamer.fitting.costs import RUNS_CORRECTED
from streamer.fitting.prepare import PreparedFit
from streamer.measuring.memory import parts
from streamer.measuring.progress import RunProgress, pass_cost
from streamer.measuring.sequences import TextSequences
from streamer.streaming.streams import GENERAL_CORRECTED, TASK_CORRECTED, Group

LENGTHS = 32
"""Lengths that the sequences of a text have at most as inputs are collected: a group of each length runs in a thread."""


def of_few_lengths(text: TextSequences) -> TextSequences:
    """Cut the ends of sequences, if need be, so that they have no more than `LENGTHS` lengths: those of one length run together."""
    step = 1
    while len({len(ids) // step for ids in text.ids}) > LENGTHS:
        step *= 2
    sizes = [max(2, len(ids) // step * step) for ids in text.ids]
    cut = tuple(ids[:n] for ids, n in zip(text.ids, sizes, strict=True))
    return TextSequences(cut, tuple(c[:n] for c, n in zip(text.counted, sizes, strict=True)), text.name)


def groups_of(prepared: PreparedFit, progress: RunProgress, streams: Mapping[int, str]) -> list[Group]:
    """Divide the texts that run, by what they run as, into groups of one length."""
    size, divided = prepared.model.size, list[tuple[TextSequences, int]]()
    for stream, name in streams.items():
        whole = of_few_lengths(prepared.texts[name].fitted)
        short = parts(whole, range(len(whole.ids)), prepared.rows_of_inputs, size.short, True)
        divided += [(whole.take(rows), stream) for rows in short]
    runs = [_runs(stream) for _, stream in divided]
    costs = [pass_cost(size, text, times) for (text, _), times in zip(divided, runs, strict=True)]
    hooks = progress.readings(costs, runs)
    return [Group(*one, hook) for one, hook in zip(divided, hooks, strict=True)]


def advance(prepared: PreparedFit, progress: RunProgress, groups: Sequence[Group]) -> None:
    """Take groups as done."""
    for group in groups:
        progress.advance(pass_cost(prepared.model.size, group.text, _runs(group.stream)))


def _runs(stream: int) -> int:
    """Count the runs of each layer."""
    return RUNS_CORRECTED if stream in (GENERAL_CORRECTED, TASK_CORRECTED) else 1
