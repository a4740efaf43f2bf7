"""Measure the losses of variants in sweeps.

For the logits z at a token and the next token y, ``loss = log Σ exp z − z_y``. With the base's z⁰ and p⁰ = softmax(z⁰),
``KL(p⁰ ‖ p) = Σ p⁰ (z⁰ − z) − (log Σ exp z⁰ − log Σ exp z)``. Sums over the vocabulary are float64 and scaled by the largest logit so far.
A row is one token of one variant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from streamer.errors import NumericError
from streamer.events import Progress
from streamer.measuring.batches import Batch, Limits, logits_together, sweep_cost
from streamer.measuring.statistics import MEASURES, SequenceSums, Sums
from streamer.streaming.groups import Group
from streamer.streaming.resume import States
from streamer.streaming.sites import Solve, TargetWatch
from streamer.streaming.size import ModelSize
from streamer.streaming.sweep import SweepModel
from streamer.streaming.turn import Stop, nothing
from streamer.streaming.variants import ADAPTER_ROW, BASE_ROW


class SweepProgress(Progress):
    """Progress of a run of sweeps, in multiplications and layers."""

    def expect(self, cost: int, layers: int) -> None:
        """Set the cost of the sweeps still to come, and their layers."""
        self.total = self.done + cost
        self.of = self.items + layers

    def layer(self, name: str, cost: int) -> None:
        """Count a layer of all groups as done; it cost this many multiplications."""
        self.add(cost)
        self.total = max(self.total, self.done + 1)
        self.of = max(self.of, self.items)
        self._report(name)

    def finish(self) -> None:
        """Report that everything is done."""
        self.total = self.done
        self.of = self.items
        self._report("")


def waiting(held_out: Iterable[Batch]) -> list[Group]:
    """List the riders that have not run."""
    return [group for batch in held_out for group in batch.groups if not group.results]


def cost_of(size: ModelSize, groups: Sequence[Group]) -> int:
    """Count the multiplications of a sweep of these groups."""
    return sweep_cost(size, sum(group.rows for group in groups), len(groups))


def measure(
    model: SweepModel,
    held_out: Sequence[Batch],
    progress: SweepProgress,
    limits: Limits,
    states: States | None = None,
    fitted: Sequence[Group] = (),
    solve: Solve = nothing,
    check: Callable[[], None] | None = None,
) -> Sums:
    """Run a sweep, and return the sums of its riders on each text, in the order of variants and sequences.

    Parameters
    ----------
    held_out
        The riders; groups with results have run, and only their logits are computed.
    states
        File from which a killed sweep resumes.
    fitted, solve
        Groups that fit the adapter's targets; see `SweepModel.run`.
    check
        Called after each layer; may raise to stop.

    Raises
    ------
    NumericError
        If a sum is not finite, or if the sweep did not use everything that the adapter changes.
    InputChangedError
        If an input changed.
    """
    groups = [*fitted, *waiting(held_out)]
    plan = model.job.plan
    monitor = progress.monitor
    layers = len(model.layers)
    layer_cost = cost_of(model.size, groups) // (layers + 1)
    if states is not None:
        states.resumed = lambda done: monitor.resuming(done, layers, "layer")

    def after(name: str) -> None:
        progress.layer(name, layer_cost)
        if check is not None:
            check()

    model.limit(limits.room, limits.spools)
    watch = TargetWatch(plan) if fitted else None
    model.run(groups, monitor.checkpoint, solve, watch, after, states)
    rows = max(sum(group.rows for group in batch.groups) for batch in held_out)
    sums = batch_sums(model, held_out, logits_together(rows), monitor.checkpoint)
    model.check_all_used()
    plan.check_unchanged()
    return {
        name: _text_sums(model, name, held_out, sums)
        for name in dict.fromkeys(batch.name for batch in held_out)
    }


def _text_sums(
    model: SweepModel, name: str, held_out: Sequence[Batch], sums: Sequence[SequenceSums]
) -> SequenceSums:
    """Join the sums of a text's batches in the order of its sequences."""
    pairs = [pair for pair in zip(held_out, sums, strict=True) if pair[0].name == name]
    order = np.argsort([number for batch, _ in pairs for number in batch.numbers])
    joined = reduce(SequenceSums.followed, (own for _, own in pairs)).in_order(order)
    for kind in MEASURES:
        wrong = ~np.isfinite(joined[kind]).all(axis=1)
        if wrong.any():
            variant = model.job.variants[int(wrong.argmax())]
            raise NumericError(
                f"{model.job.plan.base.path}: variant {variant.name!r} has a {kind} of NaN or Inf on the {name} text; check the "
                "adapter's scale"
            )
    return joined


def batch_sums(
    model: SweepModel, held_out: Sequence[Batch], block: int, checkpoint: Stop
) -> list[SequenceSums]:
    """Compute the sums of each batch's riders, which have run, from the logits of so many tokens of the vocabulary at a time."""
    sums = [_Accumulator(batch, model.job.device) for batch in held_out]
    for i, _, number, z in model.logits([batch.groups for batch in held_out], block, checkpoint):
        sums[number].add(z.float(), i)
    return [accumulator.sums() for accumulator in sums]


class _Accumulator:
    """Sums over the vocabulary for each token; shapes are (variants, sequences, length), with the base first, then the adapter."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        ids = batch.text.padded_ids
        variants = len(batch.groups)
        zeros = torch.zeros((variants, *ids.shape), dtype=torch.float64, device=device)
        self.text = batch.text
        self.adapter = min(ADAPTER_ROW, variants - 1)
        self.labels = torch.roll(ids, -1, 1).to(device)
        self.largest = torch.full_like(zeros, -torch.inf, dtype=torch.float32)
        self.top = zeros.long()
        self.total = zeros.clone()
        self.crosses = {BASE_ROW: zeros.clone(), self.adapter: zeros.clone()}
        """For the base's logits z⁰, and for the adapter's: ``Σ exp(z⁰ − largest⁰) (z⁰ − z)``."""
        self.adapter_mean = zeros[BASE_ROW].clone()
        """``Σ exp(z¹ − largest¹) z¹``."""
        self.label = zeros.float()

    def add(self, z: Tensor, i: int) -> None:
        """Add the logits (…, j − i) of vocabulary entries i to j."""
        most, at = z.max(-1)
        self.top = torch.where(most > self.largest, at + i, self.top)
        largest = torch.maximum(most, self.largest)
        factor = torch.exp(self.largest.double() - largest.double())
        self.largest = largest
        self.total *= factor
        self.adapter_mean *= factor[self.adapter]
        known = {row: torch.exp(z[row] - largest[row, ..., None]) for row in self.crosses}
        self.adapter_mean += (known[self.adapter] * z[self.adapter]).sum(-1)
        for row, cross in self.crosses.items():
            cross.mul_(factor[row])
            for v, logits in enumerate(z):
                cross[v] += (known[row] * (z[row] - logits)).sum(-1)
        for v, logits in enumerate(z):
            weights = known[v] if v in known else torch.exp(logits - largest[v, ..., None])
            self.total[v] += weights.sum(-1)
        width = z.shape[-1]
        place = (self.labels - i).expand(len(z), -1, -1)
        label = z.gather(-1, place.clamp(0, width - 1)[..., None])[..., 0]
        self.label = torch.where((place >= 0) & (place < width), label, self.label)

    def sums(self) -> SequenceSums:
        """Return the loss, the KLs, and whether the likeliest token is the base's or the text's own, by sequence."""
        log_sum = self.largest.double() + self.total.log()
        divergences = {
            row: cross / self.total[row] - (log_sum[row] - log_sum)
            for row, cross in self.crosses.items()
        }
        from_adapter = divergences[self.adapter]
        entropy = log_sum[self.adapter] - self.adapter_mean / self.total[self.adapter]
        results = {
            "loss": entropy + from_adapter if self.text.drawn else log_sum - self.label.double(),
            "kl": divergences[BASE_ROW],
            "kl_from_adapter": from_adapter,
            "agree": (self.top == self.top[BASE_ROW]).double(),
            "right": (self.top == self.labels).double(),
        }
        counted = self.text.padded_next
        arrays = {name: (t.cpu() * counted).sum(-1).numpy() for name, t in results.items()}
        return SequenceSums(counted.sum(-1).double().numpy(), **arrays)
