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
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from streamer.adapters.finetuned import AdapterPaths
from streamer.detection.findings import Findings
from streamer.detection.options import DetectionOptions, Run
from streamer.errors import UsageError
from streamer.evaluation.evaluation import Evaluation, ask_swapped, lambda_to_place, load_evaluation
from streamer.measuring import runs
from streamer.measuring.runs import EvaluatedVariant, Prepared, Progress, Records, Work
from streamer.measuring.statistics import ADAPTER_ROW, MEASURES, SequenceSums, critical_value
from streamer.measuring.texts import GENERAL, TASK, Texts, TextSequences, read_texts, sample_digest
from streamer.methods import UNCHANGED, NullSpace, RegMean, Shrink
from streamer.options import EvaluateOptions, VariantOptions
from streamer.output.job import check_coefficients, check_map, open_jobs
from streamer.storage.atomic_file import write_atomic
from streamer.storage.files import locked
from streamer.storage.transaction import is_taken, lock_of, remove_leftovers
from streamer.streaming.model import require_transformers
from streamer.streaming.sweep import SweepModel
from streamer.streaming.values import ADAPTER, Variant, VariantSet

BLOCK = 8
"""Sequences of each text in a block."""

KNOWN = 0.03
"""Shares are known if their standard errors are at most this."""


def spread(text: TextSequences) -> TextSequences:
    """Order the sequences of a text so that those of the first blocks are spread over it."""
    steps = max(1, -(-len(text.ids) // BLOCK))
    bits = (
        steps - 1
    ).bit_length()  # in the order of their reversed bits, steps are as far from each other as possible
    order = sorted(range(steps), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    return text.take([i for step in order for i in range(step, len(text.ids), steps)])


def clear(evaluation: Evaluation) -> bool:
    """Test whether more sequences would hardly change the answer.

    The suggested variant then diverges less, beyond its error, than every other that may keep the share, and keeps it itself; the shares
    of learning and of divergence are known to `KNOWN`. One block is too few to know its own errors.
    """
    general, task, best = evaluation.general, evaluation.task, evaluation.best()
    sequences = len(task.tokens)
    if sequences <= BLOCK or best.reason != "forgets least" or best.variant is None:
        return False
    chosen, errors = evaluation.variants.index(best.variant), critical_value(sequences)
    for row in range(ADAPTER_ROW, len(evaluation.variants)):
        kept, left = task.share("loss", row), general.share("kl", row)
        if max(kept.error, left.error) > KNOWN:
            return False
        lacks = kept.value + errors * kept.error < evaluation.keep
        if row != chosen and not lacks and not general.mean("kl", chosen, row).is_negative:
            return False
    kept = task.share("loss", chosen)
    return kept.value - errors * kept.error >= evaluation.keep or best.variant.keep is not None


def _next_lambda(known: Evaluation, keep: float) -> float | None:
    """Choose the λ of the shrink to place for a share; None if there is nothing to keep or to win, or a shrink is well placed."""
    if keep == 1 or known.best(keep).reason in ("not learned", "not forgotten"):
        return None
    return lambda_to_place(known, keep)


class BlockSweep(NamedTuple):
    """A sweep of so many variants over a block of the texts."""

    block: dict[str, TextSequences]
    variants: int

    @property
    def work(self) -> Work:
        """Count the rows that ride."""
        texts = self.block.values()
        rows = self.variants * sum(len(ids) for text in texts for ids in text.ids)
        return Work(fitted=0, riding=rows, length=max(text.longest for text in texts))


VALUE_BYTES, VARIANT_BYTES = 26, 2500
"""Largest JSON size in bytes of a sequence's sum, and of a variant's other figures."""


@dataclass(frozen=True, eq=False)
class PreparedEvaluation(Prepared[Evaluation]):
    """An evaluation whose inputs are open and checked.

    Attributes
    ----------
    variants
        The base, the unchanged adapter, and all variants that are requested.
    texts
        ``general``, ``task``, and others by file name.
    """

    options: EvaluateOptions
    variants: tuple[Variant, ...]
    texts: Texts

    noun = "an evaluation"
    read = staticmethod(load_evaluation)
    same = "this very evaluation"
    example = "evaluation.json"

    def blocks(self) -> list[dict[str, TextSequences]]:
        """Divide the texts into blocks."""
        rows_of = {name: range(len(text.ids)) for name, text in self.texts.items()}
        starts = range(0, max(map(len, rows_of.values())), BLOCK)
        return [
            {
                name: self.texts[name].take(rows[i : i + BLOCK])
                for name, rows in rows_of.items()
                if i in rows
            }
            for i in starts
        ]

    def expected(self, known: Evaluation | None) -> list[BlockSweep]:
        """List the sweeps of a run that does not stop early; empty if nothing is missing."""
        missing, keep = self.missing(known), self.options.keep
        new = [variant for variant in missing if variant.name != ADAPTER]
        sweeps = [BlockSweep(block, 2 + len(new)) for block in self.blocks()] if missing else []
        again = known is not None and known.keep != keep and _next_lambda(known, keep) is not None
        placing = (
            keep < 1
            and Shrink.name in [v.method for v in self.variants]
            and (bool(sweeps) or again)
        )
        return sweeps + [BlockSweep(block, 3) for block in self.blocks() if placing]

    def missing(self, known: Evaluation | None) -> list[Variant]:
        """List the requested variants that an earlier run has not measured, without those that have no intruders to scale."""
        measured = () if known is None else known.variants
        recorded: Mapping[str, Any] = {} if known is None else known.facts
        scaling = 0 not in (self.facts.get("intruders"), recorded.get("intruders"))
        variants = (v for v in self.variants[1:] if scaling or not v.scales_intruders)
        return [variant for variant in variants if EvaluatedVariant.of(variant) not in measured]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Return the inputs and options as JSON: `EvaluationFacts`."""
        findings = (
            self.model.job.findings
            if any(variant.scales_intruders for variant in self.variants)
            else None
        )
        methods = [variant.mitigation for variant in self.variants]
        tree = {
            **runs.model_facts(self.model, base=self.plan.sources[0], adapter=self.plan.sources[1]),
            **runs.writable(self.plan),
            "detection": None if findings is None else findings.options.as_dict(),
            "scale": self.options.select,
            "projected": self.options.projected,
            "texts": {GENERAL: self.texts[GENERAL].facts(), TASK: self.texts[TASK].facts()},
        }
        if others := [
            text.facts() for name, text in self.texts.items() if name not in (GENERAL, TASK)
        ]:
            tree["texts"]["others"] = others
        if findings is not None:
            tree |= {"findings": findings.decisions_digest(), "intruders": findings.intruders}
        if coefficients := [
            method.coefficients.record() for method in methods if isinstance(method, RegMean)
        ]:
            tree["coefficients"] = coefficients
        if maps := [method.map.record() for method in methods if isinstance(method, NullSpace)]:
            tree["map"] = maps[0]
        return runs.with_digest(tree)

    def run_facts(self, path: Path) -> tuple[dict[str, Any], str]:
        """Add the variants' methods, and digests of findings and of an earlier evaluation.

        The journal does not contain what earlier runs measured, so it must belong to this version of their file.
        """
        earlier = (
            hashlib.sha256(path.read_bytes()).hexdigest()
            if is_taken(path) and path.is_file()
            else ""
        )
        variants = [[v.name, v.mitigation and v.mitigation.as_dict()] for v in self.variants]
        facts = runs.with_digest(super().run_facts(path)[0], variants=variants)
        findings = self.model.job.findings
        return facts, f"{'' if findings is None else findings.digest()} {earlier}".strip()

    def is_whole(self, path: Path) -> bool:
        """Test whether an evaluation lacks nothing."""
        return not self.expected(self._load(path))

    def known(self, path: Path | None) -> Evaluation | None:
        """Load the evaluation to which this run adds variants; None if the file is new or will be replaced."""
        return (
            None if path is None or self.run.overwrite or not is_taken(path) else self._load(path)
        )

    def _load(self, path: Path) -> Evaluation:
        """Load an evaluation; refuse it if its variants cannot be compared with this run's variants."""
        known = load_evaluation(path)
        if differing := runs.differences(self.facts, known.facts):
            raise runs.of_others(path, self.noun, differing)
        return known

    def sweeps(self, known: Evaluation | None = None) -> list[Work]:
        """List the sweeps for what an earlier run has not measured."""
        return [sweep.work for sweep in self.expected(known)]

    def written_bytes(self, known: Evaluation | None) -> tuple[int, int]:
        """Estimate the bytes of the whole file, and of the journal."""
        variants = len(self.variants) + 1 + (0 if known is None else len(known.variants))
        sequences = sum(len(text.ids) for text in self.texts.values())
        values = (
            VARIANT_BYTES * (variants + 2)
            + VALUE_BYTES * (len(MEASURES) * variants + 1) * sequences
        )
        nbytes = values + len(json.dumps(self.facts, indent=1))
        return nbytes, nbytes

    def result(self, output: Path | None) -> Evaluation:
        """Measure the missing variants; write the evaluation to a file if an output is named."""
        evaluation = super().result(output)
        if evaluation.best().swapped:
            self.run.monitor.warn((ask_swapped(evaluation.task),))
        return evaluation

    def save(self, result: Evaluation, path: Path) -> None:
        """Write the evaluation."""
        write_atomic(path, result.to_json().encode())

    def keep_finished(self, path: Path) -> Evaluation:
        """Load a complete evaluation; write its suggestion anew if the requested share differs."""
        monitor, evaluation = (
            self.run.monitor,
            replace(load_evaluation(path), keep=self.options.keep),
        )
        text = evaluation.to_json().encode()
        if text == path.read_bytes():
            return super().keep_finished(path)
        remove_leftovers(path)  # from a run that was killed just after it renamed the file
        with locked(lock_of(path), path):
            write_atomic(path, text)
        monitor.note(f"{path} already contains these measures; only the suggestion is updated")
        monitor.outputs[path] = "written"
        return evaluation

    def compute(self, records: Records, output: Path | None) -> Evaluation:
        """Measure the missing variants, and then the shrink whose λ keeps the share according to the losses so far."""
        known, facts, keep = self.known(output), self.facts, self.options.keep
        if known is not None:
            self.run.monitor.note(f"{output}: adds to the {len(known.variants)} variants in it")
            facts = runs.joined_facts(facts, known.facts)
        progress = Progress(self.run, "evaluate")
        one_length = runs.needs_one_length(
            self.model, self.texts, runs.ROWS, self.run.monitor.checkpoint
        )
        missing, evaluation = self.missing(known), known
        ends = self.variants[: ADAPTER_ROW + 1]
        measure = partial(
            self._measure, facts=facts, one_length=one_length, records=records, progress=progress
        )
        if missing:
            evaluation = measure(
                known, (*ends, *(variant for variant in missing if variant not in ends))
            )
        assert evaluation is not None
        again = bool(missing) or (known is not None and known.keep != keep)
        if again and (lam := _next_lambda(evaluation, keep)) is not None:
            evaluation = measure(replace(evaluation, facts=facts), (*ends, Variant.of(Shrink(lam))))
        progress.finish()
        return replace(evaluation, facts=facts, keep=keep)

    def _measure(
        self,
        known: Evaluation | None,
        variants: Sequence[Variant],
        facts: Mapping[str, Any],
        one_length: bool,
        records: Records,
        progress: Progress,
    ) -> Evaluation:
        """Let variants, the base and the adapter first, ride through blocks until the answer is clear; join them to those known.

        Variants that join earlier ones ride through the same sequences.
        """
        model, keep, sums = self.model, self.options.keep, dict[str, SequenceSums]()
        lengths = None if known is None else {name: len(s.tokens) for name, s in known.sums.items()}
        model.use(replace(model.job, variants=tuple(variants)))
        names, blocks = json.dumps([variant.name for variant in variants]), self.blocks()
        sweeps = self.expected(known) or [BlockSweep(block, len(variants)) for block in blocks]

        def joined_to(known: Evaluation | None) -> Evaluation:
            """Join the variants to those known, in the order of tables."""
            evaluated, joint = [*map(EvaluatedVariant.of, variants)], sums
            if known is not None:
                evaluated, added = [*known.variants, *evaluated[2:]], range(2, len(evaluated))
                joint = {
                    text: known.sums[text].joined(new.take(added)) for text, new in sums.items()
                }
            order = sorted(range(len(evaluated)), key=lambda row: evaluated[row].order)
            ordered = {text: text_sums.take(order) for text, text_sums in joint.items()}
            return Evaluation.of([evaluated[row] for row in order], ordered, facts, keep)

        for number, block in enumerate(blocks):
            if (
                sums
                and lengths is not None
                and all(len(s.tokens) >= lengths[name] for name, s in sums.items())
            ):
                break
            key = f"{number} {names}"
            recorded = {
                name: arrays
                for name in block
                if (arrays := records.find(f"{key} {name}")) is not None
            }
            measures = {name: SequenceSums(**arrays) for name, arrays in recorded.items()}
            if measures.keys() != block.keys():
                limits = self.limits_of(BlockSweep(block, len(variants)).work)
                held_out = runs.riders(block, len(variants), model.size, limits.rows, one_length)
                rest = [runs.sweep_cost(model.size, sweep.work.riding) for sweep in sweeps[number:]]
                progress.expect(sum(rest), len(rest) * (len(model.layers) + 1))
                measures = runs.measure(
                    model, held_out, progress, limits, states=records.states(key)
                )
                for name, new in measures.items():
                    records.add(
                        f"{key} {name}",
                        {kind: getattr(new, kind) for kind in ("tokens", *MEASURES)},
                    )
            sums |= {
                name: sums[name].followed(new) if name in sums else new
                for name, new in measures.items()
            }
            if lengths is None and clear(joined_to(None)):
                break
        return joined_to(known)


def prepare(
    base_path: str | Path,
    adapter: Path,
    texts: Mapping[str, Path],
    findings: Findings | None,
    options: EvaluateOptions,
    variants: tuple[Variant, ...],
    max_memory: int | None,
    run: Run,
) -> PreparedEvaluation:
    """Open and check an evaluation's inputs, and pass their warnings to the monitor.

    Parameters
    ----------
    texts
        Paths of the ``general`` and the ``task`` text, and of others by file name.
    """
    model = open_model(base_path, adapter, findings, options, variants, run)
    counts = dict.fromkeys(texts, options.sequences)
    plan, read = model.job.plan, read_texts(model, texts, counts, options.length, run.monitor)
    fits = (v.mitigation.coefficients for v in variants if isinstance(v.mitigation, RegMean))
    stated = next((fit.facts.get("texts") for fit in fits), None)
    facts = (
        [text for text in stated.values() if isinstance(text, dict)]
        if isinstance(stated, dict)
        else []
    )
    sequences, files = (
        {text.get("sha256") for text in facts},
        {text.get("sample_sha256") for text in facts},
    )
    for name, text in read.items() if facts else ():
        if text.digest() in sequences or sample_digest(texts[name]) in files:
            used = f"the {name} text, {text.name}, was used to fit the coefficients"
            look = "on it, the fitted variants look better than they are; evaluate on other text"
            run.monitor.warn((f"{used}: {look}",))
    ordered = {name: spread(text) for name, text in read.items()}
    return PreparedEvaluation(plan, run, max_memory, model, options, variants, ordered)


def open_model(
    base_path: str | Path,
    adapter: Path,
    findings: Findings | None,
    options: VariantOptions,
    variants: tuple[Variant, ...],
    run: Run,
) -> SweepModel:
    """Open and check the model of all variants, and the findings if given; pass warnings to the monitor.

    Raises
    ------
    UsageError
        If a variant scales intruders, and no findings are given.
    """
    require_transformers()
    if findings is None and (scaling := [v.name for v in variants if v.scales_intruders]):
        raise UsageError(
            f"findings: {scaling[0]} needs them, found none; run `streamer detect`, and pass its file"
        )
    detection = DetectionOptions() if findings is None else findings.options
    (job,) = open_jobs(
        base_path, AdapterPaths.of_one(adapter), [findings], UNCHANGED, detection, run
    )
    plan = job.plan
    run.monitor.warn((*plan.warnings, *job.warnings))
    methods = [variant.mitigation for variant in variants]
    for method in methods:
        if isinstance(method, RegMean):
            check_coefficients(plan, method.coefficients)
    if maps := [method.map for method in methods if isinstance(method, NullSpace)]:
        run.monitor.warn(check_map(plan, maps[0]))
    rounds, device = options.dtype == "bf16", run.model_device
    return SweepModel(VariantSet(plan, variants, job.findings, options.projected, rounds, device))
