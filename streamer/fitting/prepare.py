"""Open and check a fit's inputs, and describe them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from streamer.detection.findings import Findings
from streamer.detection.options import Run
from streamer.errors import UnsupportedError
from streamer.fitting import algorithm
from streamer.fitting.fit_memory import (
    ROWS,
    collecting_bytes,
    gradient_bytes,
    plan_chunks,
    reading_bytes,
    solving_bytes,
    states_bytes,
)
from streamer.fitting.options import ALGORITHM, CORRECTIONS, LEAST, WEIGHTS, Division, FitOptions, Grain, divide
from streamer.fitting.parameters import Parameters, chosen_grain, singular_values_of
from streamer.linalg.regmean import DIRECT_BYTES
from streamer.measuring.identity import model_facts, with_digest, writable
from streamer.measuring.model import chooses_keys, read_texts, refuse_new_tokens
from streamer.measuring.pass_memory import Pass, measured_bytes, pass_bytes, plan_passes, rows_within
from streamer.measuring.sequences import TextSequences
from streamer.measuring.statistics import telling
from streamer.measuring.texts import sample_digest
from streamer.methods import UNCHANGED, Paper, make_method
from streamer.output.prepare import fitting_findings
from streamer.plan.batch import AdapterBatch
from streamer.plan.memory_estimate import MemoryEstimate, resident_bytes
from streamer.plan.plan import Plan, make_plan
from streamer.streaming.extra import require_transformers
from streamer.streaming.model import StreamingModel
from streamer.streaming.values import VariantSet
from streamer.streaming.variants import ADAPTER, BASE, Variant
from streamer.units import counted, listed

TOKENS = 10
"""Least number of tokens of either text for each coefficient; fewer cause a warning."""

FEW = 5
"""Least number of held-out sequences; with fewer, a warning: by Student's distribution, a difference then needs over three errors."""

OF_OPTIONS = ("objective", "grain", "holdout", "seed", "steps", "dtype")
"""Options that a fit's facts include."""

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Config keys for the number of layers."""


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
        return [Variant.of(make_method(Paper.name))] if self.findings is not None and self.findings.intruders else []

    @cached_property
    def chunks(self) -> Mapping[str, list[tuple[int, ...]]]:
        """Divide each text's sequences for fitting into chunks that run together."""
        return {
            name: plan_chunks(text.fitted, self.model.size, self.resident, self.max_memory, self.one_length)
            for name, text in self.texts.items()
        }

    @property
    def by_inputs(self) -> bool:
        """Test whether the fit is of right factors to inputs, not of coefficients."""
        return self.grain == "inputs"

    @property
    def grain(self) -> Grain:
        """Return what is fitted, as decided by `prepare_fit`."""
        assert self.options.grain is not None
        return self.options.grain

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
        """List the sequences that run together in each pass with two variants and in each chunk of a gradient."""
        passes = [self.held_out[one.text].take(one.sequences) for one in self.passes(2)]
        if self.by_inputs:  # its groups are not padded
            return passes
        return passes + [self.texts[name].fitted.take(rows) for name, chunks in self.chunks.items() for rows in chunks]

    @property
    def held_out(self) -> dict[str, TextSequences]:
        """Return the held-out sequences of each text."""
        return {name: text.held_out for name, text in self.texts.items()}

    @property
    def least(self) -> MemoryEstimate:
        """Estimate the memory of the largest indivisible step, which alone decides whether a budget is refused."""
        size, resident = self.model.size, self.resident
        if not self.by_inputs:
            length = max(text.whole.longest for text in self.texts.values())
            both = gradient_bytes(size, resident, length, length), pass_bytes(size, resident, 2 * length, length)
            return MemoryEstimate(f"a sequence of {length} tokens, forward and back", (), max(both))
        held_out, longest = (max(text.longest for text in own) for own in (self.held_out.values(), self._fitted))
        measured = pass_bytes(size, resident, 2 * held_out, held_out)
        steps = [
            MemoryEstimate(f"a sequence of {held_out} tokens under two variants", (), measured),
            MemoryEstimate(f"the inputs of a sequence of {longest} tokens", (), self._inputs_bytes(longest, 0)),
        ]
        return max(steps, key=lambda step: step.nbytes)

    def peak_bytes(self, variants: int) -> int:
        """Estimate the memory of the largest step, with this many variants in a pass over held-out sequences."""
        size = self.model.size
        most = measured_bytes(self.passes(variants), self.held_out, size, self.resident)
        if self.by_inputs:
            return max(most, self._inputs_bytes(self.rows_of_inputs, self.matrices_bytes))
        for name, chunks in self.chunks.items():
            for rows in chunks:
                text = self.texts[name].fitted.take(rows)
                most = max(most, gradient_bytes(size, self.resident, len(rows) * text.longest, text.longest))
        return most

    @property
    def spool_bytes(self) -> int:
        """Estimate the bytes of temporary files: a layer's inputs; or a chunk's activations between layers, last hidden states, factors."""
        if self.by_inputs:
            answers = (len(WEIGHTS) + CORRECTIONS * len(self.options.keep)) * sum(
                t.module.factor_rank * t.module.shape[1] for t in self.plan.targets
            )
            return 4 * (answers + 2 * self.fitted_tokens * self.model.size.changed_inputs)  # uncorrected and corrected
        rows = [
            len(part) * text.fitted.take(part).longest
            for name, text in self.texts.items()
            for part in self.chunks[name]
        ]
        layers = max(self.plan.config.stated(*LAYERS), default=0)
        states = sum(rows) if self.options.made_small == "divergence" else 0
        factors = sum(t.module.factor_rank * sum(t.module.shape) for t in self.plan.targets if t.module.low_rank)
        return 4 * (self.model.size.hidden * (max(rows) * layers + states) + factors)

    @property
    def resident(self) -> int:
        """Estimate the bytes in memory between two steps."""
        return resident_bytes(AdapterBatch(self.plan.base, (self.plan,)))

    @cached_property
    def parameters(self) -> Parameters:
        """Compute the singular values of all deltas, and number the parameters.

        Raises
        ------
        NumericError
            If a delta holds NaN or Inf.
        UnsupportedError
            If there is nothing to fit: all deltas are zero.
        """
        found = Parameters.of(singular_values_of(self.plan, self.run.monitor), self.grain)
        if found.count == 0:
            raise self.nothing_to_fit()
        return found

    def nothing_to_fit(self) -> UnsupportedError:
        """Make the error of an adapter without a delta."""
        return UnsupportedError(f"{self.plan.adapter.path}: all of its deltas are zero, so there is nothing to fit")

    @property
    def of_algorithm(self) -> algorithm.Problem:
        """Make the algorithm's options."""
        return self.options.of_algorithm(self.parameters.count, base_at_zero=not self.unchanged)

    def warn(self) -> None:
        """Warn of a text that is short for the number of parameters, or has too few held-out sequences to show anything."""
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
        if self.by_inputs:
            if len({text.whole.digest() for text in self.texts.values()}) == 1:
                self.run.monitor.warn(("both texts are the same, so the fit is a shrink, Δ / (1 + mu)",))
            widest = max((t.module.shape[1] for t in self.plan.targets if not t.is_embedding), default=0)
            if count < widest:
                self.run.monitor.warn(
                    (f"the {name} text has {count} tokens to fit on, fewer than the {widest} inputs of the widest matrix: the ridge "
                     "decides what it does not show; with more text, the result may forget less",)
                )  # fmt: skip
            return
        if count < TOKENS * self.parameters.count:
            many, each = counted(self.parameters.count, "coefficient"), count / self.parameters.count
            fewer = {"direction": ", or --grain matrix", "matrix": ", or --grain all", "all": ""}[self.grain]
            self.run.monitor.warn(
                (f"the {name} text has {count} tokens to fit {many} on, {each:.1f} for each; give more{fewer}",)
            )

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
        own = {"algorithm": ALGORITHM} if self.by_inputs else {}
        return with_digest(tree, **own, options=options, max_memory=self.max_memory)


def _text_facts(text: Division, file: str) -> dict[str, Any]:
    """Describe both parts of a text; the digests are of the whole text and of its file."""
    return {
        **text.whole.facts(),
        "sample_sha256": file,
        "fitted": {"sequences": len(text.fitted.ids), "tokens": text.fitted.tokens},
        "held": {"sequences": len(text.held_out.ids), "tokens": text.held_out.tokens},
    }


def prepare_fit(base_path: str | Path, adapter: Path, texts: Mapping[str, Path], options: FitOptions, max_memory: int | None,
                run: Run, findings: Findings | None = None) -> PreparedFit:  # fmt: skip
    """Open and check all inputs of a fit, and pass on their warnings.

    Parameters
    ----------
    texts
        Paths of the ``general`` and the ``task`` text.
    """
    require_transformers()
    plan = make_plan(base_path, adapter, run.options.io, run.options.stated, run.options.architecture)
    run.monitor.warn(plan.warnings)
    refuse_new_tokens(plan)
    if findings is not None:
        findings = fitting_findings(plan, findings, findings.options)
    options = replace(options, grain=chosen_grain(plan, options, run.monitor))
    variants = Variant(BASE, None), Variant(ADAPTER, UNCHANGED)
    model = StreamingModel(
        VariantSet(plan, variants, None, rounds_products=options.dtype == "bf16", device=run.options.model_device)
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
