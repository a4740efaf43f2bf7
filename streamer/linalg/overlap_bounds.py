"""Compute overlaps of unit vectors u_j with the left singular vectors u⁰_i of a matrix W0: exactly, or by bounds.

**Upper bound.** By the Christoffel function, the Krylov space bounds the overlap with any singular vector. Its process starts from a block
that contains the u_j (or ``W0ᵀu_j``, see below).

**Tall matrices.** For m > n the u_j have a part outside the range of W0, which the thin SVD does not count. The process then runs on
the n side from ``x_j = W0ᵀu_j``. Because ⟨u_j, u⁰_i⟩ = ⟨x_j, v⁰_i⟩/σ⁰_i, the bound is divided by σ, and it holds only for singular
values above a cut-off δ·σ⁰_1. For a base of up to `PROVABLE` columns, a Cholesky factor of ``W0ᵀW0 − (δ·σ⁰_1)²`` proves that no
singular value is below the cut-off; until then nothing is settled. For wider bases δ is reported.

**Lower bound.** A Ritz vector whose residual is small against its distance to its neighbours is a singular vector up to the angle
residual/gap (Wedin). This requires that no neighbour is missing, so only the converged *prefix* of the spectrum counts, and within it
only values whose successor has converged too: in the bulk a Ritz vector can be a mixture. That the prefix misses no singular value
rests on the random columns of the start block. A missed vector would have to be orthogonal to all of them, which has probability zero;
the nearer to orthogonal it must be, the less likely it is. This is the only step without a proof.

**Upper bound.** It comes from the Christoffel function of a block Krylov space. Let M be the base or its transpose, oriented so that its
right side is the smaller one. The block Golub–Kahan process starts from a block that contains the given vectors and yields ``B = X S Yᵀ``
and T = BᵀB. Let v be *any* unit right singular vector of M, with value σ and coordinates ŷ = YᵀPᵀv and z = P₊ᵀv. Multiplying the process'
invariant by v from the left gives, for each Ritz value s_l and ``g_l = s_l tail_l``,

    ŷ_l (s_l² − σ²) = −g_lᵀ z − (σ f_l + s_l f'_l),      ‖ŷ‖² + ‖z‖² ≤ 1,

where rounding adds f and f' to the invariant, ‖f‖² + ‖f'‖² ≤ φ². So ŷ is a linear image of z plus rounding. Cauchy–Schwarz in the metric
of the constraint, z ↦ zᵀ(I + H)z, bounds the overlap ``c = ŵᵀŷ`` of v with a vector whose Ritz coordinates are ŵ. Let N be the Ritz
values within τ of σ; only the norm of their ŷ_l is known. Then

    |c| ≤ (1 + e)·√( Σ_N ŵ_l² + aᵀ(I + H)⁻¹a ) + φ·√( Σ_¬N ŵ_l² / (s_l − σ)² ),
    a = Σ_¬N ŵ_l g_l / (s_l² − σ²),   H = Σ_¬N g_l g_lᵀ / (s_l² − σ²)²,   e = φ / τ at most,

since |σ f + s f'| ≤ (s + σ)·√(f² + f'²). The first root is the block Christoffel function of the space. The bound holds for every singular
vector with value σ, also in clusters, so its supremum over σ bounds every overlap. The supremum is estimated from samples, with a factor
`MARGIN` on the largest. Near a converged Ritz value the bound has a peak as narrow as the residual, so that scale is sampled too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.linalg.operators import Matrix
from streamer.linalg.svd import GolubKahan, RitzBasis, block_width

WINDOW = 100.0
"""τ/φ. A wider window merges more Ritz values, a narrower one increases the rounding term; at 100 rounding costs 1 %."""

MARGIN = 1.02
"""Factor on the largest sample, to cover the bound between samples; measured in docs/benchmarks.md."""

CHRISTOFFEL_BYTES = 4 << 20
"""Memory in bytes for evaluating the bound, chosen to fit the cache; measured in docs/benchmarks.md."""

TABLE_WIDTH = 32
"""Largest block width for which all σ share one table of p·b² values, so that H is one product. A wider block would make the table larger
than the basis."""

LEAST_WINDOW = 1e-5
"""Smallest τ/‖L‖: H grows with (‖L‖/τ)², and I + H must keep the I in float64. Only float64 matrices reach this limit."""


def window(ritz: RitzBasis, phi: float) -> float:
    """Compute τ, the distance within which Ritz values are treated as equal to σ."""
    tail = float(torch.linalg.matrix_norm(ritz.tail)) if ritz.tail.numel() else 0.0
    return max(WINDOW * phi, LEAST_WINDOW * tail / math.sqrt(len(ritz.S)), 1e-300)


def evaluation_points(S: Tensor, residual: Tensor, tau: float, bottom: float, top: float) -> Tensor:
    """Choose the σ at which to evaluate the bound: the Ritz values, 7 between each pair, and some around each at its own scales."""
    edges = torch.cat([S.new_tensor([bottom]), S[bottom < S].sort().values, S.new_tensor([top])])
    within = edges[:-1, None] + edges.diff()[:, None] * S.new_tensor(
        [0.03, 0.12, 0.3, 0.5, 0.7, 0.88, 0.97]
    )
    peaks = S[:, None] + residual[:, None] * S.new_tensor(
        [-10, -3, -1, -0.3, -0.1, 0.1, 0.3, 1, 3, 10]
    )
    around = S[:, None] + tau * S.new_tensor([-1.0001, 1.0001])
    sigma = torch.cat([within.flatten(), peaks.flatten(), around.flatten(), edges])
    return sigma[(sigma >= bottom) & (sigma <= top)]


def christoffel_bound(sigma: Tensor, ritz: RitzBasis, w: Tensor, phi: float) -> Tensor:
    """Evaluate the upper bound of the module's docstring at each σ.

    Parameters
    ----------
    sigma
        (G,) values.
    w
        (p, k) coordinates of the given vectors in the Ritz basis.
    phi
        Bound on the rounding error in the process' invariant.

    Returns
    -------
    Tensor
        (G, k): a bound on ``|⟨vector, v⟩|`` for every unit singular vector v with value σ. Costs O(G·p·(b² + k·b)), vectorised over
        as many values at a time as fit in `CHRISTOFFEL_BYTES`.
    """
    g = (ritz.S * ritz.tail).T
    p, b = g.shape
    k = w.shape[1]
    once = CHRISTOFFEL_BYTES // (
        8 * (4 * p + 2 * b * b + 2 * k * b + (p * max(b, k) if b > TABLE_WIDTH else 0))
    )
    tau = window(ritz, phi)
    tables = (_products(g, g), _products(w, g)) if 0 < b <= TABLE_WIDTH else None
    parts = [
        _christoffel(part, ritz.S, g, w, phi, tau, tables)
        for part in torch.split(sigma, max(1, once))
    ]
    return torch.cat(parts) if parts else w.new_zeros((0, k))


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Compute ``x_li y_lj`` for all i and j, (p, i·j)."""
    return (x[:, :, None] * y[:, None, :]).flatten(1)


def _christoffel(
    sigma: Tensor,
    S: Tensor,
    g: Tensor,
    w: Tensor,
    phi: float,
    tau: float,
    tables: tuple[Tensor, Tensor] | None,
) -> Tensor:
    b = g.shape[1]
    k = w.shape[1]
    distance = S - sigma[:, None]
    near = distance.abs() <= tau
    far = distance.reciprocal_().masked_fill_(near, 0.0)
    inverse = far / (S + sigma[:, None]).clamp_min(1e-300)
    chi = near.double() @ w.square()
    if b:
        if tables is None:
            H = (inverse.square()[:, None, :] * g.T) @ g
            a = (inverse[:, None, :] * w.T) @ g
        else:
            H = (inverse.square() @ tables[0]).reshape(len(sigma), b, b)
            a = (inverse @ tables[1]).reshape(len(sigma), k, b)
        H.diagonal(dim1=1, dim2=2).add_(1)
        factor = torch.linalg.cholesky(H)
        chi += torch.linalg.solve_triangular(factor, a.transpose(1, 2), upper=False).square().sum(1)
    rounding = phi * (far.square() @ w.square()).sqrt()
    return chi.sqrt() * (1 + phi * far.abs().amax(1, keepdim=True)) + rounding


CUTOFF = 1e-4
"""δ: for tall matrices, singular values of the base below this share of its largest are not covered."""

PROVABLE = 2048
"""Most columns for which a Cholesky factorisation proves that a tall matrix has no singular value below the cut-off. For wider matrices
the proof would cost many times the rest, so the result states the cut-off instead."""

DENSE_WINDOWS = {torch.float32: (300.0,), torch.float64: (300.0, 1e4, 3e5, 1e7)}
"""τ/φ for LAPACK's vectors, where φ is LAPACK's backward error: see `WINDOW`. An interval is as narrow as φ/τ allows if no
other singular value is within τ. Every window gives a valid interval; in float64, where φ is small, their intersection is used."""


@dataclass(frozen=True)
class OverlapBounds:
    """Intervals ``low_j ≤ sim_j ≤ high_j``, (k,) float64 each, and what they cost.

    Attributes
    ----------
    low, high
        The interval of each direction.
    steps, products
        Block steps, and columns multiplied by the base.
    cutoff
        δ: singular values of the base below ``δ·σ⁰_1`` are not covered; 0 if all are covered. Above 0 only for tall matrices, and
        always for those of more than `PROVABLE` columns.
    values
        (k,) float64: the base's largest singular values. As Ritz values they are at most the true ones, up to rounding; padded with
        zeros if the space has fewer.
    measured
        Whether this call measured rounding in this very space; only then may the intervals be claimed.
    reach
        Progress of the process: at least ε while some upper bound cannot yet be below ε.
    """

    low: Tensor
    high: Tensor
    steps: int
    products: int
    cutoff: float
    values: Tensor
    measured: bool = True
    reach: float = 0.0


def dense_overlaps(
    W0: Matrix, U: Tensor, generator: torch.Generator
) -> tuple[OverlapBounds, Tensor]:
    """Compute ``sim_j = max_i |⟨u_j, u⁰_i⟩|`` and bounds on it by LAPACK's full SVD of the base.

    LAPACK's u⁰_i are singular vectors of a matrix at distance φ, so vectors whose values lie within τ of each other may be mixtures.
    The upper bound therefore sums over each such window, and the lower bound uses only vectors alone in their window (the module's
    formulas with z = 0). For m > n the window at zero also holds everything outside the range of the base. See `DENSE_WINDOWS` for τ.

    Parameters
    ----------
    W0
        (m, n).
    U
        (m, k), unit columns.

    Returns
    -------
    OverlapBounds, Tensor
        The bounds, and the similarity itself, (k,) float64 on the CPU (Shuttleworth et al., arXiv 2410.21228, Algorithm 1).
    """
    U0, S, V0h = torch.linalg.svd(W0.dense(), full_matrices=False)
    probe = torch.randn(W0.shape[1], 8, generator=generator, dtype=torch.float32).to(W0.like)
    defect = (W0.matmat(probe) - (U0 * S) @ (V0h @ probe)).double() / math.sqrt(8)
    dtype = W0.like.dtype
    phi = float(torch.linalg.matrix_norm(defect)) / math.sqrt(min(W0.shape)) + torch.finfo(
        dtype
    ).eps * float(S[0])
    w = (U0.T @ U).double().cpu().flip(0)
    values = S.double().cpu().flip(0).contiguous()
    tall = W0.shape[0] > W0.shape[1]
    lows, highs = zip(
        *(_interval(w, values, ratio * phi, 1 / ratio, tall) for ratio in DENSE_WINDOWS[dtype]),
        strict=True,
    )
    low = torch.stack(lows).amax(0).clamp(0, 1)
    high = torch.stack(highs).amin(0).clamp_max(1)
    return OverlapBounds(low, high, 0, 0, 0.0, _largest(values.flip(0), U.shape[1])), w.abs().amax(
        0
    ).clamp_max(1.0)


def _largest(values: Tensor, k: int) -> Tensor:
    """Take the first k of falling values, padded with zeros."""
    return torch.nn.functional.pad(values[:k], (0, max(0, k - len(values))))


def _interval(
    w: Tensor, values: Tensor, tau: float, slack: float, tall: bool
) -> tuple[Tensor, Tensor]:
    """Bound the overlaps from below and above for one τ, with ``slack = φ/τ``; values (p,) rise, and w (p, k) is in the same order."""
    mass = torch.nn.functional.pad(w.square().cumsum(0), (0, 0, 1, 0))
    first = torch.searchsorted(values, values - tau)
    last = torch.searchsorted(values, values + tau, right=True)
    inside = (mass[last] - mass[first]).clamp_min(0)
    alone = (last - first) == 1
    if tall:
        # In this window the u⁰_i could be any vectors outside the range of the base.
        lowest = values <= tau
        inside[lowest] += (1 - mass[-1]).clamp_min(0)
        alone &= ~lowest
    high = inside.sqrt().amax(0) * (1 + slack) + slack
    return (w.abs() * alone[:, None] * (1 - slack) - slack).amax(0), high


class OverlapProcess:
    """Process that bounds the overlaps of fixed directions, more tightly with each step.

    Parameters
    ----------
    W0
        (m, n), scaled so that its norm is near 1.
    U
        (m, k), unit columns.
    generator
        Source of the random columns and probes.
    distance
        (k,) float64: largest distance of each column from the vector that it approximates; the interval then holds for that vector.
        A direction with distance 2 is never settled. Default 0.

    Attributes
    ----------
    hopeless
        The base is tall and numerically rank-deficient: any vector outside its range could be a u⁰_i, so no direction with ``low < ε``
        can be settled.
    """

    def __init__(
        self, W0: Matrix, U: Tensor, generator: torch.Generator, distance: Tensor | None = None
    ) -> None:
        m, n = W0.shape
        self.tall = m > n
        self.cutoff = CUTOFF if self.tall else 0.0
        self.hopeless = False
        self._W0 = W0
        self._U = U
        self._generator = generator
        self._rounding = 0.0  # as last measured; 0 before the first measurement
        start = W0.rmatmat(U) if self.tall else U
        k = U.shape[1]
        width = min(block_width(k, 4), m, n)
        extra = torch.randn(
            min(m, n), max(0, width - k), generator=generator, dtype=torch.float32
        ).to(start)
        extra *= torch.linalg.vector_norm(start) / max(1.0, float(torch.linalg.vector_norm(extra)))
        gk = self.process = GolubKahan(W0 if self.tall else W0.T, torch.cat([start, extra], 1))
        self._distance = torch.zeros(k, dtype=torch.float64) if distance is None else distance
        # Deflation and rounding of the start block: the process starts from slightly different vectors.
        kept = gk.following.double().cpu() @ gk.start_coefficients[:, :k]
        self._lost = torch.linalg.vector_norm(start.double().cpu() - kept, dim=0)

    def step(self) -> None:
        """Grow the Krylov space by one block."""
        self.process.step()

    @property
    def exhausted(self) -> bool:
        """Test whether the space is invariant; further steps would add nothing."""
        return self.process.exhausted

    def bounds(self, epsilon: float, final: bool = False) -> OverlapBounds:
        """Compute the intervals from the current space.

        Upper bounds are costly, so they are computed only if they can settle something, and are 1 otherwise. They are skipped for
        a direction with ``low ≥ epsilon``, and for all directions while a Ritz vector overlaps an open direction by more than ε or a
        few samples of the bound already exceed ε. Rounding is measured once, by two products with the base; later calls reuse it.

        Parameters
        ----------
        epsilon
            The threshold ε.
        final
            Measure rounding in any case, and bound every direction with ``low < epsilon``.
        """
        gk = self.process
        ritz, w, overlap = self._in_ritz_basis()
        k = self._U.shape[1]
        low = self._low(ritz, overlap, self._phi)
        high = torch.ones(k, dtype=torch.float64)
        open_ = self._open(low, epsilon)
        reach = 0.0
        measured = False
        if bool(open_.any()):
            reach = float((overlap[:, open_].amax(0) + self._distance[open_]).max())
            if reach < epsilon and not gk.exhausted:
                reach = self._quick_upper_bound(ritz, w, open_)
        if reach < epsilon or gk.exhausted or final:
            measured = final or not self._rounding
            if measured:
                self._rounding = (
                    2 * gk.defect_estimate(self._generator) + torch.finfo(gk.P.dtype).eps * gk.norm
                )
            low = self._low(ritz, overlap, self._phi)
            open_ = self._open(low, epsilon)
            if bool(open_.any()):
                high[open_] = self._high(ritz, w, open_, self._phi)
            reach = float(torch.where(open_, high, 0.0).max())
            if self.cutoff and not self.hopeless and bool((high < epsilon).any()):
                self._prove(1.01 * self.cutoff * float(ritz.S[0]))
            if self.hopeless:
                high[:] = 1.0
        return OverlapBounds(
            low,
            torch.maximum(high, low),
            gk.steps,
            gk.products,
            self.cutoff,
            _largest(ritz.S, k),
            measured,
            reach,
        )

    def settles_without_rounding(self, epsilon: float) -> bool:
        """Test whether an exact process would place each interval on one side of ε, ignoring directions of unknown distance."""
        ritz, w, overlap = self._in_ritz_basis()
        open_ = self._open(self._low(ritz, overlap, 0.0), epsilon)
        if self.hopeless or not bool(open_.any()):
            return not self.hopeless
        return bool((self._high(ritz, w, open_, 0.0) < epsilon).all())

    def _in_ritz_basis(self) -> tuple[RitzBasis, Tensor, Tensor]:
        """Compute the Ritz basis, the directions' coordinates in it, and their overlaps with its left vectors."""
        gk = self.process
        ritz = gk.ritz()
        k = self._U.shape[1]
        coefficients = torch.zeros((gk.P.shape[1], k), dtype=torch.float64)
        coefficients[: gk.start_coefficients.shape[0]] = gk.start_coefficients[:, :k]
        w = ritz.Y.T @ coefficients
        if not self.tall:
            return ritz, w, w.abs()
        overlap = ritz.X.T @ (gk.Q.T @ self._U).double().cpu()
        p = len(ritz.S)
        return (
            ritz,
            w,
            torch.nn.functional.pad(overlap, (0, 0, 0, max(0, p - len(overlap))))[:p].abs(),
        )

    @property
    def _phi(self) -> float:
        """Return φ: the deflated norm plus rounding, which counts as one rounding of the norm until it is measured."""
        gk = self.process
        return (self._rounding or torch.finfo(gk.P.dtype).eps * gk.norm) + gk.deflated

    def _open(self, low: Tensor, epsilon: float) -> Tensor:
        return (low < epsilon) & (self._distance < 2)

    def _prove(self, floor: float) -> None:
        """Prove that no singular value is below the cut-off and clear it, or set `hopeless`; skip the proof if it costs too much."""
        rows = self._W0.rows()
        if self._W0.shape[1] > PROVABLE or rows is None:
            return
        if singular_values_exceed(rows, self._W0.shape, floor / self._W0.power):
            self.cutoff = 0.0
        else:
            self.hopeless = True

    def _low(self, ritz: RitzBasis, overlap: Tensor, phi: float) -> Tensor:
        S = ritz.S
        residual = torch.linalg.vector_norm(ritz.tail, dim=0) + phi
        padded = torch.nn.functional.pad(S, (1, 1), value=float("inf"))
        padded[-1] = 0.0
        # Neighbours may be off by their own residuals.
        wide = torch.nn.functional.pad(residual, (1, 1))
        gap = torch.minimum(padded[:-2] - wide[:-2] - S, S - padded[2:] - wide[2:])
        angle = torch.where(gap > 0, residual / gap.clamp_min(1e-300), torch.ones_like(gap))
        # A converged value counts only if its successor has converged too, or none exists: the gap is to the successor's true place.
        sound = torch.nn.functional.pad(angle < 0.1, (0, 1), value=self.process.exhausted)
        prefix = torch.cumprod((sound[:-1] & sound[1:]).long(), 0).bool()
        if not bool(prefix.any()):
            return torch.zeros(overlap.shape[1], dtype=torch.float64)
        sine = angle[prefix][:, None]
        certain = overlap[prefix] * (1 - sine.square()).sqrt() - sine
        lost = self._distance if self.tall else self._distance + self._lost
        return (certain.amax(0) - lost).clamp(0, 1)

    def _quick_upper_bound(self, ritz: RitzBasis, w: Tensor, open_: Tensor) -> float:
        """Estimate the supremum of the upper bounds from a tenth of the samples; above ε, the full bound would settle nothing.

        Near ε it fell short by up to 2.2 % (power-law and flat spectra, 1024x4096 to 14336x4096), so 4 % is added.
        """
        bottom = CUTOFF * float(ritz.S[0]) if self.tall else 0.0
        edges = torch.cat([ritz.S, ritz.S.new_tensor([bottom])])
        middles = (edges[:-1] + edges[1:])[edges[1:] >= bottom] / 2
        return min(
            1.0,
            1.04
            * float(
                self._bounded(torch.cat([middles, edges[-1:]]), ritz, w, open_, self._phi).max()
            ),
        )

    def _high(self, ritz: RitzBasis, w: Tensor, open_: Tensor, phi: float) -> Tensor:
        S = ritz.S
        tau = window(ritz, phi)
        if self.cutoff and float(S[-1]) <= 2 * self.cutoff * float(S[0]):
            # By interlacing, the base has a singular value at least this small, whose u⁰_i would not be covered.
            self.hopeless = True
            return torch.ones(int(open_.sum()), dtype=torch.float64)
        residual = torch.linalg.vector_norm(ritz.tail, dim=0)
        bottom = CUTOFF * float(S[0]) if self.tall else 0.0
        top = float(S[0]) + float(residual.max()) + tau
        return (
            MARGIN
            * self._bounded(evaluation_points(S, residual, tau, bottom, top), ritz, w, open_, phi)
        ).clamp_max(1.0)

    def _bounded(
        self, sigma: Tensor, ritz: RitzBasis, w: Tensor, open_: Tensor, phi: float
    ) -> Tensor:
        """Return the largest of the bounds over these σ, for each open direction."""
        bound = christoffel_bound(sigma, ritz, w[:, open_], phi) + self._lost[open_]
        if self.tall:
            bound = (bound + phi) / sigma[
                :, None
            ]  # x_j = W0ᵀu_j carries one product's rounding error
        highest: Tensor = bound.amax(0) + self._distance[open_]
        return highest


def singular_values_exceed(rows: Iterable[Tensor], shape: tuple[int, int], floor: float) -> bool:
    """Test whether all n singular values of a tall (m, n) matrix exceed `floor`, by a Cholesky factorisation of ``MᵀM − floor²``.

    The product is summed in float64 over blocks of rows, which resolves a floor down to 1e-6·σ_1; only the lower triangle is formed,
    as Cholesky reads no other. More rows only increase MᵀM, so if the first 5n/4 rows admit a factor, all rows do. The usual cost is
    5n³/8 multiplications, at most m·n²/2, and memory for 2n² values.
    """
    m, n = shape
    gram: Tensor | None = None
    done = 0
    tried = False
    for piece in rows:
        for block in map(Tensor.double, torch.split(piece, 1024)):
            if gram is None:
                gram = block.new_zeros((n, n))
                gram.diagonal().sub_(floor**2)
            for j in range(0, n, 512):
                gram[j:, j : j + 512].addmm_(block[:, j:].T, block[:, j : j + 512])
            done += len(block)
            if done >= m or (done >= n + n // 4 and not tried):
                tried = True
                if int(torch.linalg.cholesky_ex(gram).info) == 0:
                    return True
    return False
