"""Represent matrices by their products: `Dense`, `RowBlocks`, `LowRank`, and the `Sum` of a base and a delta.

An operator of shape (m, n) offers ``matmat(X)`` for ``M @ X`` and ``rmatmat(Y)`` for ``M.T @ Y``. A `Delta` is the change that an adapter
adds to a weight: `LowRank` if it has factors, else `Dense`. Both have the same methods, so callers need not distinguish them.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """``L @ R.T`` with L (m, r) and R (n, r).

    It occupies (m + n)·r values. `dense` forms the product; `add_rows` forms a few rows at a time.
    """

    L: Tensor
    R: Tensor

    @classmethod
    def from_triplets(cls, U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> LowRank:
        """Truncate ``U diag(S) Vh`` at `rank`: factors ``U √S`` and ``V √S`` with exactly `rank` columns, padded with zeros.

        Parameters
        ----------
        U, S, Vh
            (m, p), (p,), (p, n); S in falling order.
        """
        root = S[:rank].sqrt()
        pad = (0, rank - len(root))
        return cls(
            torch.nn.functional.pad(U[:, :rank] * root, pad),
            torch.nn.functional.pad(Vh[:rank].T * root, pad),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Return (m, n)."""
        return self.L.shape[0], self.R.shape[0]

    @property
    def rank(self) -> int:
        """Return the number of columns of L and R, an upper bound on the rank."""
        return self.L.shape[1]

    @property
    def T(self) -> LowRank:
        """Transpose; the factors are shared."""
        return LowRank(self.R, self.L)

    def matmat(self, X: Tensor) -> Tensor:
        """Compute ``L @ (R.T @ X)``."""
        return self.L @ (self.R.T @ X)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """Compute ``R @ (L.T @ Y)``."""
        return self.R @ (self.L.T @ Y)

    def dense(self) -> Tensor:
        """Form ``L @ R.T``, (m, n)."""
        return self.L @ self.R.T

    def __add__(self, other: LowRank) -> LowRank:
        """Add two matrices by concatenating their factors; the rank becomes ``r1 + r2``."""
        return LowRank(torch.cat([self.L, other.L], 1), torch.cat([self.R, other.R], 1))

    def scaled(self, factor: float) -> LowRank:
        """Compute ``factor · L @ R.T``."""
        return LowRank(self.L * factor, self.R)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> LowRank:
        """Cast both factors to another dtype and device."""
        return LowRank(self.L.to(device, dtype), self.R.to(device, dtype))

    def precise(self) -> LowRank:
        """Cast both factors to float64."""
        return self.to(torch.float64)

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """List the factors under an adapter's names for them."""
        return [("lora_B", self.L), ("lora_A", self.R)]

    def is_zero(self) -> bool:
        """Test whether either factor is zero."""
        return not (self.L.any() and self.R.any())

    def largest_estimate(self) -> float:
        """Compute ``max |L| · max |R|``; the largest entry is at most r times this."""
        return float(self.L.abs().max()) * float(self.R.abs().max()) if self.rank else 0.0

    def norm(self) -> float:
        """Compute the Frobenius norm ``‖L Rᵀ‖_F`` in float64, from the triangles of two thin QRs.

        The trace formula ``tr(LᵀL RᵀR)`` would square the condition number and lose half the digits if terms cancel.
        """
        return float(torch.linalg.matrix_norm(self._core()[1]))

    def projected_norm(self, U: Tensor) -> float:
        """Compute ``‖Uᵀ L Rᵀ‖_F`` for U (m, q) with orthonormal columns."""
        return LowRank(U.T.to(self.L) @ self.L, self.R).norm()

    def row_slice(self, i: int, j: int) -> LowRank:
        """Select rows i to j; R is shared."""
        return LowRank(self.L[i:j], self.R)

    def add_rows(self, values: Tensor, i: int, j: int) -> None:
        """Add rows i to j to `values` (j − i, n), in place and in its dtype."""
        values.addmm_(self.L[i:j], self.R.T)

    def plus_projection(self, U: Tensor, factor: float) -> LowRank:
        """Compute ``(I + factor · U Uᵀ) L Rᵀ`` for U (m, q), with unchanged rank and dtype.

        U is orthonormal only to working precision: L's component along each column is scaled as measured.
        """
        U = U.to(self.L)
        return LowRank(self.L + factor * (U @ (U.T @ self.L)), self.R)

    def plus_triplets(self, U: Tensor, S: Tensor, Vh: Tensor, factor: float) -> LowRank:
        """Compute ``L Rᵀ + factor · U diag(S) Vh`` for U (m, q), S (q,), Vh (q, n): rank r + q, dtype of L."""
        U, S, Vh = (t.to(self.L) for t in (U, S, Vh))
        return self + LowRank(factor * U * S, Vh.T)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Decompose ``L Rᵀ = U diag(S) Vh`` in float64: U (m, p), S (p,), Vh (p, n), p = min(r, m, n).

        Uses thin QRs of both factors and the SVD of the small core ``R_L R_Rᵀ``; costs O((m + n)·r²).
        """
        (QL, QR), core = self._core()
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        return QL @ U, S, Vh @ QR.T

    def truncated(self, rank: int) -> tuple[LowRank, float]:
        """Truncate to the nearest matrix of rank `rank` and measure what is lost.

        Returns
        -------
        LowRank, float
            The factors as in `from_triplets`, and ``‖M − M_rank‖_F / ‖M‖_F`` (0 for a zero matrix). By Eckart–Young no matrix of that
            rank is nearer.
        """
        U, S, Vh = self.svd()
        total = float(torch.linalg.vector_norm(S))
        dropped = float(torch.linalg.vector_norm(S[rank:])) / total if total > 0 else 0.0
        return LowRank.from_triplets(U, S, Vh, rank), dropped

    def nearest(self, rank: int, leading: object) -> LowRank:
        """Find the nearest matrix of that rank in float64, from the factors; `leading` is unused."""
        return self.precise().truncated(rank)[0]

    def distance(self, other: LowRank) -> float:
        """Compute ``‖L Rᵀ − L' R'ᵀ‖_F`` in float64."""
        return (self.precise() + other.scaled(-1)).norm()

    def _core(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        QL, RL = torch.linalg.qr(self.L.double())
        QR, RR = torch.linalg.qr(self.R.double())
        return (QL, QR), RL @ RR.T


ROW_PIECES = 8
"""Row blocks into which a product with a long matrix is cut; measured in docs/benchmarks.md."""


@functools.cache
def _has_fast_onednn() -> bool:
    """Test whether torch has oneDNN's float32 products and the processor has AVX-512, which makes them fast.

    They are used only from torch 2.9 on; older versions were not measured.
    """
    has_setting = (
        hasattr(torch.backends, "fp32_precision")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )
    return has_setting and torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _long_rows() -> float:
    """Return the length of rows from which BLAS multiplies a transpose faster than oneDNN; on AMD's processors it never does."""
    with contextlib.suppress(OSError):  # only Linux has the file
        if b"GenuineIntel" in Path("/proc/cpuinfo").read_bytes():
            return 10_000
    return math.inf


def skinny_product(M: Tensor, X: Tensor) -> Tensor:
    """Compute ``M @ X`` for M (m, n), row-major or transposed, and X (n, c) of few columns.

    If `_has_fast_onednn`, oneDNN multiplies float32 matrices, except transposes with `_long_rows`; its bits do not depend on the
    number of threads. Otherwise X is padded with zero columns to a multiple of 16, which makes products several times as fast; on
    the CPU a transpose is multiplied from the left, and a long matrix is cut into `ROW_PIECES`. docs/benchmarks.md has the measurements.
    """
    c = X.shape[1]
    if (
        M.device.type == "cpu"
        and M.dtype == torch.float32
        and min(*M.shape, c) > 0
        and _has_fast_onednn()
    ):
        # Only contiguous matrices: for part of longer rows oneDNN uses a reference kernel, a thousand times slower.
        X = X if X.T.is_contiguous() else X.contiguous()
        if M.is_contiguous():
            return _onednn_linear(M, X.T)
        if M.T.is_contiguous() and len(M) < _long_rows():
            return _onednn_linear(X.T, M).T
    X = torch.nn.functional.pad(X, (0, -c % 16))
    rows = len(M) // ROW_PIECES
    if M.device.type != "cpu":
        return (M @ X)[:, :c]
    if not M.is_contiguous():
        return (X.T @ M.T).T[:, :c]
    if rows < 128:
        return (M @ X)[:, :c]
    pieces = M[: ROW_PIECES * rows].view(ROW_PIECES, rows, M.shape[1])
    rest = M[ROW_PIECES * rows :]
    out = torch.bmm(pieces, X.expand(ROW_PIECES, *X.shape)).view(ROW_PIECES * rows, -1)
    return (torch.cat([out, rest @ X]) if len(rest) else out)[:, :c]


def linear(X: Tensor, M: Tensor) -> Tensor:
    """Compute ``X @ M.T`` for X (t, n) and M (m, n), with oneDNN if `_has_fast_onednn` and M is contiguous: 1.2 to 1.9 times as fast."""
    cpu = X.device.type == "cpu" and X.dtype == M.dtype == torch.float32 and M.is_contiguous()
    if cpu and min(*M.shape, len(X)) > 0 and _has_fast_onednn():
        return _onednn_linear(X.contiguous(), M)
    return X @ M.T


def _onednn_linear(A: Tensor, B: Tensor) -> Tensor:
    """Compute ``A @ B.T`` with oneDNN; B is row-major or the transpose of a row-major matrix."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(A, B, None, "none", [], "")
    return product


@dataclass(frozen=True)
class Dense:
    """``power · matrix``: a matrix in memory, (m, n).

    The power of two is applied to the other factor of each product, so the matrix is not copied.
    """

    matrix: Tensor
    power: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Return (m, n)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def like(self) -> Tensor:
        """Make an empty tensor with the products' dtype and device."""
        return self.matrix.new_empty(0)

    def matmat(self, X: Tensor) -> Tensor:
        """Compute ``M @ X``."""
        return skinny_product(self.matrix, X * self.power)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """Compute ``M.T @ Y``."""
        return skinny_product(self.matrix.T, Y * self.power)

    @property
    def T(self) -> Dense:
        """Transpose, as a view."""
        return replace(self, matrix=self.matrix.T)

    def dense(self) -> Tensor:
        """Form the matrix; it is copied only if it is scaled."""
        return self.matrix if self.power == 1 else self.matrix * self.power

    def scaled(self, factor: float) -> Dense:
        """Compute ``factor · M``; memory is shared."""
        return replace(self, power=self.power * factor)

    def pieces(self) -> Iterator[Tensor]:
        """Yield all values, unscaled, in pieces of any shape."""
        yield self.matrix

    def rows(self) -> Iterator[Tensor] | None:
        """Yield the rows in order, unscaled, a few at a time."""
        return iter(torch.split(self.matrix, 1024))

    # The methods of a delta, named as in `LowRank`.

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Dense:
        """Form the matrix in another dtype and device."""
        return Dense(self.dense().to(device, dtype))

    def precise(self) -> Dense:
        """Return the delta unchanged: a float64 copy would dominate memory."""
        return self

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """List the matrix under its name in messages."""
        return [("the delta", self.matrix)]

    def is_zero(self) -> bool:
        """Test whether all entries are zero."""
        return not self.matrix.any()

    def largest_estimate(self) -> float:
        """Compute ``max |Δ_ij|`` exactly, without the copy that ``abs`` would make."""
        low, high = torch.aminmax(self.matrix)
        return max(-float(low), float(high)) * abs(self.power)

    def norm(self) -> float:
        """Compute the Frobenius norm ``‖Δ‖_F``, summing squares in float64."""
        squares = sum(
            float(torch.linalg.vector_norm(rows.double())) ** 2
            for rows in torch.split(self.matrix, 256)
        )
        return float(squares**0.5) * abs(self.power)

    def projected_norm(self, U: Tensor) -> float:
        """Compute ``‖Uᵀ Δ‖_F`` for U (m, q) with orthonormal columns, q ≥ 1."""
        return float(torch.linalg.matrix_norm((U.T.to(self.matrix) @ self.dense()).double()))

    def row_slice(self, i: int, j: int) -> Dense:
        """Select rows i to j, as a view."""
        return replace(self, matrix=self.matrix[i:j])

    def add_rows(self, values: Tensor, i: int, j: int) -> None:
        """Add rows i to j of Δ to `values` (j − i, n), in place and in its dtype."""
        values.add_(self.matrix[i:j], alpha=self.power)

    def plus_projection(self, U: Tensor, factor: float) -> Dense:
        """Compute ``Δ + factor · U Uᵀ Δ`` for U (m, q); needs memory for one more matrix."""
        matrix = self.dense()
        U = U.to(matrix)
        return Dense(torch.addmm(matrix, U, U.T @ matrix, alpha=factor))

    def plus_triplets(self, U: Tensor, S: Tensor, Vh: Tensor, factor: float) -> Dense:
        """Compute ``Δ + factor · U diag(S) Vh`` for U (m, q), S (q,), Vh (q, n); needs memory for one more matrix."""
        matrix = self.dense()
        U, S, Vh = (t.to(matrix) for t in (U, S, Vh))
        return Dense(torch.addmm(matrix, U * S, Vh, alpha=factor))

    def nearest(self, rank: int, leading: Leading) -> LowRank:
        """Find the nearest matrix of that rank in float64, from the triplets that `leading` finds."""
        return LowRank.from_triplets(*leading(self, rank), rank)

    def distance(self, other: LowRank) -> float:
        """Compute ``‖Δ − L Rᵀ‖_F`` in float64."""
        rows = zip(torch.split(self.dense(), 256), torch.split(other.L, 256), strict=True)
        parts = (torch.addmm(D.double(), L, other.R.T, alpha=-1) for D, L in rows)
        return math.sqrt(sum(float(torch.linalg.vector_norm(part)) ** 2 for part in parts))


@dataclass(frozen=True)
class RowBlocks:
    """``power · M`` for M (m, n), read a few rows at a time for each product so that it never has to fit in memory.

    Attributes
    ----------
    stored
        Shape of the matrix as it is read.
    read
        ``read(i, j)`` returns rows i to j in any floating-point dtype.
    like
        An empty tensor with the products' dtype and device.
    transposed
        Whether M is the transpose of the matrix that is read.
    """

    stored: tuple[int, int]
    read: Callable[[int, int], Tensor]
    like: Tensor
    transposed: bool = False
    power: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Return (m, n)."""
        rows, columns = self.stored
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def T(self) -> RowBlocks:
        """Transpose; the same rows are read."""
        return replace(self, transposed=not self.transposed)

    def matmat(self, X: Tensor) -> Tensor:
        """Compute ``M @ X``."""
        return self._down(X * self.power) if self.transposed else self._across(X * self.power)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """Compute ``M.T @ Y``."""
        return self._across(Y * self.power) if self.transposed else self._down(Y * self.power)

    def dense(self) -> Tensor:
        """Form the matrix, (m, n)."""
        out = self.like.new_empty(self.stored)
        for i, block in self._blocks():
            torch.mul(block, self.power, out=out[i : i + len(block)])
        return out.T if self.transposed else out

    def scaled(self, factor: float) -> RowBlocks:
        """Compute ``factor · M``."""
        return replace(self, power=self.power * factor)

    def pieces(self) -> Iterator[Tensor]:
        """Yield all values, unscaled, in pieces of any shape."""
        return (block for _, block in self._blocks())

    def rows(self) -> Iterator[Tensor] | None:
        """Yield the rows in order, unscaled, a few at a time; return None for a transpose, whose first row needs the whole file."""
        return None if self.transposed else self.pieces()

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        m, n = self.stored
        rows = min(m, max(1, BLOCK_BYTES // (n * self.like.element_size())))
        buffer = self.like.new_empty(
            (rows, n)
        )  # reused: the system would zero a fresh one each time
        for i in range(0, m, rows):
            j = min(i + rows, m)
            yield i, buffer[: j - i].copy_(self.read(i, j))

    def _across(self, X: Tensor) -> Tensor:
        out = X.new_empty((self.stored[0], X.shape[1]))
        for i, block in self._blocks():
            out[i : i + len(block)] = skinny_product(block, X)
        return out

    def _down(self, Y: Tensor) -> Tensor:
        out = Y.new_zeros((self.stored[1], Y.shape[1]))
        for i, block in self._blocks():
            out += skinny_product(block.T, Y[i : i + len(block)])
        return out


Matrix = Dense | RowBlocks
"""Weight matrix, in memory or on disk."""

Delta = LowRank | Dense
"""Δ (m, n), the change that an adapter adds to a weight."""

Leading = Callable[[Dense, int], tuple[Tensor, Tensor, Tensor]]
"""Function that finds a matrix's leading singular triplets, at least as many as asked if any: U (m, p), S (p,), Vh (p, n); float64."""

BLOCK_BYTES = 16 << 20
"""Bytes of rows that `RowBlocks` reads at a time: small enough to stay in the cache between upcast and product (docs/benchmarks.md)."""


@dataclass(frozen=True)
class Sum:
    """``W0 + Δ``, both (m, n)."""

    base: Operator
    delta: Delta

    @property
    def shape(self) -> tuple[int, int]:
        """Return (m, n)."""
        return self.base.shape

    @property
    def T(self) -> Sum:
        """Transpose both terms."""
        return Sum(self.base.T, self.delta.T)

    def matmat(self, X: Tensor) -> Tensor:
        """Compute ``W0 @ X + Δ @ X``."""
        return self.base.matmat(X) + self.delta.matmat(X)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """Compute ``W0.T @ Y + Δ.T @ Y``."""
        return self.base.rmatmat(Y) + self.delta.rmatmat(Y)

    def dense(self) -> Tensor:
        """Form the sum in new memory."""
        out = self.base.dense().clone()
        self.delta.add_rows(out, 0, len(out))
        return out


Operator = LowRank | Dense | RowBlocks | Sum
"""Real matrix, accessed through its products."""


def all_finite(t: Tensor) -> bool:
    """Test whether all values of a tensor are finite, in one pass and without a mask of its size."""
    if t.numel() == 0:
        return True
    low, high = torch.aminmax(t)  # both are NaN if any value is
    return math.isfinite(float(low)) and math.isfinite(float(high))
