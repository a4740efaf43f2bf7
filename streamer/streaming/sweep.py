"""Run groups of sequences through variants of a model in one pass over its layers, and stop where a changed matrix receives its input.

A group is a few sequences under one variant. Each group runs the model's own `forward` in a greenlet, which pauses at each layer's entry
until all groups have run the layer before. A layer's weights are read once, for all groups.

Groups of a fit, which have a stream, also pause at each *site*: the input of matrices that the adapter changes. When all of them have
arrived, the caller receives their inputs and may replace the matrices' deltas, which are in use from there on. Groups without a stream are
*riders*: they run a layer after it was fitted, and end in logits, which are computed a block of the vocabulary at a time by the model's
own `forward`, from the result of the layers below the head.

Losses rely on this: tokens do not see later ones, logits come only from the head, and padding changes nothing. `check_logits` and
`changed_by_padding` test it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from streamer.errors import UnsupportedError
from streamer.storage.files import give_freed_memory_back
from streamer.streaming.groups import Group
from streamer.streaming.lazy import LazyTensor
from streamer.streaming.model import LoadedModel
from streamer.streaming.readers import ParameterReader
from streamer.streaming.resume import States
from streamer.streaming.run_time import RunTimeTensor
from streamer.streaming.schedule import Schedule
from streamer.streaming.sites import Solve, Watch
from streamer.streaming.skeleton import layer_modules, quiet_transformers, refused_errors
from streamer.streaming.spool import Spool
from streamer.streaming.turn import Stop, Turn, nothing
from streamer.streaming.variants import VariantSet

LINEAR_BY_NAME = {"FalconLinear", "Conv1D"}
"""Classes with a `forward` of their own that computes exactly ``x Wᵀ + b``, or ``x W + b``."""

PLAIN = type(None), bool, int, float, str
"""Types of a layer's arguments, besides tensors and containers of them, that change nothing outside it."""


class SweepModel(LoadedModel):
    """Model whose parameters are read when an operation needs them, under the variant of the group that runs.

    Attributes
    ----------
    layers
        Paths of the layers.
    turn
        What the model does now.
    spool
        Where groups' states lie while others run; None keeps them in memory.
    directory
        Directory of the spool; None for the system's.
    resumable
        Whether layers receive tensors and plain values alone, so that a later run can enter any of them.
    """

    def __init__(self, job: VariantSet) -> None:
        super().__init__(job)
        self.turn = Turn()
        self.spool: Spool | None = None
        self.directory: Path | None = None
        self.resumable = True
        positions = itertools.count()
        for module, parameters in self.modules:
            for name, tensor in parameters.items():
                reader = ParameterReader(
                    self.turn,
                    self.values,
                    tensor,
                    next(positions),
                    module is self._head,
                    name == "weight" and self._is_rounded(module, tensor),
                )
                module._parameters[name] = LazyTensor.of(reader)  # type: ignore[assignment]  # torch types a Parameter, which this stands in for
        layers = layer_modules(self.network)
        self.layers = list(layers)
        for layer in layers.values():
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)
            layer.register_forward_hook(self._leave)
            layer.forward = partial(self._layer, layer.forward)
        for module in self._inner:
            module.register_forward_hook(self._end_below_head)

    def use(self, job: VariantSet) -> None:
        """Run other variants, or other findings, from now on."""
        self.values.job = job
        self.values.cache.clear()

    def limit(self, room: int, spools: bool) -> None:
        """Limit the memory of the next runs: the bytes of a layer's values that groups share, and whether states lie in a spool."""
        self.values.cache.room = room
        self.spool = Spool(self.directory) if spools else None

    def _is_rounded(self, module: nn.Module, weight: RunTimeTensor) -> bool:
        """Test whether a product uses only the base's weight and is to round its factors to bfloat16.

        A weight that the adapter replaces or changes by a dense delta is not rounded: rounding would erase its difference from the base.
        """
        if not self.job.rounds_products or self.values.dense(weight) or self.values.edited(weight):
            return False
        kind = type(module)
        return kind.forward is nn.Linear.forward or kind.__name__ in LINEAR_BY_NAME

    @contextlib.contextmanager
    def running(self, stop: Stop) -> Iterator[None]:
        """Compute without gradients, in silence, and turn errors of the model's own code into ours."""
        self.turn.stop = stop
        base = self.job.plan.base.path
        try:
            with torch.no_grad(), quiet_transformers(), refused_errors(base, self.network):
                yield
        finally:
            self.turn.end()

    @contextlib.contextmanager
    def alone(
        self, group: Group, stop: Stop, leave: Callable[[], None] = nothing
    ) -> Iterator[None]:
        """Let the model run one group by itself inside the context, without sites, through all layers and the whole head.

        Parameters
        ----------
        leave
            Called after each layer.
        """
        self.turn.group = group
        with self.running(stop):
            self.turn.leave = leave
            yield

    def run(
        self,
        groups: Sequence[Group],
        stop: Stop,
        solve: Solve = nothing,
        watch: Watch | None = None,
        after: Callable[[str], None] = nothing,
        states: States | None = None,
    ) -> None:
        """Run groups through all layers.

        Parameters
        ----------
        stop
            Called before each parameter is read; may raise to stop.
        solve
            Receives the inputs of each site.
        watch
            Says which matrices make sites.
        after
            Called with a layer's path each time that all groups have run it; may raise to stop.
        states
            File from which a killed run resumes.
        """
        done = 0 if states is None else states.load(self.values, groups)
        layers = iter(["embeddings", *self.layers][done:])
        with (
            self.running(stop),
            contextlib.closing(Schedule(self.turn, groups, self.spool, self._forward)) as schedule,
        ):
            self.turn.watch = watch
            while not schedule.ended:
                schedule.fit(solve)
                schedule.ride()
                after(next(layers, "logits"))
                if states is not None and self.resumable and 0 < done < len(self.layers):
                    states.save(self.values, groups, done, self.spool)
                if done:
                    self.values.cache.clear()
                done += 1
                give_freed_memory_back()

    def _forward(self) -> None:
        self.network(input_ids=self.turn.group.ids.to(self.job.device), use_cache=False)

    def _enter(self, layer: nn.Module, *args: Any) -> None:
        """Pause the group before a layer."""
        group = self.turn.group
        leaves = tree_flatten(args)[0]
        follows = group.follows(leaves)
        if group.skips:
            return
        self.resumable &= follows and all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves)
        if self.spool is not None:
            group.enter(args)
        self.turn.pause(None)

    def _layer(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a layer, or return what an earlier run's last layer returned."""
        group = self.turn.group
        if not group.skips:
            return forward(*args, **kwargs)
        group.skips -= 1
        if not group.skips:  # the file's memory cannot be written to
            move = partial(Tensor.to, device=self.job.device, copy=True)
            group.out = tree_map_only(Tensor, move, group.out)
        return group.out

    def _leave(self, layer: nn.Module, args: Any, out: Any) -> None:
        self.turn.group.out = out
        self.turn.leave()

    def _end_below_head(self, module: nn.Module, args: Any, out: Any) -> None:
        if self.turn.group.stream is None:
            self.turn.group.results[module] = out

    def logits(
        self,
        parts: Sequence[Sequence[Group]],
        block: int | Iterable[tuple[int, int]],
        stop: Stop,
    ) -> Iterator[tuple[int, int, int, Tensor]]:
        """Compute the logits of riders that have run, one block of the vocabulary at a time.

        Parameters
        ----------
        parts
            Groups with the same sequences under different variants.
        block
            Number of tokens of the vocabulary to compute together, or ranges of them.

        Yields
        ------
        i, j, part, logits
            Logits (variants, sequences, length, j − i) of tokens i to j, for the part with this number.

        Raises
        ------
        UnsupportedError
            If the model does not compute all logits with its head alone, token by token.
        """
        if isinstance(block, int):
            ends = [*range(block, self.vocabulary, block), self.vocabulary]
            block = zip([0, *ends], ends, strict=False)
        for i, j in block:
            for number, part in enumerate(parts):
                with self.running(stop):
                    self.turn.rows = i, j
                    logits = torch.stack([self._logits(group, j - i) for group in part])
                yield i, j, number, logits
            self.values.cache.clear()

    def _logits(self, group: Group, size: int) -> Tensor:
        """Compute a group's logits of the block of the vocabulary in use: (sequences, length, block)."""
        self.turn.group = group
        outer = next((module for module in self._inner if module in group.results), None)
        if outer is None:
            raise UnsupportedError(
                f"{self.job.plan.base.path}: {type(self.network).__name__} does not compute its logits with a model of its own and its "
                "head alone; not supported by evaluate and repair"
            )
        # If the outermost model below the head returns its result again, nothing inside it runs.
        result = group.results[outer]
        ids = group.ids.to(self.job.device)
        outer.forward = lambda *args, **kwargs: result
        try:
            out: Tensor = self.network(input_ids=ids, use_cache=False).logits
        finally:
            del outer.forward  # uncovers the class's own
        if out.shape != (*ids.shape, size):
            raise UnsupportedError(
                f"{self.job.plan.base.path}: {type(self.network).__name__} gives logits {list(out.shape)} for {size} tokens of "
                "the vocabulary: it does not compute all logits with its head alone; not supported by evaluate and repair"
            )
        return out
