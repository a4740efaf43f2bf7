"""Make the data embedded in a page, from which its script draws: findings, evaluation or record as compact JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import getitem
from typing import Any

import numpy as np

from streamer.detection.findings import Findings
from streamer.errors import printable
from streamer.evaluation.columns import field_figures
from streamer.evaluation.evaluation import Evaluation
from streamer.methods import METHODS
from streamer.plan.name_order import natural
from streamer.report.curves import lambda_curve, threshold_curve
from streamer.report.packing import Packed, pack, pack_names, pack_ratio, pack_share
from streamer.report.subject import Collection, Subject, scales_intruders

SCHEMA = "streamer.page/1"

MOST_DIRECTIONS = 400_000
"""Most directions on a page, over all matrices; if there are more, it has the largest of each matrix."""

LEAST_DIRECTIONS = 10
"""Fewest directions for each matrix."""

LEAST_RATIO = 1e-6
"""Smallest ratio of a singular value to the largest that is distinguished from zero."""


def page_data(subject: Subject | Collection) -> dict[str, Any]:
    """Make the object. Names are escaped as on a terminal; norms and singular values of findings have only the digits shown."""
    tree: dict[str, Any] = {"schema": SCHEMA, "findings": None, "evaluation": None, "output": None, "several": None}
    if isinstance(subject, Collection):
        held = subject.findings
        most = MOST_DIRECTIONS // len(held)
        tree["several"] = [
            {"name": printable(name), "findings": _findings(found, most)} for name, found in held.items()
        ]
        return tree
    findings, record = subject.findings, subject.record
    if findings is not None:
        tree["findings"] = _findings(findings)
    if subject.evaluation is not None:
        tree["evaluation"] = _evaluation(subject.evaluation)
    if record is not None:
        matrices = sorted(record["matrices"], key=lambda m: natural(m["tensor"]))
        # None if it does not apply: a shrink or coefficients scale no intruders, and a merge is not truncated to a rank.
        scaled, cut = scales_intruders(record), record["command"] == "mitigate"
        tree["output"] = {
            "names": pack_names([printable(m["tensor"]) for m in matrices]),
            "intruders": [len(m["intruders"]) for m in matrices] if scaled else None,
            **{key: [m[key] for m in matrices] for key in ("delta_norm", "delta_norm_after")},
            "dropped": [m["dropped"] for m in matrices] if cut else None,
        }
    return tree


def _findings(findings: Findings, directions: int = MOST_DIRECTIONS) -> dict[str, Any]:
    matrices = sorted(findings, key=lambda m: natural(m.tensor))
    found = [m.detection for m in matrices]
    most = max(LEAST_DIRECTIONS, directions // max(1, len(matrices)))
    shown = [min(most, len(d.singular_values)) for d in found]
    kinds: dict[str, int] = {}
    kind = [kinds.setdefault(f"{m.shape[0]}×{m.shape[1]} {m.dtype}", len(kinds)) for m in matrices]
    deciders: dict[str, int] = {}
    decider = [
        deciders.setdefault(f"{d.solver}{', float64' if d.precision == 'float64' and m.dtype != 'F64' else ''}", len(deciders))
        for m, d in zip(matrices, found, strict=True)
    ]  # fmt: skip

    def column(values: Iterable[Sequence[float]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.fromiter(chain.from_iterable(map(getitem, values, map(slice, shown))), np.float64)

    def shares(values: Sequence[float]) -> list[float]:
        """Divide a matrix's singular values by the largest."""
        largest = max(values, default=0.0)
        return [s / largest if largest > 0 else 0.0 for s in values]

    return {
        "epsilon": findings.options.threshold_epsilon,
        "names": pack_names([printable(m.tensor) for m in matrices]),
        "kinds": list(kinds), "kind": pack(kind), "rank": pack([m.rank for m in matrices]),
        "directions": pack([len(d.singular_values) for d in found]),
        "shown": pack(shown), "count": pack([len(d.intruders) for d in found]),
        "intruder": pack(column([[float(j in d.intruders) for j in range(n)] for d, n in zip(found, shown, strict=True)]), 1),
        "deciders": list(deciders), "decider": pack(decider), "certified": pack([d.certified for d in found], 1),
        "degenerate": {str(i): list(d.degenerate) for i, d in enumerate(found) if d.degenerate},
        "low": pack_share(column([d.similarity_low for d in found]), 2),
        "high": pack_share(column([d.similarity_high for d in found]), 2, up=True),
        "least": _figures([min(d.similarity, default=1.0) for d in found]),
        "ratio": pack_ratio(column([shares(d.singular_values) for d in found]), 2, LEAST_RATIO),
        "least_ratio": LEAST_RATIO, "sigma": [_short(max(d.singular_values, default=0.0)) for d in found],
        "base_ratio": pack_ratio(column([shares(d.base_singular_values) for d in found]), 2, LEAST_RATIO),
        "base_sigma": [_short(max(d.base_singular_values)) for d in found],
        "delta_norm": [_short(d.delta_norm) for d in found], "energy": _figures([d.intruder_energy for d in found]),
        "dropped": _figures([d.dropped_at_zero for d in found]),
        "thresholds": [[c["epsilon"], c["intruders"], c["least"], c["most"]] for c in threshold_curve(findings)],
        "lambdas": [[c["lambda"], c["paper"], c["project"], c["norm_left"]] for c in lambda_curve(findings)],
    }  # fmt: skip


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    tree, best = evaluation.to_dict(), evaluation.best()
    variants = evaluation.shown_variants()
    keys = ("kept", "kept_se", "top1_kept", "top1_kept_se", "forgetting", "forgetting_se", "divergence",
            "divergence_se")  # fmt: skip
    of_other = ("loss", "share", "share_se", "kl")
    return {
        "keep": evaluation.keep,
        "methods": list(METHODS),
        "suggested": best.variant and printable(best.variant.name),
        "front": [printable(name) for name in tree["front"]],
        "texts": {side: evaluation.facts["texts"][side]["name"] for side in ("general", "task")},
        "others": [{"name": printable(one["name"]), "effect": one["effect"]} for one in tree.get("others", [])],
        "field": [{"head": c.head, "about": c.about, "cells": c.cells} for c in field_figures(evaluation.general)],
        "accuracies": [printable(name) for name in evaluation.answered],
        "variants": [
            {"name": printable(v["name"]), "lambda": v["lambda"],
             "series": printable(one.method or one.name.partition(" ")[0]),  # its curve: base and adapter are the ends of all
             "general": v["general"]["loss"], "task": v["task"]["loss"], "kl": v["general"]["kl"],
             "agreement": v["general"]["agreement"], "top1": v["task"]["top1"],
             "others": [{key: one[key] for key in of_other} for one in v["others"]],
             "accuracies": [own["acc"] for own in (v["general"], v["task"], *v["others"]) if "acc" in own],
             **{key: v[key] for key in keys}}
            for v, one in zip(variants, evaluation.variants, strict=True)
        ],
    }  # fmt: skip


def _figures(shares: Sequence[float]) -> Packed:
    """Pack shares that tables show, in steps of 1e-9; coarser steps would make the page round twice."""
    return pack(np.rint(np.clip(shares, 0.0, 1.0) * (64**5 - 1)), 5)


def _short(value: float) -> float:
    """Round to the digits that tables show on the page and on a terminal, to avoid rounding twice."""
    return float(f"{value:.4g}")
