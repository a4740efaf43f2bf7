"""Evaluate all variants, pass by pass, journalling each, so that a killed run resumes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from streamer import __version__
from streamer.detection.findings import Findings
from streamer.detection.findings_file import journal_of, lock_of, remove_leftovers
from streamer.detection.memory import detection_estimates
from streamer.detection.options import DetectionOptions, RunOptions
from streamer.detection.run import detect_in_memory, naming_inputs
from streamer.errors import NumericError, OutputError, OutputExistsError, StreamerError, UnsupportedError
from streamer.evaluation.causality import check_causal
from streamer.evaluation.evaluation import GENERAL, TASK, Evaluation, load_evaluation
from streamer.evaluation.extra import require_transformers
from streamer.evaluation.losses import measure
from streamer.evaluation.memory import Pass, plan_passes, vocabulary_block
from streamer.evaluation.model import StreamingModel
from streamer.evaluation.options import EvaluationOptions
from streamer.evaluation.run_time import RunTimeTensor
from streamer.evaluation.sequences import TextSequences
from streamer.evaluation.statistics import MEASURES, SequenceSums
from streamer.evaluation.suggestion import EvaluatedVariant
from streamer.evaluation.texts import read_text
from streamer.evaluation.tokenizer import tokenizer_directory
from streamer.evaluation.values import Job
from streamer.events import Event
from streamer.linalg.torch_state import full_float32, threads
from streamer.output.job import GivenFindings
from streamer.output.mitigation import MitigationOptions
from streamer.output.prepare import FindingsOrPath, OutputOptions, open_jobs
from streamer.plan.batch import Batch
from streamer.plan.memory import check_budget, resident_bytes
from streamer.plan.plan import Plan
from streamer.storage.atomic_file import remove_partials, write_atomic
from streamer.storage.files import make_directory
from streamer.storage.journal import Journal, may_resume
from streamer.storage.lock import locked
from streamer.storage.output_checks import check_name, check_output_path, is_placeholder, refuse_symlink, touch


@dataclass(frozen=True, eq=False)
class Prepared:
    """An evaluation whose inputs are open and checked; nothing is written.

    Attributes
    ----------
    findings
        Those given; None where there are none.
    texts
        ``general`` and ``task``.
    model
        Of all variants; deltas that need findings can be had of it only once these are there.
    """

    plan: Plan
    options: EvaluationOptions
    detection: DetectionOptions
    run: RunOptions
    findings: GivenFindings | None
    texts: Mapping[str, TextSequences]
    model: StreamingModel

    @cached_property
    def passes(self) -> list[Pass]:
        """Divide the work."""
        return plan_passes(
            self.texts, len(self.options.variants), self.model.size, self.resident, self.detection.max_memory
        )

    @property
    def resident(self) -> int:
        """Estimate the bytes that stay in memory between two steps."""
        return resident_bytes(Batch(self.plan.base, (self.plan,)))

    @property
    def needs_findings(self) -> bool:
        """Test whether a variant depends on findings."""
        return any(v.mitigation is not None and v.mitigation.needs_detection for v in self.options.variants)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Say what it is made of, as JSON; the digest `plan` tells whether two evaluations are one."""
        o, detection = self.options, self.findings.options if self.findings else self.detection
        plan, weights = self.plan, self.plan.weights
        tree = {
            "transformers": require_transformers().__version__,
            "base": self.plan.sources[0],
            "adapter": self.plan.sources[1],
            "factored": not plan.adapter.describes_model and all(t.module.factors for t in plan.targets),
            "quantized": any(n in weights.quantized_names and not weights.requantizes(n) for n in plan.by_weight),
            "detection": detection.as_dict() if self.needs_findings else None,
            "scale": o.scale,
            "projected": o.projected,
            "texts": {name: text.facts() for name, text in self.texts.items()},
        }  # fmt: skip
        decided = {
            **tree,
            "options": o.as_json(),
            "max_memory": self.detection.max_memory,
            "findings": self.findings.decisions() if self.findings else None,
        }
        return {
            "version": __version__,
            **tree,
            "plan": hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest(),
        }


def prepare(base: str | Path, adapter: Path, texts: Mapping[str, Path], findings: FindingsOrPath, options: EvaluationOptions,
            detection: DetectionOptions, run: RunOptions) -> Prepared:  # fmt: skip
    """Open and check everything that an evaluation reads, and hand on the warnings of the inputs.

    Parameters
    ----------
    texts
        Paths of the ``general`` and the ``task`` text.
    """
    require_transformers()
    form = OutputOptions(merges=True)
    (job,) = open_jobs(base, {"": adapter}, [findings], MitigationOptions(1.0, "shrink"), detection, form, run)
    plan = job.plan
    run.monitor.warn((*plan.warnings, *job.warnings))
    if plan.edits.vocabulary is not None:
        raise UnsupportedError(
            f"{plan.adapter.path}: gives the model {plan.edits.vocabulary} tokens, which the base does not have; evaluate "
            "takes adapters that keep the vocabulary"
        )
    model = StreamingModel(Job(plan, options.variants, None, options.projected))
    read = {
        name: read_text(path, tokenizer_directory(plan), sequences=options.sequences, length=options.length,
                        vocabulary=model.vocabulary, positions=model.positions)
        for name, path in texts.items()
    }  # fmt: skip
    given = job.findings if isinstance(job.findings, GivenFindings) else None
    return Prepared(plan, options, detection, run, given, read, model)


def inspect(prepared: Prepared, output: Path) -> Literal["new", "resume", "done"]:
    """Check, read-only, whether an evaluation can be written to a file, and whether it stands there or was begun."""
    plan, run = prepared.plan, prepared.run
    refuse_symlink(output)
    if output.is_dir():
        raise OutputError(f"{output}: is a directory; name a file in it, such as {output / 'evaluation.json'}")
    check_output_path(output.parent, (), output)
    check_name(output, journal_of(output).name + ".0123456789abcdef.partial")
    prepared.passes  # noqa: B018  # refuses a budget that is too small
    if prepared.needs_findings and prepared.findings is None:
        check_budget(detection_estimates(plan, prepared.detection, prepared.resident), prepared.detection.max_memory)
    if output.exists() and not is_placeholder(output):
        with naming_inputs(plan, [output], run.overwrite):
            done = _finished(prepared, output)
        if done:
            return "done"
    plan.refuse_overwriting([output])
    found = next(Journal.peek(journal_of(output)), {})
    ours = {"plan", "stamps"} <= found.keys()
    return "resume" if ours and run.resume and may_resume(output, found, _start(prepared), overwrite=run.overwrite,
                                                          journal=journal_of(output)) else "new"  # fmt: skip


def _finished(prepared: Prepared, output: Path) -> bool:
    """Test whether this very evaluation stands there; refuse anything else that is not to be replaced."""
    try:
        found = load_evaluation(output)
    except StreamerError:
        raise OutputExistsError(
            f"{output}: exists and is not an evaluation, which is all that is replaced; choose another output", output
        ) from None
    if prepared.run.overwrite:
        return False
    if found.facts.get("plan") != prepared.facts["plan"]:
        raise OutputExistsError(
            f"{output}: holds an evaluation of other inputs or options; choose another output, or pass --overwrite",
            output,
        )
    return True


def _start(prepared: Prepared) -> dict[str, Any]:
    """Make the first record of a journal: what run it belongs to, and on how many threads, on which last bits depend."""
    bits = prepared.findings.bits if prepared.findings else ""
    return {"plan": prepared.facts["plan"], "version": __version__, "stamps": prepared.plan.detection_stamps(),
            "bits": bits, "threads": torch.get_num_threads()}  # fmt: skip


def evaluate(prepared: Prepared, output: Path | None) -> Evaluation:
    """Measure all variants, into memory, or into a file where an output is named."""
    monitor = prepared.run.monitor
    if output is None:
        return _measured(prepared, _InMemory())
    if inspect(prepared, output) == "done":
        monitor.emit(Event("note", f"{output} holds this very evaluation already; nothing to do"))
        remove_leftovers(output)  # of a run that was killed just after the file got its name
        if fault := touch([output]):
            monitor.emit(Event("warning", f"{fault}: its time stays; `make` may ask for it again"))
        monitor.told(output, "present")
        return load_evaluation(output)
    make_directory(output.parent)
    with locked(lock_of(output), output), contextlib.closing(_Journalled(prepared, output)) as records:
        remove_partials(output.parent, {output.name})
        evaluation = _measured(prepared, records)
        prepared.plan.check_unchanged()
        write_atomic(output, evaluation.to_json(prepared.options.keep).encode())
        records.journal.remove()
    monitor.told(output, "resumed" if records.resumed else "written")
    return evaluation


class _InMemory:
    """Sums of passes of this run alone."""

    threads = 0

    def __init__(self) -> None:
        self.sums: dict[int, SequenceSums] = {}

    def add(self, number: int, sums: SequenceSums) -> None:
        """Keep the sums of a pass."""
        self.sums[number] = sums


class _Journalled(_InMemory):
    """Sums of passes that a journal keeps, those of an interrupted run among them."""

    def __init__(self, prepared: Prepared, output: Path) -> None:
        super().__init__()
        self.journal = Journal(journal_of(output))
        start, run = _start(prepared), prepared.run
        found = json.loads(self.journal[0]) if len(self.journal) else {}
        ours = {"plan", "stamps"} <= found.keys()
        self.resumed = (
            ours and run.resume and may_resume(output, found, start, overwrite=run.overwrite, journal=self.journal.path)
        )
        if not self.resumed:
            self.journal.clear()
            self.journal.append(json.dumps(start).encode())
            found = start
        self.threads = found["threads"]
        for i in range(1, len(self.journal)):
            record = json.loads(self.journal[i])
            self.sums[record["pass"]] = SequenceSums(
                *(np.array(record[key], np.float64) for key in ("tokens", *MEASURES))
            )

    def add(self, number: int, sums: SequenceSums) -> None:
        """Keep the sums of a pass, durably; floats are written so that they are read as the same bits."""
        arrays = {"tokens": sums.tokens.tolist(), **{name: getattr(sums, name).tolist() for name in MEASURES}}
        self.journal.append(json.dumps({"pass": number, **arrays}).encode())
        super().add(number, sums)

    def close(self) -> None:
        """Close the journal, which stays."""
        self.journal.close()


def _measured(prepared: Prepared, records: _InMemory) -> Evaluation:
    """Run the passes that are missing, and put the sums of all together."""
    count = records.threads or torch.get_num_threads()
    if count != torch.get_num_threads():
        prepared.run.monitor.emit(Event("note", f"goes on with {count} threads, as it began; --no-resume starts over"))
    with threads(count), full_float32():
        if len(records.sums) < len(prepared.passes):
            check_causal(prepared.plan, prepared.texts[GENERAL].ids[0], prepared.run.monitor)
        findings = _findings(prepared)
        models: dict[tuple[int, ...], StreamingModel] = {}
        for number, one in enumerate(prepared.passes):
            if number in records.sums:
                continue
            if one.variants not in models:
                chosen = tuple(prepared.options.variants[v] for v in (0, *one.variants))
                models[one.variants] = StreamingModel(Job(prepared.plan, chosen, findings, prepared.options.projected))
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


def _together(prepared: Prepared, records: _InMemory, text: str) -> SequenceSums:
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
