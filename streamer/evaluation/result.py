"""Hold an evaluation: the measures of every variant, the trade-off between them, and which one to take."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from streamer.errors import FormatError, UsageError
from streamer.evaluation.losses import SequenceSums
from streamer.evaluation.statistics import Mean, mean_of
from streamer.evaluation.variants import ADAPTER, BASE
from streamer.storage.files import open_regular
from streamer.storage.strict_json import strict_json

SCHEMA = "streamer.evaluation/1"

GENERAL, TASK = "general", "task"
"""Names of the two texts: what the model could do before, and what the adapter was trained for."""

MEASURES = ("loss", "kl", "agreement")


@dataclass(frozen=True)
class Measures:
    """Means per token of one variant on one text; losses and divergences in nats.

    Attributes
    ----------
    loss
        Negative log-likelihood of the text.
    kl
        Kullback–Leibler divergence of the variant's next-token distribution from the base's.
    agreement
        Share of tokens at which variant and base hold the same next token likeliest.
    """

    loss: Mean
    kl: Mean
    agreement: Mean

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that is out of range."""
        return math.exp(self.loss.value) if self.loss.value < 700 else math.inf


@dataclass(frozen=True)
class EvaluatedVariant:
    """A variant and what was measured of it.

    Attributes
    ----------
    name, method, mitigation_lambda
        See `variants.Variant`.
    general, task
        On each of the two texts.
    general_change, task_change
        Loss less that of the adapter as it is, paired by sequence.
    kept
        Share of what the adapter learned that is kept: ``(L_base − L) / (L_base − L_adapter)`` of the losses on the task's text; None
        where the adapter's loss is not below the base's.
    """

    name: str
    method: str | None
    mitigation_lambda: float | None
    general: Measures
    task: Measures
    general_change: Mean
    task_change: Mean
    kept: float | None

    def as_json(self) -> dict[str, Any]:
        """Return the measures by the names that are written and printed."""
        return {
            "name": self.name,
            "method": self.method,
            "lambda": self.mitigation_lambda,
            GENERAL: _as_json(self.general),
            TASK: _as_json(self.task),
            "against_adapter": {
                "general_loss": self.general_change.value, "general_loss_se": self.general_change.error,
                "task_loss": self.task_change.value, "task_loss_se": self.task_change.error,
            },
            "kept": self.kept,
        }  # fmt: skip


def _as_json(measures: Measures) -> dict[str, float | None]:
    out: dict[str, float | None] = {}
    for name in MEASURES:
        mean: Mean = getattr(measures, name)
        out |= {name: mean.value, f"{name}_se": mean.error}
    perplexity = measures.perplexity
    return {**out, "perplexity": perplexity if math.isfinite(perplexity) else None}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Measures of the base, the adapter as it is, and every mitigated variant, on a general text and on the task's.

    ``evaluation["paper 0.5"].task.loss`` is a mean with its error; `best` chooses a variant, `front` those that no other beats.

    Attributes
    ----------
    head
        Inputs, options and texts, as JSON values.
    named
        Name, method and λ of each variant.
    sums
        By text, the sums over each sequence.
    """

    head: Mapping[str, Any]
    named: Sequence[tuple[str, str | None, float | None]]
    sums: Mapping[str, SequenceSums]

    @cached_property
    def variants(self) -> tuple[EvaluatedVariant, ...]:
        """Measures of each variant: ``base`` first, then ``adapter``, then each method at each λ."""
        names = [name for name, _, _ in self.named]
        base, adapter = names.index(BASE), names.index(ADAPTER)
        task = [mean_of(self.sums[TASK].loss[v], self.sums[TASK].tokens).value for v in range(len(names))]
        learned = task[base] - task[adapter]
        found = []
        for v, (name, method, lam) in enumerate(self.named):
            general, own = (
                Measures(*(mean_of(getattr(self.sums[text], m)[v], self.sums[text].tokens) for m in MEASURES))
                for text in (GENERAL, TASK)
            )
            general_change, task_change = (
                mean_of(self.sums[text].loss[v] - self.sums[text].loss[adapter], self.sums[text].tokens)
                for text in (GENERAL, TASK)
            )
            kept = (task[base] - task[v]) / learned if learned > 0 else None
            found.append(EvaluatedVariant(name, method, lam, general, own, general_change, task_change, kept))
        return tuple(found)

    def __len__(self) -> int:
        return len(self.variants)

    def __getitem__(self, name: str) -> EvaluatedVariant:
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise UsageError(f"evaluation: has no variant {name!r}; it has {', '.join(v.name for v in self.variants)}")

    def best(self, keep: float = 0.9) -> EvaluatedVariant | None:
        """Choose the variant that forgets least, by KL on the general text, of those that keep enough of what was learned.

        Parameters
        ----------
        keep
            Least share of the adapter's gain on the task's text that is kept.

        Returns
        -------
        EvaluatedVariant or None
            None where the adapter's loss on the task's text is not below the base's: there is nothing to keep.
        """
        return self._least([v for v in self.variants if v.name != BASE], keep)

    def front(self) -> tuple[EvaluatedVariant, ...]:
        """List the variants that no other beats both in loss on the task and in KL on the general text, by falling loss on the task."""
        points = sorted(self.variants, key=lambda v: (v.general.kl.value, v.task.loss.value))
        front: list[EvaluatedVariant] = []
        for v in points:
            if not front or v.task.loss.value < front[-1].task.loss.value:
                front.append(v)
        return tuple(front)

    def difference(self, first: str, second: str, text: str = GENERAL, measure: str = "kl") -> Mean:
        """Estimate the difference of a measure between two variants, paired by sequence.

        Parameters
        ----------
        first, second
            Names of the variants; the difference is of the first less the second.
        text
            ``general`` or ``task``.
        measure
            ``loss``, ``kl`` or ``agreement``.
        """
        names, sums = [name for name, _, _ in self.named], self.sums[text]
        values = getattr(sums, measure)
        return mean_of(values[names.index(first)] - values[names.index(second)], sums.tokens)

    def suggestion(self, keep: float) -> dict[str, Any] | None:
        """Describe the variant that `best` chooses, as JSON: what it keeps and costs, and whether it beats the plain shrink.

        Returns
        -------
        dict or None
            None where there is nothing to keep.
        """
        best = self.best(keep)
        if best is None or best.kept is None:
            return None
        adapter = self[ADAPTER].general.kl.value
        how = None if best.method is None else f"--method {best.method} --lambda {best.mitigation_lambda:g}"
        return {
            "name": best.name, "method": best.method, "lambda": best.mitigation_lambda, "options": how, "keep": keep,
            "kept": best.kept, "forgetting_left": best.general.kl.value / adapter if adapter > 0 else None,
            "task_loss": best.task_change.value, "task_loss_se": best.task_change.error,
            "against_shrink": self.against_shrink(best) if best.method not in (None, "shrink") else None,
        }  # fmt: skip

    def against_shrink(self, variant: EvaluatedVariant) -> dict[str, Any] | None:
        """Compare a variant with the plain shrink of the same loss on the task, as JSON.

        That shrink lies between two that were evaluated, or one and the adapter as it is; its KL is taken from the straight line between
        theirs, which is a little too large where KL bends upwards in λ, as it does as a rule: the more so, the further they are apart.

        Parameters
        ----------
        variant
            Any but the base.

        Returns
        -------
        dict or None
            Its λ, about; the variant's KL less its own, and the error of that: paired by sequence, and with the error of the point on the
            line, which comes from the task's text. None where no two shrinks lie on both sides.
        """
        line = [self[ADAPTER], *(v for v in self.variants if v.method == "shrink" and v.mitigation_lambda is not None)]
        line = sorted((v for v in line if (v.mitigation_lambda or 0) <= 1), key=lambda v: v.task.loss.value)
        pairs = itertools.pairwise(line)
        pair = next(
            ((a, b) for a, b in pairs if a.task.loss.value <= variant.task.loss.value <= b.task.loss.value), None
        )
        if pair is None:
            return None
        a, b = pair
        width = b.task.loss.value - a.task.loss.value
        share = (variant.task.loss.value - a.task.loss.value) / width if width else 0.0
        kl, task = (
            self._from_line(variant, pair, share, GENERAL, "kl"),
            self._from_line(variant, pair, share, TASK, "loss"),
        )
        slope = (a.general.kl.value - b.general.kl.value) / width if width else 0.0
        error = None if kl.error is None or task.error is None else math.hypot(kl.error, slope * task.error)
        ends = [1.0 if v.mitigation_lambda is None else v.mitigation_lambda for v in pair]
        return {
            "lambda": (1 - share) * ends[0] + share * ends[1], "between": [a.name, b.name], "kl": kl.value, "kl_se": error,
            "beyond_error": error is not None and abs(kl.value) > 2 * error,
        }  # fmt: skip

    def _from_line(
        self,
        variant: EvaluatedVariant,
        ends: tuple[EvaluatedVariant, EvaluatedVariant],
        share: float,
        text: str,
        measure: str,
    ) -> Mean:
        """Estimate a measure of a variant less that of the point on the line between two others, paired by sequence."""
        names, sums = [name for name, _, _ in self.named], self.sums[text]
        own, a, b = (getattr(sums, measure)[names.index(v.name)] for v in (variant, *ends))
        return mean_of(own - (1 - share) * a - share * b, sums.tokens)

    def _least(self, variants: Sequence[EvaluatedVariant], keep: float) -> EvaluatedVariant | None:
        enough = [v for v in variants if v.kept is not None and v.kept >= keep]
        return min(enough, key=lambda v: v.general.kl.value, default=None)

    def rows(self) -> list[dict[str, Any]]:
        """List the measures as flat rows, for ``pandas.DataFrame(evaluation.rows())``."""
        rows = []
        for v in self.variants:
            tree = v.as_json()
            flat = {key: value for key, value in tree.items() if not isinstance(value, dict)}
            for part in (GENERAL, TASK):
                flat |= {f"{part}_{key}": value for key, value in tree[part].items()}
            rows.append(flat | {f"{key}_change": value for key, value in tree["against_adapter"].items()})
        return rows

    def record(self, keep: float) -> dict[str, Any]:
        """Return all of it as the JSON that is written and printed."""
        sums = {
            text: {"tokens": s.tokens.tolist(), **{m: getattr(s, m).tolist() for m in MEASURES}}
            for text, s in self.sums.items()
        }
        variants = [v.as_json() for v in self.variants]
        return {"schema": SCHEMA, **self.head, "variants": variants, "suggestion": self.suggestion(keep), "sums": sums}

    def __str__(self) -> str:
        head = f"{'variant':<16}{'general':>9}{'KL':>9}{'same':>7}{'task':>9}{'kept':>7}"
        lines = [
            f"{v.name:<16}{v.general.loss.value:>9.4f}{v.general.kl.value:>9.4f}{v.general.agreement.value:>7.1%}{v.task.loss.value:>9.4f}"
            + (f"{v.kept:>7.1%}" if v.kept is not None else f"{'-':>7}")
            for v in self.variants
        ]
        return "\n".join([head, *lines])


def load_evaluation(path: str | Path) -> Evaluation:
    """Read the file that `evaluate_variants` writes.

    Raises
    ------
    FormatError
        If it is not one.
    """
    path = Path(path)
    fd, _ = open_regular(path, "an evaluation")
    with open(fd, "rb") as file:
        raw = file.read()
    try:
        tree = strict_json(raw)
        if tree["schema"] != SCHEMA:
            raise ValueError(f"schema {tree['schema']!r}")
        named = [(v["name"], v["method"], v["lambda"]) for v in tree["variants"]]
        sums = {}
        for text in (GENERAL, TASK):
            part = {name: np.array(tree["sums"][text][name], np.float64) for name in ("tokens", *MEASURES)}
            tokens = part.pop("tokens")
            if tokens.ndim != 1 or any(a.shape != (len(named), len(tokens)) for a in part.values()):
                raise ValueError(f"the sums on the {text} text have other shapes than their variants")
            sums[text] = SequenceSums(tokens, **part)
        if not {BASE, ADAPTER} <= {name for name, _, _ in named}:
            raise ValueError("base and adapter are not among its variants")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise FormatError(
            f"{path}: is not an evaluation of `streamer evaluate`: {json.dumps(str(e))[:100]}; evaluate again"
        ) from None
    head = {key: value for key, value in tree.items() if key not in ("schema", "variants", "suggestion", "sums")}
    return Evaluation(head, named, sums)
