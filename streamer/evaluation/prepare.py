"""Open and check an evaluation's inputs, and describe them as facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from streamer.adapters.one_or_several import One
from streamer.detection.detection_memory import detection_estimates, kept_bytes
from streamer.detection.findings import Findings
from streamer.detection.options import DetectionOptions, Run
from streamer.evaluation.evaluation import Evaluation
from streamer.evaluation.options import EvaluationOptions
from streamer.evaluation.steps import Wanted, without_scaling
from streamer.events import Monitor
from streamer.measuring.identity import model_facts, with_digest, writable
from streamer.measuring.model import chooses_keys, read_texts, refuse_new_tokens
from streamer.measuring.pass_memory import TRANSFORMERS_BYTES, Pass, pass_bytes, plan_passes
from streamer.measuring.progress import pass_cost
from streamer.measuring.sequences import GENERAL, TASK, TextSequences
from streamer.measuring.task import describe
from streamer.measuring.texts import sample_digest
from streamer.methods import UNCHANGED, RegMean
from streamer.methods.fits import Coefficients
from streamer.output.prepare import OutputOptions, check_coefficients, check_map, open_jobs
from streamer.plan.batch import AdapterBatch
from streamer.plan.memory_estimate import MemoryEstimate, resident_bytes
from streamer.plan.plan import Plan
from streamer.streaming.extra import require_transformers
from streamer.streaming.model import StreamingModel


@dataclass(frozen=True, eq=False)
class Prepared:
    """An evaluation whose inputs are open and checked; nothing has been written.

    Attributes
    ----------
    findings
        Findings that were given; None if none were.
    texts
        ``general``, ``task``, and others by file name.
    model
        Model of all variants; deltas that need findings are available only once findings are set.
    one_length
        Whether only sequences of equal length run together, because padding would change the model's logits.
    """

    plan: Plan
    options: EvaluationOptions
    detection: DetectionOptions
    run: Run
    findings: Findings | None
    texts: Mapping[str, TextSequences]
    model: StreamingModel
    one_length: bool

    def passes(self, variants: int) -> list[Pass]:
        """Divide the sequences into passes, for this many variants including the base."""
        size, budget = self.model.size, self.detection.max_memory
        return plan_passes(self.texts, variants, size, self.resident, budget, self.one_length)

    def group(self, one: Pass) -> TextSequences:
        """Return the sequences of a pass."""
        return self.texts[one.text].take(one.sequences)

    def cost(self, one: Pass) -> int:
        """Count the multiplications of a pass."""
        return pass_cost(self.model.size, self.group(one), 1 + len(one.variants))

    def expected(self, known: Evaluation | None) -> list[Pass]:
        """List the expected passes of a whole run; empty if nothing is missing.

        Parameters
        ----------
        known
            Earlier measurements.
        """
        return [one for count in self.wanted.expected(known) for one in self.passes(count)]

    @property
    def resident(self) -> int:
        """Estimate the bytes that stay in memory between two steps."""
        return resident_bytes(AdapterBatch(self.plan.base, (self.plan,)))

    @property
    def needs_findings(self) -> bool:
        """Test whether a variant depends on findings."""
        return any(variant.scales_intruders for variant in self.options.variants)

    @property
    def wanted(self) -> Wanted:
        """Return what to measure: the requested variants, without any that equal the unchanged adapter according to given findings."""
        return Wanted(without_scaling(self.options.variants, self.facts), self.options.keep)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Return the inputs and options as JSON: `EvaluationFacts`."""
        o, detection = self.options, self.detection if self.findings is None else self.findings.options
        tree = {
            **model_facts(self.model, base=self.plan.sources[0], adapter=self.plan.sources[1]),
            **writable(self.plan),
            "detection": detection.as_dict() if self.needs_findings else None,
            "scale": o.select,
            "projected": o.projected,
            "texts": {GENERAL: self.texts[GENERAL].facts(), TASK: self.texts[TASK].facts()},
        }  # fmt: skip
        if others := [text.facts() for name, text in self.texts.items() if name not in (GENERAL, TASK)]:
            tree["texts"]["others"] = others
        if self.findings is not None and self.needs_findings:
            tree |= {"findings": self.findings.decisions_digest(), "intruders": self.findings.intruders}
        if o.coefficients is not None:
            tree["coefficients"] = o.fitted_record()
        if o.map is not None:
            tree["map"] = o.map.record()
        return with_digest(tree)


def prepare(base_path: str | Path, adapter: Path, texts: Mapping[str, Path], findings: Findings | None, options: EvaluationOptions,
            detection: DetectionOptions, run: Run) -> Prepared:  # fmt: skip
    """Open and check an evaluation's inputs, and pass their warnings to the monitor.

    Parameters
    ----------
    texts
        Paths of the ``general`` and the ``task`` text, and of others by file name.
    """
    model, given = open_model(base_path, adapter, findings, options, detection, run)
    plan, read = model.job.plan, read_texts(model, texts, options.sequences, options.length, run.monitor)
    if options.coefficients is not None:
        _warn_of_fitted_texts(options.coefficients, read, texts, run.monitor)
    detects = given is None and any(variant.scales_intruders for variant in options.variants)
    detection = _shared(plan, detection, run, model, max(text.longest for text in read.values()), detects)
    return Prepared(plan, options, detection, run, given, read, model, chooses_keys(model, read))


def open_model(base_path: str | Path, adapter: Path, findings: Findings | None, options: EvaluationOptions, detection: DetectionOptions,
               run: Run) -> tuple[StreamingModel, Findings | None]:  # fmt: skip
    """Open and check the model of all variants, and the findings if given; pass warnings to the monitor."""
    require_transformers()
    form = OutputOptions(merges=True)
    (job,) = open_jobs(base_path, One(adapter), [findings], UNCHANGED, detection, form, run)
    plan = job.plan
    run.monitor.warn((*plan.warnings, *job.warnings))
    refuse_new_tokens(plan)
    for variant in options.variants:
        if isinstance(variant.mitigation, RegMean):
            check_coefficients(plan, variant.mitigation.coefficients)
    if options.map is not None:
        run.monitor.warn(check_map(plan, options.map))
    model = StreamingModel(options.job(plan, run.model_device))
    return model, job.findings


def _shared(
    plan: Plan, detection: DetectionOptions, run: Run, model: StreamingModel, longest: int, detects: bool
) -> DetectionOptions:
    """Divide the memory budget among this process and its workers, if any; see `Workers.budget`."""
    if run.workers is None or detection.max_memory is None:
        return detection
    resident, carried = resident_bytes(AdapterBatch(plan.base, (plan,))), len(describe(model.job))
    carried += sum(kept_bytes(plan, target, detection) for target in plan.targets) if detects else 0
    one = pass_bytes(model.size, resident, 2 * longest, longest) + 2 * carried
    needs = [MemoryEstimate(f"a sequence of {longest} tokens under two variants", (), one)]
    needs += detection_estimates(plan, detection, resident) if detects else ()
    own = resident + TRANSFORMERS_BYTES + (1 + run.workers.at_once) * carried
    return replace(detection, max_memory=run.workers.budget(detection.max_memory, own, needs))


def _warn_of_fitted_texts(
    coefficients: Coefficients, texts: Mapping[str, TextSequences], paths: Mapping[str, Path], monitor: Monitor
) -> None:
    """Warn if coefficients were fitted to one of the texts, recognised by a digest of its file or of its sequences."""
    stated = coefficients.facts.get("texts")
    facts = [text for text in stated.values() if isinstance(text, dict)] if isinstance(stated, dict) else []
    sequences, files = {text.get("sha256") for text in facts}, {text.get("sample_sha256") for text in facts}
    for name, text in texts.items():
        if text.digest() in sequences or sample_digest(paths[name]) in files:
            monitor.warn(
                (f"the {name} text, {text.name}, was used to fit the coefficients: on it, the fitted variants look better than they are; "
                 "evaluate on other text",)
            )  # fmt: skip
