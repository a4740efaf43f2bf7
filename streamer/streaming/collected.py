"""Collect the inputs of matrices while a model runs, and pass on their moments when they are complete."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from streamer.errors import NumericError, UnsupportedError
from streamer.linalg.second_moments import Moments
from streamer.storage.system import give_freed_memory_back
from streamer.streaming.layer_runs import Taken
from streamer.streaming.spool import Spool
from streamer.streaming.spooled_inputs import Inputs, Written
from streamer.streaming.streams import GENERAL_AS


class Matrix(Protocol):
    """Matrix whose inputs are collected: an adapter's target, or a matrix of the base."""

    @property
    def tensor(self) -> str:
        """Return a unique name."""


M = TypeVar("M", bound=Matrix)

Complete = Callable[[list[M], Mapping[int, Moments]], None]
"""Receives matrices that share their inputs, and the moments of these inputs by stream: means over each text's tokens. The moments may be
read only until it returns."""

Take = Callable[[Any, Tensor], None]
"""Receives inputs (t, n) of a matrix."""


@dataclass
class Collected(Generic[M]):
    """Inputs being collected, by stream and by the first matrix that has them; `whole` lists matrices that were read whole.

    Attributes
    ----------
    rounds
        For each time that inputs were passed on, the groups of matrices that share inputs from all tokens.
    instead
        Receives the inputs instead of this object.
    taken
        List of inputs for another process; if there is one, inputs are only listed there.
    """

    spool: Spool
    strict: bool
    stream: int = GENERAL_AS
    rounds: list[list[list[M]]] = field(default_factory=list)
    instead: Take | None = None
    taken: list[Taken] | None = None
    inputs: dict[str, dict[int, Inputs]] = field(default_factory=dict)
    matrices: dict[str, list[M]] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)
    repeated: set[str] = field(default_factory=set)
    _first: dict[str, str] = field(default_factory=dict)
    _latest: list[tuple[Tensor, str]] = field(default_factory=list)

    def take(self, matrix: M, x: Tensor) -> None:
        """Add inputs (t, n) of a matrix, unless another matrix has just brought the same inputs."""
        if self.instead is not None:
            self.instead(matrix, x)
            return
        if len(x) == 0:  # an expert to which no token is routed
            return
        first = next((name for seen, name in self._latest if _same(seen, x)), None)
        if first is None:
            self._latest.append((x, matrix.tensor))
            self.add(Taken(matrix, matrix.tensor, x))
        else:
            self.add(Taken(matrix, first, None))

    def take_ids(self, matrix: M, ids: Tensor, size: int) -> None:
        """Add one-hot inputs of `size` possible values."""
        if self.instead is None:
            self.add(Taken(matrix, matrix.tensor, ids, size))

    def add(self, one: Taken, written: Written | None = None) -> None:
        """Add inputs, or list them for another process; `written` are inputs that are already in the spool."""
        if self.taken is not None:
            # The layer may overwrite them later.
            self.taken.append(replace(one, x=None if one.x is None else one.x.clone()))
            return
        if one.size is not None and one.x is not None:
            self._of(one.first).count(one.x, one.size)
        elif one.x is not None:
            written = Written.to(self.spool, one.x)
        if written is not None:
            self._of(one.first).add(written)
        self._join(one.matrix, one.first)

    def forget_inputs(self) -> None:
        """Forget which inputs were seen last; they serve to recognise modules that share inputs."""
        self._latest.clear()

    def hand_on(self, complete: Complete[M], tokens: Mapping[int, int], path: object) -> None:
        """Pass on the moments of all collected inputs, and drop the inputs."""
        self.rounds.append([])
        for first in list(self.inputs):
            give_freed_memory_back()  # from layers and earlier inputs
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
                    f"{tensor!r}: its module runs in several layers, or shares its inputs only in some runs, which fit does not support; "
                    "use `mitigate --method shrink`"
                )
            self.repeated.add(tensor)
        known = self.matrices.setdefault(first, [])
        if all(one.tensor != tensor for one in known):
            known.append(matrix)


def _same(one: Tensor, other: Tensor) -> bool:
    """Test whether two tensors are the same memory, unchanged; the first is still referenced, so its memory is not reused."""
    return (
        one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
        and one._version == other._version
    )  # fmt: skip
