"""Run layers elsewhere: what a layer is given goes there; what it returns, and the inputs of its matrices, come back."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

PLAIN = (type(None), bool, int, float, str)
"""Types of arguments, beside tensors and what tensors are handed on in, of which another process has the same."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class LayerRun:
    """A layer that is to run, and what it is given.

    Attributes
    ----------
    layer
        Path in the model.
    stream, sequences, length
        What runs, and how many sequences of how many tokens.
    waiting
        Names of the matrices whose inputs are taken; None: all.
    rights
        R' (n, r) of the layer's targets, for a model that stops at the first inputs that are taken; None: the deltas as they are.
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
        The inputs (t, n), or one-hot ones by their numbers; None if they were taken for another matrix.
    size
        How many one-hot inputs there are.
    """

    matrix: Any
    first: str
    x: Tensor | None
    size: int | None = None


@dataclass(frozen=True)
class LayerResult:
    """What came of a layer's run.

    Attributes
    ----------
    out
        What it returned; None if it stopped at inputs.
    shared
        What the containers among its arguments hold, in which layers hand tensors on.
    taken
        Inputs, in the order in which they came.
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
"""Runs layers, each by its number, on copies of what they are given; None comes of one that writes into these, and has to run where they
are."""


def containers_of(arguments: Arguments) -> list[UserDict[Any, Any]]:
    """List the arguments in which layers hand tensors on."""
    return [leaf for leaf in tree_flatten(arguments)[0] if isinstance(leaf, UserDict)]


def is_portable(arguments: Arguments) -> bool:
    """Test whether a layer's arguments are such as can be given to another process, and what it changes in them brought back."""
    args, kwargs = arguments
    inside = [leaf for one in containers_of(arguments) for leaf in tree_flatten(one.data)[0]]
    outer = [x for x in (*args, *kwargs.values()) if isinstance(x, list | dict)]  # which a layer may write to
    leaves = [leaf for leaf in tree_flatten(arguments)[0] if not isinstance(leaf, UserDict)]
    return not outer and all(type(leaf) is Tensor or isinstance(leaf, PLAIN) for leaf in (*leaves, *inside))
