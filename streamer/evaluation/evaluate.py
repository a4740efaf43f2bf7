"""Evaluate variants: check the inputs, let variants ride in sweeps over blocks of sequences, and stop when the answer is clear.

A block has a few sequences of each text, spread over it. After each block the suggestion is made; the run stops when it is clear, or when
the texts end. Then the shrink whose λ keeps the share according to the losses so far rides once over the same sequences. A killed run
resumes at the sweep that it was in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from streamer.adapters.finetuned import One
from streamer.detection.findings import Findings
from streamer.detection.options import DetectionOptions, Run
from streamer.errors import UsageError
from streamer.evaluation.evaluation import Evaluation, load_evaluation
from streamer.evaluation.losses import EvaluationOptions
from streamer.evaluation.suggestion import ask_swapped, placed
from streamer.events import Event, Monitor
from streamer.measuring.result_file import (
    ADAPTER_ROW,
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
from streamer.measuring.riders import ROWS, Progress, Sums, Work, measured, padding_changes, riders, sweep_cost
from streamer.measuring.sequences import GENERAL, TASK, TextSequences
from streamer.measuring.statistics import ARRAYS, SequenceSums, telling
from streamer.measuring.texts import chooses_keys, read_texts, refuse_new_tokens, sample_digest
from streamer.methods import UNCHANGED, RegMean, Shrink
from streamer.methods.files import Coefficients
from streamer.output.write import OutputOptions, check_coefficients, check_map, open_jobs
from streamer.plan.plan import AdapterBatch, Plan, resident_bytes
from streamer.storage.atomic_file import write_atomic
from streamer.storage.files import locked
from streamer.storage.transaction import is_taken, lock_of, remove_leftovers
from streamer.streaming.model import require_transformers
from streamer.streaming.sweep import SweepModel
from streamer.streaming.values import Variant

BLOCK = 8
"""Sequences of each text in a block."""

KNOWN = 0.03
"""Shares are known if their standard errors are at most this."""


def spread(text: TextSequences) -> TextSequences:
    """Order the sequences of a text so that those of the first blocks are spread over it; questions keep their order."""
    if text.questions is not None:
        return text
    steps = max(1, -(-len(text.ids) // BLOCK))
    return text.take([i for step in range(steps) for i in range(_reversed(step, steps), len(text.ids), steps)])


def _reversed(step: int, steps: int) -> int:
    """Return the step with this number when steps are taken as far from each other as possible."""
    bits = (steps - 1).bit_length()
    order = sorted(range(steps), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2)) if bits else [0]
    return order[step]


def clear(evaluation: Evaluation) -> bool:
    """Test whether more sequences would hardly change the answer.

    The suggested variant then diverges less, beyond its error, than every other that may keep the share, and keeps it itself; the shares
    of learning and of divergence are known to `KNOWN`. One block is too few to know its own errors.
    """
    general, task, best = evaluation.general, evaluation.task, evaluation.best()
    sequences = len(task.tokens)
    if sequences <= BLOCK or best.reason != "forgets least" or best.variant is None:
        return False
    chosen, errors = evaluation.variants.index(best.variant), telling(sequences)
    for v in range(ADAPTER_ROW, len(evaluation.variants)):
        kept, left = task.fraction(v), general.kl_fraction(v)
        if max(kept.error, left.error) > KNOWN:
            return False
        lacks = kept.value + errors * kept.error < evaluation.keep
        if v != chosen and not lacks and not general.kl_difference(chosen, v).is_negative:
            return False
    kept = task.fraction(chosen)
    return kept.value - errors * kept.error >= evaluation.keep or best.variant.keep is not None


def _place(known: Evaluation, keep: float) -> float | None:
    """Choose the λ of the shrink to place for a share; None if there is nothing to keep or to win, or a shrink is well placed."""
    if keep == 1 or known.best(keep).reason in ("not learned", "not forgotten"):
        return None
    return placed(known.variants, known.task, keep)


def without_scaling(variants: Sequence[Variant], facts: Mapping[str, Any]) -> list[Variant]:
    """Leave out the variants that scale intruders, if there are known to be none: they equal the unchanged adapter."""
    return [variant for variant in variants if not (facts.get("intruders") == 0 and variant.scales_intruders)]


def _joined(
    known: Evaluation | None, measured: Sequence[Variant], sums: Sums, facts: Mapping[str, Any], keep: float
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
    max_memory
        Budget in bytes; None for no budget.
    findings
        Findings whose intruders are scaled; None if none were given.
    texts
        ``general``, ``task``, and others by file name.
    model
        Model of all variants.
    one_length
        Whether only sequences of equal length run together, because padding would change the model's logits.
    """

    plan: Plan
    options: EvaluationOptions
    max_memory: int | None
    run: Run
    findings: Findings | None
    texts: Mapping[str, TextSequences]
    model: SweepModel
    one_length: bool

    def blocks(self) -> list[dict[str, TextSequences]]:
        """Divide the texts into blocks; questions are all in the first."""
        count = max((len(text.ids) for text in self.texts.values() if text.questions is None), default=1)
        found = []
        for i in range(0, count, BLOCK):
            found.append({
                name: text if text.questions is not None else text.take(range(i, min(i + BLOCK, len(text.ids))))
                for name, text in self.texts.items()
                if (i == 0 if text.questions is not None else i < len(text.ids))
            })  # fmt: skip
        return found

    def work(self, block: Mapping[str, TextSequences], variants: int) -> Work:
        """Count the rows of a sweep over a block."""
        longest = max(text.longest for text in block.values())
        return Work(0, variants * sum(len(ids) for text in block.values() for ids in text.ids), longest, variants)

    def expected(self, known: Evaluation | None) -> list[tuple[dict[str, TextSequences], int]]:
        """List the sweeps of a run that does not stop early, with their numbers of variants; empty if nothing is missing."""
        done = () if known is None else known.variants
        wanted = self.wanted if known is None else without_scaling(self.wanted, known.facts)
        new = 1 + sum(EvaluatedVariant.of(v) not in done for v in wanted[1:])
        sweeps = [(block, new) for block in self.blocks()] if new > 1 else []
        placing = self.options.keep < 1 and Shrink.name in self.options.methods
        placing &= bool(sweeps) or (
            known is not None and known.keep != self.options.keep and _place(known, self.options.keep) is not None
        )
        return sweeps + [(block, 2) for block in self.blocks() if placing]

    @property
    def resident(self) -> int:
        """Estimate the bytes that stay in memory between two steps."""
        return resident_bytes(AdapterBatch(self.plan.base, (self.plan,)))

    @property
    def needs_findings(self) -> bool:
        """Test whether a variant depends on findings."""
        return any(variant.scales_intruders for variant in self.options.variants)

    @property
    def wanted(self) -> list[Variant]:
        """List the requested variants, without any that equal the unchanged adapter according to given findings."""
        return without_scaling(self.options.variants, self.facts)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Return the inputs and options as JSON: `EvaluationFacts`."""
        o, findings = self.options, self.findings if self.needs_findings else None
        tree = {
            **model_facts(self.model, base=self.plan.sources[0], adapter=self.plan.sources[1]),
            **writable(self.plan),
            "detection": None if findings is None else findings.options.as_dict(),
            "scale": o.select,
            "projected": o.projected,
            "texts": {GENERAL: self.texts[GENERAL].facts(), TASK: self.texts[TASK].facts()},
        }  # fmt: skip
        if others := [text.facts() for name, text in self.texts.items() if name not in (GENERAL, TASK)]:
            tree["texts"]["others"] = others
        if findings is not None:
            tree |= {"findings": findings.decisions_digest(), "intruders": findings.intruders}
        if o.coefficients is not None:
            tree["coefficients"] = o.fitted_record()
        if o.map is not None:
            tree["map"] = o.map.record()
        return with_digest(tree)


def prepare(base_path: str | Path, adapter: Path, texts: Mapping[str, Path], findings: Findings | None, options: EvaluationOptions,
            max_memory: int | None, run: Run) -> Prepared:  # fmt: skip
    """Open and check an evaluation's inputs, and pass their warnings to the monitor.

    Parameters
    ----------
    texts
        Paths of the ``general`` and the ``task`` text, and of others by file name.
    """
    model, given = open_model(base_path, adapter, findings, options, run)
    plan, read = model.job.plan, read_texts(model, texts, options.sequences, options.length, run.monitor)
    if options.coefficients is not None:
        _warn_of_fitted_texts(options.coefficients, read, texts, run.monitor)
    ordered = {name: spread(text) for name, text in read.items()}
    made = Prepared(plan, options, max_memory, run, given, ordered, model, chooses_keys(model, read))
    work = max((made.work(*sweep) for sweep in made.expected(None)), key=lambda work: work.riding)
    return replace(made, max_memory=work.beside(model.size, made.resident, 0, run.workers, max_memory))


def open_model(base_path: str | Path, adapter: Path, findings: Findings | None, options: EvaluationOptions,
               run: Run) -> tuple[SweepModel, Findings | None]:  # fmt: skip
    """Open and check the model of all variants, and the findings if given; pass warnings to the monitor.

    Raises
    ------
    UsageError
        If a variant scales intruders, and no findings are given.
    """
    require_transformers()
    if findings is None and (scaling := [v.name for v in options.variants if v.scales_intruders]):
        raise UsageError(f"findings: {scaling[0]} needs them, found none; run `streamer detect`, and pass its file")
    detection = DetectionOptions() if findings is None else findings.options
    (job,) = open_jobs(base_path, One(adapter), [findings], UNCHANGED, detection, OutputOptions(merges=True), run)
    plan = job.plan
    run.monitor.warn((*plan.warnings, *job.warnings))
    refuse_new_tokens(plan)
    for variant in options.variants:
        if isinstance(variant.mitigation, RegMean):
            check_coefficients(plan, variant.mitigation.coefficients)
    if options.map is not None:
        run.monitor.warn(check_map(plan, options.map))
    model = SweepModel(replace(options.job(plan, run.model_device), findings=job.findings))
    return model, job.findings


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
    variants = [[v.name, v.mitigation and v.mitigation.as_dict()] for v in prepared.options.variants]
    facts = with_digest(prepared.facts, variants=variants, max_memory=prepared.max_memory)
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
    file = result_file(prepared, output)
    file.check_path()
    for sweep in prepared.expected(None):  # raises if the budget is too small
        prepared.work(*sweep).limits(prepared.model.size, prepared.resident, prepared.max_memory)
    return file.state()


def evaluate(prepared: Prepared, output: Path | None) -> Evaluation:
    """Measure the missing variants; write the evaluation to a file if an output is named."""
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
        self.prepared, self.progress = prepared, Progress(prepared.run, prepared.model.size, "evaluate")

    def result(self) -> Evaluation:
        """Run the evaluation to its end and return it."""
        prepared, facts = self.prepared, self.prepared.facts
        with computing(self.records.threads, prepared.run):
            one_length = prepared.one_length or self._padding_changes()
            if self.known is not None:
                facts = joined_facts(facts, self.known.facts)
            base, *rest = without_scaling(prepared.wanted, facts)
            found = self.known
            if missing := self._missing(rest):
                found = self._measured((base, *missing), facts, one_length)
            assert found is not None
            keep = prepared.options.keep
            again = bool(missing) or (self.known is not None and self.known.keep != keep)
            if again and (lam := _place(found, keep)) is not None:
                self.known = replace(found, facts=facts)
                found = self._measured((base, Variant.of(Shrink(lam))), facts, one_length)
            self.progress.finish()
        return replace(found, facts=facts, keep=keep)

    def _padding_changes(self) -> bool:
        """Check the logits, and test whether padding changes them."""
        found = self.records.find("one_length")
        if found is None:
            held_out = riders(self.prepared.texts, 1, self.prepared.model.size, ROWS, self.prepared.one_length)
            changed = padding_changes(self.prepared.model, [part.text for part in held_out], self.monitor.checkpoint)
            found = {"one_length": np.array([float(changed)])}
            self.records.add("one_length", found)
        return bool(found["one_length"][0])

    def _measured(self, variants: Sequence[Variant], facts: Mapping[str, Any], one_length: bool) -> Evaluation:
        """Let variants, the base first, ride through block after block, until the answer is clear.

        Variants that join earlier ones ride through the same sequences.
        """
        prepared, model, sums = self.prepared, self.prepared.model, dict[str, SequenceSums]()
        lengths = None if self.known is None else {name: len(own.tokens) for name, own in self.known.sums.items()}
        model.use(replace(model.job, variants=tuple(variants), findings=prepared.findings))
        names, blocks = json.dumps([variant.name for variant in variants]), prepared.blocks()
        sweeps = prepared.expected(self.known) or [(block, len(variants)) for block in blocks]
        for number, block in enumerate(blocks):
            if lengths is not None and all(len(own.tokens) >= lengths[name] for name, own in sums.items()) and sums:
                break
            key, found = f"{number} {names}", dict[str, SequenceSums]()
            for name in block:
                if (known := self.records.find(f"{key} {name}")) is not None:
                    found[name] = SequenceSums(**known)
            if found.keys() != block.keys():
                work = prepared.work(block, len(variants))
                limits = work.limits(model.size, prepared.resident, prepared.max_memory)
                held_out = riders(block, len(variants), model.size, limits.rows, one_length)
                rest = [sweep_cost(model.size, prepared.work(*sweep).riding) for sweep in sweeps[number:]]
                self.progress.expect(sum(rest), len(rest) * (len(model.layers) + 1))
                found = measured(model, block, held_out, self.progress, limits, states=self.records.states(key))
                for name, own in found.items():
                    arrays = {kind: getattr(own, kind) for kind in ("tokens", *ARRAYS, *own.answers)}
                    self.records.add(f"{key} {name}", arrays)
            for name, own in found.items():
                sums[name] = sums[name].followed(own) if name in sums else own
            if lengths is None and clear(_joined(None, variants, sums, facts, prepared.options.keep)):
                break
        return _joined(self.known, variants, sums, facts, prepared.options.keep)

    def _missing(self, variants: Sequence[Variant]) -> list[Variant]:
        """List the variants that were not measured before."""
        done = () if self.known is None else self.known.variants
        return [v for v in variants if EvaluatedVariant.of(v) not in done]
