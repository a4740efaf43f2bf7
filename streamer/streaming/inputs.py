"""Collect the inputs of modules, such as those that an adapter changes, in a pass over the base.

General text runs through the base, task text through base + adapter. Sequences run in groups that take turns: each group runs one layer,
then the next group does. When all groups have run a layer, its inputs are complete; their second moments are passed on, and the inputs
are dropped before the next layer begins. The inputs are kept in a temporary file; memory holds the layer's outputs on all tokens. Each
group reads a layer's weights once.
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
    """Model of a base, with or without an adapter, that passes on the moments of its modules' inputs.

    Parameters
    ----------
    strict
        Whether to refuse a matrix that is multiplied in several layers; otherwise `repeated` lists it.
    directory
        Directory for a layer's inputs; None for the system's temporary directory.
    device
        See `Job`.

    Attributes
    ----------
    repeated
        Names of matrices that are multiplied in several layers; only the inputs of one layer were passed on.
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
        try:
            self._run_groups(groups, lambda: self._collected.hand_on(complete, tokens, path))
        finally:
            self._collected.spool.close()

    def _run_groups(self, groups: Sequence[Group], between: Callable[[], None]) -> None:
        """Run groups in turns; `between` is called each time all groups have reached the same layer."""
        self._turns = Turns([partial(self._run_group, group) for group in groups])
        self.batch.vocabulary = 0, 1

        def begin(number: int) -> None:
            give_freed_memory_back()  # from the turn before, whose thread would keep it
            self._begin(number, groups[number])

        try:
            with quiet_transformers(), refused_errors(self.job.plan.base.path, self._model):
                self._turns.run(begin, between)
        finally:
            self.batch.vocabulary, self._turns = None, None

    def _begin(self, number: int, group: Group) -> None:
        """Set the stream and variant for a group's turn."""
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
        """Pause; of the earlier layers only the last one's outputs are still in memory."""
        if self._turns is not None:
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
                f"convolution, for example; first: {whole[0]!r}), so their inputs cannot be collected; use grain 'direction'"
            )
        self.unseen = sorted({t.tensor for t in self.job.plan.targets} - self._collected.complete)
        self.check_all_used()


class CollectingReader(DifferentiableReader, Generic[M]):
    """Reads one parameter of a model, and passes on its inputs."""

    def __init__(
        self, collected: Collected[M], setting: Setting, tensor: RunTimeTensor, *, head: bool, rounded: bool
    ) -> None:
        super().__init__(setting, tensor, head=head, rounded=rounded)
        self._collected = collected

    @abstractmethod
    def matrices(self, held: TensorSlice, crossed: bool) -> Iterable[M]:
        """List the matrices in a slice whose inputs are multiplied with its columns, or with its rows if `crossed`."""

    @abstractmethod
    def tables(self) -> Iterable[tuple[M, int]]:
        """List the matrices that are looked up in this parameter by one-hot inputs, each with the number of possible inputs."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Name all matrices in this parameter."""

    def multiply(self, x: Tensor, source: Source, transposed: bool, rows: tuple[int, int]) -> Tensor:
        """Compute ``x Mᵀ`` (``x M`` if `transposed`), and record the operand on a matrix's input side as its inputs."""
        X = x.reshape(-1, x.shape[-1])
        # The adapted model's sources name the targets; in the base alone a head may be tied to an embedding.
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
        """Look up rows and record the ids as inputs of an embedding."""
        found = super().gather(ids)
        if found is not None:
            for matrix, size in self.tables():
                self._collected.take_ids(matrix, ids, size)
        return found


class _TargetReader(CollectingReader[Target]):
    """Passes on the inputs of an adapter's targets."""

    def matrices(self, held: TensorSlice, crossed: bool) -> Iterable[Target]:
        """List the targets. A tied head has the other side: it multiplies with the transpose of an embedding's delta."""
        pairs = self.setting.values.plan.by_weight.get(held.weight, ())
        return [t for t, part in pairs if held.index in (None, part.index) and t.transposed == crossed]

    def tables(self) -> Iterable[tuple[Target, int]]:
        """List the targets that are embeddings."""
        pairs = self.setting.values.targets(self.tensor)
        return [(t, t.module.shape[1]) for t, part in pairs if t.transposed and part.rows is None]

    def names(self) -> Iterable[str]:
        """Return the names of the targets."""
        return [target.tensor for target, _ in self.setting.values.targets(self.tensor)]
