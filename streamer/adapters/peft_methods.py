"""Compute the deltas of PEFT methods other than LoRA: one entry of `METHODS` for each method, by PEFT's ``peft_type``.

An entry says which tensors a module has, which matrices they fit, and what they add to W0 (out, in); a convolution's kernel is flattened
into its input. Every formula is the one of PEFT's own merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from streamer.adapters.adapter_config import AdapterConfig
from streamer.linalg.operators import Delta, Dense, LowRank

Shapes = Mapping[str, tuple[int, ...]]


class MethodInputs(NamedTuple):
    """A module's tensors by role in the computing dtype, its scaling, the adapter's config, and its weight's (out, in)."""

    tensors: Mapping[str, Tensor]
    scaling: float
    config: AdapterConfig
    shape: tuple[int, int]


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
    fits: Callable[[Shapes, tuple[int, int]], bool]
    delta: Callable[[MethodInputs, Tensor], Delta]
    scaled: bool = False
    shared: frozenset[str] = frozenset()
    low_rank: bool = False
    matrices: int = 3


def _product(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a product; raise `ValueError` if the shapes do not match."""
    (m, r), (k, n) = a, b
    if r != k:
        raise ValueError
    return m, n


def _cored(core: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of ``Σ_ij core[i, j, k, l] a[i, p] b[j, r]``, (p, r, k, l); raise `ValueError` if the shapes do not match."""
    (i, j, *kernel), (a_i, p), (b_j, r) = core, a, b
    if len(kernel) != 2 or (i, j) != (a_i, b_j):
        raise ValueError
    return p, r, *kernel


def _loha_fits(s: Shapes, shape: tuple[int, int]) -> bool:
    for i in (1, 2):
        a, b, core = s[f"hada_w{i}_a"], s[f"hada_w{i}_b"], s.get(f"hada_t{i}")
        m, *rest = _product(a, b) if core is None else _cored(core, a, b)
        if (m, math.prod(rest)) != shape:
            return False
    return True


def _loha(p: MethodInputs, W0: Tensor) -> Delta:
    """Compute ``(w1_a w1_b) ∘ (w2_a w2_b)``; either product may have a core for the kernel."""
    t = p.tensors

    def product(i: int) -> Tensor:
        a, b = t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]
        if f"hada_t{i}" in t:
            return torch.einsum("ijkl,jr,ip->prkl", t[f"hada_t{i}"], b, a).reshape(p.shape)
        return a @ b

    return Dense((product(1) * product(2)).mul_(p.scaling))


def _lokr_sides(s: Shapes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    first = s["lokr_w1"] if "lokr_w1" in s else _product(s["lokr_w1_a"], s["lokr_w1_b"])
    if "lokr_w2" in s:
        return first, s["lokr_w2"]
    a, b = s["lokr_w2_a"], s["lokr_w2_b"]
    return first, _cored(s["lokr_t2"], a, b) if "lokr_t2" in s else _product(a, b)


def _lokr_fits(s: Shapes, shape: tuple[int, int]) -> bool:
    (p, q), (m, *rest) = _lokr_sides(s)
    return len(rest) in (1, 2, 3) and (p * m, q * math.prod(rest)) == shape


def _lokr(p: MethodInputs, W0: Tensor) -> Delta:
    """Compute ``w1 ⊗ w2``; either may itself be a product."""
    t = p.tensors
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = torch.einsum("ijkl,ip,jr->prkl", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
    if w2.dim() == 4:
        w1 = w1[:, :, None, None]
    return Dense(torch.kron(w1, w2.contiguous()).reshape(p.shape).mul_(p.scaling))


def _adalora_fits(s: Shapes, shape: tuple[int, int]) -> bool:
    one = math.prod(s.get("ranknum", ())) == 1
    return one and _product(s["lora_B"], s["lora_A"]) == shape and math.prod(s["lora_E"]) == s["lora_A"][0]


def _adalora(p: MethodInputs, W0: Tensor) -> Delta:
    """Compute ``B · diag(E) · A · alpha / (init_r + 1e-5)``: PEFT keeps the initial rank in the scaling."""
    t, alpha = p.tensors, float(p.config.get("lora_alpha", 8))
    rank = float(t["ranknum"]) if "ranknum" in t else float(p.config.get("init_r", 12))
    scaling = (alpha if alpha > 0 else float(t["lora_A"].shape[0])) / (rank + 1e-5)
    return LowRank(t["lora_B"] * t["lora_E"].flatten() * scaling, t["lora_A"].T)


def _vera_fits(s: Shapes, shape: tuple[int, int]) -> bool:
    m, n = _product(s["vera_B"], s["vera_A"])
    scales = math.prod(s["vera_lambda_b"]), math.prod(s["vera_lambda_d"])
    return m >= shape[0] and n >= shape[1] and scales == (shape[0], s["vera_A"][0])


def _vera(p: MethodInputs, W0: Tensor) -> Delta:
    """Compute ``diag(b) B · diag(d) A``, with the first rows and columns of projections that all modules share."""
    (m, n), t = p.shape, p.tensors
    L = t["vera_lambda_b"].flatten()[:, None] * t["vera_B"][:m]
    R = t["vera_lambda_d"].flatten()[:, None] * t["vera_A"][:, :n]
    return LowRank(L, R.T)


def _block_size(elements: int) -> int:
    """Return the size b of a skew-symmetric block with b·(b−1)/2 entries above its diagonal."""
    return (1 + math.isqrt(1 + 8 * elements)) // 2


def _oft_fits(s: Shapes, shape: tuple[int, int]) -> bool:
    """Accept blocks along the input, or for an embedding along the output; a shared block counts for all."""
    (role, (blocks, elements)), *rest = s.items()
    size, length = _block_size(elements), shape[0] if role == "oft_embedding_R" else shape[1]
    whole = size * (size - 1) // 2 == elements and not rest
    return whole and (blocks * size == length or (blocks == 1 and length % size == 0))


def _cayley(Q: Tensor, terms: int | None = None) -> Tensor:
    """Make rotations ``(I − Q)(I + Q)⁻¹`` from skew-symmetric blocks (blocks, b, b), or their inverse by `terms` of its Neumann series.

    The two turn in opposite senses, which is PEFT's convention: an adapter is trained with one of them.
    """
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    if terms is None:
        solved: Tensor = torch.linalg.solve(eye + Q, eye - Q, left=False)
        return solved
    terms = 4 if terms == 3 else terms  # as in PEFT
    R, power = eye.clone(), eye
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
    terms = int(p.config.get("num_cayley_neumann_terms", 5)) if p.config.get("use_cayley_neumann") else None
    R = _cayley(Q, terms).to(W0.dtype)
    return Dense(_rotated(W0, R, embedding=role == "oft_embedding_R") - W0)


def _rotated(W0: Tensor, R: Tensor, embedding: bool = False) -> Tensor:
    """Compute ``W0 · diag(R)ᵀ`` block by block; a single block is repeated."""
    size = R.shape[-1]
    W = W0.T if embedding else W0
    blocks = W.reshape(len(W), -1, size).transpose(0, 1)
    out = torch.matmul(blocks, R if embedding else R.mT).transpose(0, 1).reshape(W.shape)
    return out.T if embedding else out


def _boft_fits(s: Shapes, shape: tuple[int, int]) -> bool:
    factors, blocks, size, other = s["boft_R"]
    return factors == 1 and size == other and blocks * size == shape[1] and math.prod(s["boft_s"]) == shape[0]


def _boft(p: MethodInputs, W0: Tensor) -> Delta:
    """Compute ``diag(s) W0 Rᵀ`` for one butterfly factor, which involves no permutation."""
    data = p.tensors["boft_R"][0].double()
    R = _cayley(0.5 * (data - data.mT)).to(W0.dtype)
    return Dense(p.tensors["boft_s"].flatten()[:, None].to(W0.dtype) * _rotated(W0, R) - W0)


def _full_fits(s: Shapes, shape: tuple[int, int]) -> bool:
    ((role, stored),) = s.items()
    m, n = stored[0], math.prod(stored[1:])
    return ((m, n) if role == "weight" else (n, m)) == shape


def _full(p: MethodInputs, W0: Tensor) -> Delta:
    """Compute ``W1 − W0``."""
    ((role, weight),) = p.tensors.items()
    return Dense((weight.flatten(1) if role == "weight" else weight.T) - W0)


METHODS: dict[str, PeftMethod] = {
    "LOHA": PeftMethod("LoHa", r"hada_(?:w[12]_[ab]|t[12])", _loha_fits, _loha, scaled=True, matrices=4),
    "LOKR": PeftMethod("LoKr", r"lokr_(?:w[12](?:_[ab])?|t2)", _lokr_fits, _lokr, scaled=True),
    "ADALORA": PeftMethod("AdaLoRA", r"lora_[ABE]|ranknum", _adalora_fits, _adalora, low_rank=True),
    "VERA": PeftMethod("VeRA", r"vera_lambda_[bd]", _vera_fits, _vera, shared=frozenset({"vera_A", "vera_B"}), low_rank=True),
    "OFT": PeftMethod("OFT", r"oft_(?:embedding_)?R", _oft_fits, _oft),
    "BOFT": PeftMethod("BOFT", r"boft_[Rs]", _boft_fits, _boft),
    "FULL": PeftMethod("a fully fine-tuned model in the adapter's place", r"(?!)", _full_fits, _full, matrices=2),
}  # fmt: skip
