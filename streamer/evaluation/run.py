"""Evaluate all variants, pass by pass, journalling each, so that a killed run resumes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import torch

from streamer.detection.findings import Findings
from streamer.detection.findings_file import lock_of, remove_leftovers
from streamer.detection.run import detect_in_memory
from streamer.errors import NumericError
from streamer.evaluation.evaluation import GENERAL, TASK, Evaluation, load_evaluation
from streamer.evaluation.losses import measure
from streamer.evaluation.prepare import Prepared
from streamer.evaluation.records import InMemory, Journalled, inspect
from streamer.evaluation.statistics import MEASURES, SequenceSums
from streamer.evaluation.suggestion import EvaluatedVariant
from streamer.events import Event
from streamer.linalg.torch_state import full_float32, threads
from streamer.plan.batch import Batch
from streamer.storage.atomic_file import remove_partials, write_atomic
from streamer.storage.files import make_directory
from streamer.storage.lock import locked
from streamer.storage.output_checks import touch
from streamer.streaming.logit_checks import check_logits
from streamer.streaming.model import StreamingModel, vocabulary_block
from streamer.streaming.run_time import RunTimeTensor


def evaluate(prepared: Prepared, output: Path | None) -> Evaluation:
    """Measure all variants, into memory, or into a file where an output is named."""
    monitor = prepared.run.monitor
    if output is None:
        return _measured(prepared, InMemory())
    if inspect(prepared, output) == "done":
        return _standing(prepared, output)
    make_directory(output.parent)
    with locked(lock_of(output), output), contextlib.closing(Journalled(prepared, output)) as records:
        remove_partials(output.parent, {output.name})
        evaluation = _measured(prepared, records)
        prepared.plan.check_unchanged()
        write_atomic(output, evaluation.to_json(prepared.options.keep).encode())
        records.journal.remove()
    monitor.told(output, "resumed" if records.resumed else "written")
    return evaluation


def _standing(prepared: Prepared, output: Path) -> Evaluation:
    """Load the measures that stand in a file, where the suggestion is made again if another share is to be kept."""
    monitor, evaluation = prepared.run.monitor, load_evaluation(output)
    remove_leftovers(output)  # of a run that was killed just after the file got its name
    text = evaluation.to_json(prepared.options.keep).encode()
    if text != output.read_bytes():
        with locked(lock_of(output), output):
            write_atomic(output, text)
        monitor.emit(Event("note", f"{output} holds these measures already; only the suggestion is made again"))
        monitor.told(output, "written")
        return evaluation
    monitor.emit(Event("note", f"{output} holds this very evaluation already; nothing to do"))
    if fault := touch([output]):
        monitor.emit(Event("warning", f"{fault}: its time stays; `make` may ask for it again"))
    monitor.told(output, "present")
    return evaluation


def _measured(prepared: Prepared, records: InMemory) -> Evaluation:
    """Run the passes that are missing, and put the sums of all together."""
    count = records.threads or torch.get_num_threads()
    if count != torch.get_num_threads():
        prepared.run.monitor.emit(Event("note", f"goes on with {count} threads, as it began; --no-resume starts over"))
    with threads(count), full_float32():
        findings = None
        if len(records.sums) < len(prepared.passes):
            check_logits(prepared.plan, prepared.texts[GENERAL].ids[0], prepared.run.monitor)
            findings = _findings(prepared)
        models: dict[tuple[int, ...], StreamingModel] = {}
        for number, one in enumerate(prepared.passes):
            if number in records.sums:
                continue
            if one.variants not in models:
                chosen = tuple(prepared.options.variants[v] for v in (0, *one.variants))
                models[one.variants] = StreamingModel(prepared.options.job(prepared.plan, chosen, findings))
            records.add(number, _pass(prepared, number, models[one.variants]))
    prepared.run.monitor.emit(Event("evaluate", "", *_progress(prepared, len(prepared.passes), 0)))
    variants = tuple(EvaluatedVariant(v.name, v.method, v.mitigation_lambda) for v in prepared.options.variants)
    return Evaluation(
        variants, _together(prepared, records, GENERAL), _together(prepared, records, TASK), prepared.facts
    )


def _findings(prepared: Prepared) -> Findings | None:
    """Return the findings, detected now where none were given and some are needed."""
    if not prepared.needs_findings:
        return None
    if prepared.findings is not None:
        return prepared.findings.findings
    (found,) = detect_in_memory(Batch(prepared.plan.base, (prepared.plan,)), prepared.detection, prepared.run)
    return found


def _pass(prepared: Prepared, number: int, model: StreamingModel) -> SequenceSums:
    """Run one pass; a request to stop is heeded before each parameter that is read."""
    one, monitor = prepared.passes[number], prepared.run.monitor
    products, begun = model.size.products, set[str]()

    def on_read(tensor: RunTimeTensor) -> None:
        monitor.checkpoint()
        if tensor.name in products and tensor.name not in begun:
            monitor.emit(
                Event("evaluate", tensor.name, *_progress(prepared, number, sum(products[name] for name in begun)))
            )
            begun.add(tensor.name)

    model.batch.on_read = on_read
    text = prepared.texts[one.text].take(one.sequences)
    rows = model.batch.variants * sum(map(len, text.ids))
    sums = measure(model, text, vocabulary_block(rows))
    model.check_all_used()
    prepared.plan.check_unchanged()
    for name in MEASURES:
        if not np.isfinite(getattr(sums, name)).all():
            v = int(np.argwhere(~np.isfinite(getattr(sums, name)))[0][0])
            raise NumericError(
                f"{prepared.plan.base.path}: variant {model.job.variants[v].name!r} has a {name} of NaN or Inf on the {one.text} text; "
                "check the adapter's scale"
            )
    return sums


def _progress(prepared: Prepared, number: int, done: int) -> tuple[int, int, int, int]:
    """Count multiplications for a token done and in all, and passes done and in all."""
    size, of = sum(prepared.model.size.products.values()), len(prepared.passes)
    return size * number + done, size * of, number, of


def _together(prepared: Prepared, records: InMemory, text: str) -> SequenceSums:
    """Put the sums of a text's passes in the order of variants and sequences."""
    shape = len(prepared.options.variants), len(prepared.texts[text].ids)
    tokens, arrays = np.zeros(shape[1]), {name: np.zeros(shape) for name in MEASURES}
    for number, one in enumerate(prepared.passes):
        if one.text == text:
            sums = records.sums[number]
            at = np.ix_((0, *one.variants) if one.variants[0] == 1 else one.variants, one.sequences)
            tokens[list(one.sequences)] = sums.tokens
            for name in MEASURES:
                values = getattr(sums, name)
                arrays[name][at] = values if one.variants[0] == 1 else values[1:]
    return SequenceSums(tokens, **arrays)
