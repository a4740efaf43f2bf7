"""Read a parameter of a model, and pass on the inputs that it multiplies."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Generic

from torch import Tensor

from streamer.plan.targets import TensorSlice
from streamer.streaming.collected import Collected, M
from streamer.streaming.differentiable import DifferentiableReader, Setting
from streamer.streaming.run_time import RunTimeTensor, WeightSource
from streamer.streaming.streams import TASK_AS


class CollectingReader(DifferentiableReader, Generic[M]):
    """Reads one parameter of a model, and passes on its inputs."""

    def __init__(
        self, collected: Collected[M], setting: Setting, tensor: RunTimeTensor, *, head: bool, rounded: bool
    ) -> None:
        super().__init__(setting, tensor, head=head, rounded=rounded)
        self._collected = collected

    @abstractmethod
    def matrices(self, slice_: TensorSlice, crossed: bool) -> Iterable[M]:
        """List the matrices in a slice whose inputs are multiplied with its columns, or with its rows if `crossed`."""

    @abstractmethod
    def tables(self) -> Iterable[tuple[M, int]]:
        """List the matrices that are looked up in this parameter by one-hot inputs, each with the number of possible inputs."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Name all matrices in this parameter."""

    def multiply(self, x: Tensor, source: WeightSource, transposed: bool, rows: tuple[int, int]) -> Tensor:
        """Compute ``x Mᵀ`` (``x M`` if `transposed`), and record the operand on a matrix's input side as its inputs."""
        X = x.reshape(-1, x.shape[-1])
        # The adapted model's sources name the targets; in the base alone a head may be tied to an embedding.
        adapted, at = self.tensor.adapted[self.sources.index(source)], 0
        crossed = transposed != adapted.transposed
        for slice_ in adapted.slices:
            size = self.setting.values.weight_of(slice_, TASK_AS).matrix[0]
            for matrix in self.matrices(slice_, crossed):
                self._collected.take(matrix, X[:, at : at + size] if crossed else X)
            at += size
        return super().multiply(x, source, transposed, rows)

    def values_of(self, source: WeightSource) -> Tensor:
        """Read a source whole, and note that its inputs are not seen."""
        self._collected.whole.update(self.names())
        return super().values_of(source)

    def gather(self, ids: Tensor) -> Tensor | None:
        """Look up rows and record the ids as inputs of an embedding."""
        found, batch = super().gather(ids), self.setting.batch
        if found is not None:
            own = ids.shape[:2] == (batch.sequences, batch.length)
            if not own and (ids.shape[:1] == (1,) or batch.length in ids.shape):
                # One look-up serves all sequences: of positions, (1, length), or of pairs of them, (length, length).
                ids = ids.expand(batch.sequences, *ids.shape)
            for matrix, size in self.tables():
                self._collected.take_ids(matrix, ids, size)
        return found
