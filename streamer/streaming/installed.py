"""Replace a module's parameters by stand-ins, and add each variant's deltas to the module's results.

A linear layer whose delta has factors multiplies all rows by the base's weight and adds ``(x R_v) L_vᵀ`` to the rows of variant v. An
embedding adds the deltas to the rows that it looks up. Every other module whose parameters differ runs once for each group of variants with
equal parameters.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from streamer.errors import UnsupportedError
from streamer.linalg.operators import LowRank
from streamer.linalg.torch_state import bfloat16_products
from streamer.plan.targets import Target
from streamer.streaming.run_time import RunTimeTensor
from streamer.streaming.values import LazyTensor, Reader, Values, same_values

LINEAR_BY_NAME = {"FalconLinear"}
"""Subclasses of Linear with their own `forward` that still computes ``x Wᵀ + b``."""

RUN_ALL_EXPERTS = {"Llama4TextExperts"}
"""Modules in which every token passes every expert, with weight 0 for experts that the router did not choose."""


@dataclass
class RowBatch:
    """Rows that run together, and the block of the vocabulary to compute.

    Attributes
    ----------
    variants, sequences, length
        Rows are (variants · sequences, length) tokens. If the number of rows equals the number of tokens, the first dimension is assumed
        to be rows; `check_logits`, which runs earlier, has refused models in which it is not.
    vocabulary
        Range of the head's rows to compute; None for all.
    on_read
        Called before each parameter is read; may raise to stop the pass.
    """

    variants: int
    sequences: int = 0
    length: int = 0
    vocabulary: tuple[int, int] | None = None
    on_read: Callable[[RunTimeTensor], None] = field(default=lambda tensor: None)

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return self.variants * self.sequences

    def per_variant(self, x: Tensor, where: str) -> int:
        """Return the number of entries of the first dimension that belong to one variant.

        Raises
        ------
        UnsupportedError
            If the shape does not show it.
        """
        if x.ndim >= 3 and x.shape[0] == self.rows and self.length in x.shape[1:]:
            return self.sequences
        if x.ndim >= 2 and x.shape[0] == self.rows * self.length:
            return self.sequences * self.length
        raise UnsupportedError(
            f"module {where!r} runs on {list(x.shape)} for {self.rows} sequences of {self.length} tokens, in which variants cannot "
            "be told apart; evaluate and fit do not support this module"
        )


class InstalledModule:
    """Module whose parameters are stand-ins; its `forward` runs once for each group of variants that differ.

    Parameters
    ----------
    path, module
        Its path in the loaded model, and the module, which is modified.
    tensors
        Its own parameters.
    head
        Whether it computes the logits, one block of the vocabulary at a time.
    """

    def __init__(self, path: str, module: nn.Module, tensors: Mapping[str, RunTimeTensor], values: Values, batch: RowBatch, *,
                 head: bool) -> None:  # fmt: skip
        self.path, self.values, self.batch, self.head = path, values, batch, head
        self.target: Target | None = None
        self.embeds = isinstance(module, nn.Embedding)
        weight = tensors.get("weight")
        if weight is not None and (self.embeds or is_linear(module)):
            self.target = self.values.low_rank_target(weight)
        self.rows_are_inputs = type(module).__name__ == "Conv1D"
        dense = [t for n, t in tensors.items() if not (n == "weight" and (self.embeds or self.target is not None))]
        edited = [t for n, t in tensors.items() if n == "weight" and self.target is not None and not self.embeds]
        self.groups = max(same_values(self.values, dense, False), same_values(self.values, edited, True), key=len)
        changes = len(self.groups) > 1 or (self.target is not None and not self.embeds)
        self.rounded = weight is not None and is_rounded(values, module, weight)
        self.variant: int | None = None if changes else 0
        """Variant whose values are read. None outside `run`: other modules that use the parameters would miss their deltas."""
        for name, tensor in tensors.items():
            module._parameters[name] = LazyTensor.of(_Reader(self, tensor))  # type: ignore[assignment]  # a Parameter in torch's stub
        self.forward = module.forward
        if changes or self.rounded:
            module.forward = self.run

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own `forward` and add the deltas."""
        out = self._as(0, args, kwargs) if len(self.groups) == 1 else self._by_group(args, kwargs)
        if self.target is None:
            return out
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        size = self.batch.per_variant(x, self.path)
        out = out.contiguous()  # so that flattening gives a view of `out`
        for v, delta in enumerate(self.values.deltas(self.target)):
            if delta is None:
                continue
            here = slice(v * size, (v + 1) * size)
            change = delta.T if self.rows_are_inputs else self._of_vocabulary(delta)
            out[here].flatten(0, -2).addmm_(x[here].flatten(0, -2) @ change.R, change.L.T)
        return out

    def _as(self, variant: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the module's own `forward` with one variant's values."""
        outside, self.variant = self.variant, variant
        try:
            with bfloat16_products() if self.rounded else contextlib.nullcontext():
                return self.forward(*args, **kwargs)
        finally:
            self.variant = outside

    def _of_vocabulary(self, delta: LowRank) -> LowRank:
        block = self.batch.vocabulary if self.head else None
        return delta if block is None else delta.row_slice(*block)

    def _by_group(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        size, rows = self.batch.per_variant(tensors[0], self.path), len(tensors[0])
        outs = []
        for group in self.groups:

            def row_slice(value: Any, group: range = group) -> Any:
                mine = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
                return value[group.start * size : group.stop * size] if mine else value

            outs.append(self._as(group.start, tree_map(row_slice, tuple(args)), tree_map(row_slice, dict(kwargs))))
        if isinstance(outs[0], tuple):
            return tuple(torch.cat(parts) for parts in zip(*outs, strict=True))
        return torch.cat(outs)


def is_linear(module: nn.Module) -> bool:
    """Test whether a module computes exactly ``x Wᵀ + b``, or ``x W + b`` as Conv1D does."""
    kind = type(module)
    return kind.forward is nn.Linear.forward or kind.__name__ == "Conv1D" or kind.__name__ in LINEAR_BY_NAME


def is_rounded(values: Values, module: nn.Module, weight: RunTimeTensor) -> bool:
    """Test whether a module's product uses only the base's weight and is to round its factors to bfloat16.

    A weight that the adapter replaces or changes by a dense delta is not rounded: rounding would erase its difference from the base.
    """
    if not values.job.rounds_products or not is_linear(module):
        return False
    dense = bool(values.targets(weight)) and values.low_rank_target(weight) is None
    return not dense and not values.edited(weight)


class _Reader(Reader):
    """Reads one parameter of an installed module for the current variant."""

    def __init__(self, owner: InstalledModule, tensor: RunTimeTensor) -> None:
        self.owner, self.tensor, self.shape, self.name = owner, tensor, tensor.shape, tensor.name
        self.values, self.device = owner.values, owner.values.device
        self.additive = owner.target is not None and bool(self.values.targets(tensor))
        looked_up = owner.embeds and self.additive
        self.varies = looked_up or len(same_values(self.values, [tensor], additive=False)) > 1
        with_delta = not self.additive and bool(self.values.targets(tensor))
        self.has_rows = self.values.row_access(tensor) and not with_delta

    def _variant(self) -> int:
        variant = self.owner.variant
        if variant is None or (self.owner.embeds and self.varies):
            raise UnsupportedError(
                f"{self.tensor.name!r}, which the adapter changes, is read outside its module; evaluate and fit do not support this model"
            )
        self.owner.batch.on_read(self.tensor)
        return variant

    def row_range(self) -> tuple[int, int]:
        """Return all rows, or for the head the current block of the vocabulary."""
        return (self.owner.batch.vocabulary if self.owner.head else None) or (0, self.shape[0])

    def read(self) -> Tensor:
        """Read all values, including deltas unless they are added to the products."""
        variant, (i, j) = self._variant(), self.row_range()
        if self.has_rows:
            return self.values.rows(self.tensor, variant, i, j)
        return self.values.whole(self.tensor, variant, with_delta=not self.additive)[i:j]

    def rows(self, i: int, j: int) -> Tensor:
        """Read rows i to j."""
        return self.values.rows(self.tensor, self._variant(), i, j)

    def matrix(self, index: int) -> Tensor | None:
        """Read one expert's matrix. All experts of the stack then count as used, since the text decides which are needed."""
        if not self.tensor.stacked:
            return None
        variant = self._variant()
        if self.values.adapted(variant):
            self.values.applied |= self.tensor.weights
        return self.values.matrix(self.values.sources(self.tensor, variant)[index], variant, with_delta=True)

    def gather(self, ids: Tensor) -> Tensor | None:
        """Look up rows, each variant's from its own values."""
        if not self.varies:
            return None if not self.has_rows else self._look_up(ids, self._variant(), None)
        batch, count = self.owner.batch, self.owner.batch.variants
        if not self.owner.embeds or ids.ndim != 2 or ids.shape[0] not in (1, batch.rows):
            raise UnsupportedError(
                f"{self.tensor.name!r}, which the adapter changes, is looked up with indices {list(ids.shape)} for {batch.rows} sequences "
                f"of {batch.length} tokens; evaluate and fit do not support this model"
            )
        batch.on_read(self.tensor)
        ids = ids.expand(batch.rows, -1).view(count, batch.sequences, -1)
        target = self.owner.target
        deltas = itertools.repeat(None, count) if target is None else self.values.deltas(target)
        return torch.cat([self._look_up(ids[v], v, delta) for v, delta in enumerate(deltas)])

    def _look_up(self, ids: Tensor, variant: int, delta: LowRank | None) -> Tensor:
        if not self.has_rows:
            return self.values.whole(self.tensor, variant, with_delta=True)[ids]
        unique, rows, at = self.values.looked_up(self.tensor, variant, ids)
        if delta is not None:
            rows.addmm_(delta.L[unique], delta.R.T)
        return rows[at]
