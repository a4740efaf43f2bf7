"""One sweep that fits an adapter's factors for some weights of the general text, and merged models with any factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from evaluated import loaded, nothing
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamer.fitting.fit import Solver
from streamer.fitting.result import Point, factors_of, replaced, spooled, unchanged
from streamer.linalg.torch_state import CPU
from streamer.methods import UNCHANGED, RegMean, Shrink
from streamer.methods.files import FactorSet
from streamer.plan.plan import Plan, make_plan
from streamer.plan.targets import Target
from streamer.streaming.spool import Spool
from streamer.streaming.sweep import Group, SweepModel, TargetWatch
from streamer.streaming.values import ADAPTER, BASE, Variant, VariantSet

WEIGHTS = (0.5, 4.0)
"""Weights μ of the general text, one for each candidate."""


def halves(ids: Tensor) -> list[Tensor]:
    """Batches of two lengths: most sequences, and the others without their ends."""
    cut = (2 * len(ids) + 2) // 3
    return [ids[:cut], ids[cut:, :-2]]


@dataclass
class Sweep:
    """A model, ready to fit an adapter's factors.

    Attributes
    ----------
    groups
        Two groups of each stream, of two lengths.
    """

    plan: Plan
    model: SweepModel
    solver: Solver
    groups: list[Group]

    @property
    def rights(self) -> dict[str, list[Tensor]]:
        """Return each candidate's right factors of the matrices that were fitted, by `Target.tensor`."""
        return {name: [self.solver.spool.read(place)[0] for place in own] for name, own in self.solver.places.items()}

    def run(self, riders: Sequence[Group] = (), checkpoint: Any = nothing) -> None:
        """Fit."""
        self.model.run([*self.groups, *riders], checkpoint, self.solver, TargetWatch(self.plan))


def make_sweep(
    base: Path,
    adapter: Path,
    general: Tensor,
    task: Tensor,
    weights: Sequence[float] = WEIGHTS,
    device: torch.device = CPU,
) -> Sweep:
    """Prepare a fit; the variants are the base, the adapter, the candidates, and a shrink."""
    plan, spool = make_plan(base, adapter), Spool()
    as_is, texts = unchanged(plan), [halves(general), halves(task)]
    tokens = [sum(ids.numel() for ids in text) for text in texts]
    model = SweepModel(VariantSet(plan, (Variant(BASE, None), Variant(ADAPTER, UNCHANGED)), None, device=device))
    solver = Solver(model, weights, (tokens[0], tokens[1]), spool)
    points = [Point(mu, replaced(spooled(spool, solver.places, k), as_is)) for k, mu in enumerate(weights)]
    candidates = [Variant(p.name, RegMean(coefficients=FactorSet(1.0, p.factors))) for p in points]
    model.use(replace(model.job, variants=(*model.job.variants, *candidates, Variant.of(Shrink(0.5)))))
    groups = [
        Group(ids, stream if stream < 2 else stream // 2 + 1, stream)
        for stream in range(2 + 2 * len(weights))
        for ids in texts[stream % 2]
    ]
    return Sweep(plan, model, solver, groups)


def fitted(base: Path, adapter: Path, general: Tensor, task: Tensor, weights: Sequence[float] = WEIGHTS) -> Sweep:
    """Fit an adapter's factors in one sweep."""
    sweep = make_sweep(base, adapter, general, task, weights)
    sweep.run()
    return sweep


def delta_of(plan: Plan, target: Target, right: Tensor | None = None) -> Tensor:
    """Δ (out, in) in float64, with another right factor if one is given."""
    delta = factors_of(plan, target)
    return delta.L.double() @ (delta.R if right is None else right).double().T


def merged(cls: Any, base: Path, plan: Plan, rights: Mapping[str, Tensor], out: Path) -> Any:
    """The base's model in float64 with the adapter's deltas, with other right factors of some matrices."""
    out.mkdir()
    tensors = {name: t.double() for file in base.glob("*.safetensors") for name, t in load_file(file).items()}
    for target in plan.targets:
        delta = delta_of(plan, target, rights.get(target.tensor))
        for part in target.slices:
            own = delta if part.rows is None else delta[slice(*part.rows)]
            into = tensors[part.weight] if part.index is None else tensors[part.weight][part.index]
            into += own.T if target.transposed else own
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in base.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    return loaded(cls, out, torch.float64)
