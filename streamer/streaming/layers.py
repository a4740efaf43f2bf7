"""Run decoder layers without keeping their activations: each layer's inputs go to a spool, and it runs again where gradients pass it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from streamer.errors import UnsupportedError
from streamer.streaming.spool import Spool

TOLERANCE = 1e-4
"""Relative difference of the norms of a layer's outputs, run twice, that rounding may make."""


def layer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """List by path the layers of a transformers' model that its authors let be run again, without those within others."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return found


class SpooledLayer:
    """A layer whose `forward` keeps its inputs in a spool instead of its activations in memory.

    Parameters
    ----------
    path, module
        Where it is in the model, and the module, which is changed.
    anchor
        Says what requires gradients inside: a tensor that does, or None if nothing in the layer does.
    """

    def __init__(self, path: str, module: nn.Module, spool: Spool, anchor: Callable[[], Tensor | None]) -> None:
        self.path, self.spool, self.anchor = path, spool, anchor
        self.forward: Callable[..., Any] = module.forward
        module.forward = self.run

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        leaves, spec = tree_flatten((args, kwargs))
        inputs = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        anchor = self.anchor()
        if not torch.is_grad_enabled() or (not inputs and anchor is None):
            return self.forward(*args, **kwargs)
        call = _Call(self, [None if i in inputs else leaf for i, leaf in enumerate(leaves)], spec, inputs)
        tensors: tuple[Tensor, ...] = _Boundary.apply(call, anchor, *(leaves[i] for i in inputs))  # type: ignore[no-untyped-call]
        return call.rebuilt(tensors)


@dataclass(eq=False)
class _Call:
    """One call of a layer: its arguments but for the tensors that require gradients, and the form of its result."""

    layer: SpooledLayer
    constants: list[Any]
    spec: TreeSpec
    inputs: list[int]
    result: tuple[list[Any], TreeSpec] | None = None

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the layer on the tensors that require gradients, and return those of its result."""
        leaves = list(self.constants)
        for i, tensor in zip(self.inputs, tensors, strict=True):
            leaves[i] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        out, spec = tree_flatten(self.layer.forward(*args, **kwargs))
        tensors = [leaf for leaf in out if isinstance(leaf, Tensor)]
        self.result = [None if isinstance(leaf, Tensor) else leaf for leaf in out], spec
        self.places = [i for i, leaf in enumerate(out) if isinstance(leaf, Tensor)]
        return tensors

    def rebuilt(self, tensors: tuple[Tensor, ...]) -> Any:
        """Put tensors in the place of those of the result."""
        assert self.result is not None
        leaves, spec = self.result
        for i, tensor in zip(self.places, tensors, strict=True):
            leaves[i] = tensor
        result = tree_unflatten(leaves, spec)
        self.result = None  # which holds the tensors
        return result


class _Boundary(torch.autograd.Function):
    """Runs a layer without recording it, and in the backward pass again, recording."""

    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.place = call, call.layer.spool.write(inputs)
        out = call(list(inputs))
        ctx.norm = _norm(out)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        inputs = [t.requires_grad_() for t in call.layer.spool.read(ctx.place)]
        with torch.enable_grad():
            out = call(inputs)
        call.result = None
        if not math.isclose(_norm(out), ctx.norm, rel_tol=TOLERANCE) and math.isfinite(ctx.norm):
            raise UnsupportedError(
                f"layer {call.layer.path!r} gives another result when it runs again: it depends on what ran before; "
                "fit does not do this model"
            )
        pairs = [(t, grad) for t, grad in zip(out, grads, strict=True) if grad is not None and t.requires_grad]
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [grad for _, grad in pairs])
        return None, None, *(t.grad for t in inputs)


def _norm(tensors: list[Tensor]) -> float:
    return float(sum(torch.linalg.vector_norm(t) for t in tensors if t.is_floating_point()))
