"""What an adapter holds, module by module: LoRA's factors, another method's tensors, and what is carried along."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from streamer.adapters.peft_methods import METHODS
from streamer.units import listed


@dataclass(frozen=True)
class LoraModule:
    """One adapted module: ``Δ = scale · B @ A``.

    Attributes
    ----------
    name
        Its path in the model, wrappers removed.
    a, b
        Names of lora_A (rank, in) and lora_B (out, rank) in the adapter's file. A convolution's have the dimensions of its kernel
        besides, those of lora_B of size 1.
    rank, scale
        Rows of lora_A; ``alpha/r``, or ``alpha/√r`` with rsLoRA.
    shape
        (out, in) of Δ as a matrix: (dim, vocabulary) for an embedding, (out, in·k) for a convolution with k elements in its kernel.
    form
        ``linear``, ``embedding``, ``convolution`` or ``expert``.
    kernel
        The kernel's dimensions.
    magnitude
        DoRA's magnitudes in the adapter's file; without them the delta is of low rank.
    expert
        Which of how many experts, where a and b hold the factors of all of them (see `wrapped`).
    turned
        Δ is the transpose, ``scale · (B @ A)ᵀ``.
    """

    name: str
    a: str
    b: str
    rank: int
    scale: float
    shape: tuple[int, int]
    form: str = "linear"
    kernel: tuple[int, ...] = ()
    magnitude: str | None = None
    expert: tuple[int, int] | None = None
    delta_transposed: bool = False

    @property
    def low_rank(self) -> bool:
        """Whether Δ is the product of the factors and nothing else."""
        return self.magnitude is None

    @property
    def expert_slices(self) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Which part of lora_A and of lora_B are the module's: all, or an expert's rows and columns."""
        if self.expert is None:
            return (), ()
        e, experts = self.expert
        return (slice(e * self.rank, (e + 1) * self.rank),), (slice(None), slice(e, None, experts))

    @property
    def weight(self) -> tuple[int, ...]:
        """The shape of the weight in the model, unless it is a linear layer's that is stored (in, out)."""
        m, n = self.shape
        if self.form == "embedding":
            return n, m
        return (m, n // math.prod(self.kernel), *self.kernel)

    @property
    def expected(self) -> str:
        """What it expects of a weight, for messages."""
        return f"shape {list(self.weight)}"


@dataclass(frozen=True)
class Carried:
    """A tensor of the adapter that is no factor: what it does to one tensor of the model.

    Attributes
    ----------
    role
        ``saved``: takes the tensor's place. ``lora_bias``: is added to it, times `scale`. ``tokens``: takes the place of the rows
        that `indices` name. ``original``: the base's own values, of no effect.
    module, parameter
        The tensor's name in the model: ``module.parameter``.
    source
        Its name in the adapter's file.
    """

    role: str
    module: str
    parameter: str
    source: str
    scale: float = 1.0
    indices: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The name of the model's tensor."""
        return f"{self.module}.{self.parameter}"


@dataclass(frozen=True)
class MethodModule:
    """A module of a method other than LoRA (see `methods`).

    Attributes
    ----------
    name
        Its path in the model, wrappers removed.
    method
        The method's key in `METHODS`.
    tensors
        Names in the adapter's file, by role.
    shapes
        Their shapes.
    rank, scale
        What the config says, where the method has a rank (else 0) and a scale (else 1).
    shape
        (out, in) of the weight that it was matched with, a convolution's kernel set out along its input.
    """

    name: str
    method: str
    tensors: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    rank: int
    scale: float
    shape: tuple[int, int] = (0, 0)

    @property
    def low_rank(self) -> bool:
        """Whether its delta comes in factors."""
        return METHODS[self.method].low_rank

    @property
    def form(self) -> str:
        """``embedding`` or ``conv1d``, whose weights are stored (in, out), or ``linear``, which stands for convolutions as well."""
        forms = {"oft_embedding_R": "embedding", "embedding": "embedding", "conv1d": "conv1d"}
        return next((forms[role] for role in self.tensors if role in forms), "linear")

    def on(self, weight: tuple[int, ...], transposed: bool) -> MethodModule | None:
        """The module on a weight of this shape as it is stored; None if it does not fit."""
        if len(weight) < 2:
            return None
        m, n = weight[0], math.prod(weight[1:])
        shape = (n, m) if transposed else (m, n)
        try:
            fits = METHODS[self.method].fits(self.shapes, shape)
        except (KeyError, IndexError, ValueError):  # a tensor is missing, or has other dimensions
            fits = False
        return replace(self, shape=shape) if fits else None

    @property
    def expected(self) -> str:
        """What it expects of a weight, for messages."""
        return "what fits " + listed(f"{role} {list(shape)}" for role, shape in self.shapes.items())


Module = LoraModule | MethodModule
