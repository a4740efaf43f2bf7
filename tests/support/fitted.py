"""Factors as a fit would write them, nearly those of a shrink, for the base and the adapter of a test."""

from pathlib import Path

import torch
from seeds import vary

from streamer.linalg.operators import LowRank
from streamer.methods.files import Coefficients, FactorSet
from streamer.plan.plan import make_plan


def random_coefficients(base: Path, adapter: Path, *keeps: float) -> Coefficients:
    """Make factors for each share."""
    plan = make_plan(base, adapter)
    sets = []
    for k, keep in enumerate(keeps or (0.9,)):
        matrices = {}
        for target in plan.targets:
            delta, generator = plan.delta(target), torch.Generator().manual_seed(vary(f"{target.tensor} {k}"))
            assert isinstance(delta, LowRank)
            matrices[target.tensor] = (
                (0.2 - 0.1 * k) * delta.R.float() * (1 + 0.1 * torch.randn(delta.R.shape, generator=generator))
            )
        sets.append(FactorSet(keep, matrices))
    facts = {"base": {**plan.base_identity}, "adapter": {**plan.adapter_identity}}
    return Coefficients(tuple(sets), facts)


def coefficients_file(path: Path, base: Path, adapter: Path, *keeps: float) -> Path:
    """Write such factors."""
    random_coefficients(base, adapter, *keeps).save(path)
    return path
