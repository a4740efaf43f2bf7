"""Evaluate variants: answer the steps' requests pass by pass, and record each pass in a journal, so that a killed run resumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from streamer.detection.detect import detect_in_memory
from streamer.detection.findings import Findings
from streamer.detection.findings_file import lock_of, remove_leftovers
from streamer.evaluation.evaluation import Evaluation, load_evaluation
from streamer.evaluation.prepare import Prepared
from streamer.evaluation.records import inspect, measured_before, result_file
from streamer.evaluation.steps import Request, Sums, answered, evaluation_steps, without_scaling
from streamer.evaluation.suggestion import ask_swapped
from streamer.events import Event
from streamer.measuring.identity import joined_facts, with_digest
from streamer.measuring.passes import measure_variants, needs_one_length
from streamer.measuring.progress import RunProgress
from streamer.measuring.result_file import Records, computing
from streamer.measuring.variants import EvaluatedVariant
from streamer.plan.batch import AdapterBatch
from streamer.storage.atomic_file import write_atomic
from streamer.storage.lock import locked
from streamer.streaming.values import VariantSet
from streamer.streaming.variants import Variant
from streamer.workers.engine import kept


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
