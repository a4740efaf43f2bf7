"""Replace the deltas layer by layer, so that each replacement sees the inputs that earlier replacements produce.

General text runs through the base and the corrected model; task text runs through base + adapter and the corrected model. The base and
base + adapter run each layer once. The corrected model runs a layer up to the first inputs whose matrices are not replaced yet. After their
replacement it starts the layer again and runs to the next such inputs, and finally to the end. Restarting saves memory: a layer's
intermediate results on all tokens are many times larger than its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

from torch import Tensor

from streamer.errors import UnsupportedError
from streamer.linalg.moments import RowMoments
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.streaming.collecting import FactorDeltas
from streamer.streaming.inputs import Collecting, InputModel
from streamer.streaming.run_time import (
    GENERAL_AS,
    GENERAL_CORRECTED,
    TASK_AS,
    TASK_CORRECTED,
    Arguments,
    Group,
    LayerResult,
    LayerRun,
    Taken,
    tensors_of,
    tokens_of,
)
from streamer.streaming.spool import Inputs, Spool, Written

CORRECTED = GENERAL_CORRECTED, TASK_CORRECTED

STREAMS = GENERAL_AS, TASK_AS, GENERAL_CORRECTED, TASK_CORRECTED

OTHER_ORDER = "runs its matrices in a different order after some are replaced"

Ask = Callable[[str, Arguments], LayerResult | None]
"""Has a layer run elsewhere, given its path and arguments; returns None if it must run here."""

Replace = Callable[[Sequence[Target], Mapping[int, RowMoments]], None]
"""Receives targets that share their inputs, and the moments of these inputs by stream, with rows in the same order."""


class CorrectedModel(InputModel):
    """Model of a base with an adapter that collects inputs first and has its deltas replaced afterwards."""

    def __init__(self, plan: Plan, **options: Unpack[Collecting]) -> None:
        super().__init__(plan, **options)
        self.directory = options.get("directory")
        self._by_layer: _LayerByLayer | None = None
        self._deltas: tuple[FactorDeltas, FactorDeltas] = self.setting.deltas, self.setting.deltas

    @property
    def corrects(self) -> bool:
        """Test whether any layer has matrices to replace."""
        return any(self._replaceable)

    @property
    def _replaceable(self) -> list[list[list[Target]]]:
        """List, for each layer, the targets grouped by shared inputs. Experts are excluded: changed routers send them other tokens.

        The first round covers what ran before the first layer.
        """
        return [
            [ts for ts in one if all(t.module.layer_kind != "expert" for t in ts)] for one in self._collected.rounds[1:]
        ]

    def correct(self, groups: Sequence[Group], rights: Mapping[str, Tensor], replace: Replace) -> None:
        """Run all groups, for each of the `STREAMS`, and have every matrix replaced whose inputs come from all tokens.

        Parameters
        ----------
        rights
            R' (n, r) of all targets, by `Target.tensor`; `replace` updates them during the run.

        Raises
        ------
        UnsupportedError
            If a layer changes its own arguments, or runs its matrices in a different order than before.
        """
        before, corrected = self.setting.deltas, FactorDeltas(self.job.plan, self.job.device, rights)
        spool, ask = Spool(self.directory), None if self._elsewhere is None else self._ask
        self._by_layer = by_layer = _LayerByLayer(
            self._replaceable, tokens_of(groups), spool, replace, self._pause, ask
        )
        self._deltas = before, corrected
        self._collected.instead = by_layer.take

        def between() -> None:
            self._answer(groups)
            by_layer.between()

        try:
            with self._replaced(by_layer.run_layer):
                self._run_groups(groups, between)
        finally:
            self.setting.deltas, self._by_layer, self._collected.instead = before, None, None
            spool.close()

    def _begin(self, number: int, group: Group) -> None:
        super()._begin(number, group)
        if self._by_layer is not None:
            self._by_layer.group, self._by_layer.stream = number, group.stream
            self.setting.deltas = self._deltas[group.stream in CORRECTED]

    @property
    def _spool(self) -> Spool:
        return super()._spool if self._by_layer is None else self._by_layer.spool

    def _completed(self, run: LayerRun) -> LayerRun:
        """Add to a run of the correction the matrices whose inputs it collects, and the current factors of its targets."""
        if self._by_layer is None:
            return run
        names = {t.tensor for tensor in self.inside(run.layer) for t, _ in self.values.targets(tensor)}
        all_rights = self._deltas[run.stream in CORRECTED].rights
        rights = None if all_rights is None else {name: all_rights[name] for name in sorted(names)}
        return replace(run, waiting=frozenset(self._by_layer.waiting), rights=rights)

    def _take(self, one: Taken, written: Written | None) -> None:
        if self._by_layer is None:
            super()._take(one, written)
        elif written is not None:
            self._by_layer.add(one.matrix, written)

    def _run_one(self, run: LayerRun, args: Any, kwargs: Any) -> Any:
        """Run a layer with the adapter's deltas, or with the corrected ones up to the first inputs that are collected."""
        waiting, before = run.waiting, self.setting.deltas
        if waiting is None:
            return super()._run_one(run, args, kwargs)

        def take(target: Target, x: Tensor) -> None:
            if target.tensor in waiting:
                taken.append(Taken(target, target.tensor, x.clone()))
                if run.rights is not None:
                    raise _Reached

        taken = self._collected.taken = []
        self._collected.instead = take
        if run.rights is not None:
            self.setting.deltas = FactorDeltas(self.job.plan, self.job.device, run.rights)
        try:
            return super()._run_one(run, args, kwargs)
        except _Reached:
            return None
        finally:
            self.setting.deltas, self._collected.instead = before, None


@dataclass
class _LayerByLayer:
    """Inputs of the layer that is running, and how often each group has run layers.

    Attributes
    ----------
    layers
        For each layer in running order, the targets grouped by shared inputs; the first target names its group.
    tokens
        Number of tokens of each of the `STREAMS`.
    pause
        Ends a group's turn.
    ask
        Has a layer run elsewhere, which also ends the group's turn; None runs all layers here.
    group, stream
        The group that runs, and its stream.
    waiting
        The layer's groups of targets that are not replaced yet, by their names.
    """

    layers: Sequence[Sequence[Sequence[Target]]]
    tokens: Mapping[int, int]
    spool: Spool
    replace: Replace
    pause: Callable[[], None]
    ask: Ask | None
    group: int = 0
    stream: int = GENERAL_AS
    waiting: dict[str, Sequence[Target]] = field(default_factory=dict)
    _next: dict[int, int] = field(default_factory=dict)
    _layer: int = -1
    _inside: bool = False
    _inputs: dict[str, dict[int, Inputs]] = field(default_factory=dict)

    def run_layer(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a layer until its matrices have been replaced.

        Raises
        ------
        UnsupportedError
            If the layer changes its own arguments, or runs its matrices in a different order than before.
        """
        number = self._next.get(self.group, 0)
        self._next[self.group] = number + 1
        inputs = self.layers[number] if number < len(self.layers) else ()
        if number != self._layer:  # the first group begins
            self._layer, self.waiting = number, {targets[0].tensor: targets for targets in inputs}
            self._inputs.clear()
            self.spool.clear()
        tensors = tensors_of(args, kwargs)
        versions = [one._version for one in tensors]
        out = self._run(path, forward, args, kwargs)
        for _ in inputs:
            if self.ask is None or out is not None:  # `ask` itself pauses
                self.pause()
            if out is None:
                out = self._run(path, forward, args, kwargs)
        if versions != [one._version for one in tensors]:
            raise UnsupportedError(f"layer {number} writes into its own inputs, so it cannot run again")
        if out is None:
            raise UnsupportedError(f"layer {number} {OTHER_ORDER}")
        return out

    def _run(self, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.ask is not None and (found := self.ask(path, (args, kwargs))) is not None:
            return found.out
        self._inside = True
        try:
            return forward(*args, **kwargs)
        except _Reached:
            return None
        finally:
            self._inside = False

    def take(self, target: Target, x: Tensor) -> None:
        """Add inputs (t, n) of a matrix that is not replaced yet; the corrected model stops here."""
        if not self._inside or target.tensor not in self.waiting:
            return
        self.add(target, Written.to(self.spool, x))
        if self.stream in CORRECTED:
            raise _Reached

    def add(self, target: Target, x: Written) -> None:
        """Add inputs of a matrix to the current stream."""
        self._inputs.setdefault(target.tensor, {}).setdefault(self.stream, Inputs(self.spool)).add(x)

    def between(self) -> None:
        """Replace the matrices at whose inputs the corrected model stopped."""
        for first, own in list(self._inputs.items()):
            if own.keys() == {*STREAMS}:
                if any(one.rows != self.tokens[stream] for stream, one in own.items()):  # some stopped elsewhere
                    raise UnsupportedError(f"layer {self._layer} {OTHER_ORDER}")
                self.replace(self.waiting.pop(first), {s: one.row_moments(self.tokens[s]) for s, one in own.items()})
                del self._inputs[first]


class _Reached(BaseException):
    """Ends a layer's run at inputs whose matrices are not replaced yet."""
