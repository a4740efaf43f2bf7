"""Collect the inputs of modules, such as those that an adapter changes, in a pass over the base.

General text runs through the base, task text through base + adapter. Sequences run in groups that take turns: each group runs one layer,
then the next group does. When all groups have run a layer, its inputs are complete; their second moments are passed on, and the inputs
are dropped before the next layer begins. The inputs are kept in a temporary file; memory holds the layer's outputs on all tokens. Each
group reads a layer's weights once.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from streamer.errors import UnsupportedError
from streamer.linalg.allocation import CPU
from streamer.linalg.torch_state import computes_alone, free_product_buffers
from streamer.methods import UNCHANGED
from streamer.plan.plan import Plan
from streamer.plan.targets import Target, TensorSlice
from streamer.storage.system import give_freed_memory_back
from streamer.streaming.collected import Collected, Complete
from streamer.streaming.collecting import CollectingReader, FactorDeltas, Setting
from streamer.streaming.extra import quiet_transformers, refused_errors
from streamer.streaming.installed import is_rounded
from streamer.streaming.layer_runs import (
    Arguments,
    Elsewhere,
    LayerResult,
    LayerRun,
    Taken,
    containers_of,
    is_portable,
    layer_modules,
    tensors_of,
)
from streamer.streaming.lazy import LazyTensor
from streamer.streaming.model import LoadedModel
from streamer.streaming.run_time import RunTimeTensor
from streamer.streaming.spool import Spool
from streamer.streaming.spooled_inputs import Written
from streamer.streaming.streams import GENERAL_AS, TASK_AS, Group, tokens_of
from streamer.streaming.turns import Turns
from streamer.streaming.values import VariantSet
from streamer.streaming.variants import ADAPTER, BASE, Variant


class Collecting(TypedDict, total=False):
    """Options of `CollectingModel`."""

    rounds_products: bool
    directory: Path | None
    device: torch.device
    elsewhere: Elsewhere | None


class CollectingModel(LoadedModel):
    """Model of a base, with or without an adapter, that passes on the moments of its modules' inputs.

    Parameters
    ----------
    strict
        Whether to refuse a matrix that is multiplied in several layers; otherwise `repeated` lists it.
    directory
        Directory for a layer's inputs; None for the system's temporary directory.
    device
        See `VariantSet`.
    elsewhere
        Runs one layer for all groups at a time; None runs layers here, in turns. The results are the same.

    Attributes
    ----------
    repeated
        Names of matrices that are multiplied in several layers; only the inputs of one layer were passed on.
    """

    def __init__(
        self, plan: Plan, *, strict: bool, rounds_products: bool = False, directory: Path | None = None,
        device: torch.device = CPU, elsewhere: Elsewhere | None = None,
    ) -> None:  # fmt: skip
        variants = Variant(BASE, None), Variant(ADAPTER, UNCHANGED)
        super().__init__(VariantSet(plan, variants, None, rounds_products=rounds_products, device=device), together=1)
        self.setting = Setting(self.values, FactorDeltas(plan, device), self.batch)
        self._collected = Collected[Any](Spool(directory), strict)
        self._turns: Turns | None = None
        self._elsewhere, self._group = elsewhere, 0
        self._asked: dict[int, LayerRun | None] = {}
        self._answers: dict[int, LayerResult] = {}
        self._layers = layer_modules(self._model)
        for _, module, own in self.modules:
            for name, tensor in own.items():
                rounded = name == "weight" and is_rounded(self.values, module, tensor)
                reader = self._reader(tensor, head=module is self._head, rounded=rounded)
                module._parameters[name] = LazyTensor.of(reader)  # type: ignore[assignment]  # torch types a Parameter, which this stands in for
        for layer in self._layers.values():
            layer.register_forward_pre_hook(self._before_layer)
            layer.register_forward_hook(self._after_layer)

    @abstractmethod
    def _reader(self, tensor: RunTimeTensor, *, head: bool, rounded: bool) -> CollectingReader[Any]:
        """Make the reader of a parameter."""

    @property
    def repeated(self) -> set[str]:
        """Return names of matrices that are multiplied in several layers; see the class."""
        return self._collected.repeated

    def collect(self, groups: Sequence[Group], complete: Complete[Any]) -> None:
        """Run all groups, and pass on the moments of each module's inputs once they are complete and every text has some.

        Raises
        ------
        NumericError
            If an input is NaN or Inf.
        """
        tokens, path = tokens_of(groups), self.job.plan.base.path

        def between() -> None:
            self._collected.hand_on(complete, tokens, path)
            self._answer(groups)

        try:
            with self._replaced(self._forward):
                self._run_groups(groups, between)
        finally:
            self._collected.spool.close()

    @contextlib.contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Inside the context, call `forward` instead of each layer's own, with the layer's path and its own `forward`."""
        for path, layer in self._layers.items():
            layer.forward = partial(forward, path, layer.forward)
        try:
            yield
        finally:
            for layer in self._layers.values():
                del layer.forward  # uncovers the class's own

    def _forward(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = self._ask(path, (args, kwargs))
        return forward(*args, **kwargs) if found is None else found.out

    def _ask(self, path: str, arguments: Arguments) -> LayerResult | None:
        """Have a layer run elsewhere for the current group, and return its result; None if it must run here."""
        if self._elsewhere is None:
            return None
        stream, group = self._collected.stream, self._group
        run = LayerRun(path, stream, self.batch.sequences, self.batch.length, arguments)
        self._asked[group] = run if is_portable(arguments) else None
        self._pause()
        found = self._answers.pop(group, None)
        for container, values in zip(containers_of(arguments), found.shared if found else (), strict=found is not None):
            container.update(values)
        return found

    def _pause(self) -> None:
        assert self._turns is not None
        self._turns.pause()

    def _answer(self, groups: Sequence[Group]) -> None:
        """Run the requested layers elsewhere, and add their inputs in the order of the groups."""
        asked, self._asked = self._asked, {}
        runs = {number: self._completed(run) for number, run in asked.items() if run is not None}
        if self._elsewhere is None or len(runs) < len(asked):
            return
        found: dict[int, tuple[LayerResult, list[Written | None]]] = {}
        for number, result in self._elsewhere(runs):
            if result is None:
                return  # all run here, so that inputs come in the order of the groups
            inputs = [None if one.size is not None else one.x for one in result.taken]
            found[number] = result, [None if x is None else Written.to(self._spool, x) for x in inputs]
        for number in sorted(found):
            result, written = found[number]
            self._begin(number, groups[number])
            for tensor in self.inside(runs[number].layer):
                groups[number].on_read(tensor)
            for one, place in zip(result.taken, written, strict=True):
                self._take(replace(one, matrix=self._own(one.matrix), x=one.x if one.size else None), place)
            self.values.applied |= result.applied
            self.values.read |= result.read
            self._collected.whole |= result.whole
            self._collected.forget_inputs()
            self._answers[number] = result

    @property
    def _spool(self) -> Spool:
        return self._collected.spool

    def _completed(self, run: LayerRun) -> LayerRun:
        return run

    def _take(self, one: Taken, written: Written | None) -> None:
        self._collected.add(one, written)

    def _own(self, matrix: Any) -> Any:
        """Return this process' object for a matrix of another process."""
        return matrix

    def run_layer(self, run: LayerRun) -> LayerResult | None:
        """Run a layer for another process; None if it writes into its arguments."""
        collected, values, arguments = self._collected, self.values, run.arguments
        collected.taken, collected.whole, values.applied, values.read = [], set(), set(), set()
        self._set_stream(run.stream, run.sequences, run.length)
        self.batch.vocabulary = 0, 1
        tensors = tensors_of(*arguments)
        versions = [one._version for one in tensors]
        with torch.no_grad(), quiet_transformers(), refused_errors(self.job.plan.base.path, self._model):
            out = self._run_one(run, *arguments)
        collected.forget_inputs()
        if versions != [one._version for one in tensors]:
            return None
        shared = [dict(one) for one in containers_of(arguments)]
        return LayerResult(out, shared, collected.taken, values.applied, values.read, collected.whole)

    def _run_one(self, run: LayerRun, args: Any, kwargs: Any) -> Any:
        return self._layers[run.layer].forward(*args, **kwargs)

    def _run_groups(self, groups: Sequence[Group], between: Callable[[], None]) -> None:
        """Run groups in turns; `between` is called each time all groups have reached the same layer."""
        self._turns = Turns([partial(self._run_group, group) for group in groups])
        self.batch.vocabulary = 0, 1

        def tidy() -> None:  # after a turn, whose thread would keep memory while others run
            if computes_alone():
                free_product_buffers()
            give_freed_memory_back()

        def begin(number: int) -> None:
            tidy()
            self._begin(number, groups[number])

        def round_ends() -> None:
            tidy()
            between()

        try:
            with quiet_transformers(), refused_errors(self.job.plan.base.path, self._model):
                self._turns.run(begin, round_ends)
        finally:
            self.batch.vocabulary, self._turns = None, None

    def _begin(self, number: int, group: Group) -> None:
        """Set the stream and variant for a group's turn."""
        self._group = number
        self.batch.on_read = group.on_read
        self._set_stream(group.stream, len(group.text.ids), group.text.longest)

    def _set_stream(self, stream: int, sequences: int, length: int) -> None:
        """Set the stream, its variant, and how many sequences of how many tokens run."""
        self._collected.stream, self.setting.variant = stream, GENERAL_AS if stream == GENERAL_AS else TASK_AS
        self.batch.sequences, self.batch.length = sequences, length

    def _run_group(self, group: Group) -> None:
        ids, _ = group.text.padded(group.text.longest)
        with torch.no_grad():
            self._model(input_ids=torch.from_numpy(ids).to(self.job.device), use_cache=False)

    def _before_layer(self, module: nn.Module, args: object) -> None:
        """Pause; of the earlier layers only the last one's outputs are still in memory."""
        if self._turns is not None and self._elsewhere is None:  # if layers run elsewhere, `_ask` pauses
            self._turns.pause()

    def _after_layer(self, module: nn.Module, args: object, out: object) -> None:
        self._collected.forget_inputs()


class InputModel(CollectingModel):
    """Model of a base with an adapter that passes on the inputs of the modules that the adapter changes.

    Attributes
    ----------
    unseen
        Names of the matrices that no token of the general text, or none of the task text, reached in a pass.
    """

    def __init__(self, plan: Plan, **options: Unpack[Collecting]) -> None:
        super().__init__(plan, strict=True, **options)
        self.unseen: list[str] = []
        self._targets = {target.tensor: target for target in plan.targets}

    def _own(self, matrix: Target) -> Target:
        return self._targets[matrix.tensor]

    def _reader(self, tensor: RunTimeTensor, *, head: bool, rounded: bool) -> CollectingReader[Target]:
        return _TargetReader(self._collected, self.setting, tensor, head=head, rounded=rounded)

    def collect(self, groups: Sequence[Group], complete: Complete[Target]) -> None:
        """Collect as in `CollectingModel`, and check that everything the adapter changes was used.

        Raises
        ------
        NumericError
            If an input is NaN or Inf.
        UnsupportedError
            If a module that the adapter changes multiplies its inputs in an unknown way, or runs in several layers.
        """
        super().collect(groups, complete)
        if whole := sorted(self._collected.whole - self._collected.complete):
            raise UnsupportedError(
                f"{self.job.plan.base.path}: the weights of {len(whole)} matrices are not used by a matrix product or look-up (a "
                f"convolution, for example; first: {whole[0]!r}), so their inputs cannot be collected; use `mitigate --method shrink`"
            )
        self.unseen = sorted({t.tensor for t in self.job.plan.targets} - self._collected.complete)
        self.check_all_used()


class _TargetReader(CollectingReader[Target]):
    """Passes on the inputs of an adapter's targets."""

    def matrices(self, slice_: TensorSlice, crossed: bool) -> Iterable[Target]:
        """List the targets. A tied head has the other side: it multiplies with the transpose of an embedding's delta."""
        pairs = self.setting.values.plan.by_weight.get(slice_.weight, ())
        return [t for t, part in pairs if slice_.index in (None, part.index) and t.transposed == crossed]

    def tables(self) -> Iterable[tuple[Target, int]]:
        """List the targets that are embeddings."""
        pairs = self.setting.values.targets(self.tensor)
        return [(t, t.module.shape[1]) for t, part in pairs if t.transposed and part.rows is None]

    def names(self) -> Iterable[str]:
        """Return the names of the targets."""
        return [target.tensor for target, _ in self.setting.values.targets(self.tensor)]
