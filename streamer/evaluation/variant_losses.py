"""Hold the losses of the base, the adapter and its mitigated variants on general text and on the task's text, and choose the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from streamer.detection.options import DetectionOptions
from streamer.evaluation.evaluation_records import ReliableRecord
from streamer.evaluation.shrinks import against_shrink
from streamer.evaluation.suggestion import Suggestion, front, suggest
from streamer.measuring.identity import input_options
from streamer.measuring.sequences import GENERAL, TASK
from streamer.measuring.statistics import SequenceSums
from streamer.measuring.variants import EvaluatedVariant
from streamer.methods import METHODS, takes_findings

KEEP = 0.9
"""Default share of the learning that a suggested variant keeps."""


@dataclass(frozen=True, repr=False)
class VariantLosses:
    """Hold the losses of an adapted model's variants; `Evaluation` lists its attributes."""

    variants: tuple[EvaluatedVariant, ...]
    general: SequenceSums
    task: SequenceSums
    facts: Mapping[str, Any]
    keep: float = KEEP
    others: Mapping[str, SequenceSums] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        variants: Sequence[EvaluatedVariant],
        sums: Mapping[str, SequenceSums],
        facts: Mapping[str, Any],
        keep: float,
    ) -> Self:
        """Make an object of this class from the sums on each text, by name."""
        others = {name: own for name, own in sums.items() if name not in (GENERAL, TASK)}
        return cls(tuple(variants), sums[GENERAL], sums[TASK], facts, keep, others)

    @property
    def sums(self) -> dict[str, SequenceSums]:
        """Return the sums on each text, by name."""
        return {GENERAL: self.general, TASK: self.task, **self.others}

    @property
    def answered(self) -> dict[str, SequenceSums]:
        """Return the sums on each text of questions, by name."""
        return {name: own for name, own in self.sums.items() if own.acc is not None}

    def best(self, keep: float | None = None) -> Suggestion:
        """Suggest the variant that forgets least among those that keep this share of the learning; see `Suggestion`.

        Raises
        ------
        UsageError
            If `keep` is not in (0, 1].
        """
        return suggest(self.variants, self.general, self.task, self.keep if keep is None else keep)

    def lost(self, method: str, keep: float) -> bool:
        """Test whether a method's two variants nearest to the share diverge more than the shrinks that keep as much."""
        rows = [row for row, v in enumerate(self.variants) if v.method == method]
        near = sorted(rows, key=lambda row: abs(self.task.fraction(row).value - keep))[:2]
        found = [against_shrink(self.variants, self.general, self.task, row) for row in near]
        return all(one is not None and one.verdict == "worse" for one in found)

    def reliable(self) -> ReliableRecord:
        """Return which shares have a large enough denominator; see `ReliableRecord`."""
        return reliable(self.general, self.task)

    def front(self) -> list[str]:
        """Name the variants that no other variant equals or beats in both the task's loss and the divergence from the base."""
        return [self.variants[v].name for v in front(self.variants, self.general, self.task)]

    def command(self, variant: EvaluatedVariant) -> list[str]:
        """Return the command that makes a variant, with its options; the caller adds inputs, output and files.

        The command is `mitigate` if the variant can be written as an adapter without loss, else `merge`.
        """
        facts, lam = self.facts, variant.mitigation_lambda
        exact = facts["projected"] or (variant.method in METHODS and METHODS[variant.method].keeps_rank)
        mitigates = variant.method is not None and exact and facts["factored"]
        words = ["mitigate" if mitigates else "merge"]
        if variant.keep is not None:
            words += ["--method", str(variant.method), "--keep", f"{variant.keep!r}"]
        elif lam is None:
            words += ["--lambda", "1"]
        else:
            words += ["--method", str(variant.method), "--lambda", f"{lam!r}"]
        if takes_findings(variant.method):
            words += ["--select", "first"] if facts["scale"] == "first" else []
            default, used = DetectionOptions(), facts["detection"]
            words += ["--top-k", f"{used['top_k']}"] if used["top_k"] != default.top_k else []
            if used["threshold_epsilon"] != default.threshold_epsilon:
                words += ["--epsilon", f"{used['threshold_epsilon']}"]
        if lam is not None and not 0 <= lam <= 1:
            words.append("--amplify")
        words += input_options(facts)
        return [*words, "--dequantize"] if facts["quantized"] and not mitigates else words


def reliable(general: SequenceSums, task: SequenceSums) -> ReliableRecord:
    """Return which shares have a denominator that is large relative to its error."""
    gain = task.top1_gain
    return {
        "kept": task.change.divides,
        "forgetting": general.change.divides,
        "top1_kept": gain.divides and gain.value > 0,
    }
