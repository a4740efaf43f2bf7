"""Run decoder layers without keeping activations: a layer's inputs go to a spool, and it runs again for the backward pass."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from streamer.errors import UnsupportedError
from streamer.streaming.spool import Spool

TOLERANCE = 1e-4
"""Largest relative difference that rounding may make between the norms of a layer's outputs in two runs."""


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


class SpooledLayer:
    """Layer whose `forward` keeps its inputs in a spool instead of its activations in memory.

    A `UserDict` argument passes tensors between layers, such as keys and values that later layers use again (transformers'
    `KVSharingDict`). Its contents count as the layer's inputs, and what the layer adds to it counts as outputs.

    Parameters
    ----------
    path, module
        Its path in the model, and the module, which is modified.
    anchor
        Returns a tensor that requires gradients, or None if nothing inside the layer requires any.
    """

    def __init__(self, path: str, module: nn.Module, spool: Spool, anchor: Callable[[], Tensor | None]) -> None:
        self.path, self.spool, self.anchor = path, spool, anchor
        self.forward: Callable[..., Any] = module.forward
        module.forward = self.run

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer.

        Raises
        ------
        UnsupportedError
            If the layer passes tensors on in another kind of argument, where gradients would be lost.
        """
        arguments, tree = tree_flatten((args, kwargs))
        shared = {i: argument for i, argument in enumerate(arguments) if isinstance(argument, UserDict)}
        leaves, spec = tree_flatten([shared[i].data if i in shared else one for i, one in enumerate(arguments)])
        inputs = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        anchor = self.anchor()
        if not torch.is_grad_enabled() or (not inputs and anchor is None):
            return self.forward(*args, **kwargs)
        constants = [None if i in inputs else leaf for i, leaf in enumerate(leaves)]
        call = _Call(self, constants, spec, tree, {i: type(one) for i, one in shared.items()}, inputs)
        tensors: tuple[Tensor, ...] = _Boundary.apply(call, anchor, *(leaves[i] for i in inputs))  # type: ignore[no-untyped-call]  # torch types no `apply`
        result, changes = call.rebuilt(tensors)
        for container, change in zip(shared.values(), changes, strict=True):
            container.update(change)
        return result


@dataclass(eq=False)
class _Call:
    """One call of a layer: its arguments except tensors that require gradients, and the structure of its result.

    Attributes
    ----------
    constants, spec
        Contents of the arguments, with None for each tensor that requires gradients, and their structure.
    tree
        Structure of the argument list.
    shared
        Class of each argument that passes tensors between layers; `constants` has their contents before the call.
    inputs
        Positions of the tensors that require gradients.
    """

    layer: SpooledLayer
    constants: list[Any]
    spec: TreeSpec
    tree: TreeSpec
    shared: Mapping[int, type[UserDict[Any, Any]]]
    inputs: list[int]
    result: tuple[list[Any], TreeSpec] | None = None

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the layer on the tensors that require gradients; return the tensors of its result and those that it passes on."""
        leaves = list(self.constants)
        for i, tensor in zip(self.inputs, tensors, strict=True):
            leaves[i] = tensor
        arguments = tree_unflatten(leaves, self.spec)
        containers = {i: kind(arguments[i]) for i, kind in self.shared.items()}
        arguments = [containers.get(i, argument) for i, argument in enumerate(arguments)]
        args, kwargs = tree_unflatten(arguments, self.tree)
        contained = _contained_tensors(arguments)
        result = self.layer.forward(*args, **kwargs)
        self._check(arguments, contained, tree_flatten((args, kwargs)))
        before = {id(leaf) for leaf in leaves}
        changes = [
            {key: value for key, value in container.items() if any(id(t) not in before for t in tree_flatten(value)[0])}
            for container in containers.values()
        ]
        out, spec = tree_flatten((result, changes))
        tensors = [leaf for leaf in out if isinstance(leaf, Tensor)]
        self.result = [None if isinstance(leaf, Tensor) else leaf for leaf in out], spec
        self.places = [i for i, leaf in enumerate(out) if isinstance(leaf, Tensor)]
        return tensors

    def _check(self, before: list[Any], contained: list[Tensor], after: tuple[list[Any], TreeSpec]) -> None:
        """Raise `UnsupportedError` if tensors are passed on where gradients cannot follow."""
        arguments, tree = after
        same = tree == self.tree and all(a is b for a, b in zip(before, arguments, strict=True))
        now = _contained_tensors(before)
        if not same or [*map(id, contained)] != [*map(id, now)] or any(t.requires_grad for t in contained):
            raise UnsupportedError(
                f"layer {self.layer.path!r} hands tensors on to other layers in its arguments, where gradients do not follow "
                "them; fit does not support this model"
            )

    def rebuilt(self, tensors: tuple[Tensor, ...]) -> Any:
        """Put the given tensors into the structure of the result and of what is passed on."""
        assert self.result is not None
        leaves, spec = self.result
        for i, tensor in zip(self.places, tensors, strict=True):
            leaves[i] = tensor
        result = tree_unflatten(leaves, spec)
        self.result = None  # releases the tensors
        return result


class _Boundary(torch.autograd.Function):
    """Runs a layer without recording, and again with recording in the backward pass."""

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
                "fit does not support this model"
            )
        pairs = [(t, grad) for t, grad in zip(out, grads, strict=True) if grad is not None and t.requires_grad]
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [grad for _, grad in pairs])
        return None, None, *(t.grad for t in inputs)


def _contained_tensors(arguments: list[Any]) -> list[Tensor]:
    """List the tensors inside arguments that are other objects, such as caches."""
    seen: set[int] = set()

    def within(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen and not isinstance(value, nn.Module | type):
            seen.add(id(value))
            inside = value if isinstance(value, Mapping | list | tuple | set) else getattr(value, "__dict__", {})
            children = inside.values() if isinstance(inside, Mapping) else inside
            for child in list(children):
                yield from within(child)

    return [t for one in arguments if not isinstance(one, Tensor | UserDict) for t in within(one)]


def _norm(tensors: list[Tensor]) -> float:
    return float(sum(torch.linalg.vector_norm(t) for t in tensors if t.is_floating_point()))
