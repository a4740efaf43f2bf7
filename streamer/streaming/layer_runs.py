"""Find a model's layers, and describe their runs in other processes, which receive a layer's arguments and return its result and inputs."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

PLAIN = (type(None), bool, int, float, str)
"""Types of arguments, besides tensors and containers, that can be copied to another process."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class LayerRun:
    """A layer to run, and its arguments.

    Attributes
    ----------
    layer
        Path in the model.
    stream, sequences, length
        One of `streams`, number of sequences, and tokens of each.
    waiting
        Names of the matrices whose inputs are collected; None for all.
    rights
        R' (n, r) of the layer's targets, for the corrected model, which stops at the first inputs that are collected; None for the
        adapter's own deltas.
    """

    layer: str
    stream: int
    sequences: int
    length: int
    arguments: Arguments
    waiting: frozenset[str] | None = None
    rights: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Taken:
    """Inputs of a matrix.

    Attributes
    ----------
    matrix
        The matrix.
    first
        Name of the first matrix that has the same inputs.
    x
        Inputs (t, n), or the indices of one-hot inputs; None if another matrix brought them.
    size
        Number of possible values of one-hot inputs.
    """

    matrix: Any
    first: str
    x: Tensor | None
    size: int | None = None


@dataclass(frozen=True)
class LayerResult:
    """Result of a layer's run.

    Attributes
    ----------
    out
        The layer's return value; None if it stopped at inputs.
    shared
        Contents of the containers in which layers pass tensors on.
    taken
        Inputs, in the order in which they were multiplied.
    applied, read, whole
        See `Values` and `Collected`.
    """

    out: Any
    shared: list[dict[Any, Any]]
    taken: list[Taken]
    applied: set[str]
    read: set[str]
    whole: set[str]


Elsewhere = Callable[[Mapping[int, LayerRun]], Iterator[tuple[int, LayerResult | None]]]
"""Runs layers on copies of their arguments, and yields each one's number and result; the result is None for a layer that writes into its
arguments and therefore cannot run on copies."""


def layer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """List by path the layers of a transformers model that its authors declare safe to run again; nested layers are left out."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return found


def tensors_of(args: Any, kwargs: Any) -> list[Tensor]:
    """List the tensors in a layer's arguments, including those in tuples and in containers that pass tensors between layers."""
    arguments = tree_flatten((args, kwargs))[0]
    leaves = tree_flatten([one.data if isinstance(one, UserDict) else one for one in arguments])[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def containers_of(arguments: Arguments) -> list[UserDict[Any, Any]]:
    """List the arguments in which layers pass tensors on."""
    return [leaf for leaf in tree_flatten(arguments)[0] if isinstance(leaf, UserDict)]


def is_portable(arguments: Arguments) -> bool:
    """Test whether a layer's arguments can be sent to another process, and its changes to them brought back."""
    args, kwargs = arguments
    inside = [leaf for one in containers_of(arguments) for leaf in tree_flatten(one.data)[0]]
    outer = [x for x in (*args, *kwargs.values()) if isinstance(x, list | dict)]  # which a layer may write to
    leaves = [leaf for leaf in tree_flatten(arguments)[0] if not isinstance(leaf, UserDict)]
    return not outer and all(type(leaf) is Tensor or isinstance(leaf, PLAIN) for leaf in (*leaves, *inside))
