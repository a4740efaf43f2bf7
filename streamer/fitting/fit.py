"""Fit right factors to the inputs of modules in one sweep, choose among them by held-out sequences, and write them to a file.

General text runs through the base, task text through base + adapter, and both run through the model that is being repaired, once for each
candidate: a weight μ of the general text. At each site every candidate's factors are fitted to the inputs that its own layers before
produce. Held-out sequences ride along under the base, the adapter, the candidates and shrinks. For each share to keep, the candidate that
diverges least from the base among those that keep it is chosen; if the next one keeps less, their factors are interpolated, and the result
rides in a second sweep, beside the shrink that keeps as much.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from streamer.errors import NumericError, UnsupportedError
from streamer.fitting.prepare import SHRINKS, PreparedFit
from streamer.fitting.result import (
    Point,
    adapter_facts,
    doubts,
    factors_of,
    misses,
    replaced,
    scaling_facts,
    set_facts,
    spooled,
    unchanged,
)
from streamer.linalg.operators import LowRank
from streamer.linalg.regmean import GENERAL_RIDGE, RIDGE, Refit, System, TextInputs, basis, refit, refit_one_hot
from streamer.measuring.result_file import ADAPTER_ROW, BASE_ROW, Records, ResultFile, computing, stands
from streamer.measuring.riders import (
    Part,
    Progress,
    measured,
    of_few_lengths,
    padding_changes,
    parts,
    riders,
    sweep_cost,
)
from streamer.measuring.sequences import GENERAL, TASK
from streamer.measuring.statistics import SequenceSums
from streamer.methods import UNCHANGED, RegMean, Shrink
from streamer.methods.files import FIT, Coefficients, FactorSet, load_coefficients
from streamer.plan.targets import Target
from streamer.storage.files import limit_freed_memory
from streamer.streaming.run_time import WeightSource
from streamer.streaming.spool import Spool, Spooled
from streamer.streaming.sweep import Group, Site, SweepModel, same_inputs
from streamer.streaming.values import ADAPTER, BASE, Variant
from streamer.units import counted, listed

GENERAL_STREAM, TASK_STREAM = 0, 1
"""Streams of the texts through the base, and through base + adapter; those of candidate k are the same numbers + 2 (k + 1)."""

MARGIN = 0.005
"""An interpolation aims above the share by this much."""


def checked_file(prepared: PreparedFit, output: Path) -> ResultFile:
    """Check, without writing, whether a fit can be written to a file, and describe the file."""
    file = ResultFile(output, FIT.what, "this very fit", "coefficients.safetensors", prepared.plan, prepared.run, prepared.facts,
                      lambda path: stands(path, FIT, prepared.facts, load_coefficients))  # fmt: skip
    file.check_path()
    _ = prepared.limits
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
    return replace(made, source=output)


def fit_groups(prepared: PreparedFit) -> list[Group]:
    """Divide the texts to fit on into groups of one length, for each stream."""
    found, rows, size = [], prepared.limits.rows, prepared.model.size
    for stream in range(2 + 2 * len(prepared.options.weights)):
        text = of_few_lengths(prepared.texts[(GENERAL, TASK)[stream % 2]].fitted)
        # The variants of the sweep are the base, the adapter, and the candidates.
        variant = stream if stream < 2 else stream // 2 + 1
        for own in parts(text, range(len(text.ids)), rows, size.short, True):
            found.append(Group(text.take(own).padded_ids, variant, stream))
    return found


@dataclass
class Solver:
    """Fits each site's matrices for every candidate.

    Attributes
    ----------
    model
        The model, whose sweep calls this object at each site.
    tokens
        Tokens of the general and of the task's text.
    places
        For each matrix, the places of the candidates' right factors in the spool.
    """

    model: SweepModel
    weights: Sequence[float]
    tokens: tuple[int, int]
    spool: Spool
    places: dict[str, list[Spooled]] = field(default_factory=dict)
    _seen: tuple[list[Tensor], dict[int, list[Tensor]], list[System]] = field(default_factory=lambda: ([], {}, []))

    def __call__(self, site: Site, inputs: Mapping[Group, Tensor]) -> None:
        """Fit the factors of all matrices at a site; see `SweepModel.run`."""
        plan = self.model.job.plan
        pairs = [(target, factors_of(plan, target)) for target in site.matrices]
        for target, delta in pairs:
            if delta.is_zero():
                self._write(target, [delta.R] * len(self.weights))
            elif target.tensor in self.places:
                raise UnsupportedError(
                    f"{target.tensor!r}: its module runs in several layers, which fit does not support; use `mitigate --method shrink`"
                )
        if site.size is not None:
            streams = self._by_stream(inputs)
            task, general = (
                torch.bincount(torch.cat(streams[stream]), minlength=site.size).double() / self.tokens[stream]
                for stream in (TASK_STREAM, GENERAL_STREAM)
            )
            for target, delta in pairs:
                self._write(target, [refit_one_hot(delta.R, task, general, mu) for mu in self.weights])
            return
        streams, systems = self._systems(inputs, site.matrices[0].tensor)
        # An expert receives other tokens once its router's inputs have changed, or the same in another order: they have no counterparts.
        expert = not site.order[0] or any(target.module.layer_kind == "expert" for target in site.matrices)
        whole = not expert and all(sum(map(len, x)) == self.tokens[stream % 2] for stream, x in streams.items())
        for target, delta in pairs if systems else ():
            if not delta.is_zero() and (rights := self._refit(target, delta, streams, systems, whole)) is not None:
                self._write(target, rights)

    def factors(self) -> Mapping[str, Callable[[], Tensor]]:
        """Return readers of all factors found so far, by matrix and candidate."""
        return {
            f"{name}/{k:03}": partial(self._read, place)
            for name, places in self.places.items()
            for k, place in enumerate(places)
        }

    def _read(self, place: Spooled) -> Tensor:
        return self.spool.read(place)[0]

    def restore(self, factors: Mapping[str, Tensor]) -> None:
        """Take over the factors of an earlier run."""
        for key, right in sorted(factors.items()):
            self.places.setdefault(key.rpartition("/")[0], []).append(self.spool.write([right]))

    def _write(self, target: Target, rights: Sequence[Tensor]) -> None:
        self.places[target.tensor] = [self.spool.write([right.to(torch.float32)]) for right in rights]

    def _by_stream(self, inputs: Mapping[Group, Tensor]) -> dict[int, list[Tensor]]:
        """Collect the inputs of each stream's groups, in their order."""
        found: dict[int, list[Tensor]] = {}
        for group, x in inputs.items():
            if len(x):  # an expert may receive none
                found.setdefault(group.stream or 0, []).append(x)
        return found

    def _systems(self, inputs: Mapping[Group, Tensor], name: str) -> tuple[dict[int, list[Tensor]], list[System]]:
        """Return the inputs by stream, and each candidate's system; none if a text did not reach the site.

        Matrices that follow each other and share their inputs, such as q, k and v, share the systems.
        """
        tensors = list(inputs.values())
        if same_inputs(self._seen[0], tensors):
            return self._seen[1:]
        self._seen = [], {}, []
        streams = self._by_stream(inputs)
        needed = range(2 + 2 * len(self.weights))
        if not all(any(bool(x.any()) for x in streams.get(stream, ())) for stream in needed):
            return streams, []
        if not all(math.isfinite(float(torch.linalg.vector_norm(x))) for own in streams.values() for x in own):
            raise NumericError(f"{self.model.job.plan.base.path}: the inputs of {name!r} are NaN or Inf on the texts")
        systems = [
            System(streams[2 * k + 3], streams[2 * k + 2], (self.tokens[1], self.tokens[0]), mu)
            for k, mu in enumerate(self.weights)
        ]
        self._seen = tensors, streams, systems
        return streams, systems

    def _refit(
        self, target: Target, of: LowRank, streams: Mapping[int, list[Tensor]], systems: Sequence[System], whole: bool
    ) -> list[Tensor] | None:
        (Q, T), R = basis(of.L), of.R
        device = self.model.job.device
        P = self._through(target, Q.to(device)) if whole else torch.empty(0)
        delta = Refit(R, T, (R.double() @ T.T).to(device), P)
        rights = []
        for k, (mu, system) in enumerate(zip(self.weights, systems, strict=True)):
            texts = []
            for text in (GENERAL_STREAM, TASK_STREAM):
                now = streams[2 * (k + 1) + text]
                texts.append(TextInputs(streams[text] if whole else now, now, self.tokens[text]))
            right = refit(delta, texts[TASK_STREAM], texts[GENERAL_STREAM], mu, system)
            if right is None:
                return None
            rights.append(right)
        return rights

    def _through(self, target: Target, Q: Tensor) -> Tensor:
        """Compute ``Wᵀ Q`` (n, k) of a target's weight W and Q (m, k), with products in float32."""
        values, n = self.model.values, target.module.shape[1]
        out, at, Q32 = Q.new_zeros(n, Q.shape[1]), 0, Q.float()
        source = WeightSource(target.slices)
        size = sum(values.weight_of(slice_, ADAPTER_ROW).matrix[0] for slice_ in target.slices)
        for i, j, rows in values.blocks(source, ADAPTER_ROW, 0, size):
            if target.transposed:
                out[i:j] = (rows @ Q32).double()
            else:
                out += (rows.T @ Q32[i:j]).double()
            at = j
        assert at == size
        return out


def _lost(kept: float) -> float:
    """Return a figure that rises nearly in proportion to a change of the factors: the loss rises as its square from the adapter on."""
    return math.sqrt(max(0.0, 1 - kept))


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
        self.prepared, self.records, self.monitor, self.directory = prepared, records, prepared.run.monitor, directory
        self.model = prepared.model
        self.model.directory = directory
        self._rows: dict[str, Mapping[str, SequenceSums]] = {}
        self._base: list[Group] = []

    def result(self) -> Coefficients:
        """Run to the end and return the result."""
        prepared, plan = self.prepared, self.prepared.plan
        if all(factors_of(plan, target).is_zero() for target in plan.targets):
            raise UnsupportedError(f"{plan.adapter.path}: all of its deltas are zero, so there is nothing to fit")
        prepared.warn()
        if prepared.max_memory is not None:
            limit_freed_memory()
        spool = Spool(self.directory)
        self.progress = Progress(prepared.run, self.model.size, "fit")
        try:
            with computing(self.records.threads, prepared.run):
                one_length = prepared.one_length or padding_changes(
                    self.model, [part.text for part in self._parts(prepared.one_length, 1)], self.monitor.checkpoint
                )
                points, unseen = self._swept(spool, one_length)
                of_adapter = adapter_facts(*self._sums([]), prepared.texts[TASK].whole.name)
                self.monitor.warn(doubts(of_adapter))
                chosen = self._chosen(points, one_length)
                self.progress.finish()
                names = [*(Shrink(lam).label for lam in SHRINKS), *(point.name for _, point in chosen)]
                facts = {
                    **prepared.facts, "ridge": RIDGE, "general_ridge": GENERAL_RIDGE, "unseen": unseen, **of_adapter,
                    **scaling_facts(prepared.scaling, lambda name: self._sums([name])),
                    "sets": set_facts(*self._sums(names), chosen),
                }  # fmt: skip
                self.monitor.warn(misses(facts))
                tensors = [target.tensor for target in plan.targets]
                made = tuple(
                    FactorSet(keep, {tensor: point.factors[tensor].clone() for tensor in tensors})
                    for keep, point in chosen
                )
        finally:
            spool.close()
        return Coefficients(made, facts)

    def _parts(self, one_length: bool, variants: int) -> list[Part]:
        return riders(self.prepared.held_out, variants, self.model.size, self.prepared.limits.rows, one_length)

    def _swept(self, spool: Spool, one_length: bool) -> tuple[list[Point], list[str]]:
        """Fit all candidates in one sweep, in which they, the adapter and shrinks ride; also list matrices that a text never reached."""
        prepared, plan, model = self.prepared, self.prepared.plan, self.model
        weights, as_is = prepared.options.weights, unchanged(plan)
        fitted = fit_groups(prepared)
        tokens = [
            sum(group.rows for group in fitted if group.stream == stream) for stream in (GENERAL_STREAM, TASK_STREAM)
        ]
        solver = Solver(model, weights, (tokens[0], tokens[1]), spool)
        points = [Point(mu, replaced(spooled(spool, solver.places, k), as_is)) for k, mu in enumerate(weights)]
        variants = [Variant(BASE, None), Variant(ADAPTER, UNCHANGED), *map(self._variant, points)]
        variants += [*(Variant.of(Shrink(lam)) for lam in SHRINKS), *prepared.scaling]
        held_out = self._parts(one_length, len(variants))
        self._measure(variants, held_out, fitted, solver)
        # A second sweep needs only the logits of the base's results, unless workers have these.
        self._base = [part.groups[0] for part in held_out]
        unseen = sorted({target.tensor for target in plan.targets} - solver.places.keys())
        if whole := sorted(model.whole - solver.places.keys()):
            raise UnsupportedError(
                f"{plan.base.path}: the weights of {len(whole)} matrices are not used by a matrix product or look-up (a "
                f"convolution, for example; first: {whole[0]!r}), so their inputs cannot be collected; use `mitigate --method shrink`"
            )
        if unseen:
            self.monitor.warn((f"{counted(len(unseen), 'matrix')} received no tokens from one of the texts, or lack a solution; "
                               f"their deltas stay: {listed(map(repr, unseen))}",))  # fmt: skip
        return [Point(0.0, as_is), *points], unseen

    def _chosen(self, points: Sequence[Point], one_length: bool) -> list[tuple[float, Point]]:
        """Choose for each share the candidate that diverges least among those that keep it, or one between two candidates.

        Parameters
        ----------
        points
            The adapter and the candidates, by rising weight.
        """
        options: dict[float, list[Point]] = {}
        new: list[Variant] = [Variant(BASE, None)]
        for keep in self.prepared.options.keep:
            own = options[keep] = [point for point in points[1:] if self._kept(point) >= keep]
            pairs = [(a, b) for a, b in pairwise(points) if self._kept(a) >= keep > self._kept(b)]
            if pairs:
                a, b = pairs[-1]
                above, wanted, below = (_lost(kept) for kept in (self._kept(a), keep + MARGIN, self._kept(b)))
                own.append(a.towards(b, max(0.0, (wanted - above) / (below - above))))
                new.append(self._variant(own[-1]))
        if len(new) > 1:
            parts = zip(self._parts(one_length, len(new)), self._base, strict=True)
            reused = [replace(part, groups=(base, *part.groups[1:])) if base.results else part for part, base in parts]
            self._measure(new, reused)

        def divergence(point: Point) -> float:
            return float(self._sums([point.name])[0].kl[ADAPTER_ROW + 1].sum())

        chosen = []
        for keep, own in options.items():
            enough = [point for point in own if self._kept(point) >= keep] or own
            chosen.append((keep, min(enough, key=divergence)))
        return chosen

    def _variant(self, point: Point) -> Variant:
        return Variant(point.name, RegMean(coefficients=FactorSet(1.0, point.factors)))

    def _kept(self, point: Point) -> float:
        """Return the share of the learning that a point keeps."""
        return 1.0 if point.weight == 0 else self._sums([point.name])[1].fraction(ADAPTER_ROW + 1).value

    def _measure(self, variants: Sequence[Variant], held_out: Sequence[Part], fitted: Sequence[Group] = (),
                 solver: Solver | None = None) -> None:  # fmt: skip
        """Run a sweep in which variants, the base first, ride."""
        own, model = self.prepared, self.model
        groups = [*fitted, *(group for part in held_out for group in part.groups if not group.results)]
        cost = sweep_cost(model.size, sum(group.rows for group in groups), len(groups))
        self.progress.expect(cost, len(model.layers) + 1)
        model.use(replace(model.job, variants=tuple(variants), findings=own.findings))
        # The file stays that of the first sweep, which a run that is killed in the second one needs again.
        states = None if solver is None else self.records.states(json.dumps([variant.name for variant in variants]))
        if states is not None and solver is not None:
            states.factors, states.restore = solver.factors, solver.restore
        sums = measured(model, own.held_out, held_out, self.progress, own.limits, fitted, solver, states)
        for row, variant in enumerate(variants):
            self._rows.setdefault(variant.name, {text: of.take([row]) for text, of in sums.items()})

    def _sums(self, names: Sequence[str]) -> tuple[SequenceSums, SequenceSums]:
        """Return the sums on both texts for the base, the unchanged adapter, and measured variants."""
        assert (BASE_ROW, ADAPTER_ROW) == (0, 1)
        rows = [self._rows[name] for name in (BASE, ADAPTER, *names)]
        general, task = (rows[0][text].joined(*(row[text] for row in rows[1:])) for text in (GENERAL, TASK))
        return general, task
