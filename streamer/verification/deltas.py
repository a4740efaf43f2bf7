"""Compute what an adapter adds to a weight, and what mitigation makes of it, in float64, by the formulas; W0 and Δ are (out, in).

LoRA: ``Δ = s·B·A`` with ``s = alpha/r``, or ``alpha/√r`` for rsLoRA; r and alpha come from the first pattern that matches the module.
DoRA: ``Δ = m·(W0 + s·B·A)/‖W0 + s·B·A‖ − W0`` with norms by row. A fine-tuned model W1: ``Δ = W1 − W0``. Other methods: `PEFT_METHODS`.

``paper``: ``Δ' = Δ + (λ − 1) U_I Σ_I V_Iᵀ``. ``project``: ``Δ' = Δ − (1 − λ) U_I U_Iᵀ Δ``. ``shrink``: ``Δ' = λ Δ``. U_I, Σ_I, V_I are the
singular triplets of ``W0 + Δ`` that the record calls intruders. ``regmean``: ``Δ' = L R'ᵀ`` for ``Δ = L Rᵀ``, with R' from the fit's file.
``nullspace``: ``Δ' = Δ (I + ν C)^(−1/4)``, with C from a map of the base's inputs, and ν such that the share λ of ``tr Δ C Δᵀ`` is left.

Tensors of safetensors files are read with numpy, as float64 rows of (out, in) matrices; the effect of one rounding is bounded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamer.errors import FormatError, MismatchError
from streamer.plan.architectures import architecture_for
from streamer.weights.model_config import read_model_config


class NotRecomputed(Exception):  # a reason, not an error
    """Reason why a matrix is not recomputed or a tensor not compared: a kind, size or encoding that no formula here covers."""


Array = NDArray[np.float64]

BLOCK_VALUES = 4 << 20
"""Values of a matrix to handle at a time."""

PIECE_BYTES = 16 << 20
"""Raw bytes of a tensor to handle at a time."""

FP8 = "F8_E4M3"
LARGEST_FP8 = 448.0
ELEMENTS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", FP8: "u1"}
"""Dtypes that are decoded, in the format's spelling, and numpy's dtype of their elements."""

SIGNIFICANT_BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8, FP8: 4}
LEAST_EXPONENT = {"F64": -1022, "F32": -126, "F16": -14, "BF16": -126, FP8: -6}
"""Exponent of the smallest normal numbers; below it values are evenly spaced."""

STACKED = re.compile(r"(.+)\[(\d+)\]")
"""Name of one matrix of a stack: the stack's name and the index."""

_BLOCK = re.compile(
    r'"(?:weight_block_size|block_structure)"\s*:\s*["\[]\s*([1-9]\d*)\s*[,x]\s*([1-9]\d*)'
)


class Stored(NamedTuple):
    """A tensor as stored: dtype in the format's spelling, shape, file, and the range of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int


class TensorFiles:
    """Tensors of safetensors files by name, read through memory maps.

    Attributes
    ----------
    stored
        Every tensor; if two have the same name, the last one.
    metadata
        The last file's metadata.

    Raises
    ------
    FormatError
        If the safetensors library refuses a file.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self.stored: dict[str, Stored] = {}
        self.metadata: dict[str, str] = {}
        self._maps: dict[Path, NDArray[np.uint8]] = {}
        for path in paths:
            try:
                with safe_open(path, "numpy"):
                    pass
            except (OSError, SafetensorError) as e:
                found = f"found one that the library refuses: {e}"
                raise FormatError(f"{path}: expected a safetensors file, {found}") from e
            self._maps[path] = data = np.memmap(path, np.uint8, "r")
            end = 8 + int.from_bytes(data[:8].tobytes(), "little")
            header = json.loads(data[8:end].tobytes())
            self.metadata = header.pop("__metadata__", None) or {}
            for name, tensor in header.items():
                start, stop = (end + at for at in tensor["data_offsets"])
                self.stored[name] = Stored(
                    tensor["dtype"], tuple(tensor["shape"]), path, start, stop
                )

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a tensor."""
        _, _, path, start, stop = self.stored[name]
        return self._maps[path][start:stop]

    def values(self, name: str, index: Any = ...) -> Array:
        """Read a part of a tensor as float64.

        Raises
        ------
        NotRecomputed
            If there is no such tensor, or its dtype is not decoded here.
        """
        if name not in self.stored:
            raise NotRecomputed(
                "it is not a tensor by itself, but part of one or built from several"
            )
        dtype, shape = self.stored[name][:2]
        if dtype not in ELEMENTS:
            raise NotRecomputed(f"it is stored as {dtype}, which is not decoded here")
        part: Any = self.raw(name).view(ELEMENTS[dtype]).reshape(shape or (1,))[index]
        if dtype == "BF16":
            part = (part.astype("<u4") << 16).view("<f4")
        return np.asarray(_E4M3[part] if dtype == FP8 else part.astype(np.float64))


_CODES = np.arange(127)
_E4M3 = np.where(_CODES < 8, _CODES / 8, 1 + _CODES % 8 / 8) * 2.0 ** (
    np.maximum(_CODES // 8, 1) - 7
)
_E4M3 = np.concatenate([_E4M3, [np.nan], -_E4M3, [np.nan]])
"""The values of FP8's codes: sign, 4 bits of exponent (bias 7), 3 of mantissa; all ones are NaN."""


def same_bytes(files: TensorFiles, name: str, others: TensorFiles, other: str) -> bool:
    """Test whether two tensors exist and have the same dtype, shape and bytes."""
    if (
        name not in files.stored
        or other not in others.stored
        or files.stored[name][:2] != others.stored[other][:2]
    ):
        return False
    first = files.raw(name)
    second = others.raw(other)
    pieces = (slice(i, i + PIECE_BYTES) for i in range(0, len(first), PIECE_BYTES))
    return all(np.array_equal(first[piece], second[piece]) for piece in pieces)


@dataclass(frozen=True)
class Matrix:
    """Weight read as a float64 (out, in) matrix, a few rows at a time; a convolution's kernel is flattened into its input.

    Attributes
    ----------
    files, name
        Its files, and its name in them, with ``[N]`` for one matrix of a stack.
    shape
        (out, in).
    transposed
        Whether it is stored as (in, out).
    replaced
        Values of rows, as stored, that replace its own.
    added
        Values that are added to it, of its stored shape.
    """

    files: TensorFiles
    name: str
    shape: tuple[int, int] = (0, 0)
    transposed: bool = False
    replaced: Mapping[int, Array] = field(default_factory=dict)
    added: Array | None = None

    @property
    def stored_name(self) -> str:
        """Return the name of the tensor that stores it: the stack for an expert's matrix, else its own."""
        return STACKED.sub(r"\1", self.name)

    @property
    def dtype(self) -> str:
        """Return the stored dtype; empty if it is not stored as one tensor."""
        stored = self.files.stored.get(self.stored_name)
        return "" if stored is None else stored.dtype

    @cached_property
    def stored_shape(self) -> tuple[int, int]:
        """Return the rows and columns as stored, without a stack's; (0, 0) if it is not stored as one tensor."""
        shape = self.files.stored[self.stored_name].shape or (1,) if self.dtype else (0, 0, 0)
        rows, *columns = shape[bool(STACKED.fullmatch(self.name)) :]
        return rows, math.prod(columns)

    def rows(self, i: int, j: int) -> Array:
        """Read rows i to j."""
        stack = STACKED.fullmatch(self.name)
        height, width = self.stored_shape
        part = (slice(None), slice(i, j)) if self.transposed else (slice(i, j),)
        values = self.files.values(
            self.stored_name, part if stack is None else (int(stack[2]), *part)
        )
        values = values.reshape((height, j - i) if self.transposed else (j - i, width))
        if self.dtype == FP8:
            values = values * self.scales(i, j)
        for row, value in self.replaced.items():
            if self.transposed:
                values[row] = value[i:j]
            elif i <= row < j:
                values[row - i] = value
        if self.added is not None:
            values = values + self.added.reshape(-1, width)[i:j]
        return np.ascontiguousarray(values.T) if self.transposed else values

    def scales(self, i: int, j: int) -> Array:
        """Return the scales of rows i to j of an FP8 matrix, one for each value."""
        grid, bm, bn = self._scales
        return grid[np.arange(i, j) // bm][:, np.arange(self.shape[1]) // bn]

    @cached_property
    def _scales(self) -> tuple[Array, int, int]:
        """Find the scales, and how many rows and columns share one: try the whole matrix, the config's sizes, 128×128, an even division."""
        beside = next(
            (s for end in ("_scale_inv", "_scale") if (s := self.name + end) in self.files.stored),
            "",
        )
        grid = self.files.values(beside)
        grid = grid.reshape(
            len(grid) if grid.ndim else 1, -1
        )  # ModelOpt's are (rows, 1, columns, 1)
        path = self.files.stored[self.name].path.with_name("config.json")
        stated = _BLOCK.findall(path.read_text("utf-8", "replace")) if path.exists() else []
        m, n = self.shape
        p, q = grid.shape
        sizes = [(m, n), *stated, (128, 128), (m // max(1, p), n // max(1, q))]
        for bm, bn in ((int(bm), int(bn)) for bm, bn in sizes):
            if bm and bn and (-(-m // bm), -(-n // bn)) == (p, q) and not self.transposed:
                return grid, bm, bn
        raise NotRecomputed(
            f"it has shape {[m, n]} and scales of shape {[p, q]}, whose blocks are unknown"
        )


def blocks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of rows to handle at a time."""
    step = max(1, BLOCK_VALUES // max(1, shape[1]))
    return ((i, min(shape[0], i + step)) for i in range(0, shape[0], step))


def whole(shape: tuple[int, int], rows: Callable[[int, int], Array]) -> Array:
    """Compute all rows of a matrix."""
    out = np.empty(shape)
    for i, j in blocks(shape):
        out[i:j] = rows(i, j)
    return out


def half_spacing(values: Array, dtype: str) -> Array:
    """Compute half the distance between neighbouring values of a dtype: the largest error of rounding to nearest."""
    _, exponents = np.frexp(values)  # |value| in [0.5, 1) · 2^exponent
    exponents = np.where(values == 0, LEAST_EXPONENT[dtype], exponents - 1)
    exponents = np.maximum(exponents, LEAST_EXPONENT[dtype]) - SIGNIFICANT_BITS[dtype]
    return np.asarray(np.ldexp(1.0, exponents))


WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"

ANGLES = (2e-5, 1e-3)
"""Angle error of a vector, in radians, that findings may have besides rounding; the second applies if singular values decay slowly."""

MORE = 6
"""Singular values after the first k that measure the decay; the solver's block has at least this many additional columns."""

SLOW = 0.15
"""Relative decrease of the squared values over these, below which a block Krylov process misses the first of `ANGLES` in 16 steps: its
error decreases like ``2 exp(−2·16·√decrease)``."""

ROUNDINGS = 32 * 2.0**-23
"""Error of a residual in float32, relative to σ_1: a few roundings."""

ILL_DEFINED = 0.05
"""Angle error above which a vector belongs to a cluster, in which only the spanned subspace is defined."""

DECADES = 100 / math.log(10)
"""Search range for ν, in orders of magnitude on each side of the inverse of the largest eigenvalue; ν is clipped to this range."""

_ROLES = r"lora_(?:embedding_)?[ABE]|ranknum|lora_magnitude_vector|(?:hada|lokr|oft|boft|vera|miss|shira|delora|hra)_\w+"
_FACTOR = re.compile(
    rf"(?P<module>.+)\.(?P<role>{_ROLES})(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?"
)
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")


class Delta:
    """A matrix (m, n) that is added to a weight.

    Parameters
    ----------
    rows
        Computes rows i to j, and a bound on the size of each value's summands.
    terms
        Number of summands of a value.
    """

    def __init__(
        self, shape: tuple[int, int], rows: Callable[[int, int], tuple[Array, Array]], terms: int
    ) -> None:
        self.shape = shape
        self.rows = rows
        self.terms = terms

    def dense(self) -> Array:
        """Compute all of it."""
        return whole(self.shape, lambda i, j: self.rows(i, j)[0])


class LowRank(Delta):
    """``L Rᵀ`` with L (m, r) and R (n, r)."""

    def __init__(self, L: Array, R: Array) -> None:
        self.L = L
        self.R = R
        left, right = (np.linalg.norm(factor, axis=1) for factor in (L, R))
        super().__init__(
            (len(L), len(R)), lambda i, j: (L[i:j] @ R.T, np.outer(left[i:j], right)), L.shape[1]
        )


def combined(
    delta: Delta, factor: float, left: Array | None = None, right: Array | None = None
) -> Delta:
    """Return ``factor · Δ + left · right`` with left (m, q) and right (q, n)."""
    m, n = delta.shape
    added_product = LowRank(
        np.zeros((m, 0)) if left is None else left, np.zeros((n, 0)) if right is None else right.T
    )
    if isinstance(delta, LowRank):
        return LowRank(
            np.hstack([factor * delta.L, added_product.L]), np.hstack([delta.R, added_product.R])
        )

    def rows(i: int, j: int) -> tuple[Array, Array]:
        values, bound = delta.rows(i, j)
        added, size = added_product.rows(i, j)
        return factor * values + added, bound + size

    return Delta(delta.shape, rows, delta.terms + added_product.terms)


def _dora(W0: Matrix, low: LowRank, magnitude: Array) -> Delta:
    def rows(i: int, j: int) -> tuple[Array, Array]:
        change, bound = low.rows(i, j)
        base = W0.rows(i, j)
        factor = (magnitude[i:j] / np.linalg.norm(base + change, axis=1))[:, None]
        return factor * (base + change) - base, np.abs(base) + np.abs(factor) * (
            np.abs(base) + bound
        )

    return Delta(low.shape, rows, low.terms)


Factors = tuple[LowRank, tuple[Array, Array], dict[str, str]]
"""A module's LoRA, ``s·B·A``, half the spacings of the values of s·B and Aᵀ, and the names of its tensors by role."""


class AdapterFiles(TensorFiles):
    """Tensors and config of an adapter, of a fine-tuned model used as one, or of the output of `streamer mitigate`.

    Parameters
    ----------
    base, architecture
        The base that it changes, and the class that the user named: these decide whether square layers are stored (out, in), or
        (in, out) as a Conv1D.
    """

    def __init__(
        self, directory: Path, base: Path | None = None, architecture: str | None = None
    ) -> None:
        config = read_model_config(base if base is not None and base.is_dir() else None)
        self._architecture = architecture_for(replace(config, architecture=architecture))
        self.is_model = not (directory / CONFIG_NAME).exists()
        self.options: dict[str, Any] = (
            {} if self.is_model else json.loads((directory / CONFIG_NAME).read_bytes())
        )
        super().__init__(
            sorted(directory.glob("*.safetensors")) if self.is_model else [directory / WEIGHTS_NAME]
        )

    @staticmethod
    def plain_name(name: str) -> str:
        """Strip PEFT's, DDP's, torch.compile's and FSDP's prefixes from a tensor's name."""
        plain = (
            re.sub(r"\.+", ".", _WRAPPERS.sub(r"\1", name))
            .removeprefix(".")
            .removeprefix("module.")
        )
        return plain.removeprefix("base_model.model.")

    @cached_property
    def modules(self) -> dict[str, dict[str, str]]:
        """Map each module's path to its factors' names by role."""
        modules: dict[str, dict[str, str]] = {}
        for name in () if self.is_model else self.stored:
            if match := _FACTOR.fullmatch(self.plain_name(name)):
                modules.setdefault(match["module"], {})[match["role"]] = name
        return modules

    def names(self, module: str, shape: tuple[int, int]) -> dict[str, str]:
        """Return the names of a module's factors by role; of ``module.parameter[N]``, those that fit the shape of the stack's matrices."""
        if module in self.modules:
            return self.modules[module]
        stacked = STACKED.fullmatch(module)
        parts = {*module.split(".")}
        owner = stacked and stacked[1].rpartition(".")[0]
        names = {
            name: {*name.split(".")} for name in self.modules
        }  # outputs may name modules as at run time
        fitting = [
            self.modules[n]
            for n, p in names.items()
            if unwrapped(n) == owner or parts <= p or p <= parts
        ]
        if stacked and len(fitting) > 1:
            sides = [
                {self.stored[r["lora_A"]].shape[1], self.stored[r["lora_B"]].shape[0]}
                for r in fitting
            ]
            fitting = [
                roles for roles, side in zip(fitting, sides, strict=True) if side == {*shape}
            ]
        return fitting[0] if len(fitting) == 1 else {}

    def factors(self, module: str, shape: tuple[int, int]) -> Factors:
        """Read a module's LoRA; of a stack of N matrices, lora_A is (N·r, in) and lora_B (out, r·N)."""
        stacked = STACKED.fullmatch(module)
        names = self.names(module, shape)
        key = STACKED.sub(r"\1", module)
        a, b = (
            f"lora_{'embedding_' if 'lora_embedding_A' in names else ''}{side}" for side in "AB"
        )
        if not {a, b} <= names.keys():
            raise NotRecomputed(
                "its factors are not in the adapter under its module's name, or several could be"
            )
        A, B = (
            self.values(names[role]).reshape(self.stored[names[role]].shape[0], -1)
            for role in (a, b)
        )
        if stacked is not None:
            r = int(self.stated("rank_pattern", "r", key))
            expert = int(stacked[2])
            A, B = A[expert * r : (expert + 1) * r], B[:, expert :: len(A) // r]
        if B.shape[1] != len(A):
            raise NotRecomputed("its factors are shared by several matrices")
        s = self.scaling(key, len(A))
        half_B, half_A = (
            half_spacing(t, self.stored[names[role]].dtype) for t, role in ((B, b), (A, a))
        )
        return LowRank(s * B, A.T), (abs(s) * half_B, half_A.T), names

    def stated(self, pattern: str, default: str, module: str) -> Any:
        """Return what the config states for a module: the value of the first pattern that matches, or the default."""
        patterns = self.options.get(pattern) or {}
        fitting = (
            value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)
        )
        return next(fitting, self.options[default])

    def scaling(self, module: str, rank: int) -> float:
        """Return a module's scaling."""
        # PEFT looks up a targeted parameter's alpha by the parameter's name.
        if any(
            f".{module}.weight".endswith(f".{name}")
            for name in self.options.get("target_parameters") or ()
        ):
            module = f"{module}.weight"
        alpha = float(
            self.stated(
                "alpha_pattern", "alpha" if "alpha" in self.options else "lora_alpha", module
            )
        )
        return alpha / math.sqrt(rank) if self.options.get("use_rslora") else alpha / rank

    def added_bias(self, name: str) -> Array:
        """Return a bias that LoRA adds (``lora_bias``), scaled like its module."""
        module = self.plain_name(name).rpartition(".lora_B")[0]
        return self.scaling(
            module, self.stored[self.modules[module]["lora_A"]].shape[0]
        ) * self.values(name)

    def token_rows(self, name: str) -> dict[int, Array]:
        """Return trained tokens by the rows that they replace, which are listed for their module or for the input embedding."""
        rows = self.options.get("trainable_token_indices")
        if isinstance(rows, dict):
            module = self.plain_name(name).partition(".token_adapter")[0]
            rows = next(
                (listed for key, listed in rows.items() if f".{module}".endswith(f".{key}")), None
            )
        return dict(zip(rows or (), self.values(name), strict=True))

    def delta(self, row: Mapping[str, Any], W0: Matrix) -> tuple[Matrix, Delta]:
        """Return the base's matrix as (out, in), and the Δ of a row of the record or of findings.

        The row's `transposed` is used if neither shape nor class decides how the base stores it.
        """
        module = row["module"]
        shape = W0.stored_shape
        transposed = bool(row.get("transposed"))
        method = self.options.get("peft_type") or "LORA"
        if not self.is_model and method == "LORA":
            low, _, names = self.factors(module, shape)
            m, n = low.shape
            embedding = "lora_embedding_A" in names
            if embedding or m != n:
                transposed = embedding or shape == (n, m)
            elif self._architecture is not None and not STACKED.fullmatch(module):
                layers = module, row["tensor"].removesuffix(".weight")
                transposed = any(map(self._architecture.transposed, layers))
            if W0.dtype in ELEMENTS and shape != ((n, m) if transposed else (m, n)):
                raise NotRecomputed(
                    f"its factors give a matrix of {[m, n]}, but the weight is stored as {[*shape]}"
                )
            W0 = replace(W0, shape=low.shape, transposed=transposed)
            magnitude = names.get("lora_magnitude_vector")
            return W0, low if magnitude is None else _dora(W0, low, self.values(magnitude).ravel())
        W0 = replace(W0, shape=shape[::-1] if transposed else shape, transposed=transposed)
        if self.is_model:
            W1 = replace(W0, files=self, replaced={}, added=None)
            if W1.stored_shape != shape:
                raise NotRecomputed("the fine-tuned model has no matrix of this name and shape")
            tuned = W1.rows
            base = W0.rows
            return W0, Delta(
                W0.shape,
                lambda i, j: (tuned(i, j) - base(i, j), abs(tuned(i, j)) + abs(base(i, j))),
                0,
            )
        if method not in PEFT_METHODS or module not in self.modules:
            raise NotRecomputed(
                f"it is changed by a {method} adapter, for which verify has no formula"
            )
        # VeRA's projections are shared by all modules.
        names = {**self.modules.get("base_model", {}), **self.modules[module]}
        return W0, PEFT_METHODS[method](
            W0, {role: self.values(name) for role, name in names.items()}, self, module
        )


def unwrapped(module: str) -> str:
    """Return the module that a module is, or that it wraps for a parameter."""
    return re.sub(r"(\.base_layer)+$", "", module)


Tensors = dict[str, Array]


def _by_products(
    formula: Callable[[Matrix, Tensors], Array],
) -> Callable[[Matrix, Tensors, AdapterFiles, str], Delta]:
    """Make a method whose Δ is ``alpha/r`` times a sum of products of its tensors' values."""

    def delta(W0: Matrix, tensors: Tensors, adapter: AdapterFiles, module: str) -> Delta:
        rank = int(adapter.stated("rank_pattern", "r", module))
        sizes = {role: np.abs(t) for role, t in tensors.items()}
        values, bound = (
            adapter.scaling(module, rank) * formula(W0, t).reshape(W0.shape)
            for t in (tensors, sizes)
        )
        return Delta(W0.shape, lambda i, j: (values[i:j], bound[i:j]), 2 * rank)

    return delta


def _loha(W0: Matrix, t: Tensors) -> Array:
    """Compute ``(w1_a w1_b) ∘ (w2_a w2_b)``."""
    return np.asarray((t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]))


def _lokr(W0: Matrix, t: Tensors) -> Array:
    """Compute ``w1 ⊗ w2``; either may itself be a product."""
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    return np.asarray(np.kron(w1[:, :, None, None] if w2.ndim == 4 else w1, w2))


def _adalora(W0: Matrix, t: Tensors, adapter: AdapterFiles, module: str) -> Delta:
    """Compute ``B diag(E) A · alpha / (r + 1e-5)`` with the initial rank, or the rank that is stored beside the factors."""
    alpha = float(adapter.options.get("lora_alpha", 8))
    rank = np.array(adapter.options.get("init_r", 12))
    s = (alpha if alpha > 0 else len(t["lora_A"])) / (float(t.get("ranknum", rank).item()) + 1e-5)
    return LowRank(s * t["lora_B"] * t["lora_E"].ravel(), t["lora_A"].T)


def _vera(W0: Matrix, t: Tensors, adapter: AdapterFiles, module: str) -> Delta:
    """Compute ``diag(b) B diag(d) A`` with the first rows and columns of the shared projections."""
    m, n = W0.shape
    b = t["vera_lambda_b"].reshape(-1, 1)
    d = t["vera_lambda_d"].reshape(-1, 1)
    return LowRank(b * t["vera_B"][:m], (d * t["vera_A"][:, :n]).T)


PEFT_METHODS = {
    "LOHA": _by_products(_loha),
    "LOKR": _by_products(_lokr),
    "ADALORA": _adalora,
    "VERA": _vera,
}
"""Deltas of PEFT's methods other than LoRA, by ``peft_type``."""


@dataclass(frozen=True)
class Triplets:
    """``W v_j = σ_j u_j``: U (m, k), V (n, k), and S, which falls, (at least k,); the angle is one of `ANGLES`."""

    U: Array
    S: Array
    V: Array
    angle: float

    def angle_errors(self, ranks: list[int]) -> Array:
        """Bound the angles between the vectors of these ranks in findings and here; they may mix, because only their span matters."""
        distances = np.abs(self.S[ranks, None] - np.append(self.S, 0.0))
        distances[:, ranks] = np.inf
        gaps = np.maximum(distances.min(axis=1), 1e-300)
        return np.asarray(np.clip(self.angle + ROUNDINGS * self.S[0] / gaps, 0.0, 1.0))


def leading_triplets(W: Array, top_k: float) -> Triplets:
    """Compute the leading triplets of W, by ARPACK if it can also give `MORE` further ones, else by LAPACK.

    `top_k` is a count, or a share of min(m, n); there is at least one.
    """
    from scipy.linalg import svd
    from scipy.sparse.linalg import ArpackError, svds

    side = min(W.shape)
    triplets = None
    k = min(side, top_k if isinstance(top_k, int) else max(1, round(top_k * side)))
    if k + MORE < side // 2:
        with contextlib.suppress(ArpackError):
            triplets = svds(
                W, k=k + 1 + MORE, v0=np.random.default_rng(0).standard_normal(side), tol=0
            )
    U, S, Vh = svd(W, full_matrices=False) if triplets is None else triplets
    order = np.argsort(-S, kind="stable")
    U = U[:, order]
    S = S[order]
    V = Vh[order].T
    beyond = S[min(k + MORE, len(S) - 1)]
    slow = k + MORE < len(S) and S[k - 1] ** 2 - beyond**2 < SLOW * beyond**2
    return Triplets(U[:, :k], S, V[:, :k], ANGLES[bool(slow)])


def by_intruders(
    method: str, lam: float, delta: Delta, triplets: Triplets, intruders: Sequence[int]
) -> tuple[Delta, float]:
    """Compute Δ' for the methods ``paper`` and ``project``, and the norm by which it may differ since vectors in findings may.

    Raises
    ------
    NotRecomputed
        If an intruder belongs to a cluster of directions.
    """
    chosen = list(intruders)
    angles = triplets.angle_errors(chosen)
    if angles.max() > ILL_DEFINED:
        raise NotRecomputed(
            f"its direction {chosen[int(angles.argmax())]} is one of a cluster of directions"
        )
    U = triplets.U[:, chosen]
    S = triplets.S[chosen]
    V = triplets.V[:, chosen]
    left = (lam - 1) * U * S
    right = V.T
    sizes = S
    if method == "project":
        dense = delta.dense()
        left = (lam - 1) * U
        right = U.T @ dense
        sizes = np.full(len(S), np.linalg.norm(dense))
    return combined(delta, 1.0, left, right), 2 * abs(lam - 1) * float(angles @ sizes)


def by_method(
    record: Mapping[str, Any], row: Mapping[str, Any], W0: Matrix, delta: Delta
) -> tuple[Delta, float]:
    """Compute Δ' of a record's row by the record's method, and the norm by which it may differ; see `by_intruders`."""
    method = record["method"]
    lam = record["lambda"]
    intruders = row["intruders"]
    if method == "shrink":
        return combined(delta, lam), 0.0
    if method not in ("paper", "project"):
        raise NotRecomputed(f"verify has no formula for method {method!r}")
    if not intruders or lam == 1:
        return delta, 0.0
    W = whole(W0.shape, lambda i, j: W0.rows(i, j) + delta.rows(i, j)[0])
    return by_intruders(
        method, lam, delta, leading_triplets(W, record["detection"]["top_k"]), intruders
    )


Formula = Callable[[str, Delta], Delta]
"""Computes Δ' of the matrix of this name."""


def read_fit(path: Path, record: Mapping[str, Any]) -> Formula:
    """Read the right factors of the fit that a record names, (n, r) by matrix; raise `MismatchError` if it is another file."""
    end = ".right_factor"  # of the names of arrays (1, n, r)
    files = TensorFiles([path])
    digest = hashlib.sha256()
    sha256 = record["coefficients"]["sha256"]
    arrays = {
        n.removesuffix(end)
        for n, stored in files.stored.items()
        if n.endswith(end) and any(stored.shape)
    }
    for tensor in sorted(arrays):
        digest.update(
            f"{tensor}\n".encode() + files.values(tensor + end, 0).astype("<f4").tobytes()
        )
    if digest.hexdigest() != sha256:
        raise MismatchError(
            f"{path}: has no factors with digest {sha256[:16]}; give the output's fit"
        )

    def mitigated(tensor: str, delta: Delta) -> Delta:
        R = files.values(tensor + end, 0)
        if not isinstance(delta, LowRank) or R.shape != delta.R.shape:
            raise NotRecomputed("its delta has no right factor of that shape")
        return LowRank(delta.L, R)

    return mitigated


def read_map(path: Path, record: Mapping[str, Any]) -> Formula:
    """Read what the map that a record names knows of inputs: eigenvalues of C, their vectors (n, k), and the mean of the others.

    Raises
    ------
    MismatchError
        If it is another file.
    """
    files = TensorFiles([path])
    digest = hashlib.sha256()
    sha256 = record["map"]["sha256"]
    known: dict[tuple[str, int], list[tuple[Array, Array | None, float]]] = {}
    inputs = json.loads(files.metadata.get("streamer.map", "{}")).get("inputs", [])
    for entry in sorted(inputs, key=lambda entry: (entry["names"][0], entry["one_hot"])):
        first = entry["names"][0]
        trace = float(entry["trace"])
        V = None
        rest = 0.0
        values = files.values(first + (".frequencies" if entry["one_hot"] else ".eigenvalues"))
        n = len(values) if entry["one_hot"] else files.stored[f"{first}.vectors"].shape[1]
        digest.update(
            f"{tuple(entry['names'])} {entry['tokens']} {n} {trace!r}\n".encode() + values.tobytes()
        )
        if not entry["one_hot"]:
            digest.update(files.raw(f"{first}.vectors").tobytes())
            V = np.linalg.qr(files.values(f"{first}.vectors").T)[0]
            rest = max(0.0, trace - values.sum()) / max(1, n - len(values))
        for name in entry["names"]:
            known.setdefault((name, n), []).append((values, V, rest))
    if digest.hexdigest() != sha256:
        raise MismatchError(
            f"{path}: is not the map with digest {sha256[:16]}; give the output's map"
        )

    def mitigated(tensor: str, delta: Delta) -> Delta:
        entries = known.get((tensor, delta.shape[1]), [])
        return by_spectrum(delta, *entries[0], record["lambda"]) if len(entries) == 1 else delta

    return mitigated


def by_spectrum(delta: Delta, values: Array, V: Array | None, rest: float, share: float) -> Delta:
    """Compute Δ' for the method ``nullspace``; V is None if the inputs are one-hot."""
    if V is None and not isinstance(delta, LowRank):
        raise NotRecomputed("its delta is not a product of factors")
    core = np.linalg.qr(delta.L)[1] @ delta.R.T if isinstance(delta, LowRank) else delta.dense()
    along = core if V is None else core @ V
    squares = np.sum(along**2, axis=0)
    energies = squares * values
    others = rest * max(0.0, float(np.sum(core**2) - squares.sum()))
    if share == 1 or not energies.sum() + others > 0:
        return delta
    largest = max(float(values.max()), rest)
    low = -DECADES
    high = DECADES
    nu = math.inf
    for _ in range(200 if share else 0):
        middle = (low + high) / 2
        nu = 10**middle / largest
        left = np.sum(energies / np.sqrt(1 + nu * values)) + others / np.sqrt(1 + nu * rest)
        if left > share * (energies.sum() + others):
            low = middle
        else:
            high = middle
    gains = (1 + nu * values) ** -0.25 if share else (values == 0) * 1.0
    of_rest = (1 + nu * rest) ** -0.25 if share else float(rest == 0)
    if not isinstance(delta, LowRank):
        return combined(delta, of_rest, along * (gains - of_rest), None if V is None else V.T)
    if V is None:
        return LowRank(delta.L, delta.R * gains[:, None])
    return LowRank(delta.L, of_rest * delta.R + V @ ((gains - of_rest)[:, None] * (V.T @ delta.R)))
