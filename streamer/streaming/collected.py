"""Collect the inputs of matrices as a model runs, and hand on their moments when all are there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from streamer.errors import NumericError, UnsupportedError
from streamer.linalg.second_moments import Moments
from streamer.storage.system import give_freed_memory_back
from streamer.streaming.spool import Spool
from streamer.streaming.spooled_inputs import Inputs
from streamer.streaming.streams import GENERAL_AS


class Matrix(Protocol):
    """A matrix whose inputs are collected: an adapter's target, or one of the base."""

    @property
    def tensor(self) -> str:
        """Name that no other matrix has."""


M = TypeVar("M", bound=Matrix)

Complete = Callable[[list[M], Mapping[int, Moments]], None]
"""Takes matrices that have the same inputs, and the moments of these, means over the tokens of each text, by the stream. They may be
read until it returns."""

Take = Callable[[Any, Tensor], None]
"""Takes inputs (t, n) of a matrix."""


@dataclass
class Collected(Generic[M]):
    """Inputs that are being collected, by the first matrix that has them, and stream; `whole` are matrices that were read whole.

    Attributes
    ----------
    rounds
        Of each time that inputs were handed on, the matrices that share such as all tokens bring.
    instead
        Takes the inputs in place of this.
    """

    spool: Spool
    strict: bool
    stream: int = GENERAL_AS
    rounds: list[list[list[M]]] = field(default_factory=list)
    instead: Take | None = None
    inputs: dict[str, dict[int, Inputs]] = field(default_factory=dict)
    matrices: dict[str, list[M]] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)
    repeated: set[str] = field(default_factory=set)
    _first: dict[str, str] = field(default_factory=dict)
    _latest: list[tuple[Tensor, str]] = field(default_factory=list)

    def take(self, matrix: M, x: Tensor) -> None:
        """Take inputs (t, n) of a matrix; those that another matrix had just now are not counted again."""
        if self.instead is not None:
            self.instead(matrix, x)
            return
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
        if self.instead is None:
            self._of(matrix.tensor).count(ids, size)
            self._join(matrix, matrix.tensor)

    def forget_inputs(self) -> None:
        """Let go of the inputs by which modules that share them are told."""
        self._latest.clear()

    def hand_on(self, complete: Complete[M], tokens: Mapping[int, int], path: object) -> None:
        """Hand on the moments of all inputs that have been collected, and drop these."""
        self.rounds.append([])
        for first in list(self.inputs):
            give_freed_memory_back()  # of layers, and of the inputs before
            own, matrices = self.inputs.pop(first), self.matrices.pop(first)
            if not all(math.isfinite(inputs.squares) for inputs in own.values()):
                raise NumericError(f"{path}: the inputs of {matrices[0].tensor!r} are NaN or Inf on the texts")
            if own.keys() == tokens.keys() and all(inputs.squares for inputs in own.values()):
                complete(matrices, {stream: inputs.moments(tokens[stream]) for stream, inputs in own.items()})
                self.complete.update(matrix.tensor for matrix in matrices)
                if all(inputs.rows == tokens[stream] for stream, inputs in own.items()):
                    self.rounds[-1].append(matrices)
        self.spool.clear()

    def _of(self, name: str) -> Inputs:
        return self.inputs.setdefault(name, {}).setdefault(self.stream, Inputs(self.spool))

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
