"""Evaluate all variants, pass by pass, journalling each, so that a killed run resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from streamer.detection.findings import Findings
from streamer.detection.findings_file import lock_of, remove_leftovers
from streamer.detection.run import detect_in_memory
from streamer.evaluation.evaluation import GENERAL, TASK, Evaluation, load_evaluation
from streamer.evaluation.passes import Reading, padding_changes, run_pass, together
from streamer.evaluation.prepare import Prepared
from streamer.evaluation.records import InMemory, Journalled, inspect, result_file
from streamer.evaluation.result_file import computing
from streamer.evaluation.statistics import SequenceSums
from streamer.evaluation.suggestion import EvaluatedVariant
from streamer.events import Event
from streamer.plan.batch import Batch
from streamer.storage.atomic_file import write_atomic
from streamer.storage.lock import locked
from streamer.streaming.model import StreamingModel


def evaluate(prepared: Prepared, output: Path | None) -> Evaluation:
    """Measure all variants, into memory, or into a file where an output is named."""
    if output is None:
        return _measured(prepared, InMemory())
    if inspect(prepared, output) == "done":
        return _standing(prepared, output)
    with result_file(prepared, output).written() as journal:
        evaluation = _measured(prepared, Journalled(journal))
        prepared.plan.check_unchanged()
        write_atomic(output, evaluation.to_json(prepared.options.keep).encode())
    return evaluation


def _standing(prepared: Prepared, output: Path) -> Evaluation:
    """Load the measures that stand in a file, where the suggestion is made again if another share is to be kept."""
    monitor, evaluation = prepared.run.monitor, load_evaluation(output)
    text = evaluation.to_json(prepared.options.keep).encode()
    if text == output.read_bytes():
        result_file(prepared, output).left()
        return evaluation
    remove_leftovers(output)  # of a run that was killed just after the file got its name
    with locked(lock_of(output), output):
        write_atomic(output, text)
    monitor.emit(Event("note", f"{output} holds these measures already; only the suggestion is made again"))
    monitor.told(output, "written")
    return evaluation


def _measured(prepared: Prepared, records: InMemory) -> Evaluation:
    """Run the passes that are missing, and put the sums of all together."""
    with computing(records.threads, prepared.run.monitor):
        prepared = _checked(prepared, records)
        findings = _findings(prepared) if len(records.sums) < len(prepared.passes) else None
        models: dict[tuple[int, ...], StreamingModel] = {}
        for number, one in enumerate(prepared.passes):
            if number in records.sums:
                continue
            if one.variants not in models:
                chosen = tuple(prepared.options.variants[v] for v in (0, *one.variants))
                models[one.variants] = StreamingModel(prepared.options.job(prepared.plan, chosen, findings))
            records.add(number, _pass(prepared, number, models[one.variants]))
    prepared.run.monitor.emit(Event("evaluate", "", *_progress(prepared, len(prepared.passes), 0)))
    variants = tuple(EvaluatedVariant(v.name, v.method, v.mitigation_lambda, v.keep) for v in prepared.options.variants)
    general, task = (
        together(prepared.passes, records.sums, text, len(variants), len(prepared.texts[text].ids))
        for text in (GENERAL, TASK)
    )
    return Evaluation(variants, general, task, prepared.facts)


def _checked(prepared: Prepared, records: InMemory) -> Prepared:
    """Check the logits once, and divide the work anew if padding changes them."""
    if records.one_length is None:
        changed = padding_changes(prepared.plan, prepared.groups, _reading(prepared, 0, share=0))
        records.decide(prepared.one_length or changed)
    one_length = bool(records.one_length)
    return prepared if one_length == prepared.one_length else replace(prepared, one_length=one_length)


def _findings(prepared: Prepared) -> Findings | None:
    """Return the findings, detected now where none were given and some are needed."""
    if not prepared.needs_findings:
        return None
    if prepared.findings is not None:
        return prepared.findings.findings
    (found,) = detect_in_memory(Batch(prepared.plan.base, (prepared.plan,)), prepared.detection, prepared.run)
    return found


def _pass(prepared: Prepared, number: int, model: StreamingModel) -> SequenceSums:
    """Run one pass."""
    return run_pass(model, prepared.groups[number], prepared.passes[number].text, _reading(prepared, number))


def _reading(prepared: Prepared, number: int, share: int = 1) -> Reading:
    """Tell how far a pass is, and heed a request to stop, before each parameter that is read; what is no pass has a share of 0."""
    monitor = prepared.run.monitor

    def tell(name: str, done: int) -> None:
        monitor.emit(Event("evaluate", name, *_progress(prepared, number, share * done)))

    return Reading(monitor, prepared.model.size.products, tell)


def _progress(prepared: Prepared, number: int, done: int) -> tuple[int, int, int, int]:
    """Count multiplications for a token done and in all, and passes done and in all."""
    size, of = sum(prepared.model.size.products.values()), len(prepared.passes)
    return size * number + done, size * of, number, of
