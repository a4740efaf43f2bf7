"""An adapter's modules: the tensors that each one has in the adapter's files, and the delta that they make.

Three classes answer the same questions: LoRA's factors, LoRA with DoRA's magnitudes, and the tensors of another PEFT method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from streamer.adapters.adapter_config import AdapterConfig
from streamer.adapters.dora import dora_bytes, dora_delta
from streamer.adapters.peft_methods import MethodInputs, PeftMethod
from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Delta, Dense
from streamer.units import listed
from streamer.weights.base import StoredTensor
from streamer.weights.dtypes import encoding_of

Shape = tuple[int, ...]


def values_of(stored: StoredTensor, index: tuple[slice, ...] = ()) -> Tensor:
    """Copy an adapter's tensor, or some of its rows and columns, in its computing dtype."""
    return stored.whole()[index].to(encoding_of(stored.info, str(stored.file.path)).compute, copy=True)


class Module(Protocol):
    """One adapted module of a model.

    Attributes
    ----------
    name
        Its path in the model, wrappers removed.
    rank, scaling
        By the config and the factors; a method that has no rank has 0, one without a scaling 1.
    shape
        (out, in) of Δ as a matrix: (dim, vocabulary) for an embedding, (out, in·k) for a convolution with k elements in its kernel.
    """

    name: str
    rank: int
    scaling: float
    shape: tuple[int, int]

    @property
    def form(self) -> str:
        """``linear``, ``conv1d`` (a linear layer stored (in, out)), ``embedding``, ``convolution`` or ``expert``."""

    @property
    def low_rank(self) -> bool:
        """Whether Δ comes in factors."""

    @property
    def factors(self) -> LoraModule | None:
        """The module itself, where Δ is the product of LoRA's factors and nothing else: a mitigated delta is written back in them."""
        return None

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of its tensors in the adapter's files."""

    @property
    def factor_rank(self) -> int:
        """Columns of the factors that Δ comes in."""

    @property
    def expected(self) -> str:
        """Weight that it fits, for messages."""

    def delta(self, tensors: Mapping[str, StoredTensor], W0: Tensor | None, *, double: bool = False) -> Delta:
        """Compute Δ (m, n), with ``W' = W0 + Δ``.

        Parameters
        ----------
        tensors
            Those of the adapter, by name.
        W0
            The weight as (out, in); may be None where Δ is of low rank.
        double
            Whether to compute in float64, the scaling of the factors included; W0 is float64 then.
        """

    def peak_bytes(self, itemsize: int) -> int:
        """Return the peak memory of computing a delta that is not of low rank: W0, Δ, and what is between them; else 0."""
        return 0

    def copied_bytes(self, itemsize: int) -> int:
        """Return the memory of the module's tensors in the computing dtype, where these are kept beside Δ."""
        return 0

    def placed(self, stored: Shape, transposed: bool) -> Module | None:
        """Fit the module to a weight of this shape that is stored (in, out) if `transposed`, else (out, in).

        Returns
        -------
        Module or None
            The module, its shape that of the weight as (out, in); None if it does not fit.
        """


@dataclass(frozen=True)
class LoraModule(Module):
    """LoRA: ``Δ = scaling · B @ A``; with rsLoRA the scaling is ``alpha/√r``, else ``alpha/r``.

    Attributes
    ----------
    a, b
        Names of lora_A (rank, in) and lora_B (out, rank). A convolution's have the dimensions of its kernel besides, those of lora_B of
        size 1.
    kernel
        The kernel's dimensions.
    expert
        Index and number of experts, where a and b hold the factors of all of them (see `target_parameters`).
    grouped
        Whether their columns of b stand expert by expert.
    delta_transposed
        Δ is the transpose, ``scaling · (B @ A)ᵀ``.
    """

    name: str
    a: str
    b: str
    rank: int
    scaling: float
    shape: tuple[int, int]
    form: str = "linear"
    kernel: Shape = ()
    expert: tuple[int, int] | None = None
    grouped: bool = False
    delta_transposed: bool = False

    low_rank = True

    @property
    def factors(self) -> LoraModule | None:
        """The module itself, unless Δ is made of more than the factors."""
        return self if self.low_rank else None

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of lora_A and lora_B."""
        return self.a, self.b

    @property
    def factor_rank(self) -> int:
        """Rows of lora_A."""
        return self.rank

    @property
    def expert_slices(self) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Indices of the module's share of lora_A and of lora_B: all, or an expert's rows and columns."""
        if self.expert is None:
            return (), ()
        e, experts = self.expert
        own = slice(e * self.rank, (e + 1) * self.rank)
        return (own,), (slice(None), own if self.grouped else slice(e, None, experts))

    def regrouped(self, b: Tensor) -> Tensor:
        """Put the columns of a lora_B of all experts into PEFT's order, rank by rank, if they stand expert by expert."""
        if self.expert is None or not self.grouped:
            return b
        return b.reshape(len(b), self.expert[1], self.rank).transpose(1, 2).reshape(b.shape)

    @property
    def weight(self) -> Shape:
        """Shape of the weight in the model, unless it is a linear layer's that is stored (in, out)."""
        m, n = self.shape
        if self.form == "embedding":
            return n, m
        return (m, n // math.prod(self.kernel), *self.kernel)

    @property
    def expected(self) -> str:
        """Shape of the weight that it fits."""
        return f"shape {list(self.weight)}"

    def product(self, A: Tensor, B: Tensor) -> LowRank:
        """Return ``scaling · B @ A``, or its transpose where Δ is that, as (out, in) factors; A (r, n), B (m, r)."""
        return LowRank(A.T * self.scaling, B) if self.delta_transposed else LowRank(B * self.scaling, A.T)

    def low_rank_delta(self, tensors: Mapping[str, StoredTensor], double: bool = False) -> LowRank:
        """Return LoRA's own delta as (out, in) factors."""
        slices = zip((self.a, self.b), self.expert_slices, strict=True)
        A, B = (values_of(tensors[name], index).flatten(1) for name, index in slices)
        return self.product(A.double(), B.double()) if double else self.product(A, B)

    def delta(self, tensors: Mapping[str, StoredTensor], W0: Tensor | None, *, double: bool = False) -> Delta:
        """Return ``scaling · B @ A`` in factors."""
        return self.low_rank_delta(tensors, double)

    def placed(self, stored: Shape, transposed: bool) -> Module | None:
        """Fit the module to a weight of this shape as it is stored."""
        wanted = self.shape[::-1] if self.form == "linear" and transposed else self.weight
        return self if stored == wanted else None


@dataclass(frozen=True)
class DoraModule(LoraModule):
    """DoRA: ``W' = magnitude · (W0 + scaling · B @ A)``, rows brought to length 1 first (see `dora`); Δ is not of low rank.

    Attributes
    ----------
    magnitude
        Name of the magnitudes (m,).
    """

    magnitude: str = ""

    low_rank = False

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of lora_A, lora_B and the magnitudes."""
        return self.a, self.b, self.magnitude

    def delta(self, tensors: Mapping[str, StoredTensor], W0: Tensor | None, *, double: bool = False) -> Delta:
        """Compute ``W' − W0`` in the dtype of W0."""
        assert W0 is not None
        magnitude = values_of(tensors[self.magnitude]).flatten()
        return Dense(dora_delta(W0, self.low_rank_delta(tensors, double), magnitude))

    def peak_bytes(self, itemsize: int) -> int:
        """Return the peak memory of `dora_delta`."""
        return dora_bytes(self.shape, itemsize)


@dataclass(frozen=True)
class MethodModule(Module):
    """A module of a method other than LoRA (see `peft_methods`).

    Attributes
    ----------
    method, config
        The method, and the adapter's config, which has its options.
    tensors
        Names in the adapter's files, by role.
    shapes
        Their shapes.
    shape
        (out, in) of the weight that it was placed on, a convolution's kernel set out along its input.
    expert
        Its index along the first dimension of its tensors, where these hold a matrix an expert.
    """

    name: str
    method: PeftMethod
    config: AdapterConfig
    tensors: Mapping[str, str]
    shapes: Mapping[str, Shape]
    rank: int = 0
    scaling: float = 1.0
    shape: tuple[int, int] = (0, 0)
    expert: int | None = None

    @property
    def low_rank(self) -> bool:
        """Whether the method's delta comes in factors."""
        return self.method.low_rank

    @property
    def form(self) -> str:
        """Layer, by the roles of the tensors; ``linear`` stands for convolutions as well."""
        forms = {"oft_embedding_R": "embedding", "embedding": "embedding", "conv1d": "conv1d"}
        return next((forms[role] for role in self.tensors if role in forms), "linear")

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of its tensors."""
        return tuple(self.tensors.values())

    @property
    def factor_rank(self) -> int:
        """Shorter side of the largest factor."""
        return max(min(shape) for shape in self.shapes.values() if len(shape) == 2)

    @property
    def expected(self) -> str:
        """Shapes that must fit the weight."""
        return "what fits " + listed(f"{role} {list(shape)}" for role, shape in self.shapes.items())

    def delta(self, tensors: Mapping[str, StoredTensor], W0: Tensor | None, *, double: bool = False) -> Delta:
        """Compute ``W' − W0`` by the method's formula."""
        values = {role: values_of(self.stored(tensors[name])) for role, name in self.tensors.items()}
        if double:
            values = {role: t.double() for role, t in values.items()}
        if W0 is not None:
            values = {role: t.to(W0.device, torch.promote_types(t.dtype, W0.dtype)) for role, t in values.items()}
        inputs = MethodInputs(values, self.scaling, self.config, self.shape)
        return self.method.delta(inputs, torch.empty(0) if W0 is None else W0)

    def stored(self, tensor: StoredTensor) -> StoredTensor:
        """Return the module's share of one of its tensors: all, or an expert's matrix."""
        return tensor if self.expert is None else tensor.slice(self.expert)

    def peak_bytes(self, itemsize: int) -> int:
        """Return the memory of the matrices that the formula holds at once, those of the size of W0."""
        return 0 if self.low_rank else self.method.matrices * itemsize * math.prod(self.shape)

    def copied_bytes(self, itemsize: int) -> int:
        """Return the memory of all its tensors in the computing dtype."""
        return sum(math.prod(shape) * max(4, itemsize) for shape in self.shapes.values())

    def placed(self, stored: Shape, transposed: bool) -> MethodModule | None:
        """Fit the module to a weight of this shape as it is stored."""
        if len(stored) < 2:
            return None
        m, n = stored[0], math.prod(stored[1:])
        shape = (n, m) if transposed else (m, n)
        try:
            fits = self.method.fits(self.shapes, shape)
        except (KeyError, IndexError, ValueError):  # a tensor is missing, or has other dimensions
            fits = False
        return replace(self, shape=shape) if fits else None
