"""Open and check a fit's inputs, and describe them.

Define the options of a fit, and divide its texts into a part for fitting and a held-out part.

Estimate the memory of a fit: of collecting inputs, and of solving between layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from streamer.linalg import moments, regmean
from streamer.linalg.regmean import DIRECT_BYTES
from streamer.measuring.result_file import model_facts, with_digest, writable
from streamer.measuring.sequences import GENERAL, TASK, TextSequences
from streamer.measuring.statistics import telling
from streamer.measuring.task import TRANSFORMERS_BYTES, Pass, measured_bytes, pass_bytes, plan_passes, rows_within
from streamer.measuring.texts import chooses_keys, read_texts, refuse_new_tokens, sample_digest
from streamer.methods import UNCHANGED, Paper, share_name
from streamer.output.write import fitting_findings
from streamer.plan.batch import AdapterBatch, MemoryEstimate, resident_bytes
from streamer.plan.plan import Plan, make_plan
from streamer.plan.targets import Target
from streamer.streaming.model import ModelSize, StreamingModel, require_transformers
from streamer.streaming.spool import ROWS as ROWS_OF_INPUTS
from streamer.streaming.values import ADAPTER, BASE, BLOCK_BYTES, Variant, VariantSet
from streamer.units import counted, listed

LEAST = 2
"""Least number of sequences in each part of a text."""

WEIGHTS = (0.05, 0.2, 0.6, 2.0, 6.0)
"""Weights μ of the general text that are measured; Δ' is interpolated between neighbours."""

ALGORITHM = 2
"""Version of the algorithm: another version gives another fit of the same inputs. Version 2 corrects."""

CORRECTIONS = 2
"""Most corrections of a share's factors, at two weights."""


@dataclass(frozen=True)
class FitOptions:
    """Options of a fit, all of which affect its result: keywords of `api.fit_coefficients`, which explains them."""

    keep: tuple[float, ...] = (0.9,)
    holdout: float = 0.25
    sequences: int = 64
    length: int = 512
    seed: int = 0
    dtype: ProductDtype = "float32"

    def __post_init__(self) -> None:
        if not self.keep:
            raise UsageError("keep: expected at least one share, found none")
        for share in self.keep:
            check_keep(share)
            if share_name(share) == "1":
                raise UsageError(f"keep: {share!r} is the unchanged adapter, which needs no fit; give smaller shares")
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
        """Return the options as JSON values, with the method's name in files of version 0.2."""
        return {**asdict(self), "keep": list(self.keep), "grain": "inputs"}


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


ROWS = 1024
"""Most tokens that run together unless a budget asks for fewer: reading the weights then needs less than a tenth of the time."""

ACTIVATIONS = 3
"""Values of one layer's activations, for each input or output of its matrices."""

STATES_OF_INPUTS = 2
"""Values of the model's width that stay for each token of both texts while inputs are collected: embeddings, and a layer's outputs."""

INPUT_COPIES = 4
"""Copies of inputs that are read together, in float32 units: one in float32, one in float64, and one more while they are joined."""


def states_bytes(size: ModelSize, resident: int, tokens: int) -> int:
    """Estimate the memory between two layers while inputs are collected, for this many tokens of both texts."""
    return resident + TRANSFORMERS_BYTES + STATES_OF_INPUTS * 4 * tokens * size.hidden


def collecting_bytes(size: ModelSize, rows: int, length: int) -> int:
    """Estimate the additional memory of running a layer on this many tokens together, in sequences of this length."""
    layer = 4 * rows * (ACTIVATIONS * size.layer_width + 2 * size.attention * length) + 3 * size.layer_factors
    return layer + 2 * min(BLOCK_BYTES, 4 * size.widest * size.hidden) + size.factors


def reading_bytes(plan: Plan) -> int:
    """Estimate the memory of reading inputs and computing with them."""
    return INPUT_COPIES * 4 * ROWS_OF_INPUTS * widest_input(plan)


def widest_input(plan: Plan) -> int:
    """Return the number of inputs of the widest matrix that multiplies them."""
    return max((t.module.shape[1] for t in plan.targets if not t.is_embedding), default=0)


def solving_bytes(plan: Plan, memory: int) -> int:
    """Estimate the memory to solve for factors between two layers, if matrices of moments may use `memory` bytes."""
    most = 0
    for n, count in columns_of_inputs(plan):
        by_products = moments.solving_bytes(n, count, len(WEIGHTS))
        most = max(most, regmean.matrices_bytes(n) if regmean.is_direct(n, memory) else by_products)
    return most + reading_bytes(plan)


def columns_of_inputs(plan: Plan) -> list[tuple[int, int]]:
    """List the number of inputs that modules share, and the number of columns of their right factors together."""
    columns: dict[tuple[str, str, int], int] = {}
    for target in plan.targets:
        if not target.is_embedding:  # embeddings look rows up
            # Modules with as many inputs in one parent module may share them.
            parent, _, name = target.tensor.removesuffix(".weight").rpartition(".")
            key = parent, name.partition("[")[2], target.module.shape[1]
            columns[key] = columns.get(key, 0) + target.module.factor_rank
    return [(n, count) for (*_, n), count in columns.items()]


FEW = 5
"""Least number of held-out sequences; with fewer, a warning: by Student's distribution, a difference then needs over three errors."""

OF_OPTIONS = ("grain", "holdout", "seed", "dtype")
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
    model: StreamingModel
    one_length: bool
    findings: Findings | None = None

    @property
    def scaling(self) -> list[Variant]:
        """List the variant that scales intruders, if it is requested and there are intruders."""
        return [Variant.of(Paper())] if self.findings is not None and self.findings.intruders else []

    @cached_property
    def rows_of_inputs(self) -> int:
        """Return the number of tokens that run together while inputs are collected."""
        longest, matrices = max(text.longest for text in self._fitted), self.matrices_bytes
        return rows_within(
            self.max_memory, longest, ROWS, lambda rows: self._inputs_bytes(rows, matrices),
            f"the inputs of a sequence of {longest} tokens",
        )  # fmt: skip

    @cached_property
    def matrices_bytes(self) -> int:
        """Return the bytes that the budget leaves for matrices of moments while factors are computed."""
        if self.max_memory is None:
            return DIRECT_BYTES
        return max(0, min(DIRECT_BYTES, self.max_memory - self._between_layers - reading_bytes(self.plan)))

    @property
    def fitted_tokens(self) -> int:
        """Return the number of tokens of both texts that are used for fitting."""
        return sum(len(ids) for text in self._fitted for ids in text.ids)

    @property
    def _fitted(self) -> list[TextSequences]:
        return [text.fitted for text in self.texts.values()]

    @property
    def _between_layers(self) -> int:
        # Including the corrected model's tokens, and, while its layer runs again, the layer's inputs that the other streams have left.
        return states_bytes(self.model.size, self.resident, 5 * self.fitted_tokens // 2)

    def _inputs_bytes(self, rows: int, matrices: int) -> int:
        """Estimate the memory to collect inputs, this many tokens at a time, and to solve, if matrices may use this much."""
        longest = max(text.longest for text in self._fitted)
        return self._between_layers + max(
            collecting_bytes(self.model.size, rows, longest), solving_bytes(self.plan, matrices)
        )

    def passes(self, variants: int) -> list[Pass]:
        """Divide the held-out sequences into passes with this many variants, including the base."""
        return plan_passes(self.held_out, variants, self.model.size, self.resident, self.max_memory, self.one_length)

    @property
    def groups(self) -> list[TextSequences]:
        """List the sequences that run together in each pass with two variants; groups whose inputs are collected are not padded."""
        return [self.held_out[one.text].take(one.sequences) for one in self.passes(2)]

    @property
    def held_out(self) -> dict[str, TextSequences]:
        """Return the held-out sequences of each text."""
        return {name: text.held_out for name, text in self.texts.items()}

    @property
    def least(self) -> MemoryEstimate:
        """Estimate the memory of the largest indivisible step, which alone decides whether a budget is refused."""
        held_out, longest = (max(text.longest for text in own) for own in (self.held_out.values(), self._fitted))
        measured = pass_bytes(self.model.size, self.resident, 2 * held_out, held_out)
        steps = [
            MemoryEstimate(f"a sequence of {held_out} tokens under two variants", (), measured),
            MemoryEstimate(f"the inputs of a sequence of {longest} tokens", (), self._inputs_bytes(longest, 0)),
        ]
        return max(steps, key=lambda step: step.nbytes)

    def peak_bytes(self, variants: int) -> int:
        """Estimate the memory of the largest step, with this many variants in a pass over held-out sequences."""
        measured = measured_bytes(self.passes(variants), self.held_out, self.model.size, self.resident)
        return max(measured, self._inputs_bytes(self.rows_of_inputs, self.matrices_bytes))

    @property
    def spool_bytes(self) -> int:
        """Estimate the bytes of temporary files: a layer's inputs, and factors."""
        answers = (len(WEIGHTS) + CORRECTIONS * len(self.options.keep)) * self.right_values
        return 4 * (answers + 2 * self.fitted_tokens * self.model.size.changed_inputs)  # uncorrected and corrected

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
        for name, text in self.texts.items():
            count = len(text.held_out.ids)
            if count < FEW:
                self.run.monitor.warn(
                    (
                        f"the {name} text has {count} held-out sequences, so only differences of over {telling(count):.1f} standard errors "
                        "are evidence; give more text, or raise --sequences or --holdout",
                    )
                )
        count, name = min((text.fitted.tokens, name) for name, text in self.texts.items())
        if len({text.whole.digest() for text in self.texts.values()}) == 1:
            self.run.monitor.warn(("both texts are the same, so the fit is a shrink, Δ / (1 + mu)",))
        if count < (widest := widest_input(self.plan)):
            self.run.monitor.warn(
                (f"the {name} text has {count} tokens to fit on, fewer than the {widest} inputs of the widest matrix: the ridge "
                 "decides what it does not show; with more text, the result may forget less",)
            )  # fmt: skip

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
    model = StreamingModel(
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
    return prepared
