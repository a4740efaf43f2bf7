"""Collect the inputs of all matrices of a base, under the names by which adapters change them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Unpack

from streamer.plan.architectures import architecture_for
from streamer.plan.plan import Plan
from streamer.plan.targets import TensorSlice
from streamer.plan.tied_embeddings import find_ties
from streamer.plan.transformers_renames import renames_for
from streamer.streaming.collected import Collected
from streamer.streaming.collecting import CollectingReader, Setting
from streamer.streaming.inputs import Collecting, CollectingModel
from streamer.streaming.run_time import RunTimeTensor

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


class BaseInputModel(CollectingModel):
    """Model of a base without an adapter, which passes on the inputs of all its matrices."""

    def __init__(self, plan: Plan, **options: Unpack[Collecting]) -> None:
        ties = find_ties(plan.base.weight_map, architecture_for(plan.config), renames_for(plan.config))
        self._ties = {tie.stored: tie.others for tie in ties if tie.stored}
        super().__init__(plan, strict=False, **options)

    def _reader(self, tensor: RunTimeTensor, *, head: bool, rounded: bool) -> CollectingReader[BaseMatrix]:
        return _BaseReader(self._collected, self.setting, tensor, self._ties, head=head, rounded=rounded)

    def lacking(self) -> list[str]:
        """List the matrices whose inputs were not seen: no token reached them, or they take part in no product."""
        readers = (p.reader for _, module, _ in self.modules for p in module._parameters.values() if p is not None)  # type: ignore[attr-defined]  # lazy
        names = {name for reader in readers for name in reader.names()}
        seen = {name.removesuffix(LOOKED_UP) for name in self._collected.complete}
        return sorted((names - seen) | self.repeated)


class _BaseReader(CollectingReader[BaseMatrix]):
    def __init__(
        self, collected: Collected[BaseMatrix], setting: Setting, tensor: RunTimeTensor,
        ties: dict[str, tuple[str, ...]], *, head: bool, rounded: bool,
    ) -> None:  # fmt: skip
        super().__init__(collected, setting, tensor, head=head, rounded=rounded)
        self._ties = ties
        self._experts = {
            slice_: f"{tensor.name}[{e}]" for e, source in enumerate(tensor.adapted) for slice_ in source.slices
            if tensor.stacked
        }  # fmt: skip

    def matrices(self, slice_: TensorSlice, crossed: bool) -> Iterable[BaseMatrix]:
        """Return the slice's matrix."""
        own = _name(slice_)
        expert = (self._experts[slice_],) if slice_ in self._experts else ()
        return [BaseMatrix(own, tuple(dict.fromkeys((own, *expert, *self._ties.get(own, ())))))]

    def tables(self) -> Iterable[tuple[BaseMatrix, int]]:
        """Return the embedding's table."""
        ((slice_,),) = (source.slices for source in self.tensor.adapted)
        own = _name(slice_)
        return [(BaseMatrix(own + LOOKED_UP, (own, *self._ties.get(own, ()))), self.shape[0])]

    def names(self) -> Iterable[str]:
        """Return the names of the matrices; vectors and a stack's biases have none."""
        if len(self.shape) - self.tensor.stacked < 2 or self.name.endswith("bias"):
            return []
        return [_name(slice_) for source in self.tensor.adapted for slice_ in source.slices]


def _name(slice_: TensorSlice) -> str:
    return slice_.weight if slice_.index is None else f"{slice_.weight}[{slice_.index}]"
