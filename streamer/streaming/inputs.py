"""Collect the inputs of modules, those that an adapter changes for example, in a pass over the base.

General text runs as the base, the task's as base + adapter. Sequences run in groups, by turns: each group runs one layer, then the next
group does, so that a layer's inputs are complete when all have; their second moments are handed on, and the inputs dropped before the next
layer begins. The inputs lie in a temporary file; memory is that of the layer's outputs on all tokens. A layer's weights are read once for
each group.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from streamer.errors import NumericError, UnsupportedError
from streamer.linalg.second_moments import Moments
from streamer.methods import UNCHANGED
from streamer.plan.plan import Plan
from streamer.plan.targets import Target, TensorSlice
from streamer.storage.system import give_freed_memory_back
from streamer.streaming.differentiable import CoefficientDeltas, DifferentiableReader, Setting
from streamer.streaming.extra import quiet_transformers, refused_errors
from streamer.streaming.installed import is_rounded
from streamer.streaming.layers import layer_modules
from streamer.streaming.lazy import LazyTensor
from streamer.streaming.model import LoadedModel
from streamer.streaming.run_time import RunTimeTensor, Source
from streamer.streaming.spool import Spool
from streamer.streaming.spooled_inputs import Inputs
from streamer.streaming.turns import Turns
from streamer.streaming.values import Job
from streamer.streaming.variants import ADAPTER, BASE, Variant

if TYPE_CHECKING:
    from streamer.evaluation.sequences import TextSequences

GENERAL_AS, TASK_AS = 0, 1
"""Variants that general and task text run as: the base, and base + adapter."""


@dataclass(frozen=True)
class Group:
    """Sequences of one length that run together.

    Attributes
    ----------
    variant
        `GENERAL_AS` or `TASK_AS`.
    on_read
        Called before each parameter is read.
    """

    text: TextSequences
    variant: int
    on_read: Callable[[RunTimeTensor], None]


class Matrix(Protocol):
    """A matrix whose inputs are collected: an adapter's target, or one of the base."""

    @property
    def tensor(self) -> str:
        """Name that no other matrix has."""


M = TypeVar("M", bound=Matrix)

Complete = Callable[[list[M], Mapping[int, Moments]], None]
"""Takes matrices that have the same inputs, and the moments of these, means over the tokens of each text, by the variant that it runs as.
They may be read until it returns."""


class CollectingModel(LoadedModel):
    """A model of a base, with an adapter or without, which hands on the moments of its modules' inputs.

    Parameters
    ----------
    strict
        Whether to refuse a matrix that is multiplied in several layers; others are noted in `repeated`.
    directory
        Where a layer's inputs have their blocks; None for the system's.

    Attributes
    ----------
    repeated
        Names of matrices that are multiplied in several layers: what was handed on of them are the inputs of one.
    """

    def __init__(
        self, plan: Plan, *, strict: bool, rounds_products: bool = False, directory: Path | None = None
    ) -> None:
        variants = Variant(BASE, None), Variant(ADAPTER, UNCHANGED)
        super().__init__(Job(plan, variants, None, rounds_products=rounds_products), together=1)
        self.setting = Setting(self.values, CoefficientDeltas(plan, None), self.batch)
        self._collected = Collected[Any](self.setting, Spool(directory), strict)
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
        self.setting.deltas.coefficients = None
        self._turns = Turns([partial(self._run_group, group) for group in groups])
        self.batch.vocabulary = 0, 1
        path, tokens = self.job.plan.base.path, dict[int, int]()
        for group in groups:
            tokens[group.variant] = tokens.get(group.variant, 0) + sum(map(len, group.text.ids))

        def begin(number: int) -> None:
            give_freed_memory_back()  # of the turn before, whose thread would keep it
            group = groups[number]
            self.setting.variant, self.batch.on_read = group.variant, group.on_read
            self.batch.sequences, self.batch.length = len(group.text.ids), group.text.longest

        try:
            with quiet_transformers(), refused_errors(path, self._model):
                self._turns.run(begin, lambda: self._collected.hand_on(complete, tokens, path))
        finally:
            self.batch.vocabulary, self._turns = None, None
            self.setting.deltas.spool.close()
            self._collected.spool.close()

    def _run_group(self, group: Group) -> None:
        ids, _ = group.text.padded(group.text.longest)
        with torch.no_grad():
            self._model(input_ids=torch.from_numpy(ids), use_cache=False)

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

    def __init__(self, plan: Plan, *, rounds_products: bool = False, directory: Path | None = None) -> None:
        super().__init__(plan, strict=True, rounds_products=rounds_products, directory=directory)
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
                f"{self.job.plan.base.path}: the weights of {len(whole)} matrices are used otherwise than by products and look-ups, as by "
                f"a convolution, {whole[0]!r} first, so that their inputs are not seen; take grain 'direction'"
            )
        self.unseen = sorted({t.tensor for t in self.job.plan.targets} - self._collected.complete)
        self.check_all_used()


@dataclass
class Collected(Generic[M]):
    """Inputs that are being collected, by the first matrix that has them, and variant; `whole` are matrices that were read whole."""

    setting: Setting
    spool: Spool
    strict: bool
    inputs: dict[str, dict[int, Inputs]] = field(default_factory=dict)
    matrices: dict[str, list[M]] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)
    repeated: set[str] = field(default_factory=set)
    _first: dict[str, str] = field(default_factory=dict)
    _latest: list[tuple[Tensor, str]] = field(default_factory=list)

    def take(self, matrix: M, x: Tensor) -> None:
        """Take inputs (t, n) of a matrix; those that another matrix had just now are not counted again."""
        if len(x) == 0:  # of an expert that no token is routed to
            return
        first = next((name for seen, name in self._latest if _same(seen, x)), None)
        if first is None:
            first = matrix.tensor
            self._latest.append((x, first))
            self._of(first).add(x)
        self._join(matrix, first)

    def take_ids(self, matrix: M, ids: Tensor, size: int) -> None:
        """Take one-hot inputs, of `size` that there are."""
        self._of(matrix.tensor).count(ids, size)
        self._join(matrix, matrix.tensor)

    def forget_inputs(self) -> None:
        """Let go of the inputs by which modules that share them are told."""
        self._latest.clear()

    def hand_on(self, complete: Complete[M], tokens: Mapping[int, int], path: object) -> None:
        """Hand on the moments of all inputs that have been collected, and drop these."""
        for first in list(self.inputs):
            give_freed_memory_back()  # of layers, and of the inputs before
            own, matrices = self.inputs.pop(first), self.matrices.pop(first)
            if not all(math.isfinite(inputs.squares) for inputs in own.values()):
                raise NumericError(f"{path}: the inputs of {matrices[0].tensor!r} are NaN or Inf on the texts")
            if own.keys() == tokens.keys() and all(inputs.squares for inputs in own.values()):
                complete(matrices, {variant: inputs.moments(tokens[variant]) for variant, inputs in own.items()})
                self.complete.update(matrix.tensor for matrix in matrices)
        self.spool.clear()

    def _of(self, name: str) -> Inputs:
        return self.inputs.setdefault(name, {}).setdefault(self.setting.variant, Inputs(self.spool))

    def _join(self, matrix: M, first: str) -> None:
        tensor = matrix.tensor
        if tensor in self.complete or self._first.setdefault(tensor, first) != first:
            if self.strict:
                raise UnsupportedError(
                    f"{tensor!r}: its module runs in several layers, or shares its inputs in some runs only, which the fit by inputs does "
                    "not do; pass --grain direction"
                )
            self.repeated.add(tensor)
        known = self.matrices.setdefault(first, [])
        if all(one.tensor != tensor for one in known):
            known.append(matrix)


def _same(one: Tensor, other: Tensor) -> bool:
    """Test whether two tensors are the same values in memory; the first is held, so that its memory is not used again."""
    return (
        one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
        and one._version == other._version
    )  # fmt: skip


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
