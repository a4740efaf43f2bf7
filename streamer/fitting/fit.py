"""Fit right factors to the inputs of modules in one sweep, choose among them by held-out sequences, and write them to a file.

Each text is divided into a part for fitting and a held-out part. General text runs through the base, task text through base + adapter, and
both run through the model that is being repaired, once for each candidate: a weight μ of the general text. At each site every candidate's
factors are fitted to the inputs that its own layers before produce. Held-out sequences ride along under the base, the adapter, the
candidates and shrinks. The candidate that diverges least from the base among those that keep the share is chosen; if the next one keeps
less, their factors are interpolated, and the result rides in a second sweep, beside the shrink that keeps as much.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from streamer.adapters.modules import MethodModule
from streamer.errors import FormatError, UnsupportedError
from streamer.evaluation.curve import lambda_to_place
from streamer.fitting.choice import adapter_facts, check_learning, doubts, misses, set_facts
from streamer.fitting.solver import (
    FactorSolver,
    RightFactors,
    Stream,
    factors_of,
    streams_of,
    unchanged,
)
from streamer.json_types import JsonObject
from streamer.linalg.moments import GENERAL_RIDGE, RIDGE
from streamer.measuring.batches import Batch, Work, batches, groups_to_fit, needs_one_length
from streamer.measuring.facts import identities, model_facts, with_digest, writable
from streamer.measuring.losses import SweepProgress, cost_of, measure, waiting
from streamer.measuring.prepared import ENDS, Prepared, Records, model_of
from streamer.measuring.sequences import GENERAL, TASK, TextsByName, TextSequences
from streamer.measuring.statistics import (
    EvaluatedVariant,
    Measured,
    SequenceSums,
    Sums,
    critical_value,
)
from streamer.measuring.texts import BUILT_IN, read_texts, sample_digest
from streamer.methods import RegMean, Shrink, share_name
from streamer.methods.files import FIT, Coefficients, load_coefficients
from streamer.options import RepairOptions
from streamer.plan.plan import Plan, make_plan
from streamer.run import Run
from streamer.storage.files import limit_freed_memory
from streamer.streaming.groups import Group
from streamer.streaming.skeleton import require_transformers
from streamer.streaming.spool import Spool
from streamer.streaming.variants import ADAPTER, ADAPTER_ROW, BASE, Variant
from streamer.units import counted, listed

LEAST_SEQUENCES = 2
"""Least number of sequences in each part of a text."""


@dataclass(frozen=True)
class Division:
    """A text in two parts.

    Attributes
    ----------
    whole
        The whole text.
    fitted, held_out
        Sequences used for fitting, and held-out sequences.
    """

    whole: TextSequences
    fitted: TextSequences
    held_out: TextSequences


def divide(
    texts: TextsByName, paths: Mapping[str, Path], holdout: float, seed: int
) -> dict[str, Division]:
    """Divide the sequences of each text by the seed; texts of the same kind with as many sequences are divided in the same way.

    In running text, consecutive sequences are held out, wrapping around at the end: neighbours usually come from one document, and a fit on
    one half of a document would look better on the other half than on other text. JSON lines are separate documents and are held out one by
    one. A repeated sequence is used once: both held out and fitted on, it would look better than other text.

    Parameters
    ----------
    paths
        Paths from which the texts were read.

    Raises
    ------
    FormatError
        If a text has too few different sequences.
    """
    divided = {}
    for name, text in texts.items():
        first = {ids.tobytes(): row for row, ids in reversed([*enumerate(text.ids)])}
        rows = np.array(sorted(first.values()))
        count = len(rows)
        if count < 2 * LEAST_SEQUENCES:
            few = f"{LEAST_SEQUENCES} to fit on and {LEAST_SEQUENCES} to hold out, found {count}"
            raise FormatError(
                f"{paths[name]}: expected {2 * LEAST_SEQUENCES} different sequences at least, {few}; give more"
            )
        held_out = min(count - LEAST_SEQUENCES, max(LEAST_SEQUENCES, round(holdout * count)))
        rng = np.random.default_rng(seed)
        documents = paths[name].suffix == ".jsonl"
        rows = rng.permutation(rows) if documents else np.roll(rows, rng.integers(count))
        fitted = text.take(sorted(rows[held_out:]))
        divided[name] = Division(text, fitted, text.take(sorted(rows[:held_out])))
    return divided


SHRINKS = (0.8, 0.5)
"""Shrinks that ride for comparison; the base and the adapter are those at 0 and 1."""


@dataclass(frozen=True)
class Point:
    """Right factors for a weight μ; 0 is the unchanged adapter."""

    weight: float
    factors: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        """Return the name of its variant."""
        return f"{RegMean.name} mu {self.weight!r}"

    @property
    def variant(self) -> Variant:
        """Return the variant that uses the factors."""
        return Variant(self.name, RegMean(coefficients=Coefficients(1.0, self.factors)))

    def towards(self, other: Point, t: float) -> Point:
        """Interpolate Δ' linearly, and the weight by its logarithm unless one is 0."""
        weight = t * other.weight if self.weight == 0 else self.weight ** (1 - t) * other.weight**t

        def factor(tensor: str) -> Tensor:
            return torch.lerp(self.factors[tensor], other.factors[tensor], t)

        return Point(weight, RightFactors(self.factors, factor))


ALGORITHM = 7
"""Version of the algorithm: another version gives another fit of the same inputs, or other figures. Version 7 has all shrinks' figures."""


FEW = 5
"""Least number of held-out sequences; with fewer, a warning: by Student's distribution, a difference then needs over three errors."""

FIT_FIGURES_BYTES = 2500
ENTRY_BYTES = 120
"""Largest size in bytes of a fit's figures, and of an array's header entry without its name."""


@dataclass(frozen=True, eq=False)
class PreparedFit(Prepared[Coefficients]):
    """A fit whose inputs are open and checked.

    Attributes
    ----------
    texts
        ``general`` and ``task``, each in two parts.
    files
        Digests of the texts' files; see `sample_digest`.
    """

    options: RepairOptions
    texts: Mapping[str, Division]
    files: Mapping[str, str]

    kind = FIT
    noun = FIT.what
    read = staticmethod(load_coefficients)
    same = "this very fit"
    example = "coefficients.safetensors"

    @property
    def held_out(self) -> dict[str, TextSequences]:
        """Return the held-out sequences of each text."""
        return {name: text.held_out for name, text in self.texts.items()}

    @cached_property
    def solving_bytes(self) -> int:
        """Estimate the memory of solving: Gram matrices in float64."""
        tokens = sum(text.fitted.tokens for text in self.texts.values())
        return (len(self.options.weights) + 3) * 8 * min(tokens, self.widest) ** 2

    @cached_property
    def widest(self) -> int:
        """Return the number of inputs of the widest matrix that multiplies them."""
        return max((t.module.shape[1] for t in self.plan.targets if not t.is_embedding), default=0)

    def warn(self) -> None:
        """Warn of a text that is short for the widest matrix, or has too few held-out sequences to show anything."""
        self.run.monitor.warn(self._weak_texts())

    def _weak_texts(self) -> Iterator[str]:
        for name, text in self.texts.items():
            count = len(text.held_out.ids)
            if count < FEW:
                yield (
                    f"the {name} text has {count} held-out sequences, so only differences of over {critical_value(count):.1f} standard "
                    "errors are evidence; give more text, or raise --sequences or --holdout"
                )
        if len({text.whole.digest() for text in self.texts.values()}) == 1:
            yield "both texts are the same, so the fit is a shrink, Δ / (1 + mu)"
        tokens, name = min((text.fitted.tokens, name) for name, text in self.texts.items())
        if tokens < self.widest:
            most = self.options.sequences
            cut = len(self.texts[name].whole.ids) == most
            more = f"--sequences {-(-most * self.widest // tokens)}" if cut else "more text"
            yield (
                f"the {name} text has {tokens} tokens to fit on, fewer than the {self.widest} inputs of the widest matrix: the ridge "
                f"decides what it does not show; with {more}, the result may forget less"
            )

    @cached_property
    def unchanged(self) -> list[str]:
        """List the changes that the adapter makes by other means than deltas, which the fit leaves unchanged."""
        edits = self.plan.edits
        return sorted({*edits.trained, *edits.shifts, *edits.rows})

    @cached_property
    def facts(self) -> JsonObject:
        """Describe the fit's inputs and options as JSON; equal `plan` digests mean equal fits."""
        options = self.options
        tree = {
            **model_facts(self.model, **identities(self.plan)),
            **writable(self.plan),
            "algorithm": ALGORITHM,
            "keep": options.keep,
            "weights": list(options.weights),
            "holdout": options.holdout,
            "seed": options.seed,
            "texts": {
                name: {
                    **text.whole.facts(),
                    "sample_sha256": self.files[name],
                    "fitted": {"sequences": len(text.fitted.ids), "tokens": text.fitted.tokens},
                    "held": {"sequences": len(text.held_out.ids), "tokens": text.held_out.tokens},
                }
                for name, text in self.texts.items()
            },
            "unchanged": self.unchanged,
        }
        return with_digest(tree)

    def sweeps(self, known: Coefficients | None = None) -> list[Work]:
        """List the sweep that fits, the one before it, and the one after it for an interpolation and the equal shrink."""
        fitted = sum(text.fitted.rows for text in self.texts.values())
        riding = sum(text.rows for text in self.held_out.values())
        longest = max(text.whole.longest for text in self.texts.values())
        candidates = len(self.options.weights)
        variants = len(ENDS) + candidates + len(SHRINKS)
        return [
            Work(variants * riding, longest, fitted=(1 + candidates) * fitted),
            Work(len(ENDS) * self.held_out[TASK].rows, longest),
            Work((len(ENDS) + 2) * riding, longest),
        ]

    def written_bytes(self, known: Coefficients | None) -> tuple[int, int]:
        """Estimate the bytes of the file and of the spool."""
        targets = self.plan.targets
        values = 4 * sum(t.module.factor_rank * t.module.shape[1] for t in targets)
        names = sum(2 * (len(target.tensor) + ENTRY_BYTES) for target in targets)
        nbytes = values + names + len(json.dumps(self.facts)) + FIT_FIGURES_BYTES
        return nbytes, len(self.options.weights) * values

    def keep_finished(self, path: Path) -> Coefficients:
        """Keep a complete fit, and repeat its warnings."""
        fit = super().keep_finished(path)
        self.run.monitor.warn([*doubts(fit.facts), *misses(fit.facts)])
        return fit

    def compute(self, records: Records, output: Path | None) -> Coefficients:
        """Fit the factors."""
        fit = FitRun(self, records, None if output is None else output.parent).result()
        return replace(fit, source=output)


def refuse_without_factors(plan: Plan, merge: bool) -> None:
    """Refuse an adapter some of whose deltas have no factors, of any module's form if the repair will be merged.

    Raises
    ------
    UnsupportedError
        If there are any.
    """
    for target in plan.targets:
        module = target.module
        if not (module.low_rank if merge else module.factors):
            kind = module.method.title if isinstance(module, MethodModule) else "DoRA"
            raise UnsupportedError(
                f"{plan.adapter.path}: is {kind}, and repair needs LoRA factors; pass --to-lora RANK, or use `merge` with --method shrink "
                "or --map"
            )


def prepare_fit(
    base_path: Path,
    adapter: Path,
    texts: Mapping[str, Path],
    options: RepairOptions,
    max_memory: int | None,
    run: Run,
) -> PreparedFit:
    """Open and check all inputs of a fit, and pass on their warnings.

    Parameters
    ----------
    texts
        Paths of the ``general`` and the ``task`` text.
    """
    require_transformers()
    plan = make_plan(base_path, adapter, run.io, run.stated, run.architecture)
    run.monitor.warn(plan.warnings)
    refuse_without_factors(plan, merge=True)
    model = model_of(plan, ENDS, options.dtype, run)
    # The built-in text has prose, code and chat, of which each needs its share.
    counts = {
        name: options.sequences * (2 if path == BUILT_IN else 1) for name, path in texts.items()
    }
    read = read_texts(model, texts, counts, options.length, run.monitor, 2 * LEAST_SEQUENCES)
    files = {name: sample_digest(path) for name, path in texts.items()}
    divided = divide(read, texts, options.holdout, options.seed)
    prepared = PreparedFit(run, max_memory, model, options, divided, files)
    if names := prepared.unchanged:
        tensors = f"{counted(len(names), 'tensor')} by other means than deltas, {listed(names)}"
        changes = f"{plan.adapter.path.name} also changes {tensors}"
        run.monitor.warn([f"{changes}; the fit keeps these changes"])
    return prepared


SHARE_MARGIN = 0.005
"""An interpolation aims above the share by this much."""

PLACINGS = 3
"""Most sweeps that look only for the shrink that keeps as much as the fit."""

AS_MUCH = 0.01
"""Shares that differ by at most this count as equal."""


def _distance(kept: float) -> float:
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
        self.prepared = prepared
        self.keep = prepared.options.keep
        self.records = records
        self.monitor = prepared.run.monitor
        self.model = prepared.model
        self.model.directory = directory
        self.progress = SweepProgress(self.monitor, "fit")
        self.shrinks = [Variant.of(Shrink(lam)) for lam in SHRINKS]
        self._sums_of: dict[str, Sums] = {}
        self._ran: dict[tuple[str, tuple[int, ...]], tuple[Group, ...]] = {}

    def result(self) -> Coefficients:
        """Run to the end and return the result."""
        prepared = self.prepared
        plan = prepared.plan
        if all(factors_of(plan, target).is_zero() for target in plan.targets):
            raise UnsupportedError(
                f"{plan.adapter.path}: all of its deltas are zero, so there is nothing to fit"
            )
        prepared.warn()
        if prepared.max_memory is not None:
            limit_freed_memory()
        self.one_length = needs_one_length(
            self.model, prepared.held_out, prepared.limits.rows, self.monitor.checkpoint
        )
        with contextlib.closing(Spool(self.model.directory)) as spool:
            self._check_learning()
            points, unseen = self._fit_candidates(spool)
            adapter = adapter_facts(self._measured())
            self.monitor.warn(doubts(adapter))
            chosen = self._choose(points)
            self.progress.finish()
            facts = {
                **prepared.facts,
                "ridge": RIDGE,
                "general_ridge": GENERAL_RIDGE,
                "unseen": unseen,
                **adapter,
                "sets": [set_facts(self._measured(chosen), self.keep, chosen.weight)],
            }
            self.monitor.warn(misses(facts))
            factors = {
                target.tensor: chosen.factors[target.tensor].clone() for target in plan.targets
            }
        return Coefficients(self.keep, factors, facts)

    def _batches(self, variants: int) -> list[Batch]:
        """Make the groups of held-out sequences; those of the base and the adapter that have run are reused."""
        prepared = self.prepared
        made = batches(
            prepared.held_out, variants, self.model.size, prepared.limits.rows, self.one_length
        )
        reused = []
        for batch in made:
            ran = self._ran.get((batch.name, batch.numbers), ())
            reused.append(replace(batch, groups=(*ran, *batch.groups[len(ran) :])))
        return reused

    def _check_learning(self) -> None:
        """Measure the base and the adapter on the task's text alone, to refuse swapped texts before the fit."""
        held_out = [batch for batch in self._batches(len(ENDS)) if batch.name == TASK]
        task = self._sweep(ENDS, held_out)[TASK]
        check_learning(task, self.prepared.texts[TASK].whole.name)

    def _fit_candidates(self, spool: Spool) -> tuple[list[Point], list[str]]:
        """Fit all candidates in one sweep, in which they, the adapter and shrinks ride; also list matrices that a text never reached."""
        prepared = self.prepared
        weights = prepared.options.weights
        unfitted = unchanged(prepared.plan)
        fitted = list[Group]()
        for stream in streams_of(len(weights)):
            text = prepared.texts[stream.text].fitted
            rows = prepared.limits.rows
            fitted += groups_to_fit(text, rows, self.model.size, stream.variant, stream)
        tokens = {
            text: sum(group.rows for group in fitted if group.stream == Stream(text))
            for text in (GENERAL, TASK)
        }
        solver = FactorSolver(self.model, weights, tokens, spool)
        points = [Point(mu, solver.candidate(k, unfitted)) for k, mu in enumerate(weights)]
        self._ride([*(point.variant for point in points), *self.shrinks], fitted, solver)
        unseen = sorted({target.tensor for target in prepared.plan.targets} - solver.fitted)
        if unseen:
            which = f"{counted(len(unseen), 'matrix')}, {listed(map(repr, unseen))}"
            why = "no tokens from one of the texts, or no solution"
            self.monitor.warn([f"{why}, for {which}: what the adapter adds there stays"])
        adapter = Point(0.0, unfitted)
        self._sums_of[adapter.name] = self._sums_of[ADAPTER]
        return [adapter, *points], unseen

    def _choose(self, points: Sequence[Point]) -> Point:
        """Choose the candidate that diverges least among those that keep the share, or one between two candidates.

        What lies between two candidates is measured in a second sweep, beside a shrink. The shrink that keeps as much as the choice is
        measured before this returns, so that it can be written with its figures.

        Parameters
        ----------
        points
            The adapter and the candidates, by rising weight.
        """
        _, *fitted = points
        candidates = [point for point in fitted if self._share_kept(point.name) >= self.keep]
        if between := self._between(points):
            candidates.append(between)
            self._measure([between.variant, *self._shrinks_to_place(self.keep + SHARE_MARGIN)])
        enough = [point for point in candidates if self._share_kept(point.name) >= self.keep]
        chosen = min(enough or candidates, key=self._divergence)
        for _ in range(PLACINGS):
            self._measure(self._shrinks_to_place(max(self.keep, self._share_kept(chosen.name))))
        return chosen

    def _between(self, points: Sequence[Point]) -> Point | None:
        """Interpolate at the share between the last two neighbours of which the second keeps less."""
        between = None
        for point, further in pairwise(points):
            kept = self._share_kept(point.name)
            left = self._share_kept(further.name)
            if kept >= self.keep > left:
                near = _distance(kept)
                t = (_distance(self.keep + SHARE_MARGIN) - near) / (_distance(left) - near)
                between = point.towards(further, max(0.0, t))
        return between

    def _shrinks_to_place(self, share: float) -> list[Variant]:
        """Choose the shrink to measure next, as one that keeps a share; none if a measured one does, or if none keeps as much."""
        kept = [self._share_kept(shrink.name) for shrink in self.shrinks]
        if any(own >= self.keep and abs(own - share) <= AS_MUCH for own in kept):
            return []
        lam = lambda_to_place(self._measured(), share)
        return [] if lam is None else [Variant.of(Shrink(lam))]

    def _share_kept(self, name: str) -> float:
        """Return the share of the learning that a measured variant keeps."""
        return self._sums(TASK, [name]).share("loss", ADAPTER_ROW + 1).value

    def _divergence(self, point: Point) -> float:
        return float(self._sums_of[point.name][GENERAL].kl.sum())

    def _measure(self, variants: Sequence[Variant]) -> None:
        """Measure variants in a sweep, if there are any."""
        if variants:
            self._ride(variants)
            self.shrinks += [v for v in variants if v.method == Shrink.name]

    def _ride(
        self,
        variants: Sequence[Variant],
        fitted: Sequence[Group] = (),
        solver: FactorSolver | None = None,
    ) -> None:
        """Run a sweep in which variants ride with the base and the adapter, and keep their sums."""
        riders = [*ENDS, *variants]
        sums = self._sweep(riders, self._batches(len(riders)), fitted, solver)
        for row, variant in enumerate(riders):
            own = {text: of_text.take([row]) for text, of_text in sums.items()}
            self._sums_of.setdefault(variant.name, own)

    def _sweep(
        self,
        variants: Sequence[Variant],
        held_out: Sequence[Batch],
        fitted: Sequence[Group] = (),
        solver: FactorSolver | None = None,
    ) -> Sums:
        """Run a sweep, and return the sums of its riders; the base's and the adapter's groups are kept for later sweeps."""
        model = self.model
        cost = cost_of(model.size, [*fitted, *waiting(held_out)])
        self.progress.expect(cost, len(model.layers) + 1)
        model.use(replace(model.job, variants=tuple(variants)))
        limits = self.prepared.limits
        if solver is None:
            sums = measure(model, held_out, self.progress, limits)
        else:
            # The file stays that of this sweep, which a run that is killed in a later one needs again.
            names = json.dumps([variant.name for variant in variants])
            states = self.records.states(names, solver.factors, solver.restore)
            sums = measure(
                model, held_out, self.progress, limits, states, fitted, solver, solver.check
            )
        for batch in held_out:
            self._ran[batch.name, batch.numbers] = batch.groups[: len(ENDS)]
        return sums

    def _sums(self, text: str, names: Sequence[str]) -> SequenceSums:
        """Return the sums on a text for the base, the unchanged adapter, and other measured variants."""
        base, *others = (self._sums_of[name][text] for name in (BASE, ADAPTER, *names))
        return base.joined(*others)

    def _measured(self, *points: Point) -> Measured:
        """Return what was measured of the base, the unchanged adapter, the shrinks, and factors."""
        variants = [EvaluatedVariant.of(variant) for variant in (*ENDS, *self.shrinks)]
        fitted = f"{RegMean.name} {share_name(self.keep)}"
        variants += [EvaluatedVariant(fitted, RegMean.name, None) for _ in points]
        names = [shrink.name for shrink in self.shrinks] + [point.name for point in points]
        general = self._sums(GENERAL, names)
        return Measured(tuple(variants), general, self._sums(TASK, names), {})
