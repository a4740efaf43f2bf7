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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamer.adapters.modules import MethodModule
from streamer.detection.options import Run
from streamer.errors import FormatError, MismatchError, NumericError, UnsupportedError
from streamer.evaluation.evaluation import (
    Evaluation,
    ShrinkComparison,
    against_shrink,
    ask_swapped,
    lambda_to_place,
)
from streamer.linalg.moments import (
    GENERAL_RIDGE,
    RIDGE,
    Refit,
    System,
    TextInputs,
    basis,
    refit,
    refit_one_hot,
)
from streamer.linalg.operators import LowRank
from streamer.measuring import runs
from streamer.measuring.runs import EvaluatedVariant, Part, Prepared, Progress, Records, Sums, Work
from streamer.measuring.statistics import ADAPTER_ROW, BASE_ROW, SequenceSums, critical_value, flat
from streamer.measuring.texts import (
    BUILT_IN,
    GENERAL,
    TASK,
    Texts,
    TextSequences,
    read_texts,
    sample_digest,
)
from streamer.methods import UNCHANGED, RegMean, Shrink, share_name
from streamer.methods.files import FIT, Coefficients, load_coefficients
from streamer.options import RepairOptions
from streamer.plan.plan import Plan, make_plan
from streamer.plan.targets import Target
from streamer.storage.files import limit_freed_memory
from streamer.streaming.model import require_transformers
from streamer.streaming.sweep import Group, OnDemand, Site, Spool, Spooled, SweepModel, same_inputs
from streamer.streaming.values import ADAPTER, BASE, Variant, VariantSet, WeightSource
from streamer.units import counted, listed

SHRINKS = (0.8, 0.5)
"""Shrinks that ride for comparison; the base and the adapter are those at 0 and 1."""


def factors_of(plan: Plan, target: Target) -> LowRank:
    """Read the factors of a delta and check that they are finite."""
    delta = plan.finite_delta(target)
    assert isinstance(delta, LowRank)
    return delta


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
        a, b = self.factors, other.factors
        return Point(weight, Factors(a, lambda tensor: torch.lerp(a[tensor], b[tensor], t)))


Factors = OnDemand[str, Tensor]
"""Right factors by `Target.tensor`."""


def unchanged(plan: Plan) -> Factors:
    """Read the factors of the unchanged adapter."""
    targets = {target.tensor: target for target in plan.targets}
    return Factors(targets, lambda tensor: factors_of(plan, targets[tensor]).R.to(torch.float32))


NEAR_SHRINK = 0.9
"""A fit that leaves at least this share of a shrink's forgetting has gained little: texts of one kind give a shrink."""

MISSED = 0.01
"""A fit misses its share if it keeps less by more than this."""


def check_learning(task: SequenceSums, name: str) -> None:
    """Check that the adapter learned a text.

    Parameters
    ----------
    task
        Sums of the base and the adapter on held-out sequences of the text.
    name
        Name of the text, for messages.

    Raises
    ------
    MismatchError
        If there is no evidence of it, so that there is no learning to keep.
    """
    learning = task.mean("loss", BASE_ROW, ADAPTER_ROW)
    if learning.is_negative:
        raise MismatchError(f"{name}: {ask_swapped(task)}")
    if not learning.is_positive:
        raise MismatchError(
            f"{name}: there is no evidence that the adapter learned this text, so there is nothing to keep: its loss less the base's is "
            f"{-learning.value:.4f} ± {learning.error:.4f} on {learning.sequences} held-out sequences, where only "
            f"{critical_value(learning.sequences):.1f} standard errors are evidence; give more text, raise --sequences, or give text of "
            "its task"
        )


def adapter_facts(evaluation: Evaluation) -> dict[str, Any]:
    """Describe what the unchanged adapter has learned and forgotten on the held-out sequences, in nats per token.

    Returns
    -------
    dict
        ``forgotten`` says whether the divergence is significant; ``learning`` is the fall of the loss on the task's text, ``top1_gain`` the
        rise of the share of its tokens that are the likeliest, ``forgetting`` the rise of the loss on general text, and ``divergence`` the
        mean ``KL(base ‖ adapter)`` there. ``reliable`` says which of them can be denominators of shares.
    """
    divergence = evaluation.general.mean("kl", ADAPTER_ROW)
    return {
        "forgotten": divergence.is_positive,
        **flat("learning", evaluation.task.mean("loss", BASE_ROW, ADAPTER_ROW)),
        **flat("top1_gain", evaluation.task.mean("right", ADAPTER_ROW, BASE_ROW)),
        **flat("forgetting", evaluation.general.change),
        **flat("divergence", divergence),
        "reliable": evaluation.reliable(),
    }


def set_facts(evaluation: Evaluation, keep: float, point: Point) -> dict[str, Any]:
    """Describe the fitted factors, the last variant of an evaluation, and compare them with the shrink that keeps as much.

    Returns
    -------
    dict
        Shares are relative to the adapter: ``kept`` of the learning, ``behaviour_kept`` of its divergence from the base on the task's text,
        ``top1_kept`` of its gain in top-1, ``forgetting`` of the rise of the
        general loss, ``divergence`` of its divergence. ``missed`` says that less is kept than `keep`. ``shrinks`` has the figures of
        the measured shrinks, the mildest first. ``shrink`` describes the measured
        shrink that keeps most nearly as much, and at least `keep`; its ``loss`` and ``kl`` are the factors' minus those of the shrink that
        keeps exactly as much on general text, and ``verdict`` judges them. It is null if there is no such shrink.
    """
    row = len(evaluation.variants) - 1
    comparison = against_shrink(evaluation, row)
    kept = evaluation.task.share("loss", row).value
    return {
        "keep": keep,
        "missed": kept < keep - MISSED,
        "mu": point.weight,
        **_figures(evaluation, row),
        "shrinks": _shrinks(evaluation),
        "shrink": None if comparison is None else _shrink_facts(evaluation, comparison, keep, kept),
    }


def _shrinks(evaluation: Evaluation) -> list[dict[str, Any]]:
    rows = [row for row, variant in enumerate(evaluation.variants) if variant.method == Shrink.name]
    found = [
        {"lambda": evaluation.variants[row].mitigation_lambda, **_figures(evaluation, row)}
        for row in rows
    ]
    return sorted(found, key=lambda shrink: -shrink["lambda"])


def _shrink_facts(
    evaluation: Evaluation, comparison: ShrinkComparison, keep: float, kept: float
) -> dict[str, Any]:
    row = _nearest_shrink(evaluation, keep, kept)
    lam = evaluation.variants[row].mitigation_lambda
    return {
        "lambda": 1.0 if lam is None else lam,
        **_figures(evaluation, row),
        **flat("loss", comparison.loss),
        **flat("kl", comparison.kl),
        "verdict": comparison.verdict,
    }


def _nearest_shrink(evaluation: Evaluation, keep: float, kept: float) -> int:
    """Find the shrink, or the adapter, that keeps at least one share and most nearly another."""
    shares = {
        row: evaluation.task.share("loss", row).value
        for row, variant in enumerate(evaluation.variants)
        if row == ADAPTER_ROW or variant.method == Shrink.name
    }
    enough = [row for row, share in shares.items() if share >= keep]
    return min(enough, key=lambda row: abs(shares[row] - kept))


def _figures(evaluation: Evaluation, row: int) -> dict[str, Any]:
    general, task = evaluation.general, evaluation.task
    return {
        "trade": evaluation.trade(evaluation.variants[row]),
        **flat("kept", task.share("loss", row)),
        **flat("behaviour_kept", task.share("kl_from_adapter", row)),
        **flat("top1_kept", task.share("right", row)),
        **flat("forgetting", general.share("loss", row)),
        **flat("divergence", general.share("kl", row)),
    }


def doubts(facts: Mapping[str, Any]) -> list[str]:
    """Warn if there is no evidence that the adapter forgets."""
    if facts["forgotten"]:
        return []
    return [
        f"there is no evidence that the adapter forgets, so it can be used as it is (more text may show more): its divergence from the "
        f"base on general text is {facts['divergence']:.4f} ± {facts['divergence_se']:.4f} on the held-out sequences"
    ]


def misses(facts: Mapping[str, Any]) -> list[str]:
    """Warn if the factors keep less than requested, or diverge nearly as much as the shrink that keeps as much."""
    (fitted,) = facts["sets"]  # a list in the file
    lines = list[str]()
    if not facts["reliable"]["kept"]:
        return lines
    share, shrink = f"{100 * fitted['keep']:g}%", fitted["shrink"]
    if fitted["missed"]:
        kept = (
            f"{share} was to be kept, and {100 * fitted['kept']:.1f}% is, on the held-out sequences"
        )
        lines.append(f"{kept}; ask for a larger share, or give more text")
    if facts["forgotten"] and shrink and fitted["divergence"] >= NEAR_SHRINK * shrink["divergence"]:
        what = f"{share}: the result is close to the shrink that keeps the same share, and diverges nearly as much from the base"
        lines.append(
            f"{what}; the texts may be too similar: give general text of another kind than the task's"
        )
    return lines


LEAST = 2
"""Least number of sequences in each part of a text."""

ALGORITHM = 7
"""Version of the algorithm: another version gives another fit of the same inputs, or other figures. Version 7 has all shrinks' figures."""


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
    texts: Texts, paths: Mapping[str, Path], holdout: float, seed: int
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
    out = {}
    for name in (GENERAL, TASK):
        text = texts[name]
        first = {ids.tobytes(): row for row, ids in reversed([*enumerate(text.ids)])}
        rows, count = np.array(sorted(first.values())), len(first)
        if count < 2 * LEAST:
            raise FormatError(
                f"{paths[name]}: expected {2 * LEAST} different sequences at least, {LEAST} to fit on and {LEAST} to hold out, found "
                f"{count}; give more"
            )
        held_out = min(count - LEAST, max(LEAST, round(holdout * count)))
        rng = np.random.default_rng(seed)
        documents = paths[name].suffix == ".jsonl"
        order = rows[
            rng.permutation(count) if documents else np.roll(np.arange(count), rng.integers(count))
        ]
        out[name] = Division(
            text, text.take(sorted(order[held_out:])), text.take(sorted(order[:held_out]))
        )
    return out


FEW = 5
"""Least number of held-out sequences; with fewer, a warning: by Student's distribution, a difference then needs over three errors."""

FIGURES_BYTES, TENSOR_BYTES = 2500, 120
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

    kind, noun = FIT, FIT.what
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
        warnings = [
            f"the {name} text has {count} held-out sequences, so only differences of over {critical_value(count):.1f} standard errors are "
            "evidence; give more text, or raise --sequences or --holdout"
            for name, text in self.texts.items()
            if (count := len(text.held_out.ids)) < FEW
        ]
        if len({text.whole.digest() for text in self.texts.values()}) == 1:
            warnings.append("both texts are the same, so the fit is a shrink, Δ / (1 + mu)")
        tokens, name = min((text.fitted.tokens, name) for name, text in self.texts.items())
        if tokens < self.widest:
            most, enough = (
                self.options.sequences,
                -(-self.options.sequences * self.widest // tokens),
            )
            cut = len(self.texts[name].whole.ids) == most
            warnings.append(
                f"the {name} text has {tokens} tokens to fit on, fewer than the {self.widest} inputs of the widest matrix: the ridge "
                f"decides what it does not show; with {f'--sequences {enough}' if cut else 'more text'}, the result may forget less"
            )
        self.run.monitor.warn(warnings)

    @cached_property
    def unchanged(self) -> list[str]:
        """List the changes that the adapter makes by other means than deltas, which the fit leaves unchanged."""
        edits = self.plan.edits
        return sorted({*edits.trained, *edits.shifts, *edits.rows})

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Describe the fit's inputs and options as JSON; equal `plan` digests mean equal fits."""
        o = self.options
        tree = {
            **runs.model_facts(
                self.model, base={**self.plan.base_identity}, adapter={**self.plan.adapter_identity}
            ),
            **runs.writable(self.plan),
            "algorithm": ALGORITHM,
            "keep": o.keep,
            "weights": list(o.weights),
            "holdout": o.holdout,
            "seed": o.seed,
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
        return runs.with_digest(tree)

    def sweeps(self, known: Coefficients | None = None) -> list[Work]:
        """List the sweep that fits, the one before it, and the one after it for an interpolation and the equal shrink."""
        fitted = sum(len(ids) for text in self.texts.values() for ids in text.fitted.ids)
        riding = sum(len(ids) for text in self.held_out.values() for ids in text.ids)
        longest = max(text.whole.longest for text in self.texts.values())
        candidates = len(self.options.weights)
        variants = 2 + candidates + len(SHRINKS)
        task = sum(len(ids) for ids in self.held_out[TASK].ids)
        return [
            Work(fitted=(1 + candidates) * fitted, riding=variants * riding, length=longest),
            Work(fitted=0, riding=2 * task, length=longest),
            Work(fitted=0, riding=4 * riding, length=longest),
        ]

    def written_bytes(self, known: Coefficients | None) -> tuple[int, int]:
        """Estimate the bytes of the file and of the spool."""
        values = 4 * sum(t.module.factor_rank * t.module.shape[1] for t in self.plan.targets)
        names = sum(2 * (len(target.tensor) + TENSOR_BYTES) for target in self.plan.targets)
        return values + names + len(json.dumps(self.facts)) + FIGURES_BYTES, len(
            self.options.weights
        ) * values

    def keep_finished(self, path: Path) -> Coefficients:
        """Keep a complete fit, and repeat its warnings."""
        fit = super().keep_finished(path)
        self.run.monitor.warn([*doubts(fit.facts), *misses(fit.facts)])
        return fit

    def compute(self, records: Records, output: Path | None) -> Coefficients:
        """Fit the factors."""
        fit = FitRun(self, records, None if output is None else output.parent).result()
        return replace(fit, source=output)


def refuse_dense(plan: Plan, dense: Sequence[Target]) -> None:
    """Refuse an adapter some of whose deltas have no factors.

    Raises
    ------
    UnsupportedError
        If there are any.
    """
    if dense:
        module = dense[0].module
        kind = module.method.title if isinstance(module, MethodModule) else "DoRA"
        raise UnsupportedError(
            f"{plan.adapter.path}: is {kind}, and repair needs LoRA factors; pass --to-lora RANK, or use `merge` with --method shrink "
            "or --map"
        )


def prepare_fit(
    base_path: str | Path,
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
    refuse_dense(plan, [t for t in plan.targets if not t.module.low_rank])
    variants = Variant(BASE, None), Variant(ADAPTER, UNCHANGED)
    model = SweepModel(
        VariantSet(plan, variants, None, False, options.dtype == "bf16", run.model_device)
    )
    # The built-in text has prose, code and chat, of which each needs its share.
    counts = {
        name: options.sequences * (2 if path == BUILT_IN else 1) for name, path in texts.items()
    }
    read = read_texts(model, texts, counts, options.length, run.monitor, 2 * LEAST)
    files = {name: sample_digest(path) for name, path in texts.items()}
    divided = divide(read, texts, options.holdout, options.seed)
    prepared = PreparedFit(plan, run, max_memory, model, options, divided, files)
    if names := prepared.unchanged:
        tensors = f"{counted(len(names), 'tensor')} by other means than deltas, {listed(names)}"
        changes = f"{plan.adapter.path.name} also changes {tensors}; the fit keeps these changes"
        run.monitor.warn((changes,))
    return prepared


class Stream(NamedTuple):
    """One text through one model: general text through the base, task text through base + adapter, or either through a candidate."""

    text: str
    candidate: int | None = None

    @property
    def variant(self) -> int:
        """Return the number of the variant that runs; the candidates come after the base and the adapter."""
        if self.candidate is None:
            return BASE_ROW if self.text == GENERAL else ADAPTER_ROW
        return ADAPTER_ROW + 1 + self.candidate


def streams_of(candidates: int) -> list[Stream]:
    """List the streams of a fit with so many candidates."""
    return [
        Stream(text, candidate)
        for candidate in (None, *range(candidates))
        for text in (GENERAL, TASK)
    ]


MARGIN = 0.005
"""An interpolation aims above the share by this much."""

PLACINGS = 3
"""Most sweeps that look only for the shrink that keeps as much as the fit."""

AS_MUCH = 0.01
"""Shares that differ by at most this count as equal."""


class SiteSystems(NamedTuple):
    """The inputs of a site's matrices, as they came and by stream, and each candidate's system."""

    inputs: Sequence[Tensor]
    streams: Mapping[Stream, Sequence[Tensor]]
    systems: Sequence[System]


@dataclass
class Solver:
    """Fits each site's matrices for every candidate.

    Attributes
    ----------
    model
        The model, whose sweep calls this object at each site.
    tokens
        Number of tokens of each text.
    places
        For each matrix, the places of the candidates' right factors in the spool.
    """

    model: SweepModel
    weights: Sequence[float]
    tokens: Mapping[str, int]
    spool: Spool
    places: dict[str, list[Spooled]] = field(default_factory=dict)
    _last: SiteSystems | None = None

    def __call__(self, site: Site, inputs: Mapping[Group, Tensor]) -> None:
        """Fit the factors of all matrices at a site; see `SweepModel.run`."""
        plan = self.model.job.plan
        pairs = [(target, factors_of(plan, target)) for target in site.matrices]
        for target, delta in pairs:
            if delta.is_zero():
                self._write(target, [delta.R] * len(self.weights))
            elif target.tensor in self.places:
                raise UnsupportedError(
                    f"{target.tensor!r}: its module runs in several layers, which repair does not support; use `mitigate --method shrink`"
                )
        if site.size is not None:
            streams = self._by_stream(inputs)
            task, general = (
                torch.bincount(torch.cat(streams[Stream(text)]), minlength=site.size).double()
                / self.tokens[text]
                for text in (TASK, GENERAL)
            )
            for target, delta in pairs:
                self._write(
                    target, [refit_one_hot(delta.R, task, general, mu) for mu in self.weights]
                )
            return
        systems = self._systems_of(inputs, site.matrices[0].tensor)
        if systems is None:
            return
        # An expert receives other tokens once its router's inputs have changed, or the same in another order: they have no counterparts.
        expert = not site.order[0] or any(
            target.module.layer_kind == "expert" for target in site.matrices
        )
        paired = not expert and all(
            sum(map(len, x)) == self.tokens[stream.text] for stream, x in systems.streams.items()
        )
        for target, delta in pairs:
            if (
                not delta.is_zero()
                and (rights := self._refit(target, delta, systems, paired)) is not None
            ):
                self._write(target, rights)

    def check(self) -> None:
        """Check that the inputs of all weights that were used so far could be collected."""
        if unused := sorted(self.model.otherwise_used - self.places.keys()):
            raise UnsupportedError(
                f"{self.model.job.plan.base.path}: the weight {unused[0]!r} is not used by a matrix product or look-up (but by a "
                "convolution, for example), so its inputs cannot be collected; use `mitigate --method shrink`"
            )

    def candidate(self, number: int, rest: Mapping[str, Tensor]) -> Factors:
        """Return a candidate's factors as they are fitted, and `rest` for all other matrices."""
        places = self.places
        return Factors(
            rest,
            lambda name: self.spool.read(places[name][number])[0] if name in places else rest[name],
        )

    def factors(self) -> Mapping[str, Tensor]:
        """Return all factors found so far, by matrix and candidate."""
        places = {
            f"{name}/{k:03}": place
            for name, rights in self.places.items()
            for k, place in enumerate(rights)
        }
        return OnDemand(places, lambda key: self.spool.read(places[key])[0])

    def restore(self, factors: Mapping[str, Tensor]) -> None:
        """Take over the factors of an earlier run."""
        for key, right in sorted(factors.items()):
            self.places.setdefault(key.rpartition("/")[0], []).append(self.spool.write([right]))

    def _write(self, target: Target, rights: Sequence[Tensor]) -> None:
        self.places[target.tensor] = [
            self.spool.write([right.to(torch.float32)]) for right in rights
        ]

    def _by_stream(self, inputs: Mapping[Group, Tensor]) -> dict[Stream, list[Tensor]]:
        """Collect the inputs of each stream's groups, in their order."""
        by_stream: dict[Any, list[Tensor]] = {}
        for group, x in inputs.items():
            if len(x):  # an expert may receive none
                by_stream.setdefault(group.stream, []).append(x)
        return by_stream

    def _systems_of(self, inputs: Mapping[Group, Tensor], name: str) -> SiteSystems | None:
        """Divide the inputs by stream, and make each candidate's system; None if a text did not reach the site.

        Matrices that follow each other and share their inputs, such as q, k and v, share the systems.
        """
        tensors = list(inputs.values())
        if self._last is not None and same_inputs(self._last.inputs, tensors):
            return self._last
        self._last = None  # frees its systems before others are made
        streams = self._by_stream(inputs)
        if not all(
            any(bool(x.any()) for x in streams.get(stream, ()))
            for stream in streams_of(len(self.weights))
        ):
            return None
        if not all(
            math.isfinite(float(torch.linalg.vector_norm(x)))
            for group in streams.values()
            for x in group
        ):
            raise NumericError(
                f"{self.model.job.plan.base.path}: the inputs of {name!r} are NaN or Inf on the texts"
            )
        tokens = self.tokens[TASK], self.tokens[GENERAL]
        systems = [
            System(streams[Stream(TASK, k)], streams[Stream(GENERAL, k)], tokens, mu)
            for k, mu in enumerate(self.weights)
        ]
        self._last = SiteSystems(tensors, streams, systems)
        return self._last

    def _refit(
        self, target: Target, delta: LowRank, site: SiteSystems, paired: bool
    ) -> list[Tensor] | None:
        """Fit each candidate's right factor to the inputs; None if a system has no solution.

        Parameters
        ----------
        paired
            Whether the inputs of a candidate are those of the same tokens in the unchanged models.
        """
        (Q, T), R = basis(delta.L), delta.R
        device = self.model.job.device
        P = self._through(target, Q.to(device)) if paired else torch.empty(0)
        refitted = Refit(R, T, (R.double() @ T.T).to(device), P)
        rights = []
        for k, (mu, system) in enumerate(zip(self.weights, site.systems, strict=True)):
            texts = {}
            for text in (GENERAL, TASK):
                current = site.streams[Stream(text, k)]
                reference = site.streams[Stream(text)] if paired else current
                texts[text] = TextInputs(reference, current, self.tokens[text])
            right = refit(refitted, texts[TASK], texts[GENERAL], mu, system)
            if right is None:
                return None
            rights.append(right)
        return rights

    def _through(self, target: Target, Q: Tensor) -> Tensor:
        """Compute ``Wᵀ Q`` (n, k) of a target's weight W and Q (m, k), with products in float32."""
        values, source = self.model.values, WeightSource(target.slices)
        out, Q32 = Q.new_zeros(target.module.shape[1], Q.shape[1]), Q.float()
        size = sum(values.weight_of(slice_, ADAPTER_ROW).matrix[0] for slice_ in target.slices)
        for i, j, rows in values.blocks(source, ADAPTER_ROW, 0, size):
            if target.transposed:
                out[i:j] = (rows @ Q32).double()
            else:
                out += (rows.T @ Q32[i:j]).double()
        return out


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
        self.prepared, self.records, self.monitor, self.model = (
            prepared,
            records,
            prepared.run.monitor,
            prepared.model,
        )
        self.model.directory = directory
        self.progress = Progress(prepared.run, "fit")
        self.shrinks = [Shrink(lam) for lam in SHRINKS]
        self._rows: dict[str, Mapping[str, SequenceSums]] = {}
        self._ran: dict[tuple[str, tuple[int, ...]], tuple[Group, ...]] = {}

    def result(self) -> Coefficients:
        """Run to the end and return the result."""
        prepared, plan = self.prepared, self.prepared.plan
        if all(factors_of(plan, target).is_zero() for target in plan.targets):
            raise UnsupportedError(
                f"{plan.adapter.path}: all of its deltas are zero, so there is nothing to fit"
            )
        prepared.warn()
        if prepared.max_memory is not None:
            limit_freed_memory()
        texts, rows = prepared.held_out, prepared.limits.rows
        self.one_length = runs.needs_one_length(self.model, texts, rows, self.monitor.checkpoint)
        with contextlib.closing(Spool(self.model.directory)) as spool:
            self._check_learning()
            points, unseen = self._fit_candidates(spool)
            adapter = adapter_facts(self._evaluation())
            self.monitor.warn(doubts(adapter))
            keep, chosen = prepared.options.keep, self._choose(points)
            self.progress.finish()
            facts = {
                **prepared.facts,
                "ridge": RIDGE,
                "general_ridge": GENERAL_RIDGE,
                "unseen": unseen,
                **adapter,
                "sets": [set_facts(self._evaluation(chosen), keep, chosen)],
            }
            self.monitor.warn(misses(facts))
            factors = {
                target.tensor: chosen.factors[target.tensor].clone() for target in plan.targets
            }
        return Coefficients(keep, factors, facts)

    def _parts(self, variants: int) -> list[Part]:
        """Make the groups of held-out sequences; those of the base and the adapter that have run are reused."""
        rows = self.prepared.limits.rows
        parts = runs.riders(
            self.prepared.held_out, variants, self.model.size, rows, self.one_length
        )
        ran = [self._ran.get((part.name, part.numbers), ()) for part in parts]
        return [
            replace(p, groups=(*known, *p.groups[len(known) :]))
            for p, known in zip(parts, ran, strict=True)
        ]

    def _check_learning(self) -> None:
        """Measure the base and the adapter on the task's text alone, to refuse swapped texts before the fit."""
        ends = Variant(BASE, None), Variant(ADAPTER, UNCHANGED)
        held_out = [part for part in self._parts(len(ends)) if part.name == TASK]
        check_learning(self._sweep(ends, held_out)[TASK], self.prepared.texts[TASK].whole.name)

    def _fit_candidates(self, spool: Spool) -> tuple[list[Point], list[str]]:
        """Fit all candidates in one sweep, in which they, the adapter and shrinks ride; also list matrices that a text never reached."""
        prepared, plan, model = self.prepared, self.prepared.plan, self.model
        weights, unchanged_factors = prepared.options.weights, unchanged(plan)
        fitted = list[Group]()
        for stream in streams_of(len(weights)):  # each text in groups of one length
            text = runs.of_few_lengths(prepared.texts[stream.text].fitted)
            parts = runs.parts(text, prepared.limits.rows, model.size.short, one_length=True)
            fitted += [
                Group(text.take(numbers).padded_ids, stream.variant, stream) for numbers in parts
            ]
        tokens = {
            text: sum(group.rows for group in fitted if group.stream == Stream(text))
            for text in (GENERAL, TASK)
        }
        solver = Solver(model, weights, tokens, spool)
        points = [Point(mu, solver.candidate(k, unchanged_factors)) for k, mu in enumerate(weights)]
        variants = [
            Variant(BASE, None),
            Variant(ADAPTER, UNCHANGED),
            *(point.variant for point in points),
        ]
        variants += map(Variant.of, self.shrinks)
        held_out = self._parts(len(variants))
        self._measure(variants, held_out, fitted, solver)
        unseen = sorted({target.tensor for target in plan.targets} - solver.places.keys())
        if unseen:
            self.monitor.warn(
                (
                    f"no tokens from one of the texts, or no solution, for {counted(len(unseen), 'matrix')}, "
                    f"{listed(map(repr, unseen))}: what the adapter adds there stays",
                )
            )
        adapter = Point(0.0, unchanged_factors)
        self._rows[adapter.name] = self._rows[ADAPTER]
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
        keep, kept = (
            self.prepared.options.keep,
            {point.name: self._share_kept(point.name) for point in points},
        )
        candidates = [point for point in points[1:] if kept[point.name] >= keep]
        pairs = [(a, b) for a, b in pairwise(points) if kept[a.name] >= keep > kept[b.name]]
        if pairs:
            a, b = pairs[-1]
            near, far = _distance(kept[a.name]), _distance(kept[b.name])
            between = a.towards(b, max(0.0, (_distance(keep + MARGIN) - near) / (far - near)))
            candidates.append(between)
            self._ride([between.variant], self._shrinks_to_place(keep + MARGIN))
        enough = [point for point in candidates if self._share_kept(point.name) >= keep]
        chosen = min(enough or candidates, key=self._divergence)
        for _ in range(PLACINGS):
            self._ride([], self._shrinks_to_place(max(keep, self._share_kept(chosen.name))))
        return chosen

    def _shrinks_to_place(self, share: float) -> list[Shrink]:
        """Choose the shrink to measure next, as one that keeps a share; none if a measured one does, or if none keeps as much."""
        kept = [self._share_kept(shrink.label) for shrink in self.shrinks]
        if any(own >= self.prepared.options.keep and abs(own - share) <= AS_MUCH for own in kept):
            return []
        lam = lambda_to_place(self._evaluation(), share)
        return [] if lam is None else [Shrink(lam)]

    def _ride(self, variants: Sequence[Variant], shrinks: Sequence[Shrink]) -> None:
        """Measure variants and shrinks in a sweep; the results of the base and the adapter are known."""
        new = [*variants, *map(Variant.of, shrinks)]
        if not new:
            return
        riders = [Variant(BASE, None), Variant(ADAPTER, UNCHANGED), *new]
        self._measure(riders, self._parts(len(riders)))
        self.shrinks += shrinks

    def _share_kept(self, name: str) -> float:
        """Return the share of the learning that a measured variant keeps."""
        return self._sums(TASK, name).share("loss", ADAPTER_ROW + 1).value

    def _divergence(self, point: Point) -> float:
        return float(self._sums(GENERAL, point.name).kl[-1].sum())

    def _measure(
        self,
        variants: Sequence[Variant],
        held_out: Sequence[Part],
        fitted: Sequence[Group] = (),
        solver: Solver | None = None,
    ) -> None:
        """Run a sweep in which variants, the base and the adapter first, ride, and keep their sums."""
        sums = self._sweep(variants, held_out, fitted, solver)
        for row, variant in enumerate(variants):
            self._rows.setdefault(
                variant.name, {text: text_sums.take([row]) for text, text_sums in sums.items()}
            )

    def _sweep(
        self,
        variants: Sequence[Variant],
        held_out: Sequence[Part],
        fitted: Sequence[Group] = (),
        solver: Solver | None = None,
    ) -> Sums:
        """Run a sweep, and return the sums of its riders; the base's and the adapter's groups are kept for later sweeps."""
        prepared, model = self.prepared, self.model
        groups = [
            *fitted,
            *(group for part in held_out for group in part.groups if not group.results),
        ]
        cost = runs.sweep_cost(model.size, sum(group.rows for group in groups), len(groups))
        self.progress.expect(cost, len(model.layers) + 1)
        model.use(replace(model.job, variants=tuple(variants)))
        # The file stays that of the first sweep, which a run that is killed in the second one needs again.
        names = json.dumps([variant.name for variant in variants])
        states = (
            None if solver is None else self.records.states(names, solver.factors, solver.restore)
        )
        check = None if solver is None else solver.check
        sums = runs.measure(
            model, held_out, self.progress, prepared.limits, fitted, solver, states, check
        )
        self._ran |= {
            (part.name, part.numbers): part.groups[: ADAPTER_ROW + 1] for part in held_out
        }
        return sums

    def _sums(self, text: str, *names: str) -> SequenceSums:
        """Return the sums on a text for the base, the unchanged adapter, and other measured variants."""
        first, *others = (self._rows[name][text] for name in (BASE, ADAPTER, *names))
        return first.joined(*others)

    def _evaluation(self, *points: Point) -> Evaluation:
        """Evaluate the base, the unchanged adapter, the measured shrinks, and factors."""
        fitted = f"{RegMean.name} {share_name(self.prepared.options.keep)}"
        variants = [
            EvaluatedVariant(BASE, None, None),
            EvaluatedVariant(ADAPTER, None, None),
            *(
                EvaluatedVariant(shrink.label, shrink.name, shrink.mitigation_lambda)
                for shrink in self.shrinks
            ),
            *(EvaluatedVariant(fitted, RegMean.name, None) for _ in points),
        ]
        names = [*(shrink.label for shrink in self.shrinks), *(point.name for point in points)]
        return Evaluation(
            tuple(variants), self._sums(GENERAL, *names), self._sums(TASK, *names), {}
        )
