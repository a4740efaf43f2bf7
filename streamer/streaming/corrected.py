"""Replace the deltas of one layer after the other, so that each replacement sees the inputs that those before it make.

General text runs as the base and as the corrected model, the task's as base + adapter and as the corrected model. The first two run a
layer once. The corrected model runs it up to the first inputs whose matrices have no replacement yet; once these have one, up to the
next, and at last to the end. It begins anew each time: what a layer computes on all tokens takes many times the memory of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamer.errors import UnsupportedError
from streamer.linalg.allocation import CPU
from streamer.linalg.low_rank import LowRank
from streamer.linalg.second_moments import RowMoments
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.streaming.differentiable import CoefficientDeltas
from streamer.streaming.inputs import InputModel
from streamer.streaming.layers import layer_modules, tensors_of
from streamer.streaming.spool import Spool
from streamer.streaming.spooled_inputs import Inputs
from streamer.streaming.streams import GENERAL_AS, GENERAL_CORRECTED, TASK_AS, TASK_CORRECTED, Group, tokens_of

STREAMS = GENERAL_AS, TASK_AS, GENERAL_CORRECTED, TASK_CORRECTED

OTHER_ORDER = "runs its matrices in another order once some are replaced"

Replace = Callable[[Sequence[Target], Mapping[int, RowMoments]], None]
"""Takes targets that have the same inputs, and the moments of these by what runs, whose rows are in one order."""


class FactorDeltas(CoefficientDeltas):
    """The deltas of an adapter with other right factors: R' (n, r), by `Target.tensor`."""

    def __init__(self, plan: Plan, rights: Mapping[str, Tensor], device: torch.device) -> None:
        super().__init__(plan, None, device)
        self.rights = rights

    def _factors(self, target: Target, c: Tensor | None) -> LowRank:
        return LowRank(super()._factors(target, None).L, self.rights[target.tensor].to(self.device))


class CorrectedModel(InputModel):
    """The model of a base with an adapter, which collects inputs, and then has its deltas replaced."""

    def __init__(
        self, plan: Plan, *, rounds_products: bool = False, directory: Path | None = None, device: torch.device = CPU
    ) -> None:
        super().__init__(plan, rounds_products=rounds_products, directory=directory, device=device)
        self.directory = directory
        self._layers: _LayerByLayer | None = None
        self._deltas: tuple[CoefficientDeltas, CoefficientDeltas] = self.setting.deltas, self.setting.deltas

    @property
    def corrects(self) -> bool:
        """Test whether there is a layer whose matrices would be replaced."""
        return any(self._replaceable)

    @property
    def _replaceable(self) -> list[list[list[Target]]]:
        """List for each layer the targets by the inputs that they have in common; experts are given other tokens once routers change.

        What ran before the first layer came with the first round.
        """
        return [
            [own for own in one if all(t.module.form != "expert" for t in own)] for one in self._collected.rounds[1:]
        ]

    def correct(self, groups: Sequence[Group], rights: Mapping[str, Tensor], replace: Replace) -> None:
        """Run all groups, of each of the `STREAMS`, and have those matrices replaced whose inputs all tokens brought.

        Parameters
        ----------
        rights
            R' (n, r) of all targets, by `Target.tensor`, those that `replace` makes among them from then on.

        Raises
        ------
        UnsupportedError
            If a layer changes its own arguments, or runs its matrices in another order than before.
        """
        before, corrected = self.setting.deltas, FactorDeltas(self.job.plan, rights, self.job.device)
        layers, spool = layer_modules(self._model).values(), Spool(self.directory)
        self._layers = by_layer = _LayerByLayer(self._replaceable, tokens_of(groups), spool, replace, self._pause)
        self._deltas = before, corrected
        self._collected.instead = by_layer.take
        for layer in layers:
            layer.forward = partial(by_layer.run_layer, layer.forward)
        try:
            self._run_groups(groups, by_layer.between)
        finally:
            for layer in layers:
                del layer.forward  # the class's is left
            self.setting.deltas, self._layers, self._collected.instead = before, None, None
            corrected.spool.close()
            spool.close()

    def _begin(self, number: int, group: Group) -> None:
        super()._begin(number, group)
        if self._layers is not None:
            self._layers.begin(number, group.stream)
            self.setting.deltas = self._deltas[group.stream in (GENERAL_CORRECTED, TASK_CORRECTED)]

    def _pause(self) -> None:
        assert self._turns is not None
        self._turns.pause()


class _LayerByLayer:
    """The inputs of the layer that runs, and how often each group runs it.

    Parameters
    ----------
    layers
        Of each layer, in the order in which they run, the targets by the inputs that they have in common, which the first names.
    tokens
        How many each of the `STREAMS` has.
    pause
        Ends a group's turn.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Sequence[Target]]],
        tokens: Mapping[int, int],
        spool: Spool,
        replace: Replace,
        pause: Callable[[], None],
    ) -> None:
        self.layers, self.tokens, self.spool, self.replace, self.pause = layers, tokens, spool, replace, pause
        self.group, self.stream = 0, GENERAL_AS
        self._next: dict[int, int] = {}
        self._layer, self._inside = -1, False
        self._waiting: dict[str, Sequence[Target]] = {}
        self._inputs: dict[str, dict[int, Inputs]] = {}

    def begin(self, group: int, stream: int) -> None:
        """Take the group that runs from now on."""
        self.group, self.stream = group, stream

    def run_layer(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a layer until its matrices have been replaced.

        Raises
        ------
        UnsupportedError
            If the layer changes its own arguments, or runs its matrices in another order than before.
        """
        number = self._next.get(self.group, 0)
        self._next[self.group] = number + 1
        inputs = self.layers[number] if number < len(self.layers) else ()
        if number != self._layer:  # the first group begins
            self._layer, self._waiting = number, {targets[0].tensor: targets for targets in inputs}
            self._inputs.clear()
            self.spool.clear()
        tensors = tensors_of(args, kwargs)
        versions = [one._version for one in tensors]
        out = self._run(forward, args, kwargs)
        for _ in inputs:
            self.pause()
            if out is None:
                out = self._run(forward, args, kwargs)
        if versions != [one._version for one in tensors]:
            raise UnsupportedError(f"layer {number} writes into its own inputs, so it cannot run again")
        if out is None:
            raise UnsupportedError(f"layer {number} {OTHER_ORDER}")
        return out

    def _run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._inside = True
        try:
            return forward(*args, **kwargs)
        except _Reached:
            return None
        finally:
            self._inside = False

    def take(self, target: Target, x: Tensor) -> None:
        """Take inputs (t, n) of a matrix that has no replacement yet; the corrected model stops there."""
        if not self._inside or target.tensor not in self._waiting:
            return
        own = self._inputs.setdefault(target.tensor, {})
        own.setdefault(self.stream, Inputs(self.spool)).add(x)
        if self.stream in (GENERAL_CORRECTED, TASK_CORRECTED):
            raise _Reached

    def between(self) -> None:
        """Replace the matrices at whose inputs the corrected model has stopped."""
        for first, own in list(self._inputs.items()):
            if own.keys() == {*STREAMS}:
                if any(one.rows != self.tokens[stream] for stream, one in own.items()):  # some stopped elsewhere
                    raise UnsupportedError(f"layer {self._layer} {OTHER_ORDER}")
                self.replace(self._waiting.pop(first), {s: one.row_moments(self.tokens[s]) for s, one in own.items()})
                del self._inputs[first]


class _Reached(BaseException):
    """Ends the run of a layer at inputs whose matrices have no replacement yet."""
