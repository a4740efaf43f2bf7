"""Run passes of the model over sequences under variants, record each pass, and join their sums.

Report a run's progress over texts, in multiplications, and act on requests to stop.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from streamer.detection.options import Run
from streamer.events import Event, Monitor
from streamer.measuring.result_file import Records
from streamer.measuring.sequences import TextSequences
from streamer.measuring.statistics import ARRAYS, BINS, MEASURES, SequenceSums
from streamer.measuring.task import Pass, run_on_workers, run_pass
from streamer.streaming.model import ModelSize, StreamingModel, changed_by_padding, check_logits
from streamer.streaming.run_time import RunTimeTensor
from streamer.streaming.values import Variant, VariantSet

READING = 64
"""Number of rows whose products with a weight take as long as reading the weight."""

CALL = 5_000_000
"""Multiplications that take as long as the fixed cost of a module's call, about half a millisecond."""


def pass_cost(size: ModelSize, text: TextSequences, times: int, readings: int = 1) -> int:
    """Count the multiplications of running sequences, padded to the longest, `times` times, for example under that many variants.

    Parameters
    ----------
    readings
        Number of times that each weight is read; a reading counts as the multiplications that take equally long.
    """
    rows = times * len(text.ids) * text.longest
    return sum(size.products.values()) * (rows + readings * READING) + readings * CALL * len(size.products)


class RunProgress:
    """Progress over all passes of a run.

    Parameters
    ----------
    size
        Size of the model.
    stage
        Stage of the events: ``evaluate``, ``fit`` or ``map``.
    """

    def __init__(self, monitor: Monitor, size: ModelSize, stage: Literal["evaluate", "fit", "map"]) -> None:
        self._monitor, self.size, self._stage = monitor, size, stage
        self._done = self._total = self._items = self._of = self._resumed = 0

    def expect(self, costs: list[int]) -> None:
        """Set the costs of all passes still to come."""
        self._total = self._done + sum(costs)
        self._of = self._items + len(costs)

    def resume(self, passes: int) -> None:
        """Set the number of passes that an interrupted run recorded; a note reports it before the first event, when the total is known."""
        self._resumed = passes

    def reading(self, cost: int, times: int) -> Callable[[RunTimeTensor], None]:
        """Make the hook of a pass that reads each parameter `times` times; before each reading it reports the multiplications done.

        The hook also acts on requests to stop.
        """
        return self.readings([cost], [times])[0]

    def readings(self, costs: Sequence[int], times: Sequence[int]) -> list[Callable[[RunTimeTensor], None]]:
        """Make the hooks of passes that run in turns; each hook reports the progress of all of them."""
        products, parts = self.size.products, [0] * len(costs)
        whole = sum(products.values())

        def hook(number: int) -> Callable[[RunTimeTensor], None]:
            begun, done = Counter[str](), 0

            def on_read(tensor: RunTimeTensor) -> None:
                nonlocal done
                self._monitor.checkpoint()
                name = tensor.name
                if name in products and begun[name] < times[number]:
                    self._emit(name, self._done + sum(parts))
                    begun[name] += 1
                    done += products[name]
                    parts[number] = costs[number] * done // (whole * times[number])

            return on_read

        return [hook(number) for number in range(len(costs))]

    def begin(self, name: str) -> None:
        """Report which pass is running, for passes that run on workers."""
        self._emit(name, self._done)

    def advance(self, cost: int) -> None:
        """Count a pass as done."""
        self._done += cost
        self._items += 1

    def finish(self) -> None:
        """Report that everything is done."""
        self._total, self._of = self._done, self._items
        self._emit("", self._done)

    def _emit(self, name: str, done: int) -> None:
        total, of = max(self._total, done + 1 if name else done), max(self._of, self._items)
        if self._resumed:
            self._monitor.resuming(self._resumed, max(of, self._resumed), "pass")
            self._resumed = 0
        self._monitor.emit(Event(self._stage, name, done, total, self._items, of))


def longest_padded(groups: Iterable[TextSequences]) -> tuple[NDArray[np.int64], int] | None:
    """Find the longest sequence to which others are padded, and the length of the next longest in its group.

    Parameters
    ----------
    groups
        Groups of sequences that run together.

    Returns
    -------
    tuple or None
        None if nothing is padded.
    """
    found = None
    for text in groups:
        lengths = sorted({len(ids) for ids in text.ids})
        if len(lengths) > 1 and (found is None or lengths[-1] > len(found[0])):
            found = max(text.ids, key=len), lengths[-2]
    return found


def checked_tokens(groups: Iterable[TextSequences]) -> int:
    """Count the tokens that `padding_changes` runs on the base to compare padded sequences; 0 if none are padded."""
    padded = longest_padded(groups)
    return 0 if padded is None else len(padded[0]) + padded[1]


def padding_changes(job: VariantSet, groups: Sequence[TextSequences], on_read: Callable[[RunTimeTensor], None]) -> bool:
    """Check the logits of a model, and test whether padding changes them for sequences that will run together.

    Raises
    ------
    UnsupportedError
        If losses would be meaningless; see `check_logits`.
    """
    check_logits(job, groups[0].ids[0], on_read)
    padded = longest_padded(groups)
    return padded is not None and changed_by_padding(job, *padded, on_read)


def together(
    passes: Sequence[Pass], sums: Mapping[int, SequenceSums], name: str, variants: int, text: TextSequences
) -> SequenceSums:
    """Join the sums of a text's passes, by pass number, in the order of variants and sequences; NaN for sequences in no pass."""
    shape = variants, len(text.ids)
    arrays, bins = {kind: np.full(shape, np.nan) for kind in MEASURES}, np.zeros((variants, BINS))
    for number, one in enumerate(passes):
        if one.text == name:
            own = sums[number]
            rows = (0, *one.variants) if one.variants[0] == 1 else one.variants
            at = np.ix_(rows, one.sequences)
            for kind in MEASURES:
                arrays[kind][at] = getattr(own, kind)[-len(rows) :]
            bins[list(rows)] += own.kl_bins[-len(rows) :]
    tokens = np.array([float(counted.sum()) for counted in text.counted])
    return SequenceSums(tokens, **arrays, kl_bins=bins)


def needs_one_length(
    job: VariantSet, chosen: bool, groups: Sequence[TextSequences], records: Records, progress: RunProgress
) -> bool:
    """Check the logits once, and test whether sequences that run together must have equal lengths.

    Parameters
    ----------
    chosen
        Whether equal lengths are required regardless of the logits.
    groups
        Groups of sequences that will run together.
    """
    found = records.find("one_length")
    if found is None:
        changed = padding_changes(job, groups, progress.reading(0, 1))
        found = {"one_length": np.array([float(chosen or changed)])}
        records.add("one_length", found)
    return bool(found["one_length"][0])


def measure_variants(passes: Sequence[Pass], texts: Mapping[str, TextSequences], variants: Sequence[Variant],
                     job: Callable[[tuple[Variant, ...]], VariantSet], key: Callable[[int], str], records: Records,
                     progress: RunProgress, run: Run) -> dict[str, SequenceSums]:  # fmt: skip
    """Run the passes that no interrupted run recorded, here or on workers; join the sums by text, and score questions.

    Parameters
    ----------
    job
        Returns the description of the model for some of the variants.
    key
        Returns the key of a pass in the records, given its number.
    """
    sums: dict[int, SequenceSums] = {}
    todo: dict[int, tuple[Pass, TextSequences]] = {}
    costs = [pass_cost(progress.size, texts[one.text].take(one.sequences), 1 + len(one.variants)) for one in passes]
    for number, one in enumerate(passes):
        if (found := records.find(key(number))) is None:
            todo[number] = one, texts[one.text].take(one.sequences)
        else:
            sums[number] = SequenceSums(**found)
            progress.advance(costs[number])

    def in_turn() -> Generator[tuple[int, SequenceSums], None, None]:
        models: dict[tuple[int, ...], StreamingModel] = {}
        for number, (one, text) in todo.items():
            if one.variants not in models:
                models[one.variants] = StreamingModel(job(tuple(variants[v] for v in (0, *one.variants))))
            yield number, run_pass(models[one.variants], text, one.text, progress.reading(costs[number], 1))

    elsewhere = run.workers is not None and todo
    stream = (
        run_on_workers(job(tuple(variants)), todo, run, records.threads, progress.begin) if elsewhere else in_turn()
    )
    with contextlib.closing(stream):
        for number, own in stream:
            records.add(key(number), {name: getattr(own, name) for name in ("tokens", *ARRAYS)})
            sums[number] = own
            progress.advance(costs[number])
    return {name: text.scored(together(passes, sums, name, len(variants), text)) for name, text in texts.items()}
