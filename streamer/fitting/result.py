"""State what a fit gave: figures of each set of coefficients on the sequences held apart, beside the shrink that keeps the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from streamer.errors import MismatchError
from streamer.evaluation.shrinks import against_shrink
from streamer.evaluation.statistics import SequenceSums, flat
from streamer.evaluation.variants import ADAPTER_ROW, BASE_ROW, EvaluatedVariant
from streamer.fitting.algorithm import FittedPoint
from streamer.fitting.front import MISSED
from streamer.output.coefficients import Floats, share_name
from streamer.streaming.variants import ADAPTER, BASE

SHRINKS = (0.85, 0.7, 0.5, 0.25, 0.0)
"""Shrinks that are measured on the sequences held apart, beside the adapter, λ = 1. By 0 it is the base, unless more than deltas stays."""

NEAR = 0.05
"""A coefficient within this of 0 or 1 is near it."""


def shrinks(count: int) -> list[Floats]:
    """Return the parameters of the shrinks that are measured."""
    return [np.full(count, lam) for lam in SHRINKS]


def adapter_facts(general: SequenceSums, task: SequenceSums, name: str) -> dict[str, Any]:
    """Say as JSON what the adapter as it is has learned and forgotten, on the sequences held apart.

    Parameters
    ----------
    name
        Of the task's text, for messages.

    Raises
    ------
    MismatchError
        If it is not told that it has learned anything: of that no share can be kept.
    """
    learning = task.loss_difference(BASE_ROW, ADAPTER_ROW)
    forgetting = general.loss_difference(ADAPTER_ROW, BASE_ROW)
    if not learning.is_positive:
        raise MismatchError(
            f"{name}: there is no evidence that the adapter learned this text, so there is nothing to keep: its loss less the base's is "
            f"{-learning.value:.4f} ± {learning.error:.4f} on the {learning.sequences} sequences held apart, of which "
            f"it takes {learning.telling:.1f} errors; give more text, or more of it by --sequences, or what the adapter was trained for"
        )
    return {
        "forgotten": forgetting.is_positive,
        **flat("learning", learning),
        **flat("forgetting", forgetting),
        **flat("divergence", general.mean(general.kl[ADAPTER_ROW])),
    }


def set_facts(general: SequenceSums, task: SequenceSums, found: Sequence[FittedPoint]) -> list[dict[str, Any]]:
    """Return the figures of all sets as JSON.

    Parameters
    ----------
    general, task
        Sums on the sequences held apart: of the base, the adapter as it is, each of `SHRINKS`, and each set.
    """
    variants = [EvaluatedVariant(BASE, None, None), EvaluatedVariant(ADAPTER, None, None)]
    variants += [EvaluatedVariant(f"shrink {lam:g}", "shrink", lam) for lam in SHRINKS]
    variants += [EvaluatedVariant(f"fitted {share_name(one.keep)}", "fitted", None) for one in found]
    first = 2 + len(SHRINKS)
    return [_set(one, variants, general, task, first + i) for i, one in enumerate(found)]


def _set(one: FittedPoint, variants: Sequence[EvaluatedVariant], general: SequenceSums, task: SequenceSums,
         v: int) -> dict[str, Any]:  # fmt: skip
    """Return the figures of one set, a variant by its number."""
    same = (one.coefficients == one.coefficients[:1]).all()  # it is a shrink
    compared, shrink = None if same else against_shrink(variants, general, task, v), None
    if compared is not None:
        loss, kl = general.loss_difference(ADAPTER_ROW, BASE_ROW), general.mean(general.kl[ADAPTER_ROW])
        shrink = {
            "lambda": compared.mitigation_lambda,
            "forgetting": general.share(v).value - compared.loss.value / loss.value,
            "divergence": general.kl_share(v).value - compared.kl.value / kl.value,
            **flat("loss", compared.loss),
            **flat("kl", compared.kl),
            "verdict": compared.verdict,
        }
    theta = one.coefficients
    return {
        "keep": one.keep,
        "missed": task.share(v).value < one.keep - MISSED,
        "mu": one.weight if math.isfinite(one.weight) else None,
        **flat("kept", task.share(v)),
        **flat("forgetting", general.share(v)),
        **flat("divergence", general.kl_share(v)),
        "coefficients": {
            "mean": float(theta.mean()),
            "near_0": int((theta <= NEAR).sum()),
            "near_1": int((theta >= 1 - NEAR).sum()),
        },
        "shrink": shrink,
    }


def doubts(facts: Mapping[str, Any]) -> list[str]:
    """Warn of an adapter of which it is not told that it forgets."""
    if facts["forgotten"]:
        return []
    return [
        f"there is no evidence that the adapter forgets, so it can be used as it is (more text may show more): its loss on general text "
        f"less the base's is {facts['forgetting']:.4f} ± {facts['forgetting_se']:.4f} on the sequences held apart"
    ]


def misses(facts: Mapping[str, Any]) -> list[str]:
    """Warn of sets that keep less than was wanted; files of earlier versions do not say."""
    return [
        f"{100 * one['keep']:g}% was to be kept, and {100 * one['kept']:.1f}% is, on the sequences held apart; ask for a larger share, or "
        "give more text or --steps"
        for one in facts["sets"]
        if one.get("missed")
    ]
