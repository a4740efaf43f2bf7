"""Fit right factors to the inputs of modules, and write them to a file.

One pass collects inputs and solves for a grid of weights, whose results are measured; each share is interpolated between them. Then, at
each share's weight, the model runs again, and each layer's factors are fitted to the inputs that the preceding layers produce with their
new factors. A killed run repeats the collecting and correcting passes, which give the same values; measurements are in the journal.

Run layers on workers, which make the same model from the inputs' addresses; share the memory with them.

Divide the texts whose inputs are collected into groups of sequences, which take turns, and count the multiplications of a fit.
"""

from __future__ import annotations

import contextlib
import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from streamer.detection.matrices import choose_device, inputs_of
from streamer.detection.options import Run
from streamer.errors import UnsupportedError
from streamer.events import Monitor
from streamer.fitting.prepare import CORRECTIONS, ROWS, WEIGHTS, PreparedFit, columns_of_inputs
from streamer.fitting.result import (
    SHRINKS,
    Point,
    adapter_facts,
    doubts,
    factors_of,
    misses,
    replaced,
    scaled,
    scaling_facts,
    set_facts,
    spooled,
    through,
)
from streamer.linalg.moments import Moments, RowMoments, sketch_size
from streamer.linalg.regmean import RIDGE, InputPair, WeightDelta, answers, corrected, is_direct
from streamer.measuring.passes import RunProgress, measure_variants, needs_one_length, pass_cost
from streamer.measuring.result_file import ADAPTER_ROW, BASE_ROW, Records, ResultFile, computing, stands
from streamer.measuring.sequences import GENERAL, TASK, TextSequences
from streamer.measuring.statistics import SequenceSums
from streamer.measuring.task import TRANSFORMERS_BYTES, kept_model, parts
from streamer.methods import UNCHANGED, RegMean, Shrink
from streamer.methods.fits import FIT, Coefficients, FactorSet, load_coefficients
from streamer.plan.batch import AdapterBatch, MemoryEstimate, check_budget
from streamer.plan.targets import Target
from streamer.storage.files import limit_freed_memory
from streamer.streaming.corrected import CorrectedModel
from streamer.streaming.inputs import BaseInputModel, CollectingModel
from streamer.streaming.model import ModelSize
from streamer.streaming.run_time import (
    GENERAL_AS,
    GENERAL_CORRECTED,
    TASK_AS,
    TASK_CORRECTED,
    Elsewhere,
    Group,
    LayerResult,
    LayerRun,
)
from streamer.streaming.spool import Spool, Spooled
from streamer.streaming.values import ADAPTER, BASE, Variant, VariantSet
from streamer.units import counted, listed
from streamer.workers import Packed, Task, kept

_models: dict[Any, CollectingModel] = {}


@dataclass(frozen=True)
class LayerTask(Task[Packed[LayerResult | None]]):
    """A layer of a model, with an adapter or of the base alone, on some sequences.

    Attributes
    ----------
    rounds_products, device
        See `VariantSet`; the device is given by name.
    """

    rounds_products: bool
    device: str
    layer: str
    run: Packed[LayerRun]

    @property
    def name(self) -> str:
        """Name the layer."""
        return self.layer

    def do(self, batch: AdapterBatch, monitor: Monitor) -> Packed[LayerResult | None]:
        """Run the layer on a model that the process keeps for later layers; check that no input changed."""
        (plan,) = batch.plans
        kind = CorrectedModel if plan.targets else BaseInputModel

        def make() -> CollectingModel:
            return kind(plan, rounds_products=self.rounds_products, device=choose_device(self.device))

        with kept_model(_models, (kind, self.rounds_products, self.device), plan, make) as model:
            result = Packed(model.run_layer(self.run.value))
            plan.check_unchanged()
        return result


def layers_on_workers(job: VariantSet, run: Run, threads: int) -> Elsewhere | None:
    """Return a function that runs layers on workers; None if there are no workers."""
    workers = run.workers
    if workers is None:
        return None
    inputs = inputs_of(AdapterBatch(job.plan.base, (job.plan,)), run)
    common = inputs, threads, job.rounds_products, str(job.device)

    def elsewhere(runs: Mapping[int, LayerRun]) -> Iterator[tuple[int, LayerResult | None]]:
        tasks = {number: LayerTask(*common, one.layer, Packed(one)) for number, one in runs.items()}
        with contextlib.closing(workers.run(tasks, run.monitor, lambda _number: None)) as stream:
            for number, found in stream:
                yield number, found.value

    return elsewhere


def shared_memory(
    run: Run, max_memory: int | None, size: ModelSize, tokens: int, need: MemoryEstimate, carried: int = 0
) -> int | None:
    """Divide the allowed memory among this process, which solves, and workers that run layers, if any; see `Workers.budget`.

    Parameters
    ----------
    tokens
        Tokens of all texts that run: a layer's inputs exist once more while they are sent to workers.
    need
        The largest indivisible step.
    carried
        Additional bytes sent with a task.
    """
    if run.workers is None:
        return max_memory
    carried += 4 * ROWS * size.layer_width
    own = TRANSFORMERS_BYTES + 4 * tokens * size.hidden + (1 + run.workers.at_once) * carried
    return run.workers.budget(max_memory, own, [replace(need, nbytes=need.nbytes + 2 * carried)], computes=True)


def shared(prepared: PreparedFit) -> PreparedFit:
    """Divide the allowed memory among this process and its workers, if any; see `Workers.budget`."""
    carried = 4 * max(len(WEIGHTS), len(prepared.options.keep)) * prepared.right_values
    size, tokens = prepared.model.size, 2 * prepared.fitted_tokens
    budget = shared_memory(prepared.run, prepared.max_memory, size, tokens, prepared.least, carried)
    return replace(prepared, max_memory=budget)


RUNS_CORRECTED = 2
"""Runs of a layer for its correction: up to each of its inputs, and to its end."""

STEPS = 150
"""Approximate number of conjugate gradient steps to solve by products."""

FLOAT64_COST = 5
"""Most multiplications in float32 that need the time of one in float64 for moments and their factors."""

CORRECTED = GENERAL_CORRECTED, TASK_CORRECTED

Divided = tuple[TextSequences, int]
"""Sequences that run together, and their stream, such as `GENERAL_AS`."""

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


ROUNDS = 3
"""Most interpolations that are measured for a share, by a secant rule."""

STEP = 1.5
"""Factor between the weights of two corrections, between which the requested share is interpolated."""

CLOSE = 0.01
"""A corrected point may replace an uncorrected one if it keeps the requested share to within this."""

EXACT = 0.003
"""An interpolation is accepted if it keeps the requested share to within this."""


def checked_file(prepared: PreparedFit, output: Path) -> ResultFile:
    """Check, without writing, whether a fit can be written to a file, and describe the file."""
    file = ResultFile(output, FIT.what, "this very fit", "coefficients.safetensors", prepared.plan, prepared.run, prepared.facts,
                      lambda path: stands(path, FIT, prepared.facts, load_coefficients))  # fmt: skip
    file.check_path()
    check_budget([prepared.least], prepared.max_memory, ", and less with fewer --sequences")
    return file


def fit(prepared: PreparedFit, output: Path | None) -> Coefficients:
    """Fit factors for all shares; write them to a file if an output is given."""
    if output is None:
        return FitRun(prepared, Records(), None).result()
    file = checked_file(prepared, output)
    if file.state() == "done":
        file.left()
        standing = load_coefficients(output)
        prepared.run.monitor.warn([*doubts(standing.facts), *misses(standing.facts)])
        return standing
    with file.written() as records:
        made = FitRun(prepared, records, output.parent).result()
        prepared.plan.check_unchanged()
        made.save(output, overwrite=True)  # `state` has already approved replacing an existing file
    return made


class FitRun:
    """One fit in progress.

    Parameters
    ----------
    records
        Records of an interrupted run, extended by this run.
    directory
        Directory whose file system holds temporary files; None for the system's default.
    """

    def __init__(self, prepared: PreparedFit, records: Records, directory: Path | None) -> None:
        self.records, self.monitor, self.directory = records, prepared.run.monitor, directory
        self._divide(prepared)
        self.raised: list[str] = []
        self.uncorrected: set[str] = set()
        self._requests = 0
        self._rows: dict[str, Mapping[str, SequenceSums]] = {}

    def result(self) -> Coefficients:
        """Run to the end and return the result."""
        prepared, plan = self.prepared, self.prepared.plan
        if all(factors_of(plan, target).is_zero() for target in plan.targets):
            raise UnsupportedError(f"{plan.adapter.path}: all of its deltas are zero, so there is nothing to fit")
        prepared.warn()
        if prepared.max_memory is not None:
            limit_freed_memory()
        spool = Spool(self.directory)
        try:
            with kept(prepared.run.workers), computing(self.records.threads, self.monitor):
                self._check_logits()
                self.progress.resume(self.records.taken_up)
                baseline = [Variant.of(Shrink(lam)) for lam in SHRINKS]
                self._measure_new([Variant(ADAPTER, UNCHANGED), *baseline, *prepared.scaling])
                of_adapter = adapter_facts(*self._sums([]), prepared.texts[TASK].whole.name)
                self.monitor.warn(doubts(of_adapter))
                job = prepared.model.job
                model = CorrectedModel(plan, rounds_products=job.rounds_products, directory=self.directory, device=job.device,
                                       elsewhere=layers_on_workers(job, prepared.run, self.records.threads))  # fmt: skip
                points, unseen = self._solved(model, spool)
                found = [
                    (keep, self._corrected(model, spool, keep, point)) for keep, point in self._interpolated(points)
                ]
                self.progress.finish()
                names = [*(one.name for one in baseline), *(point.name for _, point in found)]
                facts = {
                    **prepared.facts, "ridge": RIDGE, "raised": self.raised, "unseen": unseen,
                    "uncorrected": sorted(self.uncorrected), **of_adapter,
                    **scaling_facts(prepared.scaling, lambda name: self._sums([name])),
                    "sets": set_facts(*self._sums(names), found),
                }  # fmt: skip
                if self.uncorrected:
                    count, first = counted(len(self.uncorrected), "matrix"), listed(map(repr, sorted(self.uncorrected)))
                    self.monitor.warn(
                        (f"a correction would have made {count} too large, {first}: they keep the first pass' factors",)
                    )
                self.monitor.warn(misses(facts))
                tensors = [target.tensor for target in plan.targets]
                made = tuple(
                    FactorSet(keep, {tensor: point.factors[tensor].clone() for tensor in tensors})
                    for keep, point in found
                )
        finally:
            spool.close()
        return Coefficients(made, facts)

    def _divide(self, prepared: PreparedFit) -> None:
        """Divide the work into passes, and start counting."""
        self.prepared, self.progress = prepared, RunProgress(self.monitor, prepared.model.size, "fit")
        expected = expected_costs(prepared)
        self.progress.expect([*expected.groups, *expected.passes])

    def _check_logits(self) -> None:
        """Check the logits, and divide the work again if they show that only sequences of one length may run together."""
        own = self.prepared
        one_length = needs_one_length(own.model.job, own.one_length, own.groups, self.records, self.progress)
        if one_length != own.one_length:
            self._divide(replace(own, one_length=one_length))

    def _solved(self, model: CorrectedModel, spool: Spool) -> tuple[list[Point], list[str]]:
        """Collect the inputs' moments and solve for each weight; also list matrices that some text never reached: their delta stays."""
        prepared, plan = self.prepared, self.prepared.plan
        places: dict[str, Sequence[Spooled]] = {}

        def complete(targets: list[Target], moments: Mapping[int, Moments]) -> None:
            self.monitor.checkpoint()
            factors = [(delta.L, delta.R) for delta in (factors_of(plan, target) for target in targets)]
            rights, ridge = answers(
                factors, moments[TASK_AS], moments[GENERAL_AS], WEIGHTS, targets[0].tensor, prepared.matrices_bytes
            )
            if ridge > RIDGE:
                self.raised += [target.tensor for target in targets]
            for target, mine in zip(targets, rights, strict=True):
                places[target.tensor] = [spool.write([right.to(torch.float32)]) for right in mine]

        groups = groups_of(self.prepared, self.progress, {GENERAL_AS: GENERAL, TASK_AS: TASK})
        model.collect(groups, complete)
        advance(self.prepared, self.progress, groups)
        plan.check_unchanged()
        if model.unseen:
            count, first = counted(len(model.unseen), "matrix"), listed(map(repr, model.unseen))
            self.monitor.warn(
                (f"{count} received no tokens from one of the texts, and the delta there is kept: {first}",)
            )
        if self.raised:
            self.monitor.warn((f"the texts are short for the inputs of {counted(len(self.raised), 'matrix')}, "
                               f"{listed(map(repr, self.raised))}: the ridge was raised; more text may forget less",))  # fmt: skip
        as_is = scaled(plan, 1.0)
        for tensor in model.unseen:
            places[tensor] = [spool.write([as_is[tensor]])] * len(WEIGHTS)
        points = [Point(mu, spooled(spool, places, number)) for number, mu in enumerate(WEIGHTS)]
        return [Point(0.0, as_is), *points, Point(math.inf, scaled(plan, 0.0))], model.unseen

    def _corrected(self, model: CorrectedModel, spool: Spool, keep: float, point: Point) -> Point:
        """Fit each layer to the preceding ones' outputs, at two weights if needed; return the result if better and close to the share."""
        if not 0 < point.weight < math.inf or not model.corrects:
            return point
        try:
            made = [self._correct(model, spool, point, point.weight)]
            if abs((kept := self._kept(made[0])) - keep) > EXACT:
                made.append(self._correct(model, spool, point, point.weight * (STEP if kept > keep else 1 / STEP)))
                other = self._kept(made[1])
                t = min(2.0, max(0.0, (kept - keep) / (kept - other))) if kept != other else 0.5
                made.append(made[0].towards(made[1], t))
                self._measure_new([self._variant(made[2])])
        except UnsupportedError as e:
            self.monitor.warn((f"{e}: the factors are not corrected",))
            return point
        best = min(made, key=lambda one: abs(self._kept(one) - keep))

        def left(one: Point) -> float:
            return float(self._sums([one.name])[0].kl[ADAPTER_ROW + 1].sum())

        return best if left(best) < left(point) and abs(self._kept(best) - keep) <= CLOSE else point

    def _correct(self, model: CorrectedModel, spool: Spool, point: Point, weight: float) -> Point:
        """Run and correct the model at a weight, starting from a point's factors, and measure the result."""
        plan = self.prepared.plan
        places: dict[str, Sequence[Spooled]] = {}
        made = replaced(spooled(spool, places, 0), point.factors)

        def replaced_by(targets: Sequence[Target], moments: Mapping[int, RowMoments]) -> None:
            self.monitor.checkpoint()
            pairs = [(t, delta) for t in targets if not (delta := factors_of(plan, t)).is_zero()]
            if not pairs:
                return
            own = [WeightDelta(delta.L, delta.R, partial(through, plan, t)) for t, delta in pairs]
            task, general = (
                InputPair(moments[a], moments[b])
                for a, b in ((TASK_AS, TASK_CORRECTED), (GENERAL_AS, GENERAL_CORRECTED))
            )
            rights = corrected(own, task, general, weight, self.prepared.matrices_bytes)
            if rights is None:
                self.uncorrected.update(target.tensor for target, _ in pairs)
                return
            for (target, _), right in zip(pairs, rights, strict=True):
                places[target.tensor] = [spool.write([right.to(torch.float32)])]

        groups = groups_of(
            self.prepared,
            self.progress,
            {GENERAL_AS: GENERAL, TASK_AS: TASK, GENERAL_CORRECTED: GENERAL, TASK_CORRECTED: TASK},
        )
        model.correct(groups, made, replaced_by)
        advance(self.prepared, self.progress, groups)
        plan.check_unchanged()
        found = Point(weight, made, corrected=True)
        self._measure_new([self._variant(found)])
        return found

    def _interpolated(self, points: Sequence[Point]) -> list[tuple[float, Point]]:
        """Find for each share the point that keeps it, between two measured points, and measure it."""
        keeps = self.prepared.options.keep
        self._measure_new([self._variant(point) for point in points[1:-1]])
        known = {keep: [(self._kept(point), point) for point in points] for keep in keeps}
        found: dict[float, Point] = {}
        for _ in range(ROUNDS):
            asked: dict[float, Point] = {}
            for keep, own in known.items():
                at = max(i for i, (kept, _) in enumerate(own[:-1]) if kept >= keep or i == 0)
                (above, a), (below, b) = own[at], own[at + 1]
                t = min(1.0, max(0.0, (above - keep) / (above - below))) if above > below else 0.5
                if keep not in found or abs(self._kept(found[keep]) - keep) > EXACT:
                    asked[keep] = found[keep] = a.towards(b, t)
            if not asked:
                break
            self._measure_new([self._variant(point) for point in asked.values()])
            for keep, point in asked.items():
                kept, own = self._kept(point), known[keep]
                at = next((i for i, (_, other) in enumerate(own) if other.weight > point.weight), len(own) - 1)
                own.insert(at, (kept, point))
        for keep, own in known.items():  # if the curve is rough, the last point is not always the nearest
            found[keep] = min((abs(kept - keep), i, point) for i, (kept, point) in enumerate(own[1:]))[2]
        return [(keep, found[keep]) for keep in keeps]

    def _variant(self, point: Point) -> Variant:
        return Variant(point.name, RegMean(coefficients=FactorSet(1.0, point.factors)))

    def _kept(self, point: Point) -> float:
        """Return the share of the learning that a point keeps."""
        if point.weight == 0:
            return 1.0
        return self._sums([point.name])[1].fraction(ADAPTER_ROW + 1).value

    def _measure_new(self, variants: Sequence[Variant]) -> None:
        """Measure together those variants that were not measured yet."""
        new = [Variant(BASE, None), *(v for v in variants if v.name not in self._rows)]
        if len(new) == 1:
            return
        self._requests += 1
        names = json.dumps([variant.name for variant in new])
        own = self.prepared

        def job(chosen: tuple[Variant, ...]) -> VariantSet:
            return replace(own.model.job, variants=chosen, findings=own.findings)

        whole = measure_variants(
            own.passes(len(new)), own.held_out, new, job, lambda i: f"{self._requests}.{i} {names}", self.records,
            self.progress, own.run,
        )  # fmt: skip
        for row, variant in enumerate(new):
            self._rows.setdefault(variant.name, {text: of.take([row]) for text, of in whole.items()})

    def _sums(self, names: Sequence[str]) -> tuple[SequenceSums, SequenceSums]:
        """Return the sums on both texts for the base, the unchanged adapter, and measured variants."""
        assert (BASE_ROW, ADAPTER_ROW) == (0, 1)
        rows = [self._rows[name] for name in (BASE, ADAPTER, *names)]
        general, task = (rows[0][text].joined(*(row[text] for row in rows[1:])) for text in (GENERAL, TASK))
        return general, task
