"""Give a loaded model its weights from disk: which weights form each tensor, and its values under each variant, read when they are needed.

``model.layers.0.mlp.up_proj.weight`` of a vision-language model → ``language_model.model.layers.0.mlp.up_proj.weight`` on disk;
``model.layers.0.mlp.experts.gate_up_proj`` (8, 2·I, H) → for each expert, ``….experts.3.w1.weight`` above ``….experts.3.w3.weight``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from streamer.detection.findings import Findings
from streamer.errors import MismatchError, UnsupportedError, UsageError
from streamer.json_types import Selection
from streamer.linalg.operators import Delta, LowRank
from streamer.linalg.torch_state import CPU
from streamer.methods import (
    METHODS,
    UNCHANGED,
    Method,
    MethodName,
    NullSpace,
    RegMean,
    make_method,
    options_of,
)
from streamer.methods.files import Coefficients, InputMap
from streamer.output.adapter_writer import back_project
from streamer.plan.architectures import architecture_for, architectures_for
from streamer.plan.name_matching import (
    MERGE,
    TRANSPOSE,
    TRANSPOSE_IF,
    Loaded,
    TensorSlice,
    renames_for,
)
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.plan.tied_embeddings import TiedNames, find_ties
from streamer.units import listed
from streamer.weights.base import Plain, Weight
from streamer.weights.logical import WeightView


@dataclass(frozen=True)
class WeightSource:
    """Weights on disk, concatenated by rows, that form a tensor of the loaded model or one matrix of a stack.

    Attributes
    ----------
    slices
        The weights' names, with the matrix's index if a weight is a stack.
    transposed
        Whether the loaded tensor is the transpose.
    """

    slices: tuple[TensorSlice, ...]
    transposed: bool = False


@dataclass(frozen=True)
class RunTimeTensor:
    """Parameter or buffer of the loaded model.

    Attributes
    ----------
    name, shape
        Name and shape in the loaded model.
    base, adapted
        Sources in the base and in the adapted model, which may undo a tie: one for the whole tensor, or one for each expert.
    stacked
        Whether there is one source for each expert.
    """

    name: str
    shape: tuple[int, ...]
    base: tuple[WeightSource, ...]
    adapted: tuple[WeightSource, ...]
    stacked: bool = False

    @property
    def weights(self) -> set[str]:
        """Return the names of the adapted model's weights that form it."""
        return {piece.weight for source in self.adapted for piece in source.slices}

    def targets(self, plan: Plan) -> list[tuple[Target, TensorSlice]]:
        """List the targets in it, each with its slice."""
        return [pair for weight in sorted(self.weights) for pair in plan.by_weight.get(weight, ())]


def match_run_time(
    plan: Plan, shapes: Mapping[str, tuple[int, ...]], optional: Iterable[str], prefix: str
) -> dict[str, RunTimeTensor]:
    """Match each tensor of a loaded model to the base's weights, and check that they include everything that the adapter changes.

    Parameters
    ----------
    shapes
        Name → shape of every parameter and persistent buffer.
    optional
        Buffers that a checkpoint may lack because the class computes them.
    prefix
        The class's ``base_model_prefix``, with which a checkpoint's names may begin.

    Raises
    ------
    MismatchError
        If a parameter has no weights, or weights of another shape.
    UnsupportedError
        If loading builds weights in an unknown way, or the adapter changes a weight that the loaded model does not have.
    """
    if plan.weights.quantized_names and any(a.conv1d for a in architectures_for(plan.config)):
        raise UnsupportedError(
            f"{plan.base.path}: a quantized {plan.config.model_type} stores its layers as (out, in), and the loaded model as (in, out), "
            "which is not supported by evaluate and repair; use the 16-bit base"
        )
    names, optional = _Names(plan, prefix), set(optional)
    tensors = {
        name: tensor
        for name, shape in shapes.items()
        if (tensor := names.find(name, shape)) is not None
    }
    if missing := [name for name in shapes if name not in tensors and name not in optional]:
        raise MismatchError(
            f"{plan.base.path}: lacks {len(missing)} of {len(shapes)} tensors of its class, {listed(map(repr, missing))}; is it of another "
            "class than its config.json says?"
        )
    used = {weight for tensor in tensors.values() for weight in tensor.weights}
    if lost := sorted(names.edited - used):
        raise UnsupportedError(
            f"{plan.adapter.path}: changes {len(lost)} tensors that the class of {plan.base.path} does not use to compute a text's losses, "
            f"{listed(map(repr, lost))}; evaluate and repair cannot measure them"
        )
    return tensors


class _Names:
    """Index of weights on disk by the run-time names that loading gives them."""

    def __init__(self, plan: Plan, prefix: str) -> None:
        self.plan, self.prefix = plan, f"{prefix}." if prefix else ""
        renames, edits = renames_for(plan.config), plan.edits
        self.at: dict[str, list[Loaded]] = defaultdict(list)
        on_disk = [
            *plan.weights.stored,
            *(n for n in edits.sources if n not in plan.weights.stored),
        ]
        for loaded in renames.loaded(on_disk):
            self.at[loaded.name].append(loaded)
        for (
            name
        ) in on_disk:  # transformers skips a rename if the model has no tensor of the new name
            self.at.setdefault(name, [Loaded(name, name)])
        self.ties: dict[str, TiedNames] = {}
        architecture = architecture_for(plan.config)
        for tie in find_ties(plan.base.weight_map, architecture, renames):
            self.ties |= {name: tie for name in tie.on_disk if tie.stored}
        self.edited = {*edits.sources, *edits.rows, *edits.shifts, *plan.by_weight}

    def find(self, name: str, shape: tuple[int, ...]) -> RunTimeTensor | None:
        """Find the sources of one tensor; None if it has none."""
        spellings = dict.fromkeys((name, name.removeprefix(self.prefix), self.prefix + name))
        loaded = next((self.at[spelling] for spelling in spellings if spelling in self.at), [])
        tie = next((self.ties[spelling] for spelling in spellings if spelling in self.ties), None)
        if loaded and loaded[0].by is not None:
            sources = self._built(name, loaded, shape)
            return RunTimeTensor(name, shape, sources, sources, stacked=True)
        weight = loaded[0].tensor if loaded else None
        if weight is None and tie is not None:
            weight = (
                next((tie.on_disk[s] for s in spellings if s in tie.on_disk), None) or tie.stored
            )
        if weight is None or (tie is None and weight not in self.plan.weights.stored):
            return None
        stands, tied_to = weight in self.plan.weights.stored, weight if tie is None else tie.stored
        has_weight = weight in self.edited or (stands and weight not in self.plan.edits.dropped)
        base = self._direct(weight if stands else tied_to, shape)
        adapted = self._direct(weight if has_weight else tied_to, shape)
        stacked = len(shape) == 3 and adapted[0].slices[0].index is not None
        return RunTimeTensor(name, shape, base, adapted, stacked)

    def _direct(self, weight: str, shape: tuple[int, ...]) -> tuple[WeightSource, ...]:
        """Use a weight unchanged; a stack gives one source for each matrix."""
        weights, sources = self.plan.weights, self.plan.edits.sources
        stored = weights.shape(weight) if weight in weights else sources[weight].info.shape
        if stored != shape:
            raise MismatchError(
                f"{self.plan.base.path}: {weight!r} has shape {list(stored)}, and its class expects {list(shape)}; is it of another class, "
                "or another vocabulary, than its config.json says?"
            )
        if len(shape) == 3 and not weight.endswith(
            ".weight"
        ):  # a name in .weight is a convolution's
            return tuple(WeightSource((TensorSlice(weight, e),)) for e in range(shape[0]))
        return (WeightSource((TensorSlice(weight),)),)

    def _built(
        self, name: str, loaded: Sequence[Loaded], shape: tuple[int, ...]
    ) -> tuple[WeightSource, ...]:
        """Collect the pieces of a tensor that loading builds, from each expert's tensors or from stacks."""
        by = loaded[0].by
        assert by is not None
        if not by.stacks or len(shape) != 3:
            raise UnsupportedError(
                f"{self.plan.base.path}: {name!r} is built on loading by {' and '.join(by.by)} from {loaded[0].tensor!r}, "
                "which is not supported by evaluate and repair; save the base again with the transformers that is installed"
            )
        numbered = MERGE in by.by
        sources: list[dict[int, str]] = [{} for _ in by.sources]
        for part in loaded:
            sources[part.source][(part.number if numbered else 0) or 0] = part.tensor
        experts = range(shape[0])
        if any(sorted(s) != (list(experts) if numbered else [0]) for s in sources):
            raise MismatchError(
                f"{self.plan.base.path}: {name!r} is built on loading from {loaded[0].tensor!r} and similar tensors, which are not one for "
                f"each of {shape[0]} experts"
            )
        shapes = [self.plan.weights[s[0]].shape[0 if numbered else 1 :] for s in sources]
        if any(len(shape) != 2 for shape in shapes) or len({shape[1] for shape in shapes}) != 1:
            raise MismatchError(
                f"{self.plan.base.path}: {sources[0][0]!r} and its like do not fit together: {shapes}"
            )
        rows, width = sum(shape[0] for shape in shapes), shapes[0][1]
        transposed = by.by == (TRANSPOSE,) or (
            by.by == (TRANSPOSE_IF,) and (rows, width) != shape[1:]
        )
        if ((width, rows) if transposed else (rows, width)) != shape[1:]:
            raise MismatchError(
                f"{self.plan.base.path}: {name!r} is built on loading of matrices {[rows, width]}, and its class expects {list(shape[1:])}"
            )

        def pieces(e: int) -> tuple[TensorSlice, ...]:
            return tuple(TensorSlice(s[e]) if numbered else TensorSlice(s[0], e) for s in sources)

        return tuple(WeightSource(pieces(e), transposed) for e in experts)


def layer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """List by path the layers of a transformers model that its authors declare safe to run again; nested layers are left out."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(
            path.startswith(f"{outer}.") for outer in layers
        ):
            layers[path] = module
    return layers


Shared = TypeVar("Shared", Tensor, Delta)

BASE, ADAPTER = "base", "adapter"
"""Names of the first two variants: the model without the adapter, and with the unchanged adapter."""


@dataclass(frozen=True)
class Variant:
    """A model to evaluate: the base with an adapter mitigated by one method.

    Attributes
    ----------
    name
        ``base``, ``adapter``, or method and λ: ``paper 0.5``; for a fit the share that it keeps: ``regmean 0.9``.
    mitigation
        The method that computes Δ'; None for the base, which does not use the adapter.
    """

    name: str
    mitigation: Method | None

    @classmethod
    def of(cls, method: Method) -> Variant:
        """Make the variant for a method, named by its label."""
        return cls(method.label, method)

    @property
    def method(self) -> MethodName | None:
        """Return the name of the method; None for ``base`` and ``adapter``."""
        return self.mitigation.name if self.mitigation and self.name != ADAPTER else None

    @property
    def mitigation_lambda(self) -> float | None:
        """Return λ; None for ``base``, ``adapter`` and a fit."""
        return (
            self.mitigation.mitigation_lambda if self.mitigation and self.name != ADAPTER else None
        )

    @property
    def scales_intruders(self) -> bool:
        """Test whether the variant depends on findings."""
        return self.mitigation is not None and self.mitigation.needs_detection

    @property
    def keep(self) -> float | None:
        """Return the share of the learning that a fit keeps; None for all other variants."""
        return self.mitigation.coefficients.keep if isinstance(self.mitigation, RegMean) else None


def make_variants(
    methods: Sequence[MethodName],
    lambdas: Sequence[float],
    select: Selection,
    coefficients: Coefficients | None = None,
    amplify: bool = False,
    mapped: InputMap | None = None,
) -> tuple[Variant, ...]:
    """List ``base``, ``adapter``, each method at each λ, and last the one with the given coefficients.

    If coefficients or a map are given, the method that uses them is listed, whether named or not.

    Raises
    ------
    UsageError
        If there is no method or no λ, one is given twice, λ is 1 (the unchanged adapter), ``regmean`` has no coefficients, or an option
        makes no sense.
    """
    for what, values in (("method", methods), ("lambda", lambdas)):
        if not values:
            raise UsageError(f"{what}: expected at least one, found none")
        if len(set(values)) < len(values):
            raise UsageError(f"{what}: expected different values, found {list(values)}")
    if 1 in lambdas:
        raise UsageError("lambda: 1 is the unchanged adapter, which is always evaluated; omit it")
    if mapped is not None and NullSpace.name not in methods:
        methods = (*methods, NullSpace.name)
    if coefficients is not None:
        methods = (*(name for name in methods if name != RegMean.name), RegMean.name)
    files = {"map": mapped, "coefficients": coefficients}
    stated = {
        "select": select,
        "amplify": amplify,
        **{name: file for name, file in files.items() if file is not None},
    }
    mitigations: list[Method] = []
    for name in methods:
        names = options_of(METHODS[name]) if name in METHODS else []
        options = {option: value for option, value in stated.items() if option in names}
        if "mitigation_lambda" in names:
            mitigations += [make_method(name, mitigation_lambda=lam, **options) for lam in lambdas]
        else:  # refuses an unknown name, and missing coefficients
            mitigations.append(make_method(name, **options))
    return (Variant(BASE, None), Variant(ADAPTER, UNCHANGED), *map(Variant.of, mitigations))


BLOCK_BYTES = 64 << 20
"""Bytes of a matrix's rows that are read and multiplied at a time."""


class Reader(ABC):
    """Reads the float32 values of one parameter for the current variant."""

    name: str
    shape: tuple[int, ...]
    device: torch.device
    rounded: bool = False

    @abstractmethod
    def read(self) -> Tensor:
        """Read all values, or those of the rows in use."""

    def matrix(self, index: int) -> Tensor | None:
        """Read one matrix of a stack, or return a stand-in; None if the parameter is not a stack."""
        return None

    def gather(self, ids: Tensor) -> Tensor | None:
        """Read one row for each id, (*ids, columns); None if the parameter is not read row by row."""
        return None

    @abstractmethod
    def product(self, x: Tensor, transposed: bool) -> Tensor:
        """Compute ``x Wᵀ``, or ``x W`` if `transposed`."""


class _Transpose(Reader):
    """Reads the transpose of a matrix."""

    def __init__(self, of: Reader) -> None:
        self.of, self.name, self.shape, self.device = of, of.name, of.shape[::-1], of.device

    def read(self) -> Tensor:
        return self.of.read().T

    def product(self, x: Tensor, transposed: bool) -> Tensor:
        return self.of.product(x, not transposed)


class LazyTensor(Tensor):
    """Parameter whose values stay on disk: it has shape and dtype, and each operation reads what it needs.

    Products, look-ups in an embedding, and access to one matrix of a stack read a part at a time; a cast to float32 reads nothing; every
    other operation reads the whole tensor. Results that were read are plain tensors.
    """

    reader: Reader

    @classmethod
    def of(cls, reader: Reader) -> LazyTensor:
        """Make the stand-in for a parameter."""
        lazy: LazyTensor = Tensor._make_subclass(
            cls, torch.empty(reader.shape, dtype=torch.float32, device="meta")
        )
        lazy.reader = reader
        return lazy

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute an operation on values read for it."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if (
                func == Tensor.device.__get__
            ):  # `__get__` makes a new object each time, so compare with ==
                return args[0].reader.device
            if func in _ALIASES:
                return args[0]
            _refuse_writing(func, args, kwargs)
            if func in _METADATA:
                return func(*args, **kwargs)
        # Outside the guard, which holds for the whole thread: a sweep may run other groups before a product returns.
        special = _SPECIAL.get(func)
        if special is not None and (result := special(*args, **kwargs)) is not None:
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*tree_map(_values, tuple(args)), **tree_map(_values, dict(kwargs)))

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes more arguments
        return f"LazyTensor({self.reader.shape})"


def _refuse_writing(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse an operation that changes a parameter: it would change only a temporary copy."""
    name = getattr(func, "__name__", "")
    inplace = name in ("__setitem__", "__set__")
    inplace |= name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    inplace |= name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    if (inplace and args and isinstance(args[0], LazyTensor)) or isinstance(
        kwargs.get("out"), LazyTensor
    ):
        target = args[0] if inplace else kwargs["out"]
        raise UnsupportedError(
            f"{target.reader.name!r} is changed by the model as it runs ({name}), not supported by evaluate and repair; measure "
            "merged models"
        )


def _values(value: Any) -> Any:
    return value.reader.read() if isinstance(value, LazyTensor) else value


_ALIASES = {Tensor.data.__get__, Tensor.detach}  # type: ignore[attr-defined]  # a getter, in torch's stub a tensor
"""Operations whose results share the parameter's memory: changing a result would change the parameter."""

_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "is_meta", "layout", "requires_grad", "itemsize",
                                                 "is_quantized", "is_sparse", "is_nested", "is_cuda", "is_cpu", "is_leaf", "grad",
                                                 "grad_fn")),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex,
    Tensor.__len__, Tensor.ndimension, Tensor.is_contiguous,
}  # fmt: skip


def _linear(x: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """Compute ``x Wᵀ + b``."""
    if not isinstance(weight, LazyTensor) or isinstance(x, LazyTensor):
        return None
    product = weight.reader.product(x, False)
    return product if bias is None else product + _values(bias)


def _embedding(ids: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """Look up rows; the function's other arguments concern training or norms."""
    renormed = kwargs.get("max_norm") is not None or (len(args) > 1 and args[1] is not None)
    if not isinstance(weight, LazyTensor) or renormed:
        return None
    count = weight.reader.shape[0]
    if (
        ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < count
    ):  # beyond the rows a file has other bytes
        raise UnsupportedError(
            f"{weight.reader.name!r}: expected rows 0 to {count - 1}, found {int(ids.min())} to {int(ids.max())} looked up; use a "
            "smaller --length if they are positions"
        )
    return weight.reader.gather(ids)


def _item(weight: Any, index: Any) -> Tensor | None:
    """Take one matrix of a stack."""
    if not isinstance(weight, LazyTensor):
        return None
    number = (
        index.item()
        if isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point()
        else index
    )
    return weight.reader.matrix(number) if type(number) is int else None


def _matmul(x: Any, weight: Any) -> Tensor | None:
    """Compute ``x W``."""
    lazy = isinstance(weight, LazyTensor) and weight.ndim == 2 and not isinstance(x, LazyTensor)
    return weight.reader.product(x, True) if lazy else None


def _addmm(bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    """Compute ``b + x W``."""
    product = _matmul(x, weight) if beta == alpha == 1 else None
    return None if product is None else product + _values(bias)


def _bmm(input: Any, mat2: Any) -> Tensor | None:  # noqa: A002  # torch's names, by which it may be called
    """Compute ``x_e W_e`` for each matrix of a stack, one at a time."""
    if (
        isinstance(input, LazyTensor)
        or not isinstance(mat2, LazyTensor)
        or len(input) != mat2.shape[0]
    ):
        return None
    matrices = [matrix for e in range(len(input)) if (matrix := mat2.reader.matrix(e)) is not None]
    return (
        torch.stack([rows @ matrix for rows, matrix in zip(input, matrices, strict=True)])
        if matrices
        else None
    )


def _cast(weight: Any, dtype: Any = None, *others: Any, **options: Any) -> Tensor | None:
    """Keep the stand-in where a router asks for float32, unless its products are rounded."""
    same = dtype is torch.float32 and not others and not options and not weight.reader.rounded
    return weight if same else None


def _transpose(weight: Any, *dimensions: int) -> Tensor | None:
    """Return a stand-in for the transpose of a matrix."""
    exchanged = not dimensions or {d % 2 for d in dimensions} == {0, 1}
    lazy = isinstance(weight, LazyTensor) and weight.ndim == 2
    return LazyTensor.of(_Transpose(weight.reader)) if lazy and exchanged else None


_SPECIAL: Mapping[Any, Callable[..., Tensor | None]] = {
    functional.linear: _linear, functional.embedding: _embedding, Tensor.__getitem__: _item,
    torch.matmul: _matmul, Tensor.matmul: _matmul, Tensor.__matmul__: _matmul, torch.mm: _matmul, Tensor.mm: _matmul,
    torch.addmm: _addmm, torch.bmm: _bmm, Tensor.bmm: _bmm,
    Tensor.T.__get__: _transpose, Tensor.mT.__get__: _transpose, Tensor.t: _transpose, torch.t: _transpose,  # type: ignore[attr-defined]  # as above
    Tensor.transpose: _transpose, torch.transpose: _transpose,
    Tensor.to: _cast, Tensor.type: _cast, Tensor.float: partial(_cast, dtype=torch.float32),
}  # fmt: skip


@dataclass(frozen=True)
class VariantSet:
    """Variants of one adapted model, and what their deltas are computed from.

    Attributes
    ----------
    findings
        Findings on all matrices; None if no variant needs them.
    projected
        Whether deltas are projected onto the adapter's rank, as `mitigate` writes them, instead of kept complete, as `merge` does.
    rounds_products
        Whether the base's weights, and the inputs and results of their products, are rounded to bfloat16.
    device
        Device on which the model runs; everything read from files is copied to it here.
    """

    plan: Plan
    variants: tuple[Variant, ...]
    findings: Findings | None
    projected: bool = False
    rounds_products: bool = False
    device: torch.device = CPU

    def __post_init__(self) -> None:
        if self.rounds_products and self.device != CPU:
            raise UsageError(
                f"bf16 products run only on the CPU; with --device {self.device}, use --dtype float32"
            )


ROOM = 384 << 20
"""Bytes of float32 values of one layer that stay in memory for the next group of sequences; the others are converted again for each."""


class LayerCache:
    """Values that groups of sequences share while they run one layer, as many as there is room for."""

    def __init__(self, room: int = ROOM) -> None:
        self.room, self._nbytes, self._values = room, 0, dict[Any, Any]()

    def get(self, key: Any, read: Callable[[], Shared]) -> Shared:
        """Return the values of a key; read them if they are not here."""
        if key in self._values:
            return cast(Shared, self._values[key])
        values = read()
        nbytes = (
            values.nbytes
            if isinstance(values, Tensor)
            else sum(t.nbytes for _, t in values.named_tensors())
        )
        if self._nbytes + nbytes <= self.room:
            self._values[key], self._nbytes = values, self._nbytes + nbytes
        return values

    def clear(self) -> None:
        """Drop all values: another layer begins."""
        self._values.clear()
        self._nbytes = 0


class Values:
    """Float32 values of the tensors that form a loaded model, by the variant's number.

    Attributes
    ----------
    applied
        Names of the weights whose deltas were used.
    read
        Names of the weights that were read with the adapter's edits.
    """

    def __init__(self, job: VariantSet) -> None:
        self.job, self.plan, self.device = job, job.plan, job.device
        self.base: WeightView = replace(job.plan.weights, replacements={}, derived={})
        self.applied: set[str] = set()
        self.read: set[str] = set()
        self.cache = LayerCache()

    def adapted(self, variant: int) -> bool:
        """Test whether a variant uses the adapter; only the base does not."""
        return self.job.variants[variant].mitigation is not None

    def weight(self, name: str, variant: int) -> Weight:
        """Return the weight to which a variant's deltas are added."""
        adapted = self.adapted(variant)
        if adapted:
            self.read.add(name)
        return (self.plan.weights if adapted else self.base)[name]

    def sources(self, tensor: RunTimeTensor, variant: int) -> tuple[WeightSource, ...]:
        """Return the sources of a tensor under a variant."""
        return tensor.adapted if self.adapted(variant) else tensor.base

    def edited(self, tensor: RunTimeTensor) -> bool:
        """Test whether the adapter changes a tensor other than by deltas; such changes affect all variants but the base."""
        return bool(self.edits & tensor.weights) or tensor.base != tensor.adapted

    def dense(self, tensor: RunTimeTensor) -> bool:
        """Test whether the adapter changes a tensor by deltas, and not by one whose factors cover the whole tensor."""
        pairs, source = tensor.targets(self.plan), tensor.adapted[0]
        if (
            len(pairs) != 1
            or tensor.stacked
            or source.transposed
            or len(source.slices) > 1
            or len(tensor.shape) != 2
        ):
            return bool(pairs)
        ((target, slice_),) = pairs
        return not target.module.low_rank or slice_.index is not None or slice_.rows is not None

    def change(self, target: Target, part: TensorSlice, variant: int) -> Delta:
        """Compute the change Δ' that a variant's adapter makes to a slice of a weight, in float32 and oriented as the weight is stored."""
        self.applied.add(part.weight)
        key = target.tensor, variant
        delta = self.cache.get(
            key, lambda: self._delta(target, variant).to(torch.float32, self.device)
        )
        delta = delta if part.rows is None else delta.row_slice(*part.rows)
        return delta.T if target.transposed else delta

    def changes(self, slice_: TensorSlice, variant: int) -> list[tuple[TensorSlice, Delta]]:
        """List a variant's changes to a weight, or to one matrix of it, in the order of targets."""
        pairs = self.plan.by_weight.get(slice_.weight, ()) if self.adapted(variant) else ()
        return [
            (part, self.change(t, part, variant))
            for t, part in pairs
            if slice_.index in (None, part.index)
        ]

    def _delta(self, target: Target, variant: int) -> Delta:
        """Compute Δ' (out, in) of one variant."""
        method, findings = self.job.variants[variant].mitigation, self.job.findings
        assert method is not None
        needed = findings if method.needs_detection else None
        detection = None if needed is None else needed.by_tensor[target.tensor].detection
        delta = self.cache.get(target.tensor, lambda: self.plan.finite_delta(target))
        after = method.mitigated(delta, detection, target.tensor)
        factors = target.module.factors
        if (
            self.job.projected
            and factors is not None
            and isinstance(after, LowRank)
            and factors.scaling
        ):
            B, A, _ = back_project(after, factors.rank, factors.scaling)
            return LowRank(B * factors.scaling, A.T)
        return after

    def whole(self, tensor: RunTimeTensor, variant: int) -> Tensor:
        """Read a tensor, or all matrices of a stack, with deltas."""
        matrices = [self.matrix(source, variant) for source in self.sources(tensor, variant)]
        return torch.stack(matrices) if tensor.stacked else matrices[0]

    def matrix(self, source: WeightSource, variant: int) -> Tensor:
        """Read the tensor or the single matrix of a source, with deltas."""
        pieces = [self._piece(piece, variant) for piece in source.slices]
        values = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return values.T if source.transposed else values

    def weight_of(self, slice_: TensorSlice, variant: int) -> Weight:
        """Return a weight, or one matrix of it."""
        weight = self.weight(slice_.weight, variant)
        return weight if slice_.index is None else weight.slice(slice_.index)

    def blocks(
        self,
        source: WeightSource,
        variant: int,
        first: int,
        last: int,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Read rows of a source's matrix as stored, a few at a time, without deltas; yields (from, to, values).

        Parameters
        ----------
        first, last
            Range of rows to read; the yielded positions count from `first`.
        dtype
            Dtype to which the values are rounded.
        """
        at = -first
        for slice_ in source.slices:
            weight = self.weight_of(slice_, variant).at_hand()
            m, n = weight.matrix
            step = max(1, BLOCK_BYTES // (4 * max(1, n)))
            for i in range(max(0, -at), min(m, last - first - at), step):
                j = min(i + step, m, last - first - at)

                def read(
                    weight: Weight = weight, slice_: TensorSlice = slice_, i: int = i, j: int = j
                ) -> Tensor:
                    # They cross to the device as stored, in the fewest bytes.
                    values = weight.rows(i, j).to(self.device).to(dtype, copy=True)
                    if slice_.index is None:
                        self._edit(slice_.weight, variant, values, i)
                    return values

                adapted = self.adapted(variant) and slice_.weight in self.edits
                yield at + i, at + j, self.cache.get((slice_, i, j, adapted, dtype), read)
            at += m

    def looked_up(
        self, tensor: RunTimeTensor, variant: int, ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read the looked-up rows of a plain matrix, without deltas; returns their numbers, the rows, and each id's place among them."""
        unique, at = torch.unique(
            ids.to(CPU), return_inverse=True
        )  # files are read by these numbers
        ((slice_,),) = (source.slices for source in self.sources(tensor, variant))
        weight, wanted = self.weight(slice_.weight, variant).at_hand(), unique.tolist()
        some = (
            isinstance(weight, Plain) and not weight.load_bytes
        )  # mapped: only pages of these rows are read
        rows = (
            weight.rows(0, weight.matrix[0])[unique]
            if some
            else torch.cat([weight.rows(i, i + 1) for i in wanted])
        )
        rows = rows.to(torch.float32, copy=True).reshape(-1, *tensor.shape[1:])
        for number, i in enumerate(wanted if slice_.weight in self.edits else ()):
            self._edit(slice_.weight, variant, rows[number : number + 1], i)
        return unique.to(self.device), rows.to(self.device), at.to(self.device)

    def row_access(self, tensor: RunTimeTensor) -> bool:
        """Test whether a few rows can be read by themselves: the tensor is a vector or matrix that one weight stores unchanged."""
        sources = (*tensor.base, *tensor.adapted)
        unchanged = (
            len(s.slices) == 1 and s.slices[0].index is None and not s.transposed for s in sources
        )
        return len(tensor.shape) <= 2 and all(unchanged)

    def _piece(self, slice_: TensorSlice, variant: int) -> Tensor:
        values = self.weight_of(slice_, variant).whole(self.device).to(torch.float32)
        if slice_.index is None:
            self._edit(slice_.weight, variant, values, 0)
        for part, change in self.changes(slice_, variant):
            into = values if part.index is None or slice_.index is not None else values[part.index]
            matrix = into.view(len(into), -1)
            change.add_rows(matrix, 0, len(matrix))
        return values

    def _edit(self, name: str, variant: int, values: Tensor, start: int) -> None:
        """Apply the adapter's edits to rows of a weight starting at `start`: biases are added, rows are replaced."""
        edits = self.plan.edits
        if not self.adapted(variant):
            return
        if name in edits.shifts:
            shift, scaling = edits.shifts[name]
            rows = Plain.of(shift).rows(start, start + len(values)).to(values)
            values.add_(rows.reshape(values.shape), alpha=scaling)
        if name in edits.rows:
            stored, indices = edits.rows[name]
            tokens = Plain.of(stored)
            for at, row in enumerate(indices):
                if start <= row < start + len(values):
                    values[row - start] = tokens.rows(at, at + 1)[0].to(values)

    @cached_property
    def edits(self) -> set[str]:
        """Return the names of the weights that the adapter changes other than by deltas."""
        edits = self.plan.edits
        return {*edits.sources, *edits.shifts, *edits.rows}
