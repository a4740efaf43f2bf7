"""Groups of sequences that run together under one variant, and the states with which they enter a layer."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from streamer.streaming.spool import Spool, Spooled


@dataclass(eq=False)
class Group:
    """Sequences that run together under one variant.

    Attributes
    ----------
    ids
        Tokens (sequences, length).
    variant
        The variant's number.
    stream
        Name of the stream of a fit; None for a rider.
    results
        Results of the models below the head, by module, once they are known.
    out
        Result of the last layer that ran.
    skips
        Number of layers that an earlier run completed, and that return `out` instead of running.
    """

    ids: Tensor
    variant: int
    stream: Hashable | None = None
    results: dict[nn.Module, Any] = field(default_factory=dict)
    out: Any = None
    skips: int = 0
    _state: list[Tensor] = field(default_factory=list)
    _place: Spooled | None = None
    _first: list[weakref.ref[Tensor]] | None = None

    @property
    def leaves(self) -> tuple[Any, ...]:
        """Return the parts of `out`."""
        return self.out if type(self.out) is tuple else (self.out,)

    @property
    def is_plain(self) -> bool:
        """Test whether `out` consists of tensors, which a file can hold."""
        return all(isinstance(leaf, Tensor) or leaf is None for leaf in self.leaves)

    @property
    def rows(self) -> int:
        """Return the number of tokens, with padding."""
        return self.ids.numel()

    def put_away(self, spool: Spool) -> None:
        """Move the tensors with which the group enters a layer to a spool; their storage is emptied in place, so references hold."""
        # Clones: a tensor that has lent its memory to NumPy, as writing does, cannot be resized any more.
        self._place = spool.write([state.clone() for state in self._state], self._place)
        for state in self._state:
            state.untyped_storage().resize_(0)

    def bring_back(self, spool: Spool) -> None:
        """Read the tensors that were moved."""
        if self._state and self._place:
            for state, read in zip(self._state, spool.read(self._place), strict=True):
                state.untyped_storage().resize_(read.nbytes)
                state.copy_(read)
        self._state.clear()

    def follows(self, leaves: Sequence[Any]) -> bool:
        """Test whether states with which the group enters a layer are the last layer's result, or were there at the first layer."""
        if self._first is None:
            self._first = [weakref.ref(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
            return True
        results = [leaf for leaf in tree_flatten(self.out)[0] if isinstance(leaf, Tensor)]
        known = {leaf.untyped_storage()._cdata for leaf in results}
        first = [tensor for ref in self._first if (tensor := ref()) is not None]
        return all(
            state.untyped_storage()._cdata in known or any(state is tensor for tensor in first)
            for state in self._states(leaves)
        )

    @contextlib.contextmanager
    def at_hand(self, spool: Spool | None) -> Iterator[None]:
        """Bring the tensors back for the context."""
        if spool is None:
            yield
            return
        state = list(self._state)
        self.bring_back(spool)
        yield
        self._state = state
        self.put_away(spool)

    def enter(self, args: Any) -> None:
        """Note the states of tokens with which the group enters a layer, as bytes of their whole storage."""
        states = self._states(tree_flatten(args)[0])
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in states}
        self._state = [
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            for storage in storages.values()
            if storage.resizable()
        ]

    def _states(self, leaves: Sequence[Any]) -> list[Tensor]:
        """List the states of the group's tokens among a layer's arguments."""
        tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())
        return [tensor for tensor in tensors if tensor.shape[:2] == self.ids.shape]
