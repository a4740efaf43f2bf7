"""Show an evaluation, and write and read its JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from streamer.errors import FormatError, UnknownNameError
from streamer.evaluation.losses import EvaluationFacts, EvaluationRecord, SuggestionRecord, VariantLosses, VariantRecord
from streamer.evaluation.suggestion import Suggestion, Trade
from streamer.evaluation.view import table_text, verdict
from streamer.measuring.result_file import ADAPTER_ROW, BASE_ROW, EvaluatedVariant
from streamer.measuring.sequences import GENERAL, TASK
from streamer.measuring.statistics import (
    ANSWERS,
    MEASURES,
    MOST_LOSS,
    QUANTILES,
    SequenceSums,
    defined,
    flat,
    from_record,
    to_record,
)
from streamer.storage.files import open_regular, strict_json
from streamer.units import listed, quoted

SCHEMA: Final = "streamer.evaluation/1"

FACTS = tuple(EvaluationFacts.__annotations__)
"""Keys of the JSON that name inputs and options."""

OPTIONAL = ("configs", "findings", "intruders", "coefficients", "map")
"""Keys that are absent if there is none."""

LARGEST_SUM = 1e100
"""Sums above this are damaged; their squares might overflow."""


@dataclass(frozen=True, repr=False)
class Evaluation(VariantLosses):
    """Losses of an adapted model's variants, shown as a table and written as JSON.

    Attributes
    ----------
    variants
        The base, the unchanged adapter, each method at each λ, and each set of coefficients.
    general, task
        Sums over each sequence of the two texts, for each variant.
    facts
        Inputs and options, as JSON: `EvaluationFacts`.
    keep
        Share of the learning that the suggested variant keeps by default.
    others
        Sums over each sequence of other texts, by file name.
    """

    def __getitem__(self, name: str) -> VariantRecord:
        """Return the figures of a variant by name, as in the JSON."""
        names = [v.name for v in self.variants]
        if name not in names:
            raise UnknownNameError(f"evaluation: has no variant {name!r}; it has {', '.join(names)}")
        return self._variant_dict(names.index(name))

    def table(self, keep: float | None = None) -> str:
        """Format the verdict, the table of variants, and the reasons for the suggestion."""
        return table_text(self, self.best(keep))

    def __repr__(self) -> str:
        return f"<Evaluation: {len(self.variants)} variants, {len(self.general.tokens)} general and {len(self.task.tokens)} task sequences>"

    def to_dict(self, keep: float | None = None) -> EvaluationRecord:
        """Make the JSON object (schema ``streamer.evaluation/1``); `from_json` rebuilds the evaluation from its sums per sequence."""
        best = self.best(keep)
        others = [
            {"name": name, "effect": own.effect, **flat("change", own.change), "reliable": own.change.divides,
             "tokens": own.tokens.tolist()}
            for name, own in self.others.items()
        ]  # fmt: skip
        return cast(EvaluationRecord, {
            "schema": SCHEMA,
            "verdict": verdict(self, best),
            **{key: self.facts[key] for key in FACTS if key in self.facts},
            "tokens": {"general": self.general.tokens.tolist(), "task": self.task.tokens.tolist()},
            **({"others": others} if others else {}),
            "keep": self.keep,
            "variants": [self._variant_dict(v) for v in range(len(self.variants))],
            "reliable": self.reliable(),
            "front": self.front(),
            "suggestion": self._suggestion_dict(best),
        })  # fmt: skip

    def shown_variants(self) -> list[dict[str, Any]]:
        """Make the JSON of all variants, with null for shares that tables leave out."""
        tree = self.to_dict()
        hidden = {f"{name}{end}" for name, fine in tree["reliable"].items() if not fine for end in ("", "_se")}
        texts, no_share = tree.get("others", []), {"share": None, "share_se": None}
        return [
            {
                **v,
                **dict.fromkeys(hidden),
                "others": [
                    {**own, **({} if text["reliable"] else no_share)}
                    for text, own in zip(texts, v.get("others", []), strict=True)
                ],
            }
            for v in tree["variants"]
        ]

    def to_json(self, keep: float | None = None) -> str:
        """Return the JSON object as text."""
        return json.dumps(self.to_dict(keep), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Read an evaluation from the text that `to_json` or ``streamer evaluate`` wrote.

        Raises
        ------
        FormatError
            If the text is not an evaluation.
        """
        try:
            tree = strict_json(text.encode())
            if tree["schema"] != SCHEMA:
                raise ValueError(f"the schema {tree['schema']!r}")
            variants = tuple(map(_variant, tree["variants"]))
            facts = {key: tree[key] for key in FACTS if key in tree or key not in OPTIONAL}
            sums = {
                text: _sums(text, tree["tokens"][text], [v[text] for v in tree["variants"]]) for text in (GENERAL, TASK)
            }
            for i, one in enumerate(tree.get("others", ())):
                sums[one["name"]] = _sums(one["name"], one["tokens"], [v["others"][i] for v in tree["variants"]])
            made = cls.of(variants, sums, facts, tree.get("keep", tree["suggestion"]["keep"]))
            made.to_json()  # fails for sums that no run has, such as negative squares
            return made
        except (ArithmeticError, AttributeError, ValueError, LookupError, TypeError) as e:
            raise FormatError(f"expected an evaluation ({SCHEMA}), found: {quoted(str(e))}; evaluate again") from e

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
                {"name": name, **_figures(own, v), **flat("share", own.fraction(v))} for name, own in self.others.items()
            ]} if self.others else {}),
            **flat("kept", self.task.fraction(v)),
            **flat("top1_kept", self.task.top1_fraction(v)),
            **flat("forgetting", self.general.fraction(v)),
            **flat("divergence", self.general.kl_fraction(v)),
            "against_adapter": self._against(v, ADAPTER_ROW),
            "against_base": self._against(v, BASE_ROW),
        })  # fmt: skip

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
            "shrink": shrink,
            "trade": traded,
        }


def load_evaluation(path: str | Path) -> Evaluation:
    """Read an evaluation from the file that `evaluate_variants` or ``streamer evaluate`` wrote.

    Raises
    ------
    MissingInputError, FormatError
        If the file does not exist, or is not an evaluation.
    """
    fd, _ = open_regular(Path(path), "an evaluation")
    with os.fdopen(fd, "rb") as file:
        raw = file.read()
    try:
        return Evaluation.from_json(raw.decode())
    except UnicodeDecodeError as e:
        raise FormatError(f"{path}: expected an evaluation ({SCHEMA}), found a file that is not text") from e
    except FormatError as e:
        raise FormatError(f"{path}: {e}") from e


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
        "sequences": len(sums.tokens),
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
        **flat("share", sums.accuracy_fraction(name, v)),
    }


def _variant(tree: Mapping[str, Any]) -> EvaluatedVariant:
    name, method, numbers = tree["name"], tree["method"], (tree["lambda"], tree.get("keep"))
    named = isinstance(name, str) and isinstance(method, str | None)
    if not named or not all(number is None or type(number) in (int, float) for number in numbers):
        raise ValueError("a variant's name, method, λ or share has the wrong type")
    return EvaluatedVariant(name, method, *numbers)


def _sums(text: str, tokens: list[float], figures: list[Mapping[str, Any]]) -> SequenceSums:
    """Collect the sums on a text from the variants' figures."""
    names = (*MEASURES, *(name for name in ANSWERS if name in figures[0]["sums"]))
    arrays = {name: np.array([f["sums"][name] for f in figures], np.float64) for name in names}
    shapes = {array.shape for array in arrays.values()}
    if np.isnan(arrays["loss"]).any():
        raise ValueError(f"{text}: a variant lacks sequences")
    if shapes != {(len(figures), len(tokens))} or len(figures) < 2 or len(tokens) < 2:
        raise ValueError(f"sums of {text} are {listed(map(str, sorted(shapes)))}")
    counted = all(type(count) in (int, float) and 0 < count <= LARGEST_SUM and count % 1 == 0 for count in tokens)
    if not counted or any((np.abs(array) > LARGEST_SUM).any() for array in arrays.values()):
        raise ValueError(f"sums or token counts of {text} are impossible")
    bins = np.array([from_record(f.get("kl_bins")) for f in figures])
    return SequenceSums(np.array(tokens, np.float64), **arrays, kl_bins=bins)
