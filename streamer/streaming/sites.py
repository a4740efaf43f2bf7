"""Find the sites of a fit: inputs of matrices that an adapter changes, or of all matrices of a base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from streamer.plan.architectures import architecture_for
from streamer.plan.name_matching import TensorSlice
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.streaming.groups import Group
from streamer.streaming.run_time import RunTimeTensor


@dataclass(frozen=True)
class Site:
    """Input of watched matrices, at which a group of a fit has stopped.

    Attributes
    ----------
    order
        Key by which sites are taken when groups wait at different ones: those of experts first, which some groups do not reach.
    matrices
        The matrices that multiply it.
    x
        Inputs (t, n), or the indices of one-hot inputs.
    size
        Number of possible one-hot inputs; None for other inputs.
    """

    order: tuple[bool, int, int]
    matrices: tuple[Any, ...]
    x: Tensor
    size: int | None = None


def same_inputs(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    """Test whether inputs are the same memory, unchanged; those before are still referenced, so their memory is not reused."""
    return len(before) == len(now) and all(
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a._version == b._version
        for a, b in zip(before, now, strict=True)
    )


Solve = Callable[[Site, Mapping[Group, Tensor]], None]
"""Receives a site and the inputs of the groups that reached it, in the groups' order."""


class TargetWatch:
    """Watches the targets of an adapter: says which matrices of a parameter make sites."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def matrices(
        self, tensor: RunTimeTensor, slice_: TensorSlice, crossed: bool
    ) -> Sequence[Target]:
        """List the targets in a slice whose inputs are multiplied with its columns, or with its rows if `crossed`.

        A tied head has the other side: it multiplies with the transpose of an embedding's delta.
        """
        pairs = self._plan.by_weight.get(slice_.weight, ())
        return [
            t for t, part in pairs if slice_.index in (None, part.index) and t.transposed == crossed
        ]

    def tables(self, tensor: RunTimeTensor) -> Sequence[tuple[Target, int]]:
        """List the targets that are looked up by one-hot inputs, each with the number of possible inputs."""
        return [
            (t, t.module.shape[1])
            for t, part in tensor.targets(self._plan)
            if t.transposed and part.rows is None
        ]

    def names(self, tensor: RunTimeTensor) -> Iterable[str]:
        """Return the names of the targets."""
        return [target.tensor for target, _ in tensor.targets(self._plan)]


LOOKED_UP = " (looked up)"
"""Suffix for the name of an embedding's table, because a head may use the same matrix."""


@dataclass(frozen=True)
class BaseMatrix:
    """A matrix of a base.

    Attributes
    ----------
    tensor
        A unique name: see `LOOKED_UP`.
    names
        Names under which adapters change it: its own, the name of the stack that contains it after loading, and names tied to it.
    """

    tensor: str
    names: tuple[str, ...]


class BaseWatch:
    """Watches all matrices of a base."""

    def __init__(self, plan: Plan) -> None:
        ties = plan.names.ties(architecture_for(plan.config))
        self._ties = {tie.stored: tie.others for tie in ties if tie.stored}

    def matrices(
        self, tensor: RunTimeTensor, slice_: TensorSlice, crossed: bool
    ) -> Sequence[BaseMatrix]:
        """Return the slice's matrix."""
        name = _name(slice_)
        expert = [
            f"{tensor.name}[{e}]"
            for e, s in enumerate(tensor.adapted)
            if tensor.stacked and slice_ in s.slices
        ]
        return [BaseMatrix(name, tuple(dict.fromkeys((name, *expert, *self._ties.get(name, ())))))]

    def tables(self, tensor: RunTimeTensor) -> Sequence[tuple[BaseMatrix, int]]:
        """Return the embedding's table."""
        ((slice_,),) = (source.slices for source in tensor.adapted)
        name = _name(slice_)
        return [(BaseMatrix(name + LOOKED_UP, (name, *self._ties.get(name, ()))), tensor.shape[0])]

    def names(self, tensor: RunTimeTensor) -> Iterable[str]:
        """Return the names of the matrices; vectors and a stack's biases have none."""
        if len(tensor.shape) - tensor.stacked < 2 or tensor.name.endswith("bias"):
            return []
        return [_name(slice_) for source in tensor.adapted for slice_ in source.slices]


Watch = TargetWatch | BaseWatch


def _name(slice_: TensorSlice) -> str:
    return slice_.weight if slice_.index is None else f"{slice_.weight}[{slice_.index}]"
