"""Hold an evaluation: the losses of the base, the adapter and its mitigated variants on a general text and on the task's."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from streamer.detection.options import DetectionOptions
from streamer.errors import FormatError, UnknownNameError
from streamer.evaluation.divergences import from_record, to_record
from streamer.evaluation.evaluation_records import (
    EvaluationFacts,
    EvaluationRecord,
    ReliableRecord,
    SuggestionRecord,
    VariantRecord,
)
from streamer.evaluation.identity import input_options
from streamer.evaluation.statistics import ANSWERS, MEASURES, MOST_LOSS, QUANTILES, SINCE, SequenceSums, defined, flat
from streamer.evaluation.suggestion import Suggestion, Trade, front, suggest
from streamer.evaluation.variants import ADAPTER_ROW, BASE_ROW, EvaluatedVariant
from streamer.evaluation.view import table_text, verdict
from streamer.methods import METHODS, takes_findings
from streamer.storage.files import open_regular
from streamer.storage.strict_json import strict_json
from streamer.units import listed, quoted

SCHEMA: Final = "streamer.evaluation/1"

GENERAL, TASK = "general", "task"
"""Names of the two texts: what the model could do before, and what the adapter was trained for."""

FACTS = tuple(EvaluationFacts.__annotations__)
"""Keys of an evaluation's JSON that say what it was made of."""

OPTIONAL = ("findings", "intruders", "coefficients", "map")
"""Those of them that are left out if there are none."""

KEEP = 0.9
"""Share of what was learned that a suggested variant keeps, unless another is asked for."""


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Losses of the variants of an adapted model.

    Attributes
    ----------
    variants
        The base, the adapter as it is, each method at each λ, and each set of coefficients.
    general, task
        Sums over each sequence of the two texts, for each variant.
    facts
        What it was made of, as JSON: `EvaluationFacts`.
    keep
        Share of what was learned that the suggested variant keeps, unless another is asked for.
    others
        Sums as of the two texts, of others, by the names of their files.
    """

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
    ) -> Evaluation:
        """Make it of the sums on each text, by name."""
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

    def __getitem__(self, name: str) -> VariantRecord:
        """Return the figures of the variant of this name, as the JSON has them."""
        names = [v.name for v in self.variants]
        if name not in names:
            raise UnknownNameError(f"evaluation: has no variant {name!r}; it has {', '.join(names)}")
        return self._variant_dict(names.index(name))

    def best(self, keep: float | None = None) -> Suggestion:
        """Suggest the variant that forgets least of those that keep this share of what was learned; see `Suggestion`.

        Raises
        ------
        UsageError
            If `keep` is not in (0, 1].
        """
        return suggest(self.variants, self.general, self.task, self.keep if keep is None else keep)

    def reliable(self) -> ReliableRecord:
        """Say which shares are of a change that is large enough; see `ReliableRecord`."""
        return reliable(self.general, self.task)

    def front(self) -> list[str]:
        """List the variants' names that no other one equals or excels in both loss on the task's text and divergence from the base."""
        return [self.variants[v].name for v in front(self.variants, self.general, self.task)]

    def dropped(self, row: int) -> bool:
        """Test whether a variant, by its number, was dropped in a race before it ran on all sequences."""
        return self.task.ran(row) < len(self.task.tokens)

    def mark(self, row: int) -> str:
        """Mark a variant that was dropped with the sequences of general text that it ran on."""
        return f" †{self.general.ran(row)}" if self.dropped(row) else ""

    def table(self, keep: float | None = None) -> str:
        """Format the verdict, the variants as a table, and why the suggested one is."""
        return table_text(self, self.best(keep))

    def __repr__(self) -> str:
        return f"<Evaluation: {len(self.variants)} variants, {len(self.general.tokens)} general and {len(self.task.tokens)} task sequences>"

    def to_dict(self, keep: float | None = None) -> EvaluationRecord:
        """Make the JSON object (schema ``streamer.evaluation/1``); its sums of each sequence are all that `from_json` needs."""
        best = self.best(keep)
        return cast(EvaluationRecord, {
            "schema": SCHEMA,
            "verdict": verdict(self, best),
            **{key: self.facts[key] for key in FACTS if key in self.facts},
            "tokens": {"general": self.general.tokens.tolist(), "task": self.task.tokens.tolist()},
            **self._others_dict(),
            "variants": [self._variant_dict(v) for v in range(len(self.variants))],
            "reliable": self.reliable(),
            "front": self.front(),
            "suggestion": self._suggestion_dict(best),
        })  # fmt: skip

    def to_json(self, keep: float | None = None) -> str:
        """Write the JSON object as text."""
        return json.dumps(self.to_dict(keep), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Read what `to_json` or ``streamer evaluate`` wrote.

        Raises
        ------
        FormatError
            If it is something else.
        """
        try:
            tree = strict_json(text.encode())
            if tree["schema"] != SCHEMA:
                raise ValueError(f"the schema {tree['schema']!r}")
            variants = tuple(
                EvaluatedVariant(v["name"], v["method"], v["lambda"], v.get("keep")) for v in tree["variants"]
            )
            facts = {key: tree[key] for key in FACTS if key in tree or key not in OPTIONAL}
            sums = {
                text: _sums(text, tree["tokens"][text], [v[text] for v in tree["variants"]]) for text in (GENERAL, TASK)
            }
            for i, one in enumerate(tree.get("others", ())):
                sums[one["name"]] = _sums(one["name"], one["tokens"], [v["others"][i] for v in tree["variants"]])
            return cls.of(variants, sums, facts, tree["suggestion"]["keep"])
        except (ValueError, LookupError, TypeError) as e:
            raise FormatError(f"expected an evaluation ({SCHEMA}), found another text: {quoted(str(e))}") from e

    def _variant_dict(self, v: int) -> VariantRecord:
        variant = self.variants[v]
        return cast(VariantRecord, {
            "name": variant.name,
            "method": variant.method,
            "lambda": variant.mitigation_lambda,
            **({} if variant.keep is None else {"keep": variant.keep}),
            "general": _figures(self.general, v),
            "task": _figures(self.task, v),
            **({"others": [
                {"name": name, **_figures(own, v), **flat("share", own.share(v))} for name, own in self.others.items()
            ]} if self.others else {}),
            **flat("kept", self.task.share(v)),
            **flat("top1_kept", self.task.top1_share(v)),
            **flat("forgetting", self.general.share(v)),
            **flat("divergence", self.general.kl_share(v)),
            "dropped": self.dropped(v),
            "against_adapter": self._against(v, ADAPTER_ROW),
            "against_base": self._against(v, BASE_ROW),
        })  # fmt: skip

    def _others_dict(self) -> dict[str, Any]:
        found = [
            {"name": name, "effect": own.effect, **flat("change", own.change), "reliable": own.change.divides,
             "tokens": own.tokens.tolist()}
            for name, own in self.others.items()
        ]  # fmt: skip
        return {"others": found} if found else {}

    def _against(self, v: int, other: int) -> dict[str, float | None]:
        return {
            **flat("general_loss", self.general.loss_difference(v, other)),
            **flat("general_kl", self.general.kl_difference(v, other)),
            **flat("task_loss", self.task.loss_difference(v, other)),
            **flat("task_top1", self.task.mean(self.task.right[v] - self.task.right[other])),
        }

    def _suggestion_dict(self, s: Suggestion) -> SuggestionRecord:
        variant = s.variant
        shrink: Any = None if s.shrink is None else {
            "lambda": s.shrink.mitigation_lambda, "between": list(s.shrink.between), **flat("loss", s.shrink.loss),
            **flat("kl", s.shrink.kl), **flat("top1", s.shrink.top1), "verdict": s.shrink.verdict,
        }  # fmt: skip
        judged = s.declined or (variant if s.reason == "forgets least" else None)
        traded: Any = None
        if judged is not None:
            traded = Trade.of(self.general, self.task, self.variants.index(judged)).record(judged.name)
        return {
            "name": None if variant is None else variant.name,
            "method": None if variant is None else variant.method,
            "lambda": None if variant is None else variant.mitigation_lambda,
            "reason": s.reason,
            "keep": s.keep,
            "swapped": s.swapped,
            "command": None if variant is None else self.command(variant),
            "least_loss": None if s.least_loss is None else s.least_loss.name,
            "shrink": shrink,
            "trade": traded,
        }

    def command(self, variant: EvaluatedVariant) -> list[str]:
        """Give the command of streamer that makes a variant, and its options; inputs, output and files are to be added.

        It is `mitigate` where the adapter can be written back and that drops nothing of what was evaluated, else `merge`.
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
            words += ["--scale", "first"] if facts["scale"] == "first" else []
            default, used = DetectionOptions(), facts["detection"]
            words += ["--top-k", f"{used['top_k']}"] if used["top_k"] != default.top_k else []
            if used["threshold_epsilon"] != default.threshold_epsilon:
                words += ["--epsilon", f"{used['threshold_epsilon']}"]
        if lam is not None and not 0 <= lam <= 1:
            words.append("--amplify")
        words += input_options(facts)
        return [*words, "--dequantize"] if facts["quantized"] and not mitigates else words


def load_evaluation(path: str | Path) -> Evaluation:
    """Read the file that `evaluate_variants` or ``streamer evaluate`` wrote.

    Raises
    ------
    MissingInputError, FormatError
        If it is not there, or not one.
    """
    fd, _ = open_regular(Path(path), "an evaluation")
    with os.fdopen(fd, "rb") as file:
        raw = file.read()
    try:
        return Evaluation.from_json(raw.decode())
    except UnicodeDecodeError as e:
        raise FormatError(f"{path}: expected an evaluation ({SCHEMA}), found a file that is no text") from e
    except FormatError as e:
        raise FormatError(f"{path}: {e}") from e


def reliable(general: SequenceSums, task: SequenceSums) -> ReliableRecord:
    """Say which shares are of a change that is large enough, beside its error, to divide by."""
    gain = task.top1_gain
    return {
        "kept": task.change.divides,
        "forgetting": general.change.divides,
        "top1_kept": gain.divides and gain.value > 0,
    }


def _figures(sums: SequenceSums, v: int) -> dict[str, Any]:
    loss = sums.mean(sums.loss[v])
    return {
        **flat("loss", loss),
        "perplexity": math.exp(loss.value) if loss.value < MOST_LOSS else None,
        **flat("perplexity_ratio", sums.perplexity_ratio(v)),
        **flat("kl", sums.mean(sums.kl[v])),
        **{f"kl_{name}": defined(sums.kl_quantile(v, share)) for name, share in QUANTILES.items()},
        "kl_max": defined(sums.kl_largest(v)),
        **flat("agreement", sums.mean(sums.agree[v])),
        **flat("top1", sums.mean(sums.right[v])),
        **flat("p_change", sums.mean(sums.p_change[v])),
        **flat("p_rms", sums.p_rms(v)),
        **{name: _accuracy(sums, name, v) for name in sums.answers},
        "sequences": sums.ran(v),
        "sums": {
            name: [defined(x) for x in own]
            for name in (*MEASURES, *sums.answers)
            if not np.isnan(own := getattr(sums, name)[v]).all()
        },
        **({} if np.isnan(sums.kl_bins[v]).any() else {"kl_bins": to_record(sums.kl_bins[v])}),
    }


def _accuracy(sums: SequenceSums, name: str, v: int) -> dict[str, Any]:
    return {
        **flat("value", sums.accuracy(name, v)),
        **flat("against_adapter", sums.accuracy(name, v, ADAPTER_ROW)),
        **flat("against_base", sums.accuracy(name, v, BASE_ROW)),
        **flat("share", sums.accuracy_share(name, v)),
    }


def _sums(text: str, tokens: list[float], figures: list[Mapping[str, Any]]) -> SequenceSums:
    """Read the sums on a text, of its variants' figures; those by earlier versions lack some."""
    none = [math.nan] * len(tokens)
    arrays = {name: np.array([f["sums"].get(name, none) if name in SINCE else f["sums"][name] for f in figures], np.float64)
              for name in (*MEASURES, *(name for name in ANSWERS if name in figures[0]["sums"]))}  # fmt: skip
    shapes = {array.shape for array in arrays.values()}
    if np.isnan(arrays["loss"][: ADAPTER_ROW + 1]).any():
        raise ValueError(f"{text}: base or adapter lacks sequences")
    if shapes != {(len(figures), len(tokens))} or len(figures) < 2 or len(tokens) < 2:
        raise ValueError(f"sums of {text} are {listed(map(str, sorted(shapes)))}")
    bins = np.array([from_record(f.get("kl_bins")) for f in figures])
    return SequenceSums(np.array(tokens, np.float64), **arrays, kl_bins=bins)
