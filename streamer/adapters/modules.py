"""An adapter's modules: their tensors in the adapter's files, and the deltas computed from them, by the formulas of PEFT's own merge.

Two classes share one interface: LoRA's factors, which may have DoRA's magnitudes, and the tensors of another PEFT method.

DoRA scales each row of the (out, in) matrix to its magnitude: ``W' = m · (W0 + Δ) / ‖W0 + Δ‖``. By PEFT's convention, m has one entry for
each row of the (out, in) matrix. For an embedding this is a column of the stored (vocabulary, dim); for a convolution it is an output
channel, with the norm over all other dimensions. The norm includes the delta, without dropout's scaling.

The other PEFT methods are entries of `PEFT_METHODS`, by PEFT's ``peft_type``. An entry says which tensors a module has, which matrices they
fit, and what they add to W0 (out, in); a convolution's kernel is flattened into its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from streamer.adapters.adapter_config import AdapterConfig
from streamer.errors import NumericError
from streamer.linalg.operators import BLOCK_BYTES, Delta, Dense, LowRank
from streamer.units import listed
from streamer.weights.base import StoredTensor, Tensors, TensorShape, float_dtype

Shapes = Mapping[str, TensorShape]

MatrixShape = tuple[int, int]
"""(out, in)."""


class MethodInputs(NamedTuple):
    """A module's tensors by role in the computing dtype, its scaling, the adapter's config, and its weight's (out, in)."""

    tensors: Mapping[str, Tensor]
    scaling: float
    config: AdapterConfig
    shape: MatrixShape


@dataclass(frozen=True)
class PeftMethod:
    """One PEFT method: its tensors, the weights that they fit, and the delta that they form.

    Attributes
    ----------
    title
        Readable name.
    roles
        Regular expression for the last part of the tensor names.
    fits
        Tests whether tensors of these shapes fit a matrix of shape (out, in).
    delta
        Computes ``W' − W0`` from the tensors and W0.
    scaled
        Whether the delta is multiplied by ``alpha/r``.
    shared
        Roles of tensors that the file stores once for all modules.
    low_rank
        Whether the delta is given as factors.
    matrices
        Matrices of W0's size in memory at once while the delta is computed, including W0 but not the module's tensors.
    """

    title: str
    roles: str
    fits: Callable[[Shapes, MatrixShape], bool]
    delta: Callable[[MethodInputs, Tensor], Delta]
    scaled: bool = False
    shared: frozenset[str] = frozenset()
    low_rank: bool = False
    matrices: int = 3


def _product(a: TensorShape, b: TensorShape) -> MatrixShape:
    """Return the shape of a product; raise `ValueError` if the shapes do not match."""
    m, r = a
    k, n = b
    if r != k:
        raise ValueError
    return m, n


def _loha_fits(s: Shapes, shape: MatrixShape) -> bool:
    return all(_product(s[f"hada_w{i}_a"], s[f"hada_w{i}_b"]) == shape for i in (1, 2))


def _loha(p: MethodInputs, W0: Tensor) -> Delta:
    """Compute ``(w1_a w1_b) ∘ (w2_a w2_b)``."""
    first, second = (p.tensors[f"hada_w{i}_a"] @ p.tensors[f"hada_w{i}_b"] for i in (1, 2))
    return Dense((first * second).mul_(p.scaling))


def _lokr_sides(s: Shapes) -> tuple[TensorShape, TensorShape]:
    first, second = (
        s.get(f"lokr_w{i}") or _product(s[f"lokr_w{i}_a"], s[f"lokr_w{i}_b"]) for i in (1, 2)
    )
    return first, second


def _lokr_fits(s: Shapes, shape: MatrixShape) -> bool:
    (p, q), (m, *rest) = _lokr_sides(s)
    return len(rest) in (1, 2, 3) and (p * m, q * math.prod(rest)) == shape


def _lokr(p: MethodInputs, W0: Tensor) -> Delta:
    """Compute ``w1 ⊗ w2``; either may itself be a product."""
    t = p.tensors
    w1, w2 = (
        t[f"lokr_w{i}"] if f"lokr_w{i}" in t else t[f"lokr_w{i}_a"] @ t[f"lokr_w{i}_b"]
        for i in (1, 2)
    )
    if w2.dim() == 4:
        w1 = w1[:, :, None, None]
    return Dense(torch.kron(w1, w2.contiguous()).reshape(p.shape).mul_(p.scaling))


def _adalora_fits(s: Shapes, shape: MatrixShape) -> bool:
    A = s["lora_A"]
    is_number = math.prod(s.get("ranknum", ())) == 1
    return is_number and _product(s["lora_B"], A) == shape and math.prod(s["lora_E"]) == A[0]


def _adalora(p: MethodInputs, W0: Tensor) -> Delta:
    """Compute ``B · diag(E) · A · alpha / (init_r + 1e-5)``: PEFT keeps the initial rank in the scaling."""
    t = p.tensors
    alpha = p.config.number("", "lora_alpha", "", 8)
    rank = float(t["ranknum"]) if "ranknum" in t else p.config.number("", "init_r", "", 12)
    scaling = (alpha if alpha > 0 else float(t["lora_A"].shape[0])) / (rank + 1e-5)
    return LowRank(t["lora_B"] * t["lora_E"].flatten() * scaling, t["lora_A"].T)


def _vera_fits(s: Shapes, shape: MatrixShape) -> bool:
    m, n = _product(s["vera_B"], s["vera_A"])
    scales = math.prod(s["vera_lambda_b"]), math.prod(s["vera_lambda_d"])
    return m >= shape[0] and n >= shape[1] and scales == (shape[0], s["vera_A"][0])


def _vera(p: MethodInputs, W0: Tensor) -> Delta:
    """Compute ``diag(b) B · diag(d) A``, with the first rows and columns of projections that all modules share."""
    m, n = p.shape
    t = p.tensors
    L = t["vera_lambda_b"].flatten()[:, None] * t["vera_B"][:m]
    R = t["vera_lambda_d"].flatten()[:, None] * t["vera_A"][:, :n]
    return LowRank(L, R.T)


def _block_size(elements: int) -> int:
    """Return the size b of a skew-symmetric block with b·(b−1)/2 entries above its diagonal."""
    return (1 + math.isqrt(1 + 8 * elements)) // 2


def _oft_fits(s: Shapes, shape: MatrixShape) -> bool:
    """Accept blocks along the input, or for an embedding along the output; a shared block counts for all."""
    (role, (blocks, elements)), *others = s.items()
    m, n = shape
    length = m if role == "oft_embedding_R" else n
    size = _block_size(elements)
    is_triangle = size * (size - 1) // 2 == elements and not others
    return is_triangle and (blocks * size == length or (blocks == 1 and length % size == 0))


def _cayley(Q: Tensor, terms: int | None = None) -> Tensor:
    """Make rotations ``(I − Q)(I + Q)⁻¹`` from skew-symmetric blocks (blocks, b, b), or their inverse by `terms` of its Neumann series.

    The two turn in opposite senses, which is PEFT's convention: an adapter is trained with one of them.
    """
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    if terms is None:
        solved: Tensor = torch.linalg.solve(eye + Q, eye - Q, left=False)
        return solved
    terms = 4 if terms == 3 else terms  # as in PEFT
    R = eye.clone()
    power = eye
    for i in range(1, terms):
        power = power @ Q
        R += power if i == terms - 1 and terms > 2 else 2 * power
    return R


def _oft(p: MethodInputs, W0: Tensor) -> Delta:
    """Compute ``W0 Rᵀ`` with rotations R along the diagonal; for an embedding ``Rᵀ W0``, W0 (dim, vocabulary)."""
    ((role, vectors),) = p.tensors.items()
    size = _block_size(vectors.shape[1])
    Q = vectors.new_zeros((len(vectors), size, size), dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    Q[:, rows, columns] = vectors.double()
    Q = Q - Q.mT
    if p.config.get("coft"):
        eps = float(p.config.get("eps", 6e-5)) / math.sqrt(len(Q))
        norms = torch.linalg.matrix_norm(Q)[:, None, None]
        Q = torch.where(norms <= eps, Q, eps * Q / norms)
    terms = None
    if p.config.get("use_cayley_neumann"):
        terms = int(p.config.get("num_cayley_neumann_terms", 5))
    R = _cayley(Q, terms).to(W0.dtype)
    return Dense(_rotated(W0, R, embedding=role == "oft_embedding_R") - W0)


def _rotated(W0: Tensor, R: Tensor, embedding: bool = False) -> Tensor:
    """Compute ``W0 · diag(R)ᵀ`` block by block; a single block is repeated."""
    size = R.shape[-1]
    W = W0.T if embedding else W0
    blocks = W.reshape(len(W), -1, size).transpose(0, 1)
    out = torch.matmul(blocks, R if embedding else R.mT).transpose(0, 1).reshape(W.shape)
    return out.T if embedding else out


def _boft_fits(s: Shapes, shape: MatrixShape) -> bool:
    m, n = shape
    factors, blocks, size, other = s["boft_R"]
    return factors == 1 and size == other and blocks * size == n and math.prod(s["boft_s"]) == m


def _boft(p: MethodInputs, W0: Tensor) -> Delta:
    """Compute ``diag(s) W0 Rᵀ`` for one butterfly factor, which involves no permutation."""
    data = p.tensors["boft_R"][0].double()
    R = _cayley(0.5 * (data - data.mT)).to(W0.dtype)
    return Dense(p.tensors["boft_s"].flatten()[:, None].to(W0.dtype) * _rotated(W0, R) - W0)


def _miss_fits(s: Shapes, shape: MatrixShape) -> bool:
    m, n = shape
    block = s["miss_block"]
    if len(block) == 3:
        first, middle, last = block
        return first * last == m and middle == last and n % last == 0
    first, width = block
    return width == m and first <= n


def _miss(p: MethodInputs, W0: Tensor) -> Delta:
    """Repeat a block along the input; or, with one square block B for each block of rows, add ``W B + B`` to each block W of W0."""
    block = p.tensors["miss_block"]
    m, n = p.shape
    if block.dim() == 3:
        size = block.shape[-1]
        blocks = W0.reshape(m // size, size, n // size, size)
        products = torch.einsum("aibj,ajk->aibk", blocks, block)
        return Dense((products + block[:, :, None, :]).reshape(m, n))
    return Dense(block.T.repeat(1, -(-n // len(block)))[:, :n].contiguous())


def _shira_fits(s: Shapes, shape: MatrixShape) -> bool:
    (count,) = s["shira_weight"]
    return s["shira_indices"] == (2, count) and count % sum(shape) == 0


def _shira(p: MethodInputs, W0: Tensor) -> Delta:
    """Place values at their rows and columns."""
    rows, columns = p.tensors["shira_indices"].long()
    m, n = p.shape
    if any(int(at.min()) < 0 or int(at.max()) >= size for at, size in ((rows, m), (columns, n))):
        raise NumericError(
            f"shira_indices: expected rows and columns of a matrix of {[m, n]}, found others; save the adapter again"
        )
    delta = torch.zeros(m, n, dtype=W0.dtype, device=W0.device)
    values = p.tensors["shira_weight"].to(W0.dtype)
    return Dense(delta.index_put_((rows, columns), values, accumulate=True))


def _delora_fits(s: Shapes, shape: MatrixShape) -> bool:
    is_number = math.prod(s["delora_lambda"]) == 1
    fits = _product(s["delora_B"], s["delora_A"]) == shape
    return is_number and fits and s["delora_w_norm"] == shape[1:]


def _delora(p: MethodInputs, W0: Tensor) -> Delta:
    """Compute ``λ/r · B A`` with columns of B and rows of A of length 1, times the lengths of W0's columns at the start."""
    t = p.tensors
    A = t["delora_A"]
    B = t["delora_B"]
    rows = torch.linalg.vector_norm(A, dim=1).clamp(min=1e-4)
    columns = torch.linalg.vector_norm(B, dim=0).clamp(min=1e-4)
    L = B * (t["delora_lambda"] / len(A) / (rows * columns))
    return LowRank(L, (A * t["delora_w_norm"]).T)


def _hra_fits(s: Shapes, shape: MatrixShape) -> bool:
    length, count = s["hra_u"]
    return length == shape[1] and count <= length


def _hra(p: MethodInputs, W0: Tensor) -> Delta:
    """Compute ``W0 H − W0`` for a product H of reflections, whose vectors are made orthogonal first with ``apply_GS``."""
    U = p.tensors["hra_u"].double()
    if p.config.get("apply_GS"):
        U, R = torch.linalg.qr(U / torch.linalg.vector_norm(U, dim=0))
        if float(R.diagonal().abs().min()) < 1e-5:
            raise NumericError(
                "hra_u: expected independent vectors for apply_GS, found dependent ones; train the adapter"
            )
    U = U / torch.linalg.vector_norm(U, dim=0)
    W = W0.double()
    for u in U.T:
        W = W.addr(W @ u, u, alpha=-2)
    return Dense((W - W0).to(W0.dtype))


def _full_fits(s: Shapes, shape: MatrixShape) -> bool:
    ((role, (m, *others)),) = s.items()
    n = math.prod(others)
    return ((m, n) if role == "weight" else (n, m)) == shape


def _full(p: MethodInputs, W0: Tensor) -> Delta:
    """Compute ``W1 − W0``."""
    ((role, weight),) = p.tensors.items()
    return Dense((weight.flatten(1) if role == "weight" else weight.T) - W0)


PEFT_METHODS: dict[str, PeftMethod] = {
    "LOHA": PeftMethod("LoHa", r"hada_w[12]_[ab]", _loha_fits, _loha, scaled=True, matrices=4),
    "LOKR": PeftMethod("LoKr", r"lokr_w[12](?:_[ab])?", _lokr_fits, _lokr, scaled=True),
    "ADALORA": PeftMethod("AdaLoRA", r"lora_[ABE]|ranknum", _adalora_fits, _adalora, low_rank=True),
    "VERA": PeftMethod(
        "VeRA",
        r"vera_lambda_[bd]",
        _vera_fits,
        _vera,
        shared=frozenset({"vera_A", "vera_B"}),
        low_rank=True,
    ),
    "OFT": PeftMethod("OFT", r"oft_(?:embedding_)?R", _oft_fits, _oft),
    "BOFT": PeftMethod("BOFT", r"boft_[Rs]", _boft_fits, _boft),
    "MISS": PeftMethod("MiSS", r"miss_block", _miss_fits, _miss, matrices=4),
    "SHIRA": PeftMethod("SHiRA", r"shira_(?:weight|indices)", _shira_fits, _shira),
    "DELORA": PeftMethod(
        "DeLoRA", r"delora_(?:A|B|lambda|w_norm)", _delora_fits, _delora, low_rank=True
    ),
    "HRA": PeftMethod("HRA", r"hra_u", _hra_fits, _hra, matrices=8),
    "FULL": PeftMethod(
        "a fully fine-tuned model in the adapter's place", r"(?!)", _full_fits, _full, matrices=2
    ),
}


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


INDICES = {"I32", "I64"}
"""Dtypes of positions, which float32 holds exactly up to 16,777,216."""


def values_of(stored: StoredTensor, index: tuple[slice, ...] = ()) -> Tensor:
    """Copy an adapter's tensor, or some of its rows and columns, to its computing dtype."""
    is_index = stored.info.dtype in INDICES
    dtype = torch.float32 if is_index else float_dtype(stored.info, str(stored.file.path))
    return stored.whole()[index].to(torch.promote_types(dtype, torch.float32), copy=True)


@dataclass(frozen=True)
class LoraModule:
    """LoRA: ``Δ = scaling · B @ A``; the scaling is ``alpha/√r`` for rsLoRA, else ``alpha/r``.

    DoRA: ``W' = magnitude · (W0 + scaling · B @ A)`` with rows first normalised to length 1 (see `dora_delta`); Δ is not of low rank.

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
    magnitude
        Name of DoRA's magnitudes (m,); empty for LoRA.
    """

    name: str
    a: str
    b: str
    rank: int
    scaling: float
    shape: MatrixShape
    layer_kind: str = "linear"
    kernel: TensorShape = ()
    expert: tuple[int, int] | None = None
    grouped: bool = False
    delta_transposed: bool = False
    magnitude: str = ""

    @property
    def low_rank(self) -> bool:
        """Return whether Δ is just the product of the factors."""
        return not self.magnitude

    @property
    def factors(self) -> LoraModule | None:
        """Return the module itself if a mitigated delta can be written as factors."""
        return self if self.low_rank else None

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of lora_A, of lora_B and, for DoRA, of the magnitudes."""
        return (self.a, self.b, self.magnitude) if self.magnitude else (self.a, self.b)

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
        part = slice(e * self.rank, (e + 1) * self.rank)
        return (part,), (slice(None), part if self.grouped else slice(e, None, experts))

    def regrouped(self, b: Tensor) -> Tensor:
        """Reorder the columns of a lora_B of all experts from expert by expert to PEFT's order, rank by rank."""
        if self.expert is None or not self.grouped:
            return b
        return b.reshape(len(b), self.expert[1], self.rank).transpose(1, 2).reshape(b.shape)

    @property
    def weight(self) -> TensorShape:
        """Return the shape of the weight in the model; for a linear layer, as stored (out, in)."""
        m, n = self.shape
        if self.layer_kind == "embedding":
            return n, m
        return m, n // math.prod(self.kernel), *self.kernel

    @property
    def expected(self) -> str:
        """Describe the shape of the weight that it fits."""
        return f"shape {list(self.weight)}"

    def product(self, A: Tensor, B: Tensor) -> LowRank:
        """Return ``scaling · B @ A`` as (out, in) factors, transposed if `delta_transposed`; A (r, n), B (m, r)."""
        if self.delta_transposed:
            return LowRank(A.T * self.scaling, B)
        return LowRank(B * self.scaling, A.T)

    def delta(self, tensors: Tensors, W0: Tensor | None, *, double: bool = False) -> Delta:
        """Compute Δ (m, n), with ``W' = W0 + Δ``: ``scaling · B @ A`` as factors, or DoRA's in W0's dtype.

        Parameters
        ----------
        tensors
            The adapter's tensors, by name.
        W0
            The weight as (out, in); may be None if Δ is of low rank.
        double
            Whether to compute in float64, including the scaling of the factors; W0 is then float64.
        """
        slices = zip((self.a, self.b), self.expert_slices, strict=True)
        A, B = (values_of(tensors[name], index).flatten(1) for name, index in slices)
        product = self.product(A.double(), B.double()) if double else self.product(A, B)
        if self.low_rank:
            return product
        assert W0 is not None
        return Dense(dora_delta(W0, product, values_of(tensors[self.magnitude]).flatten()))

    def peak_bytes(self, itemsize: int) -> int:
        """Return the peak memory of `dora_delta`: W0, the delta, and up to four blocks of rows in float64; 0 for LoRA."""
        if self.low_rank:
            return 0
        m, n = self.shape
        return 2 * itemsize * m * n + 4 * min(8 * m * n, max(BLOCK_BYTES, 8 * n))

    def copied_bytes(self, itemsize: int) -> int:
        """Return the memory of the module's tensors in the computing dtype, if they are kept beside Δ; else 0."""
        return 0

    def placed(self, stored: TensorShape, transposed: bool) -> Module | None:
        """Fit the module to a weight of this shape, stored (in, out) if `transposed`, else (out, in); return None if it does not fit."""
        wanted = self.shape[::-1] if self.layer_kind == "linear" and transposed else self.weight
        return self if stored == wanted else None


@dataclass(frozen=True)
class MethodModule:
    """Module of a method other than LoRA (see `PEFT_METHODS`).

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
    shapes: Mapping[str, TensorShape]
    rank: int = 0
    scaling: float = 1.0
    shape: MatrixShape = (0, 0)
    expert: int | None = None

    factors: ClassVar[None] = None

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

    def delta(self, tensors: Tensors, W0: Tensor | None, *, double: bool = False) -> Delta:
        """Compute ``W' − W0`` by the method's formula."""
        stored = {role: self.stored(tensors[name]) for role, name in self.tensors.items()}
        values = {role: values_of(tensor) for role, tensor in stored.items()}
        if double:
            values = {role: t.double() for role, t in values.items()}
        if W0 is None:
            W0 = torch.empty(0)
        else:
            values = {
                role: t.to(W0.device, torch.promote_types(t.dtype, W0.dtype))
                for role, t in values.items()
            }
        return self.method.delta(MethodInputs(values, self.scaling, self.config, self.shape), W0)

    def stored(self, tensor: StoredTensor) -> StoredTensor:
        """Return the module's part of one of its tensors: the whole, or one expert's matrix."""
        return tensor if self.expert is None else tensor.slice(self.expert)

    def peak_bytes(self, itemsize: int) -> int:
        """Return the memory of the matrices of W0's size that the formula holds at once."""
        return 0 if self.low_rank else self.method.matrices * itemsize * math.prod(self.shape)

    def copied_bytes(self, itemsize: int) -> int:
        """Return the memory of all its tensors in the computing dtype."""
        return sum(math.prod(shape) * max(4, itemsize) for shape in self.shapes.values())

    def placed(self, stored: TensorShape, transposed: bool) -> MethodModule | None:
        """Fit the module to a weight of this shape as stored."""
        if len(stored) < 2:
            return None
        m, *others = stored
        n = math.prod(others)
        shape = (n, m) if transposed else (m, n)
        try:
            fits = self.method.fits(self.shapes, shape)
        except (KeyError, IndexError, ValueError):
            return None  # a tensor is missing or has the wrong number of dimensions
        return replace(self, shape=shape) if fits else None


Module = LoraModule | MethodModule
"""One adapted module of a model.

It has its path in the model, `name`, without wrappers; `rank` and `scaling`, from the config and the factors (a method without rank has 0,
one without scaling 1); the `shape` (out, in) of Δ as a matrix, (dim, vocabulary) for an embedding, (out, in·k) for a convolution with k
kernel elements; and a `layer_kind`: ``linear``, ``conv1d`` (a linear layer stored (in, out)), ``embedding``, ``convolution`` or ``expert``.
"""
