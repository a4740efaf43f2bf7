"""Compute singular values and vectors: leading triplets by block Krylov or LAPACK, their residuals, and energies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from streamer.linalg.operators import Delta, LowRank, Operator

NOISE = 4
"""Drop directions of a block below this many roundings of the norm, times the square root of the number of basis columns.

One step adds at most 0.3 roundings to a block. Later steps amplify earlier errors, which the square root accounts for (measured in
docs/benchmarks.md).
"""


def block_width(k: int, extra: int) -> int:
    """Round k plus at least `extra` columns up to a multiple of 16, because products of such widths are fast."""
    return -(-(k + extra) // 16) * 16


class RitzBasis(NamedTuple):
    """Singular value decomposition of the projected matrix, ``B = X diag(S) Yᵀ``, all float64 on the CPU.

    Attributes
    ----------
    X, S, Y
        (q, q), (p,), (p, p); S falls and is padded with zeros if q < p.
    tail
        (b, p): ``Mᵀ (Q x_l) = S_l P y_l + P₊ tail[:, l]``, so ``‖tail[:, l]‖`` is the residual of Ritz triplet l.
    """

    X: Tensor
    S: Tensor
    Y: Tensor
    tail: Tensor


class GolubKahan:
    """Process that maintains ``M P = Q B`` and ``Mᵀ Q = P Bᵀ + P₊ L Eᵀ`` with orthonormal ``[P, P₊]`` and ``Q``; each step adds a block.

    M is (m, n). P (n, p) and Q (m, q) are the bases, P₊ (n, b) is the next block, B (q, p) is block upper triangular, and Eᵀ selects
    the last block of rows (all rows after a `restart`). Hence ``MᵀM P = P T + P₊ β Eᵀ`` with ``T = BᵀB``: the block Lanczos process
    on MᵀM. Forming T from B in float64 loses only eps·‖M‖ on singular values; products with MᵀM in float32 would lose eps·‖M‖²
    (Golub & Kahan 1965; Golub & Van Loan, Matrix Computations, 10.4).

    Every block is orthogonalised against the whole basis twice, and again if it shrank, until it has no component left in the basis.
    Directions that vanish to rounding are dropped (deflation, see `NOISE`) and added to `deflated`. If a whole block vanishes, the
    bases span invariant subspaces: `exhausted` becomes true, and the Ritz values are singular values of M. Both hold up to
    `deflated`.

    Parameters
    ----------
    op
        M. Scale it first, so that the squares of its values neither overflow nor underflow.
    start
        (n, b) start block; ``start = P[:, :b'] @ start_coefficients`` until the first `restart`.

    Attributes
    ----------
    products
        Columns multiplied by M or Mᵀ so far.
    deflated
        Frobenius norm of everything dropped: its contribution to F in ``Mᵀ Q = P Bᵀ + P₊ L Eᵀ + F``.
    """

    def __init__(self, op: Operator, start: Tensor) -> None:
        m, n = op.shape
        self.op = op
        self.P = start.new_empty((n, 0))
        self.Q = start.new_empty((m, 0))
        self.B = torch.zeros((0, 0), dtype=torch.float64)
        self.L = torch.zeros((0, 0), dtype=torch.float64)
        self.steps = 0
        self.products = 0
        self.norm = 0.0
        self._last = 0
        self.deflated = 0.0
        self._eps = torch.finfo(start.dtype).eps
        self.following, self.start_coefficients, _ = self._orthonormal(start, self.P, _norm(start))
        self.deflated = 0.0  # a rank-deficient start block says nothing about M

    @property
    def exhausted(self) -> bool:
        """Test whether the space is invariant; another step would add nothing."""
        return self.following.shape[1] == 0

    def step(self) -> None:
        """Add one block, at the cost of one product with M and one with Mᵀ."""
        block = self.following
        new, R, C = self._orthonormal(self._counted(self.op.matmat(block)), self.Q, self.norm)
        self.P = torch.cat([self.P, block], 1)
        grown = torch.zeros((self.Q.shape[1] + new.shape[1], self.P.shape[1]), dtype=torch.float64)
        grown[: self.B.shape[0], : self.B.shape[1]] = self.B
        grown[: C.shape[0], self.B.shape[1] :] = C
        grown[C.shape[0] :, self.B.shape[1] :] = R
        self.B = grown
        self.Q = torch.cat([self.Q, new], 1)
        self._last = new.shape[1]
        if self._last == 0:
            self.following = block[:, :0]
            self.L = torch.zeros((0, 0), dtype=torch.float64)
        else:
            self.following, self.L, _ = self._orthonormal(
                self._counted(self.op.rmatmat(new)), self.P, self.norm
            )
        self.steps += 1

    def restart(self, kept: int) -> None:
        """Shrink the bases to the `kept` leading Ritz triplets to bound memory.

        ``M (P y) = (Q x) S`` and ``Mᵀ (Q x) = (P y) S + P₊ tail`` is the same invariant with B = S and L = the tail, now over all rows.
        Only the dropped directions are lost (thick restart; Baglama & Reichel, SIAM J. Sci. Comput. 27, 2005).
        """
        ritz = self.ritz()
        kept = min(kept, *self.B.shape)
        self.P = self.P @ ritz.Y[:, :kept].to(self.P)
        self.Q = self.Q @ ritz.X[:, :kept].to(self.Q)
        self.B = ritz.S[:kept].diag()
        self.L = ritz.tail[:, :kept]
        self._last = kept

    def _counted(self, image: Tensor) -> Tensor:
        self.products += image.shape[1]
        self.norm = max(self.norm, _norm(image))
        return image

    def _orthonormal(
        self, block: Tensor, basis: Tensor, size: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Factor ``block = basis @ C + new @ R`` with orthonormal `new`, of the rank of `block` beyond rounding at `size`."""
        C = torch.zeros((basis.shape[1], block.shape[1]), dtype=torch.float64)
        for _ in range(2):
            c = basis.T @ block
            block = block - basis @ c
            C += c.double().cpu()
        new, triangle = torch.linalg.qr(block)
        R = triangle.double().cpu()
        u, s, vh = torch.linalg.svd(R, full_matrices=False)
        noise = NOISE * self._eps * math.sqrt(max(1, basis.shape[1])) * size
        kept = min(int((s > noise).sum()), basis.shape[0] - basis.shape[1])
        if kept < len(s):
            self.deflated = math.hypot(self.deflated, float(torch.linalg.vector_norm(s[kept:])))
            new = new @ u[:, :kept].to(new)
            R = s[:kept, None] * vh[:kept]
        if kept and float(s[kept - 1]) < 0.01 * size:
            # Normalising a small direction amplifies its rounding error, and may do so more than once.
            for _ in range(3):
                c = basis.T @ new
                if _norm(c) <= 4 * self._eps * math.sqrt(kept):
                    break
                new, triangle = torch.linalg.qr(new - basis @ c)
                C += c.double().cpu() @ R
                R = triangle.double().cpu() @ R
        return new, R, C

    def ritz(self) -> RitzBasis:
        """Decompose B and compute the residual of each Ritz triplet."""
        q, p = self.B.shape
        X, S, Yt = torch.linalg.svd(self.B)
        tail = torch.zeros((self.following.shape[1], p), dtype=torch.float64)
        if self._last and self.following.shape[1]:
            tail[:, : len(S)] = self.L @ X[q - self._last :, : len(S)]
        return RitzBasis(X, torch.nn.functional.pad(S, (0, p - len(S))), Yt.T.contiguous(), tail)

    def defect_estimate(self, generator: torch.Generator, probes: int = 16) -> float:
        """Estimate how far rounding breaks the invariant: ``(‖M P − Q B‖_F² + ‖Mᵀ Q − P Bᵀ − P₊ L Eᵀ‖_F²)^½``.

        For Gaussian z, ``E‖F z‖² = ‖F‖_F²``. If F had rank one, 16 probes would give less than half of its norm once in 900 draws (χ²
        distribution). Rounding spreads F over as many directions as the basis has, so the estimate is far closer.
        """
        z = torch.randn(self.B.shape[1], probes, generator=generator, dtype=torch.float64)
        forward = self.op.matmat(self.P @ z.to(self.P)).double().cpu() - _times(self.Q, self.B @ z)
        z = torch.randn(self.B.shape[0], probes, generator=generator, dtype=torch.float64)
        expected = _times(self.P, self.B.T @ z)
        if self._last and self.following.shape[1]:
            expected += _times(self.following, self.L @ z[-self._last :])
        backward = self.op.rmatmat(self.Q @ z.to(self.Q)).double().cpu() - expected
        self.products += 2 * probes
        return float(((forward.square().sum() + backward.square().sum()) / probes).sqrt())


def _times(basis: Tensor, coefficients: Tensor) -> Tensor:
    """Compute ``basis @ coefficients`` in float64 on the CPU, a few rows at a time: a float64 copy of the basis would dominate memory."""
    return torch.cat([rows.double().cpu() @ coefficients for rows in torch.split(basis, 4096)])


def _norm(t: Tensor) -> float:
    """Bound the spectral norm from above by the Frobenius norm, which is at most √b too large for b columns."""
    return float(torch.linalg.matrix_norm(t)) if t.numel() else 0.0


@dataclass(frozen=True)
class Triplets:
    """``W v_j ≈ σ_j u_j`` and ``Wᵀ u_j ≈ σ_j v_j`` for the k largest singular values of W (m, n).

    Attributes
    ----------
    U, S, Vh
        (m, k), (k,), (k, n); S in falling order.
    residuals
        (k,) float64: ``max(‖W v − σ u‖, ‖Wᵀ u − σ v‖)``, recomputed from the operator after the solve.
    gaps
        (k,) float64: distance from σ_j to the nearest other singular value, and for m > n also to zero; infinite if there is none.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    gaps: Tensor

    @property
    def angle_error_estimate(self) -> Tensor:
        """Estimate the angle error, (k,) float64: ``residual_j / gap_j``, at most 1.

        By Wedin (BIT 12, 1972), the sine of the angle between u_j and the true singular vector is at most the residual over the
        distance from σ_j to the *true* rest of the spectrum. Only the computed rest is known, so this is an estimate. Residuals
        below one rounding of σ_1 are noise and count as one rounding.
        """
        floor = torch.finfo(self.S.dtype).eps * float(self.S[0]) if len(self.S) else 0.0
        error = self.residuals.clamp_min(floor) / self.gaps.clamp_min(
            torch.finfo(torch.float64).tiny
        )
        return error.clamp_max(1.0)

    @property
    def distance_estimate(self) -> Tensor:
        """Estimate ``‖u_j − u‖`` to the true singular vector, (k,) float64: ``2 sin(θ/2)`` for the angle θ of `angle_error_estimate`.

        A similarity changes by at most this much. A degenerate direction gets 2: nothing is known of it alone.
        """
        sine = self.angle_error_estimate
        return torch.where(sine > DEGENERATE, 2.0, 2 * (sine.asin() / 2).sin())


DEGENERATE = 0.1
"""Angle error above which a single direction is ill-defined, because its neighbours in the cluster fit equally well."""


def dense_triplets(W: Operator, k: int) -> Triplets:
    """Compute the k leading triplets by LAPACK's full SVD, in the operator's precision.

    Parameters
    ----------
    W
        (m, n), 1 ≤ k ≤ min(m, n). The matrix is formed; memory is about three times its size.

    Raises
    ------
    torch.linalg.LinAlgError
        If LAPACK does not converge.
    """
    U, S, Vh = torch.linalg.svd(W.dense(), full_matrices=False)
    U = U[:, :k].contiguous()
    values = S.double()
    S = S[:k].clone()
    Vh = Vh[:k].contiguous()
    padded = torch.nn.functional.pad(values, (1, 1), value=float("inf"))
    if W.shape[0] > W.shape[1]:
        padded[-1] = 0.0  # vectors outside the range of W are neighbours of u_n
    gaps = torch.minimum((padded[:-2] - values).abs(), (values - padded[2:]).abs())[:k]
    return Triplets(U, S, Vh, residuals(W, U, S, Vh), gaps.cpu())


ANGLES = (1e-5, 1e-3)
"""Target angle errors for Krylov triplets; refinement also stops if the residual is down to rounding. Spectra without decay miss the first
target in 16 steps and then get the second; the remaining error widens the certified intervals."""


OVERSAMPLING = 6
"""Fewest random columns in the start block beyond k."""


class KrylovTriplets(NamedTuple):
    """Triplets from `krylov_triplets`, whether they meet `ANGLES`, and their cost.

    Without convergence these are the best found; their residuals and gaps show how good.
    """

    triplets: Triplets
    converged: bool
    steps: int
    products: int


def krylov_triplets(
    W: Operator, k: int, generator: torch.Generator, like: Tensor, max_basis: int, max_steps: int
) -> KrylovTriplets:
    """Compute the k leading triplets by the block Golub–Kahan process from a random block, with thick restarts.

    Parameters
    ----------
    W
        (m, n), scaled so that its norm is near 1.
    k
        1 ≤ k < min(m, n). The block has at least `OVERSAMPLING` more columns, so that a cluster at σ_k does not hide a vector.
    like
        A tensor with the dtype and device of the computation.
    max_basis
        Most columns of the basis, at least k and two blocks; memory is (m + n) times this. A full basis restarts from the leading
        third of its Ritz triplets.
    max_steps
        Most block steps.
    """
    m, n = W.shape
    op = W if n <= m else W.T
    width = min(block_width(k, OVERSAMPLING), m, n)
    process = GolubKahan(
        op, torch.randn(op.shape[1], width, generator=generator, dtype=torch.float32).to(like)
    )
    look = 4
    while True:
        process.step()
        ended = process.exhausted or process.steps >= max_steps
        full = process.P.shape[1] + process.following.shape[1] > max_basis
        if process.steps < look and not ended and not full:
            continue
        # Decomposing B costs the cube of the basis, so deep in a flat spectrum not every step is checked.
        look = process.steps + (1 if process.steps < 16 else 4)
        ritz = process.ritz()
        good = process.exhausted or _converged(
            ritz, k, (m, n), ANGLES[process.steps > 16], torch.finfo(like.dtype).eps
        )
        if good or ended:
            triplets = _leading(process, ritz, k, W, generator)
            return KrylovTriplets(
                triplets,
                good and min(process.B.shape) >= k,
                process.steps,
                process.products + 2 * k,
            )
        if full:
            process.restart(max(k + width, max_basis // 3))


def _gaps(ritz: RitzBasis, k: int, shape: tuple[int, int]) -> Tensor:
    """Estimate a lower bound on the distance from each of k Ritz values to the nearest other singular value, (k,)."""
    m, n = shape
    S = ritz.S
    padded = torch.nn.functional.pad(S, (1, 1), value=float("inf"))
    padded[-1] = 0.0 if len(S) < min(m, n) or m > n else float("inf")
    residual = torch.linalg.vector_norm(ritz.tail, dim=0)
    # The j-th Ritz value lies below the j-th singular value, and after convergence by at most its residual; the next singular value may
    # be that much nearer. Convergence, and that no value was missed, rest on the random columns, as in all Krylov solvers.
    below = S - padded[2:] - torch.nn.functional.pad(residual, (0, 1))[1:]
    return torch.minimum(padded[:-2] - S, below).clamp_min(0)[:k]


def _converged(ritz: RitzBasis, k: int, shape: tuple[int, int], angle: float, eps: float) -> bool:
    """Test whether the first k Ritz triplets are within `angle` of singular triplets, or as near as rounding allows."""
    residual = torch.linalg.vector_norm(ritz.tail, dim=0)[:k]
    return bool(
        (residual <= (angle * _gaps(ritz, k, shape)).clamp_min(8 * eps * float(ritz.S[0]))).all()
    )


def _leading(
    process: GolubKahan, ritz: RitzBasis, k: int, W: Operator, generator: torch.Generator
) -> Triplets:
    """Form the k leading Ritz triplets; fill up missing ones with σ = 0, arbitrary orthonormal vectors and gap 0."""
    missing = max(0, k - min(process.B.shape))
    count = k - missing
    left = process.Q @ ritz.X[:, :count].to(process.Q)
    right = process.P @ ritz.Y[:, :count].to(process.P)
    left, right = (_completed(basis, missing, generator) for basis in (left, right))
    U, V = (left, right) if process.op is W else (right, left)
    pad = (0, missing)
    S = torch.nn.functional.pad(ritz.S[:count], pad).to(U)
    gaps = torch.nn.functional.pad(_gaps(ritz, count, W.shape), pad)
    return Triplets(U, S, V.T.contiguous(), residuals(W, U, S, V.T), gaps)


def _completed(basis: Tensor, missing: int, generator: torch.Generator) -> Tensor:
    """Append `missing` orthonormal columns to a basis."""
    if not missing:
        return basis
    columns = torch.randn(len(basis), missing, generator=generator, dtype=torch.float32).to(basis)
    for _ in range(2):
        columns = torch.linalg.qr(columns - basis @ (basis.T @ columns)).Q
    return torch.cat([basis, columns], 1)


def residuals(W: Operator, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """Compute ``max(‖W v_j − σ_j u_j‖, ‖Wᵀ u_j − σ_j v_j‖)`` for each j, (k,) float64 on the CPU."""
    # Norms are summed in float64: squares of values near 1e30 overflow in float32.
    right = torch.linalg.vector_norm((W.matmat(Vh.T) - U * S).double(), dim=0)
    left = torch.linalg.vector_norm((W.rmatmat(U) - Vh.T * S).double(), dim=0)
    return torch.maximum(left, right).cpu()


GRAM_COLUMNS = 1024
ROUNDING = 1e-12
"""Share of the total energy by which sums of squares in float64 may be off."""


def energies(delta: Delta) -> Tensor:
    """Compute the squared singular values, falling, in float64: from the factors, or as the eigenvalues of ``M Mᵀ``.

    A dense matrix needs memory for three float64 squares of its shorter side; factors need as much as they occupy.
    """
    if isinstance(delta, LowRank):
        return delta.svd()[1].square()
    matrix = delta.dense()
    matrix = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    gram = matrix.new_zeros((len(matrix), len(matrix)), dtype=torch.float64)
    for i in range(0, matrix.shape[1], GRAM_COLUMNS):
        block = matrix[:, i : i + GRAM_COLUMNS].double()
        gram.addmm_(block, block.T)
    values: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp_(min=0)
    return values


def energies_bytes(shape: tuple[int, int]) -> int:
    """Estimate the memory in bytes of `energies` for a dense matrix, without the matrix itself."""
    p = min(shape)
    return 8 * (3 * p * p + p * min(GRAM_COLUMNS, max(shape)))


def least_rank(energy: Tensor, share: float) -> int:
    """Return the least k ≥ 1 whose k largest energies sum to at least `share` of the total.

    >>> least_rank(torch.tensor([8.0, 1.0, 1.0]), 0.8), least_rank(torch.tensor([8.0, 1.0, 1.0]), 0.81)
    (1, 2)
    """
    sums = energy.cumsum(0)
    return min(len(sums), int(torch.searchsorted(sums, share * sums[-1] * (1 - ROUNDING))) + 1)
