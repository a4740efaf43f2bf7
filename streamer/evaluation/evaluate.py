"""Evaluate variants: check the inputs, choose what to measure next, measure it pass by pass, and resume a killed run.

A generator chooses: it requests variants, receives their sums, and returns the evaluation. It holds no model and reads no file. The same
answers lead to the same requests, so a journal of answers resumes it. It requests the user's variants, and then, up to `MOST_PLACED`
times for each method with a λ, a variant whose λ keeps the share according to the losses so far. A method whose variants nearest to the
share diverge more than a shrink that keeps as much is not placed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from streamer.adapters.finetuned import One
from streamer.detection.detect import detect_in_memory
from streamer.detection.findings import Findings
from streamer.detection.findings_file import lock_of, remove_leftovers
from streamer.detection.matrices import detection_estimates, kept_bytes
from streamer.detection.options import DetectionOptions, Run
from streamer.evaluation.evaluation import Evaluation, load_evaluation
from streamer.evaluation.losses import EvaluationOptions
from streamer.evaluation.suggestion import ask_swapped, placed
from streamer.events import Event, Monitor
from streamer.measuring.passes import RunProgress, measure_variants, needs_one_length, pass_cost
from streamer.measuring.result_file import (
    EvaluatedVariant,
    Records,
    ResultFile,
    State,
    computing,
    differences,
    joined_facts,
    model_facts,
    of_others,
    with_digest,
    writable,
)
from streamer.measuring.sequences import GENERAL, TASK, TextSequences
from streamer.measuring.statistics import SequenceSums
from streamer.measuring.task import TRANSFORMERS_BYTES, Pass, describe, pass_bytes, plan_passes
from streamer.measuring.texts import chooses_keys, read_texts, refuse_new_tokens, sample_digest
from streamer.methods import UNCHANGED, RegMean, Shrink
from streamer.methods.fits import Coefficients
from streamer.output.write import OutputOptions, check_coefficients, check_map, open_jobs
from streamer.plan.batch import AdapterBatch, MemoryEstimate, check_budget, resident_bytes
from streamer.plan.plan import Plan
from streamer.storage.atomic_file import write_atomic
from streamer.storage.files import locked
from streamer.storage.output_checks import is_taken
from streamer.streaming.model import StreamingModel, require_transformers
from streamer.streaming.values import Variant, VariantSet
from streamer.workers import kept

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
Result = TypeVar("Result")

MOST_PLACED = 4
"""Most variants of a method measured in order to place one; one or two are usual."""

Sums = Mapping[str, SequenceSums]
"""Answer to a request: on each text, the sums of the requested variants, including the base."""

Request = tuple[Variant, ...]
"""Variants to measure on all texts, the base first."""

Steps = Generator[Request, Sums, Evaluation]


def answered(steps: Generator[Asked, Answer, Result], answer: Callable[[Asked], Answer]) -> Result:
    """Answer the requests of steps until they end; return their result."""
    reply: Any = None
    while True:
        try:
            request = steps.send(reply)
        except StopIteration as end:
            found: Result = end.value
            return found
        reply = answer(request)


@dataclass(frozen=True)
class Wanted:
    """What to measure: variants, ``base`` and ``adapter`` first, and the share of the learning that a placed λ should keep."""

    variants: Sequence[Variant]
    keep: float

    def expected(self, known: Evaluation | None) -> list[int]:
        """List the number of variants in each expected request, including the base; empty if nothing is missing."""
        tries = _tries(known, self.keep)
        request = _request(self, known, tries)
        if request is None:
            return []
        methods = {v.method for v in self.variants if v.mitigation_lambda is not None}
        return [len(request)] + [2] * sum(self.keep < 1 and not tries[str(name)] for name in methods)


def evaluation_steps(wanted: Wanted, known: Evaluation | None, facts: Mapping[str, Any]) -> Steps:
    """Evaluate variants: yield requests, receive their sums, and return the evaluation.

    Parameters
    ----------
    known
        Earlier measurements.
    facts
        Facts of the returned evaluation.
    """
    evaluation, tries = known, _tries(known, wanted.keep)
    while (request := _request(wanted, evaluation, tries)) is not None:
        tries.update(str(v.method) for v in request[1:] if v not in wanted.variants)
        evaluation = _joined(evaluation, request, (yield request), facts, wanted.keep)
    assert evaluation is not None
    return replace(evaluation, facts=facts, keep=wanted.keep)


def without_scaling(variants: Sequence[Variant], facts: Mapping[str, Any]) -> list[Variant]:
    """Leave out the variants that scale intruders, if there are known to be none: they equal the unchanged adapter."""
    return [variant for variant in variants if not (facts.get("intruders") == 0 and variant.scales_intruders)]


def _tries(known: Evaluation | None, keep: float) -> Counter[str]:
    """Count the λ tried in order to place each method: `MOST_PLACED` if an earlier run placed it for this share, else none."""
    done = known.variants if known is not None and known.keep == keep else ()
    return Counter({str(v.method): MOST_PLACED for v in done if v.method is not None})


def _request(wanted: Wanted, known: Evaluation | None, tries: Counter[str]) -> Request | None:
    """Return the next request; None if nothing is missing."""
    if known is None:
        return tuple(wanted.variants)
    base, *variants = without_scaling(wanted.variants, known.facts)
    if missing := [v for v in variants if EvaluatedVariant.of(v) not in known.variants]:
        return base, *missing
    if known.best(wanted.keep).reason in ("not learned", "not forgotten"):
        return None
    # The shrink is first: the others are compared with it.
    placing = {
        Shrink.name: UNCHANGED,
        **{str(v.method): v.mitigation for v in variants if v.mitigation_lambda is not None},
    }
    for name, method in placing.items():
        tried = tries[name]
        if method is None or tried == MOST_PLACED or known.lost(name, wanted.keep):
            continue
        lam = placed(known.variants, known.task, wanted.keep, name, last=tried == MOST_PLACED - 1)[1]
        if lam is not None:
            return base, Variant.of(replace(method, mitigation_lambda=lam))  # type: ignore[type-var]  # each method is a dataclass
    return None


def _joined(
    known: Evaluation | None, measured: Request, sums: Sums, facts: Mapping[str, Any], keep: float
) -> Evaluation:
    """Add measured sums to an evaluation, in the order of its table."""
    variants = [*(() if known is None else known.variants), *map(EvaluatedVariant.of, measured[known is not None :])]
    order = sorted(range(len(variants)), key=lambda v: variants[v].order)
    added = range(known is not None, len(measured))
    own = {text: new if known is None else known.sums[text].joined(new.take(added)) for text, new in sums.items()}
    return Evaluation.of(
        [variants[v] for v in order], {text: one.take(order) for text, one in own.items()}, facts, keep
    )


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


ONE = "an evaluation"


def result_file(prepared: Prepared, output: Path) -> ResultFile:
    """Describe the file of an evaluation."""
    # The journal does not contain what earlier runs measured, so it must belong to this version of their file.
    earlier = hashlib.sha256(output.read_bytes()).hexdigest() if is_taken(output) and output.is_file() else ""
    bits = f"{'' if prepared.findings is None else prepared.findings.digest()} {earlier}".strip()
    o, memory = prepared.options, prepared.detection.max_memory
    variants = [[v.name, v.mitigation and v.mitigation.as_dict()] for v in o.variants]
    facts = with_digest(prepared.facts, variants=variants, max_memory=memory)
    return ResultFile(output, ONE, "this very evaluation", "evaluation.json", prepared.plan, prepared.run, facts,
                      lambda path: not prepared.expected(_load(prepared, path)), bits)  # fmt: skip


def measured_before(prepared: Prepared, output: Path) -> Evaluation | None:
    """Load the evaluation to which this run adds variants; None if the file is new or will be replaced."""
    return _load(prepared, output) if is_taken(output) and not prepared.run.overwrite else None


def _load(prepared: Prepared, path: Path) -> Evaluation:
    """Load an evaluation; refuse it if its variants cannot be compared with this run's variants."""
    standing = load_evaluation(path)
    differing = differences(prepared.facts, standing.facts)
    if differing:
        raise of_others(path, ONE, differing)
    return standing


def inspect(prepared: Prepared, output: Path) -> State:
    """Check, without writing, that an evaluation can be written to a file, and whether it is complete there or was begun."""
    plan, file = prepared.plan, result_file(prepared, output)
    file.check_path()
    prepared.passes(2)  # raises if the budget does not hold one sequence
    if prepared.needs_findings and prepared.findings is None:
        check_budget(detection_estimates(plan, prepared.detection, prepared.resident), prepared.detection.max_memory)
    return file.state()


def evaluate(prepared: Prepared, output: Path | None) -> Evaluation:
    """Measure the missing variants; write the evaluation to a file if an output is named."""
    with kept(prepared.run.workers):
        found = _evaluated(prepared, output)
    if found.best().swapped:
        prepared.run.monitor.warn((ask_swapped(found.task),))
    return found


def _evaluated(prepared: Prepared, output: Path | None) -> Evaluation:
    if output is None:
        return _Run(prepared, None, Records()).result()
    if inspect(prepared, output) == "done":
        return _standing(prepared, output)
    with result_file(prepared, output).written() as records:
        known = measured_before(prepared, output)
        if known is not None:
            prepared.run.monitor.emit(Event("note", f"{output}: adds to the {len(known.variants)} variants in it"))
        found = _Run(prepared, known, records).result()
        prepared.plan.check_unchanged()
        write_atomic(output, found.to_json().encode())
    return found


def _standing(prepared: Prepared, output: Path) -> Evaluation:
    """Load a complete evaluation; write its suggestion anew if the requested share differs."""
    monitor, evaluation = prepared.run.monitor, replace(load_evaluation(output), keep=prepared.options.keep)
    text = evaluation.to_json().encode()
    if text == output.read_bytes():
        result_file(prepared, output).left()
        return evaluation
    remove_leftovers(output)  # from a run that was killed just after it renamed the file
    with locked(lock_of(output), output):
        write_atomic(output, text)
    monitor.emit(Event("note", f"{output} already contains these measures; only the suggestion is updated"))
    monitor.told(output, "written")
    return evaluation


class _Run:
    """A running evaluation.

    Parameters
    ----------
    known
        Earlier measurements.
    records
        Records of an interrupted run, to which this run adds its own.
    """

    def __init__(self, prepared: Prepared, known: Evaluation | None, records: Records) -> None:
        self.known, self.records, self.monitor = known, records, prepared.run.monitor
        self._findings: Findings | None = None
        self._divide(prepared)

    def result(self) -> Evaluation:
        """Run the evaluation to its end and return it."""
        facts, wanted = self.prepared.facts, self.prepared.wanted
        with computing(self.records.threads, self.monitor):
            self._check()
            self.progress.resume(self.records.taken_up)
            if (count := self._intruders(self._missing(wanted.variants))) is not None:
                facts = with_digest({**facts, "intruders": count})
            if self.known is not None:
                facts = joined_facts(facts, self.known.facts)
            wanted = replace(wanted, variants=without_scaling(wanted.variants, facts))
            found = answered(evaluation_steps(wanted, self.known, facts), self._measured)
            self.progress.finish()
        return found

    def _divide(self, prepared: Prepared) -> None:
        """Set how the work is divided, and start its progress."""
        self.prepared, self.progress = prepared, RunProgress(self.monitor, prepared.model.size, "evaluate")
        self.progress.expect([prepared.cost(one) for one in prepared.expected(self.known)])

    def _check(self) -> None:
        """Check whether padding changes the logits; if so, divide the work again."""
        prepared = self.prepared
        groups = [prepared.group(one) for one in prepared.expected(self.known)]
        one_length = needs_one_length(prepared.model.job, prepared.one_length, groups, self.records, self.progress)
        if one_length != prepared.one_length:
            self._divide(replace(prepared, one_length=one_length))

    def _measured(self, request: Request) -> Sums:
        """Measure the variants of a request on its part of each text."""
        prepared, variants = self.prepared, request
        what = json.dumps([variant.name for variant in variants])

        def job(chosen: tuple[Variant, ...]) -> VariantSet:
            return replace(prepared.model.job, variants=chosen, findings=self._findings_for(variants))

        passes = prepared.passes(len(request))
        self.progress.expect([prepared.cost(one) for one in passes])
        return measure_variants(
            passes, prepared.texts, variants, job, lambda i: f"{i} {what}", self.records, self.progress, prepared.run
        )

    def _missing(self, variants: Sequence[Variant]) -> list[Variant]:
        """List the variants that were not measured before."""
        done = () if self.known is None else self.known.variants
        return [v for v in variants if EvaluatedVariant.of(v) not in done]

    def _intruders(self, variants: Sequence[Variant]) -> int | None:
        """Count the intruders that these variants scale; None if no variant scales intruders."""
        if not any(variant.scales_intruders for variant in variants):
            return None
        known = self.records.find("intruders")
        if known is None:
            findings = self._findings_for(variants)
            assert findings is not None
            known = {"count": np.array([float(findings.intruders)])}
            self.records.add("intruders", known)
        return int(known["count"][0])

    def _findings_for(self, variants: Sequence[Variant]) -> Findings | None:
        """Return the findings that these variants need, detected now if none were given; None if none are needed."""
        prepared = self.prepared
        if not any(variant.scales_intruders for variant in variants):
            return None
        if prepared.findings is not None:
            return prepared.findings
        if self._findings is None:
            batch = AdapterBatch(prepared.plan.base, (prepared.plan,))
            (self._findings,) = detect_in_memory(batch, prepared.detection, prepared.run)
        return self._findings
