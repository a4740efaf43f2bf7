"""Represent an adapter's modules: their tensors in the adapter's files, and the deltas computed from them.

Three classes share one interface: LoRA's factors, LoRA with DoRA's magnitudes, and the tensors of another PEFT method.

Compute DoRA's delta: ``W' = m · (W0 + Δ) / ‖W0 + Δ‖``, which scales each row of the (out, in) matrix to its magnitude.

PEFT's convention: m has one entry for each row of the (out, in) matrix. For an embedding this is a column of the stored (vocabulary, dim);
for a convolution it is an output channel, with the norm over all other dimensions. The norm includes the delta, without dropout's scaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from streamer.adapters.adapter_config import AdapterConfig
from streamer.adapters.peft_methods import MethodInputs, PeftMethod
from streamer.linalg.operators import BLOCK_BYTES, Delta, Dense, LowRank
from streamer.units import listed
from streamer.weights.base import StoredTensor, encoding_of


def dora_delta(W0: Tensor, delta: LowRank, magnitude: Tensor) -> Tensor:
    """Compute ``W' − W0``, (m, n), in W0's dtype; norms are computed in float64.

    Parameters
    ----------
    W0
        The base matrix, (out, in).
    delta
        Δ, the product of the LoRA factors.
    magnitude
        Lengths m of the rows, (m,).
    """
    delta = LowRank(delta.L.to(W0), delta.R.to(W0))
    lengths = magnitude.to(W0.device, torch.float64)
    m, n = W0.shape
    out = torch.empty((m, n), dtype=W0.dtype, device=W0.device)
    rows = max(1, BLOCK_BYTES // max(1, n * 8))
    for i in range(0, m, rows):
        j = min(m, i + rows)
        total = torch.addmm(W0[i:j], delta.L[i:j], delta.R.T).double()
        factor = lengths[i:j] / torch.linalg.vector_norm(total, dim=1)
        out[i:j] = total * factor[:, None] - W0[i:j]
    return out


def dora_bytes(shape: tuple[int, int], itemsize: int) -> int:
    """Estimate the peak memory of `dora_delta` in bytes: W0, the delta, and up to four blocks of rows in float64."""
    m, n = shape
    return 2 * itemsize * m * n + 4 * min(8 * m * n, max(BLOCK_BYTES, 8 * n))


Shape = tuple[int, ...]


def values_of(stored: StoredTensor, index: tuple[slice, ...] = ()) -> Tensor:
    """Copy an adapter's tensor, or some of its rows and columns, to its computing dtype."""
    return stored.whole()[index].to(encoding_of(stored.info, str(stored.file.path)).compute, copy=True)


class Module(Protocol):
    """One adapted module of a model.

    Attributes
    ----------
    name
        Its path in the model, without wrappers.
    rank, scaling
        From the config and the factors; a method without rank has 0, one without scaling has 1.
    shape
        (out, in) of Δ as a matrix: (dim, vocabulary) for an embedding, (out, in·k) for a convolution with k kernel elements.
    """

    name: str
    rank: int
    scaling: float
    shape: tuple[int, int]

    @property
    def layer_kind(self) -> str:
        """Return ``linear``, ``conv1d`` (a linear layer stored (in, out)), ``embedding``, ``convolution`` or ``expert``."""

    @property
    def low_rank(self) -> bool:
        """Return whether Δ is given as factors."""

    @property
    def factors(self) -> LoraModule | None:
        """Return the module itself if Δ is just the product of LoRA's factors, so that a mitigated delta can be written as factors."""
        return None

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of its tensors in the adapter's files."""

    @property
    def factor_rank(self) -> int:
        """Return the number of columns of Δ's factors."""

    @property
    def expected(self) -> str:
        """Describe the weight that it fits, for messages."""

    def delta(self, tensors: Mapping[str, StoredTensor], W0: Tensor | None, *, double: bool = False) -> Delta:
        """Compute Δ (m, n), with ``W' = W0 + Δ``.

        Parameters
        ----------
        tensors
            The adapter's tensors, by name.
        W0
            The weight as (out, in); may be None if Δ is of low rank.
        double
            Whether to compute in float64, including the scaling of the factors; W0 is then float64.
        """

    def peak_bytes(self, itemsize: int) -> int:
        """Return the peak memory for computing a delta that is not of low rank (W0, Δ and intermediates); else 0."""
        return 0

    def copied_bytes(self, itemsize: int) -> int:
        """Return the memory of the module's tensors in the computing dtype, if they are kept beside Δ."""
        return 0

    def placed(self, stored: Shape, transposed: bool) -> Module | None:
        """Fit the module to a weight of this shape, stored (in, out) if `transposed`, else (out, in).

        Returns
        -------
        Module or None
            The module with the weight's shape as (out, in); None if it does not fit.
        """


@dataclass(frozen=True)
class LoraModule(Module):
    """LoRA: ``Δ = scaling · B @ A``; the scaling is ``alpha/√r`` for rsLoRA, else ``alpha/r``.

    Attributes
    ----------
    a, b
        Names of lora_A (rank, in) and lora_B (out, rank). For a convolution both have the kernel's dimensions too, of size 1 in lora_B.
    kernel
        The kernel's dimensions.
    expert
        Index and number of experts, if a and b hold the factors of all experts (see `adapter_config`).
    grouped
        Whether the columns of such a b are ordered expert by expert.
    delta_transposed
        Whether Δ is the transpose, ``scaling · (B @ A)ᵀ``.
    """

    name: str
    a: str
    b: str
    rank: int
    scaling: float
    shape: tuple[int, int]
    layer_kind: str = "linear"
    kernel: Shape = ()
    expert: tuple[int, int] | None = None
    grouped: bool = False
    delta_transposed: bool = False

    low_rank = True

    @property
    def factors(self) -> LoraModule | None:
        """Return the module itself, unless Δ depends on more than the factors."""
        return self if self.low_rank else None

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of lora_A and lora_B."""
        return self.a, self.b

    @property
    def factor_rank(self) -> int:
        """Return the number of rows of lora_A."""
        return self.rank

    @property
    def expert_slices(self) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return the indices of the module's part of lora_A and of lora_B: everything, or one expert's rows and columns."""
        if self.expert is None:
            return (), ()
        e, experts = self.expert
        own = slice(e * self.rank, (e + 1) * self.rank)
        return (own,), (slice(None), own if self.grouped else slice(e, None, experts))

    def regrouped(self, b: Tensor) -> Tensor:
        """Reorder the columns of a lora_B of all experts from expert by expert to PEFT's order, rank by rank."""
        if self.expert is None or not self.grouped:
            return b
        return b.reshape(len(b), self.expert[1], self.rank).transpose(1, 2).reshape(b.shape)

    @property
    def weight(self) -> Shape:
        """Return the shape of the weight in the model; for a linear layer, as stored (out, in)."""
        m, n = self.shape
        if self.layer_kind == "embedding":
            return n, m
        return (m, n // math.prod(self.kernel), *self.kernel)

    @property
    def expected(self) -> str:
        """Describe the shape of the weight that it fits."""
        return f"shape {list(self.weight)}"

    def product(self, A: Tensor, B: Tensor) -> LowRank:
        """Return ``scaling · B @ A`` as (out, in) factors, transposed if `delta_transposed`; A (r, n), B (m, r)."""
        return LowRank(A.T * self.scaling, B) if self.delta_transposed else LowRank(B * self.scaling, A.T)

    def low_rank_delta(self, tensors: Mapping[str, StoredTensor], double: bool = False) -> LowRank:
        """Return the product of the LoRA factors alone, as (out, in) factors."""
        slices = zip((self.a, self.b), self.expert_slices, strict=True)
        A, B = (values_of(tensors[name], index).flatten(1) for name, index in slices)
        return self.product(A.double(), B.double()) if double else self.product(A, B)

    def delta(self, tensors: Mapping[str, StoredTensor], W0: Tensor | None, *, double: bool = False) -> Delta:
        """Return ``scaling · B @ A`` as factors."""
        return self.low_rank_delta(tensors, double)

    def placed(self, stored: Shape, transposed: bool) -> Module | None:
        """Fit the module to a weight of this shape as stored."""
        wanted = self.shape[::-1] if self.layer_kind == "linear" and transposed else self.weight
        return self if stored == wanted else None


@dataclass(frozen=True)
class DoraModule(LoraModule):
    """DoRA: ``W' = magnitude · (W0 + scaling · B @ A)`` with rows first normalised to length 1 (see `dora`); Δ is not of low rank.

    Attributes
    ----------
    magnitude
        Name of the magnitudes (m,).
    """

    magnitude: str = ""

    low_rank = False

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of lora_A, lora_B and the magnitudes."""
        return self.a, self.b, self.magnitude

    def delta(self, tensors: Mapping[str, StoredTensor], W0: Tensor | None, *, double: bool = False) -> Delta:
        """Compute ``W' − W0`` in W0's dtype."""
        assert W0 is not None
        magnitude = values_of(tensors[self.magnitude]).flatten()
        return Dense(dora_delta(W0, self.low_rank_delta(tensors, double), magnitude))

    def peak_bytes(self, itemsize: int) -> int:
        """Return the peak memory of `dora_delta`."""
        return dora_bytes(self.shape, itemsize)


@dataclass(frozen=True)
class MethodModule(Module):
    """Module of a method other than LoRA (see `peft_methods`).

    Attributes
    ----------
    method, config
        The method, and the adapter's config with the method's options.
    tensors
        Names in the adapter's files, by role.
    shapes
        Shapes of these tensors, by role.
    shape
        (out, in) of the weight that the module is placed on, with a convolution's kernel flattened into its input.
    expert
        The module's index along the first dimension of its tensors, if they hold one matrix for each expert.
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
        """Return whether the method's delta is given as factors."""
        return self.method.low_rank

    @property
    def layer_kind(self) -> str:
        """Return the kind of layer, by the tensors' roles; convolutions count as ``linear``."""
        kinds = {"oft_embedding_R": "embedding", "embedding": "embedding", "conv1d": "conv1d"}
        return next((kinds[role] for role in self.tensors if role in kinds), "linear")

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of its tensors."""
        return tuple(self.tensors.values())

    @property
    def factor_rank(self) -> int:
        """Return the shorter side of the largest factor."""
        return max(min(shape) for shape in self.shapes.values() if len(shape) == 2)

    @property
    def expected(self) -> str:
        """Describe the tensor shapes that a weight must fit."""
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
        """Return the module's part of one of its tensors: the whole, or one expert's matrix."""
        return tensor if self.expert is None else tensor.slice(self.expert)

    def peak_bytes(self, itemsize: int) -> int:
        """Return the memory of the matrices of W0's size that the formula holds at once."""
        return 0 if self.low_rank else self.method.matrices * itemsize * math.prod(self.shape)

    def copied_bytes(self, itemsize: int) -> int:
        """Return the memory of all its tensors in the computing dtype."""
        return sum(math.prod(shape) * max(4, itemsize) for shape in self.shapes.values())

    def placed(self, stored: Shape, transposed: bool) -> MethodModule | None:
        """Fit the module to a weight of this shape as stored."""
        if len(stored) < 2:
            return None
        m, n = stored[0], math.prod(stored[1:])
        shape = (n, m) if transposed else (m, n)
        try:
            fits = self.method.fits(self.shapes, shape)
        except (KeyError, IndexError, ValueError):  # a tensor is missing or has the wrong number of dimensions
            fits = False
        return replace(self, shape=shape) if fits else None
