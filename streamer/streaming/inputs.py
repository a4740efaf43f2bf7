"""Collect the inputs of modules, those that an adapter changes for example, in a pass over the base.

General text runs as the base, the task's as base + adapter. Sequences run in groups, by turns: each group runs one layer, then the next
group does, so that a layer's inputs are complete when all have; their second moments are handed on, and the inputs dropped before the next
layer begins. The inputs lie in a temporary file; memory is that of the layer's outputs on all tokens. A layer's weights are read once for
each group.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor, nn

from streamer.errors import UnsupportedError
from streamer.linalg.allocation import CPU
from streamer.methods import UNCHANGED
from streamer.plan.plan import Plan
from streamer.plan.targets import Target, TensorSlice
from streamer.storage.system import give_freed_memory_back
from streamer.streaming.collected import Collected, Complete, M
from streamer.streaming.differentiable import CoefficientDeltas, DifferentiableReader, Setting
from streamer.streaming.extra import quiet_transformers, refused_errors
from streamer.streaming.installed import is_rounded
from streamer.streaming.layers import layer_modules
from streamer.streaming.lazy import LazyTensor
from streamer.streaming.model import LoadedModel
from streamer.streaming.run_time import RunTimeTensor, Source
from streamer.streaming.spool import Spool
from streamer.streaming.streams import GENERAL_AS, TASK_AS, Group, tokens_of
from streamer.streaming.turns import Turns
from streamer.streaming.values import Job
from streamer.streaming.variants import ADAPTER, BASE, Variant


class CollectingModel(LoadedModel):
    """A model of a base, with an adapter or without, which hands on the moments of its modules' inputs.

    Parameters
    ----------
    strict
        Whether to refuse a matrix that is multiplied in several layers; others are noted in `repeated`.
    directory
        Where a layer's inputs have their blocks; None for the system's.
    device
        See `Job`.

    Attributes
    ----------
    repeated
        Names of matrices that are multiplied in several layers: what was handed on of them are the inputs of one.
    """

    def __init__(
        self, plan: Plan, *, strict: bool, rounds_products: bool = False, directory: Path | None = None,
        device: torch.device = CPU,
    ) -> None:  # fmt: skip
        variants = Variant(BASE, None), Variant(ADAPTER, UNCHANGED)
        super().__init__(Job(plan, variants, None, rounds_products=rounds_products, device=device), together=1)
        self.setting = Setting(self.values, CoefficientDeltas(plan, None, device), self.batch)
        self._collected = Collected[Any](Spool(directory), strict)
        self._turns: Turns | None = None
        for _, module, own in self.modules:
            for name, tensor in own.items():
                rounded = name == "weight" and is_rounded(self.values, module, tensor)
                reader = self._reader(self._collected, tensor, head=module is self._head, rounded=rounded)
                module._parameters[name] = LazyTensor.of(reader)  # type: ignore[assignment]  # torch types a Parameter, which this stands in for
        for layer in layer_modules(self._model).values():
            layer.register_forward_pre_hook(self._before_layer)
            layer.register_forward_hook(self._after_layer)

    @abstractmethod
    def _reader(
        self, collected: Collected[Any], tensor: RunTimeTensor, *, head: bool, rounded: bool
    ) -> CollectingReader[Any]:
        """Make the reader of a parameter."""

    @property
    def repeated(self) -> set[str]:
        """See the class."""
        return self._collected.repeated

    def collect(self, groups: Sequence[Group], complete: Complete[Any]) -> None:
        """Run all groups, and hand on the moments of each module's inputs as soon as all are there, if every text has any.

        Raises
        ------
        NumericError
            If an input is NaN or Inf.
        """
        tokens, path = tokens_of(groups), self.job.plan.base.path
        try:
            self._run_groups(groups, lambda: self._collected.hand_on(complete, tokens, path))
        finally:
            self._collected.spool.close()

    def _run_groups(self, groups: Sequence[Group], between: Callable[[], None]) -> None:
        """Run groups by turns; `between` is called each time that all have come as far."""
        self._turns = Turns([partial(self._run_group, group) for group in groups])
        self.batch.vocabulary = 0, 1

        def begin(number: int) -> None:
            give_freed_memory_back()  # of the turn before, whose thread would keep it
            self._begin(number, groups[number])

        try:
            with quiet_transformers(), refused_errors(self.job.plan.base.path, self._model):
                self._turns.run(begin, between)
        finally:
            self.batch.vocabulary, self._turns = None, None

    def _begin(self, number: int, group: Group) -> None:
        """Set what a group's turn runs as."""
        self._collected.stream, self.setting.variant = (
            group.stream,
            GENERAL_AS if group.stream == GENERAL_AS else TASK_AS,
        )
        self.batch.on_read = group.on_read
        self.batch.sequences, self.batch.length = len(group.text.ids), group.text.longest

    def _run_group(self, group: Group) -> None:
        ids, _ = group.text.padded(group.text.longest)
        with torch.no_grad():
            self._model(input_ids=torch.from_numpy(ids).to(self.job.device), use_cache=False)

    def _before_layer(self, module: nn.Module, args: object) -> None:
        """Pause: of the layers before nothing but the last one's outputs is held any more."""
        if self._turns is not None:
            self._turns.pause()

    def _after_layer(self, module: nn.Module, args: object, out: object) -> None:
        self._collected.forget_inputs()


class InputModel(CollectingModel):
    """The model of a base with an adapter, which hands on the inputs of the modules that the adapter changes.

    Attributes
    ----------
    unseen
        Names of the matrices that no token of the general text, or none of the task's, reached in a pass.
    """

    def __init__(
        self, plan: Plan, *, rounds_products: bool = False, directory: Path | None = None, device: torch.device = CPU
    ) -> None:
        super().__init__(plan, strict=True, rounds_products=rounds_products, directory=directory, device=device)
        self.unseen: list[str] = []

    def _reader(
        self, collected: Collected[Target], tensor: RunTimeTensor, *, head: bool, rounded: bool
    ) -> CollectingReader[Target]:
        return _TargetReader(collected, self.setting, tensor, head=head, rounded=rounded)

    def collect(self, groups: Sequence[Group], complete: Complete[Target]) -> None:
        """Collect, see `CollectingModel`; all that the adapter changes must have been used.

        Raises
        ------
        NumericError
            If an input is NaN or Inf.
        UnsupportedError
            If a module that the adapter changes multiplies inputs in a way that is not seen here, or runs in several layers.
        """
        super().collect(groups, complete)
        if whole := sorted(self._collected.whole - self._collected.complete):
            raise UnsupportedError(
                f"{self.job.plan.base.path}: the weights of {len(whole)} matrices are not used by a matrix product or look-up (a "
                f"convolution, for example; first: {whole[0]!r}), so their inputs cannot be collected; take grain 'direction'"
            )
        self.unseen = sorted({t.tensor for t in self.job.plan.targets} - self._collected.complete)
        self.check_all_used()


class CollectingReader(DifferentiableReader, Generic[M]):
    """Reads one parameter of a model, and hands on what it is multiplied with."""

    def __init__(
        self, collected: Collected[M], setting: Setting, tensor: RunTimeTensor, *, head: bool, rounded: bool
    ) -> None:
        super().__init__(setting, tensor, head=head, rounded=rounded)
        self._collected = collected

    @abstractmethod
    def matrices(self, held: TensorSlice, crossed: bool) -> Iterable[M]:
        """List the matrices in a slice whose inputs are multiplied with its columns or, if `crossed`, with its rows."""

    @abstractmethod
    def tables(self) -> Iterable[tuple[M, int]]:
        """List the matrices whose one-hot inputs are looked up in this parameter, and how many such inputs there are."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Name all matrices in this parameter."""

    def multiply(self, x: Tensor, source: Source, transposed: bool, rows: tuple[int, int]) -> Tensor:
        """``x Mᵀ``, or `transposed`, ``x M``; what is on the input's side of a matrix are its inputs."""
        X = x.reshape(-1, x.shape[-1])
        # The adapted model's weights have the targets; a head may be tied to an embedding in the base alone.
        adapted, at = self.tensor.adapted[self.sources.index(source)], 0
        crossed = transposed != adapted.transposed
        for held in adapted.slices:
            size = self.setting.values.weight_of(held, TASK_AS).matrix[0]
            for matrix in self.matrices(held, crossed):
                self._collected.take(matrix, X[:, at : at + size] if crossed else X)
            at += size
        return super().multiply(x, source, transposed, rows)

    def values_of(self, source: Source) -> Tensor:
        """Read a source whole, and note that its inputs are not seen."""
        self._collected.whole.update(self.names())
        return super().values_of(source)

    def gather(self, ids: Tensor) -> Tensor | None:
        """Look rows up, which are the inputs of an embedding."""
        found = super().gather(ids)
        if found is not None:
            for matrix, size in self.tables():
                self._collected.take_ids(matrix, ids, size)
        return found


class _TargetReader(CollectingReader[Target]):
    """Hands on the inputs of an adapter's targets."""

    def matrices(self, held: TensorSlice, crossed: bool) -> Iterable[Target]:
        """List the targets; the other side is that of a tied head, which multiplies with an embedding's delta transposed."""
        pairs = self.setting.values.plan.by_weight.get(held.weight, ())
        return [t for t, part in pairs if held.index in (None, part.index) and t.transposed == crossed]

    def tables(self) -> Iterable[tuple[Target, int]]:
        """List the embeddings' targets."""
        pairs = self.setting.values.targets(self.tensor)
        return [(t, t.module.shape[1]) for t, part in pairs if t.transposed and part.rows is None]

    def names(self) -> Iterable[str]:
        """Name the targets."""
        return [target.tensor for target, _ in self.setting.values.targets(self.tensor)]
