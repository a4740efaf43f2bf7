"""Evaluate variants: check the inputs, let variants ride in sweeps over blocks of sequences, and stop when the answer is clear.

A block has a few sequences of each text, spread over it. After each block the suggestion is made; the run stops when it is clear, or when
the texts end. Then the shrink whose λ keeps the share according to the losses so far rides once over the same sequences. A killed run
resumes at the sweep that it was in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from streamer.adapters.finetuned import AdapterPaths
from streamer.detection.findings import Findings
from streamer.detection.options import DetectionOptions
from streamer.errors import UsageError
from streamer.evaluation.curve import lambda_to_place
from streamer.evaluation.evaluation import Evaluation, load_evaluation
from streamer.evaluation.judgement import ask_swapped
from streamer.json_types import JsonObject
from streamer.measuring.batches import MOST_ROWS, Work, batches, needs_one_length, sweep_cost
from streamer.measuring.facts import (
    differences,
    joined_facts,
    model_facts,
    of_others,
    with_digest,
    writable,
)
from streamer.measuring.losses import SweepProgress, measure
from streamer.measuring.prepared import ENDS, Prepared, Records
from streamer.measuring.sequences import GENERAL, TASK, TextsByName, TextSequences
from streamer.measuring.statistics import MEASURES, SUM_ARRAYS, EvaluatedVariant, SequenceSums, Sums
from streamer.measuring.texts import read_texts, sample_digest
from streamer.methods import UNCHANGED, NullSpace, RegMean, Shrink
from streamer.options import EvaluateOptions, VariantOptions
from streamer.output.opening import check_coefficients, check_map, open_mitigations
from streamer.run import Run
from streamer.storage.atomic_file import write_atomic
from streamer.storage.files import locked
from streamer.storage.transaction import is_taken, lock_of, remove_leftovers
from streamer.streaming.skeleton import require_transformers
from streamer.streaming.sweep import SweepModel
from streamer.streaming.variants import ADAPTER_ROW, Variant, VariantSet

BLOCK_SEQUENCES = 8
"""Sequences of each text in a block."""

KNOWN = 0.03
"""Shares are known if their standard errors are at most this."""


def spread(text: TextSequences) -> TextSequences:
    """Order the sequences of a text so that those of the first blocks are spread over it."""
    steps = max(1, -(-len(text.ids) // BLOCK_SEQUENCES))
    bits = (steps - 1).bit_length()
    # In the order of their reversed bits, steps are as far from each other as possible.
    order = sorted(range(steps), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    return text.take([i for step in order for i in range(step, len(text.ids), steps)])


def blocks_of(texts: TextsByName) -> list[dict[str, TextSequences]]:
    """Divide texts into blocks; a short text is in the first ones alone."""
    longest = max(len(text.ids) for text in texts.values())
    return [
        {
            name: text.take(range(start, min(start + BLOCK_SEQUENCES, len(text.ids))))
            for name, text in texts.items()
            if start < len(text.ids)
        }
        for start in range(0, longest, BLOCK_SEQUENCES)
    ]


def clear(evaluation: Evaluation) -> bool:
    """Test whether more sequences would hardly change the answer.

    The suggested variant then diverges less, beyond its error, than every other that may keep the share, and keeps it itself; the shares
    of learning and of divergence are known to `KNOWN`. One block is too few to know its own errors.
    """
    general = evaluation.general
    task = evaluation.task
    best = evaluation.best()
    few = len(task.tokens) <= BLOCK_SEQUENCES
    if few or best.reason != "forgets least" or best.variant is None:
        return False
    chosen = evaluation.variants.index(best.variant)
    for row in range(ADAPTER_ROW, len(evaluation.variants)):
        kept = task.share("loss", row)
        if max(kept.error, general.share("kl", row).error) > KNOWN:
            return False
        lacks = kept.value + kept.margin < evaluation.keep
        if row != chosen and not lacks and not general.mean("kl", chosen, row).is_negative:
            return False
    kept = task.share("loss", chosen)
    return kept.value - kept.margin >= evaluation.keep or best.variant.keep is not None


def work_of(block: TextsByName, variants: int) -> Work:
    """Count the rows of a sweep of so many variants over a block."""
    texts = block.values()
    return Work(variants * sum(text.rows for text in texts), max(text.longest for text in texts))


def joined_evaluation(
    known: Evaluation | None,
    variants: Sequence[Variant],
    sums: Sums,
    facts: JsonObject,
    keep: float,
) -> Evaluation:
    """Join variants to those known, in the order of tables; the base and the adapter come first in both."""
    evaluated = [EvaluatedVariant.of(variant) for variant in variants]
    if known is not None:
        added = range(ADAPTER_ROW + 1, len(evaluated))
        evaluated = [*known.variants, *evaluated[ADAPTER_ROW + 1 :]]
        sums = {text: known.sums[text].joined(own.take(added)) for text, own in sums.items()}
    order = sorted(range(len(evaluated)), key=lambda row: evaluated[row].order)
    ordered = {text: own.take(order) for text, own in sums.items()}
    return Evaluation.of([evaluated[row] for row in order], ordered, facts, keep)


def _next_lambda(known: Evaluation, keep: float) -> float | None:
    """Choose the λ of the shrink to place for a share; None if there is nothing to keep or to win, or a shrink is well placed."""
    if keep == 1 or known.best(keep).reason in ("not learned", "not forgotten"):
        return None
    return lambda_to_place(known, keep)


VALUE_BYTES = 26
VARIANT_BYTES = 2500
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
    texts: TextsByName

    noun = "an evaluation"
    read = staticmethod(load_evaluation)
    same = "this very evaluation"
    example = "evaluation.json"

    def over_blocks(self, new: int) -> list[Work]:
        """List sweeps of the base, the adapter and so many other variants over the blocks of the texts."""
        return [work_of(block, len(ENDS) + new) for block in blocks_of(self.texts)]

    def sweeps(self, known: Evaluation | None = None) -> list[Work]:
        """List the sweeps of a run that does not stop early; empty if nothing is missing."""
        keep = self.options.keep
        missing = self.missing(known)
        sweeps = self.over_blocks(len(missing)) if known is None or missing else []
        again = known is not None and known.keep != keep and _next_lambda(known, keep) is not None
        shrinks = any(variant.method == Shrink.name for variant in self.variants)
        if keep < 1 and shrinks and (sweeps or again):
            sweeps += self.over_blocks(1)
        return sweeps

    def missing(self, known: Evaluation | None) -> list[Variant]:
        """List the requested variants that an earlier run has not measured, without those that have no intruders to scale."""
        measured = () if known is None else known.variants
        recorded: JsonObject = {} if known is None else known.facts
        scaling = 0 not in (self.facts.get("intruders"), recorded.get("intruders"))
        _base, _adapter, *variants = self.variants
        return [
            variant
            for variant in variants
            if (scaling or not variant.scales_intruders)
            and EvaluatedVariant.of(variant) not in measured
        ]

    @cached_property
    def facts(self) -> JsonObject:
        """Return the inputs and options as JSON: `EvaluationFacts`."""
        base, adapter = self.plan.sources
        scaling = any(variant.scales_intruders for variant in self.variants)
        findings = self.model.job.findings if scaling else None
        methods = [variant.mitigation for variant in self.variants]
        others = dict(self.texts)
        texts: dict[str, object] = {name: others.pop(name).facts() for name in (GENERAL, TASK)}
        if others:
            texts["others"] = [text.facts() for text in others.values()]
        tree = {
            **model_facts(self.model, base=base, adapter=adapter),
            **writable(self.plan),
            "detection": None if findings is None else findings.options.as_dict(),
            "scale": self.options.select,
            "projected": self.options.projected,
            "texts": texts,
        }
        if findings is not None:
            tree |= {"findings": findings.decisions_digest(), "intruders": findings.intruders}
        if sets := [m.coefficients.record() for m in methods if isinstance(m, RegMean)]:
            tree["coefficients"] = sets
        for method in methods:
            if isinstance(method, NullSpace):
                tree["map"] = method.map.record()
        return with_digest(tree)

    def run_facts(self, path: Path) -> tuple[JsonObject, str]:
        """Add the variants' methods, and digests of findings and of an earlier evaluation.

        The journal does not contain what earlier runs measured, so it must belong to this version of their file.
        """
        facts, _ = super().run_facts(path)
        variants = [[v.name, v.mitigation and v.mitigation.as_dict()] for v in self.variants]
        digests = []
        if self.model.job.findings is not None:
            digests.append(self.model.job.findings.digest())
        if is_taken(path) and path.is_file():
            digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
        return with_digest(facts, variants=variants), " ".join(digests)

    def is_whole(self, path: Path) -> bool:
        """Test whether an evaluation lacks nothing."""
        return not self.sweeps(self._load(path))

    def known(self, path: Path | None) -> Evaluation | None:
        """Load the evaluation to which this run adds variants; None if the file is new or will be replaced."""
        if path is None or self.run.overwrite or not is_taken(path):
            return None
        return self._load(path)

    def _load(self, path: Path) -> Evaluation:
        """Load an evaluation; refuse it if its variants cannot be compared with this run's variants."""
        known = load_evaluation(path)
        if differing := differences(self.facts, known.facts):
            raise of_others(path, self.noun, differing)
        return known

    def written_bytes(self, known: Evaluation | None) -> tuple[int, int]:
        """Estimate the bytes of the whole file, and of the journal."""
        variants = len(self.variants) + 1 + (0 if known is None else len(known.variants))
        sequences = sum(len(text.ids) for text in self.texts.values())
        values = VALUE_BYTES * (len(MEASURES) * variants + 1) * sequences
        nbytes = values + VARIANT_BYTES * (variants + 2) + len(json.dumps(self.facts, indent=1))
        return nbytes, nbytes

    def result(self, output: Path | None) -> Evaluation:
        """Measure the missing variants; write the evaluation to a file if an output is named."""
        evaluation = super().result(output)
        if evaluation.best().swapped:
            self.run.monitor.warn([ask_swapped(evaluation.task)])
        return evaluation

    def save(self, result: Evaluation, path: Path) -> None:
        """Write the evaluation."""
        write_atomic(path, result.to_json().encode())

    def keep_finished(self, path: Path) -> Evaluation:
        """Load a complete evaluation; write its suggestion anew if the requested share differs."""
        monitor = self.run.monitor
        evaluation = replace(load_evaluation(path), keep=self.options.keep)
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
        monitor = self.run.monitor
        keep = self.options.keep
        known = self.known(output)
        facts = self.facts
        if known is not None:
            monitor.note(f"{output}: adds to the {len(known.variants)} variants in it")
            facts = joined_facts(facts, known.facts)
        progress = SweepProgress(monitor, "evaluate")

        def added(
            known: Evaluation | None, new: Sequence[Variant], planned: Sequence[Work]
        ) -> Evaluation:
            """Measure variants on the sequences of those known, or, if none are, until the answer is clear."""
            variants = [*ENDS, *new]

            def enough(sums: Sums) -> bool:
                if known is None:
                    return clear(joined_evaluation(None, variants, sums, facts, keep))
                return all(
                    len(own.tokens) >= len(known.sums[text].tokens) for text, own in sums.items()
                )

            sums = self._ride(records, progress, variants, planned, enough)
            return joined_evaluation(known, variants, sums, facts, keep)

        missing = self.missing(known)
        evaluation = known
        if known is None or missing:
            evaluation = added(known, missing, self.sweeps(known))
        assert evaluation is not None
        changed = evaluation is not known or evaluation.keep != keep
        if changed and (lam := _next_lambda(evaluation, keep)) is not None:
            evaluation = added(evaluation, [Variant.of(Shrink(lam))], self.over_blocks(1))
        progress.finish()
        return replace(evaluation, facts=facts, keep=keep)

    @cached_property
    def one_length(self) -> bool:
        """Test whether only sequences of one length may run together."""
        return needs_one_length(self.model, self.texts, MOST_ROWS, self.run.monitor.checkpoint)

    def _ride(
        self,
        records: Records,
        progress: SweepProgress,
        variants: Sequence[Variant],
        planned: Sequence[Work],
        enough: Callable[[Sums], bool],
    ) -> Sums:
        """Let variants, the base and the adapter first, ride through blocks until their sums are enough.

        Parameters
        ----------
        planned
            The sweeps still to come, of which those over the blocks are the first.
        """
        model = self.model
        model.use(replace(model.job, variants=tuple(variants)))
        names = json.dumps([variant.name for variant in variants])
        layers = len(model.layers) + 1
        sums: Sums = {}
        for number, block in enumerate(blocks_of(self.texts)):
            if sums and enough(sums):
                break
            key = f"{number} {names}"
            found = {name: records.find(f"{key} {name}") for name in block}
            new = {name: SequenceSums(**arrays) for name, arrays in found.items() if arrays}
            if new.keys() != block.keys():
                limits = self.limits_of(planned[number])
                riders = batches(block, len(variants), model.size, limits.rows, self.one_length)
                cost = sum(sweep_cost(model.size, work.riding) for work in planned[number:])
                progress.expect(cost, (len(planned) - number) * layers)
                new = measure(model, riders, progress, limits, records.states(key))
                for name, own in new.items():
                    records.add(f"{key} {name}", {array: own[array] for array in SUM_ARRAYS})
            for name, own in new.items():
                sums[name] = sums[name].followed(own) if name in sums else own
        return sums


def prepare(
    base_path: Path,
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
    model = open_variants(base_path, adapter, findings, options, variants, run)
    counts = dict.fromkeys(texts, options.sequences)
    read = read_texts(model, texts, counts, options.length, run.monitor)
    run.monitor.warn(_of_fits(variants, texts, read))
    ordered = {name: spread(text) for name, text in read.items()}
    return PreparedEvaluation(run, max_memory, model, options, variants, ordered)


def _of_fits(
    variants: Iterable[Variant], paths: Mapping[str, Path], texts: TextsByName
) -> Iterator[str]:
    """Warn of texts to which coefficients were fitted, as far as these state their texts."""
    fits = (v.mitigation.coefficients for v in variants if isinstance(v.mitigation, RegMean))
    stated: Any = next((fit.facts.get("texts") for fit in fits), None)
    if not isinstance(stated, dict):
        return
    facts = [text for text in stated.values() if isinstance(text, dict)]
    known = {text.get(key) for text in facts for key in ("sha256", "sample_sha256")}
    for name, text in texts.items():
        if known & {text.digest(), sample_digest(paths[name])}:
            used = f"the {name} text, {text.name}, was used to fit the coefficients"
            look = "on it, the fitted variants look better than they are; evaluate on other text"
            yield f"{used}: {look}"


def open_variants(
    base_path: Path,
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
    (opened,) = open_mitigations(
        base_path, AdapterPaths.of_one(adapter), [findings], UNCHANGED, detection, run
    )
    plan = opened.plan
    run.monitor.warn((*plan.warnings, *opened.warnings))
    for variant in variants:
        method = variant.mitigation
        if isinstance(method, RegMean):
            check_coefficients(plan, method.coefficients)
        elif isinstance(method, NullSpace):
            run.monitor.warn(check_map(plan, method.map))  # each warning once
    rounds = options.dtype == "bf16"
    return SweepModel(
        VariantSet(plan, variants, opened.findings, options.projected, rounds, run.model_device)
    )
