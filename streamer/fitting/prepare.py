"""Open and check a fit's inputs, and describe them.

Define the options of a fit, and divide its texts into a part for fitting and a held-out part.

Estimate the memory of a fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from streamer.adapters.modules import MethodModule
from streamer.detection.findings import Findings
from streamer.detection.options import Run
from streamer.errors import FormatError, UnsupportedError, UsageError
from streamer.evaluation.losses import ProductDtype, check_dtype
from streamer.evaluation.suggestion import check_keep
from streamer.measuring.result_file import model_facts, with_digest, writable
from streamer.measuring.riders import Limits, Work
from streamer.measuring.sequences import GENERAL, TASK, TextSequences
from streamer.measuring.statistics import telling
from streamer.measuring.texts import chooses_keys, read_texts, refuse_new_tokens, sample_digest
from streamer.methods import UNCHANGED, Paper, share_name
from streamer.options import FittingOptions, RepairOptions
from streamer.output.write import fitting_findings
from streamer.plan.plan import AdapterBatch, Plan, make_plan, resident_bytes
from streamer.plan.targets import Target
from streamer.streaming.model import require_transformers
from streamer.streaming.sweep import SweepModel
from streamer.streaming.values import ADAPTER, BASE, Variant, VariantSet
from streamer.units import counted, listed

LEAST = 2
"""Least number of sequences in each part of a text."""

SHRINKS = (0.8, 0.5)
"""Shrinks that ride for comparison; the base and the adapter are those at 0 and 1."""

ALGORITHM = 5
"""Version of the algorithm: another version gives another fit of the same inputs. Version 4 has a ridge for general text."""


@dataclass(frozen=True)
class FitOptions:
    """Options of a fit, all of which affect its result; see `options.FittingOptions`."""

    keep: tuple[float, ...] = (RepairOptions.keep,)
    weights: tuple[float, ...] = tuple(FittingOptions.weights)
    holdout: float = FittingOptions.holdout
    sequences: int = FittingOptions.sequences
    length: int = FittingOptions.length
    seed: int = FittingOptions.seed
    dtype: ProductDtype = FittingOptions.dtype

    def __post_init__(self) -> None:
        if not self.keep:
            raise UsageError("keep: expected at least one share, found none")
        for share in self.keep:
            check_keep(share)
            if share_name(share) == "1":
                raise UsageError(f"keep: {share!r} is the unchanged adapter, which needs no fit; give smaller shares")
        if (
            not all(0 < mu < math.inf for mu in self.weights)
            or sorted({*self.weights}) != [*self.weights]
            or not self.weights
        ):
            raise UsageError(f"weights: expected rising numbers above 0, found {list(self.weights)}")
        if len({share_name(share) for share in self.keep}) < len(self.keep):
            raise UsageError(f"keep: expected shares that differ in six digits, found {list(self.keep)}")
        if isinstance(self.holdout, bool) or not isinstance(self.holdout, Real) or not 0 < self.holdout < 1:
            raise UsageError(f"holdout: expected a share between 0 and 1, found {self.holdout!r}")
        for name, least in (("sequences", 2 * LEAST), ("length", 2), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UsageError(f"{name}: expected a whole number from {least}, found {value!r}")
        check_dtype(self.dtype)

    def as_dict(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return {**asdict(self), "keep": list(self.keep), "weights": list(self.weights)}


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


def divide(texts: Mapping[str, TextSequences], paths: Mapping[str, Path], options: FitOptions) -> dict[str, Division]:
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
        first: dict[bytes, int] = {}
        for row, ids in enumerate(text.ids):
            first.setdefault(ids.tobytes(), row)
        rows, count = np.array(list(first.values())), len(first)
        if count < 2 * LEAST:
            raise FormatError(
                f"{paths[name]}: expected {2 * LEAST} different sequences at least, {LEAST} to fit on and {LEAST} to hold out, found "
                f"{count}; give more"
            )
        held_out = min(count - LEAST, max(LEAST, round(options.holdout * count)))
        rng = np.random.default_rng(options.seed)
        documents = paths[name].suffix == ".jsonl"
        order = rows[rng.permutation(count) if documents else np.roll(np.arange(count), rng.integers(count))]
        out[name] = Division(text, text.take(sorted(order[held_out:])), text.take(sorted(order[:held_out])))
    return out


def widest_input(plan: Plan) -> int:
    """Return the number of inputs of the widest matrix that multiplies them."""
    return max((t.module.shape[1] for t in plan.targets if not t.is_embedding), default=0)


FEW = 5
"""Least number of held-out sequences; with fewer, a warning: by Student's distribution, a difference then needs over three errors."""

OF_OPTIONS = ("weights", "holdout", "seed", "dtype")
"""Options that a fit's facts include."""


@dataclass(frozen=True, eq=False)
class PreparedFit:
    """A fit whose inputs are open and checked; nothing is written.

    Attributes
    ----------
    max_memory
        Budget in bytes; None for no budget.
    texts
        ``general`` and ``task``, each in two parts.
    files
        Digests of the texts' files; see `sample_digest`.
    model
        Model of the base and one variant, which supplies sizes.
    one_length
        See `evaluation.prepare.Prepared`.
    findings
        Findings whose scaled intruders are measured for comparison; None if not requested.
    """

    plan: Plan
    options: FitOptions
    run: Run
    max_memory: int | None
    texts: Mapping[str, Division]
    files: Mapping[str, str]
    model: SweepModel
    one_length: bool
    findings: Findings | None = None

    @property
    def scaling(self) -> list[Variant]:
        """List the variant that scales intruders, if it is requested and there are intruders."""
        return [Variant.of(Paper())] if self.findings is not None and self.findings.intruders else []

    @property
    def held_out(self) -> dict[str, TextSequences]:
        """Return the held-out sequences of each text."""
        return {name: text.held_out for name, text in self.texts.items()}

    def work(self, variants: int) -> Work:
        """Count the rows of the sweep that fits, with so many variants riding."""
        fitted = sum(len(ids) for text in self.texts.values() for ids in text.fitted.ids)
        riding = sum(len(ids) for text in self.held_out.values() for ids in text.ids)
        longest = max(text.whole.longest for text in self.texts.values())
        return Work((1 + len(self.options.weights)) * fitted, variants * riding, longest, variants)

    @property
    def variants(self) -> int:
        """Return the number of variants that ride while the candidates are fitted."""
        return 2 + len(self.options.weights) + len(SHRINKS) + len(self.scaling)

    @cached_property
    def solving_bytes(self) -> int:
        """Estimate the memory of solving: Gram matrices in float64."""
        tokens = sum(text.fitted.tokens for text in self.texts.values())
        return (len(self.options.weights) + 3) * 8 * min(tokens, widest_input(self.plan)) ** 2

    @cached_property
    def limits(self) -> Limits:
        """Choose how the sweep fits the budget."""
        return self.work(self.variants).limits(self.model.size, self.resident + self.solving_bytes, self.max_memory)

    @property
    def right_values(self) -> int:
        """Return the number of values in the right factors of all matrices."""
        return sum(t.module.factor_rank * t.module.shape[1] for t in self.plan.targets)

    @property
    def resident(self) -> int:
        """Estimate the bytes in memory between two steps."""
        return resident_bytes(AdapterBatch(self.plan.base, (self.plan,)))

    def warn(self) -> None:
        """Warn of a text that is short for the widest matrix, or has too few held-out sequences to show anything."""
        lines, counts = [], {name: len(text.held_out.ids) for name, text in self.texts.items()}
        for name in (name for name, count in counts.items() if count < FEW):
            lines.append(f"the {name} text has {counts[name]} held-out sequences, so only differences of over {telling(counts[name]):.1f} "
                         "standard errors are evidence; give more text, or raise --sequences or --holdout")  # fmt: skip
        if len({text.whole.digest() for text in self.texts.values()}) == 1:
            lines.append("both texts are the same, so the fit is a shrink, Δ / (1 + mu)")
        count, name = min((text.fitted.tokens, name) for name, text in self.texts.items())
        if count < (widest := widest_input(self.plan)):
            lines.append(f"the {name} text has {count} tokens to fit on, fewer than the {widest} inputs of the widest matrix: the ridge "
                         "decides what it does not show; with more text, the result may forget less")  # fmt: skip
        self.run.monitor.warn(lines)

    @cached_property
    def unchanged(self) -> list[str]:
        """List the changes that the adapter makes by other means than deltas, which the fit leaves unchanged."""
        edits = self.plan.edits
        return sorted({*edits.trained, *edits.shifts, *edits.rows})

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Describe the fit's inputs and options as JSON; equal `plan` digests mean equal fits."""
        options = self.options.as_dict()
        tree = {
            **model_facts(self.model, base={**self.plan.base_identity}, adapter={**self.plan.adapter_identity}),
            **writable(self.plan),
            **{name: options[name] for name in OF_OPTIONS if name in options},
            "texts": {name: _text_facts(text, self.files[name]) for name, text in self.texts.items()},
            "unchanged": self.unchanged,
        }
        if self.findings is not None:
            tree |= {"findings": self.findings.decisions_digest(), "intruders": self.findings.intruders}
        return with_digest(tree, algorithm=ALGORITHM, options=options, max_memory=self.max_memory)


def _text_facts(text: Division, file: str) -> dict[str, Any]:
    """Describe both parts of a text; the digests are of the whole text and of its file."""
    return {
        **text.whole.facts(),
        "sample_sha256": file,
        "fitted": {"sequences": len(text.fitted.ids), "tokens": text.fitted.tokens},
        "held": {"sequences": len(text.held_out.ids), "tokens": text.held_out.tokens},
    }


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
            f"{plan.adapter.path}: is {kind}, and repair and fit need LoRA factors; pass --to-lora RANK to repair, or use `merge` with "
            "--method shrink or --map"
        )


def prepare_fit(base_path: str | Path, adapter: Path, texts: Mapping[str, Path], options: FitOptions, max_memory: int | None,
                run: Run, findings: Findings | None = None) -> PreparedFit:  # fmt: skip
    """Open and check all inputs of a fit, and pass on their warnings.

    Parameters
    ----------
    texts
        Paths of the ``general`` and the ``task`` text.
    """
    require_transformers()
    plan = make_plan(base_path, adapter, run.io, run.stated, run.architecture)
    run.monitor.warn(plan.warnings)
    refuse_new_tokens(plan)
    if findings is not None:
        findings = fitting_findings(plan, findings, findings.options)
    refuse_dense(plan, [t for t in plan.targets if not t.module.low_rank])
    variants = Variant(BASE, None), Variant(ADAPTER, UNCHANGED)
    model = SweepModel(
        VariantSet(plan, variants, None, rounds_products=options.dtype == "bf16", device=run.model_device)
    )
    whole = read_texts(model, texts, options.sequences, options.length, run.monitor, 2 * LEAST)
    read = {name: text.right() for name, text in whole.items()}
    files = {name: sample_digest(path) for name, path in texts.items()}
    divided, one_length = divide(read, texts, options), chooses_keys(model, read)
    prepared = PreparedFit(plan, options, run, max_memory, divided, files, model, one_length, findings)
    if prepared.unchanged:
        names = prepared.unchanged
        run.monitor.warn(
            (
                f"{plan.adapter.path.name} also changes {counted(len(names), 'tensor')} by other means than deltas, {listed(names)}; the "
                "fit keeps these changes",
            )
        )
    work, solving = prepared.work(prepared.variants), prepared.solving_bytes
    return replace(prepared, max_memory=work.beside(model.size, prepared.resident, solving, run.workers, max_memory))
