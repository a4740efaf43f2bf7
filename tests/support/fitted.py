"""Coefficients as a fit would write them, of random values, for the base and the adapter of a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from seeds import vary

from streamer.methods.coefficient_set import CoefficientSet, MatrixCoefficients, directions, groups
from streamer.methods.coefficients import Coefficients
from streamer.plan.plan import make_plan


def random_coefficients(base: Path, adapter: Path, *keeps: float, unchanged: int = 0) -> Coefficients:
    """Make coefficients for each share; those of the first `unchanged` matrices are 1."""
    plan = make_plan(base, adapter)
    sets = []
    for k, keep in enumerate(keeps or (0.9,)):
        matrices = {}
        for number, target in enumerate(plan.targets):
            s = directions(plan.delta(target))
            group = groups(s)
            drawn = np.random.default_rng(vary(f"{target.tensor} {k}")).random(len(s))
            c = np.ones(len(s)) if number < unchanged else np.where(group < 0, 1.0, drawn[group])
            matrices[target.tensor] = MatrixCoefficients(s, c)
        sets.append(CoefficientSet(keep, matrices))
    facts = {"base": {**plan.base_identity}, "adapter": {**plan.adapter_identity}}
    return Coefficients(tuple(sets), facts)


def coefficients_file(path: Path, base: Path, adapter: Path, *keeps: float, unchanged: int = 0) -> Path:
    """Write such coefficients."""
    random_coefficients(base, adapter, *keeps, unchanged=unchanged).save(path)
    return path
