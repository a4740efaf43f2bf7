"""Bound the overlap of any singular vector with given vectors, by the Christoffel function of a block Krylov space.

Let M be the base or its transpose, oriented so that its right side is the smaller one. The block Golub–Kahan process starts from a block
that contains the given vectors and yields ``B = X S Yᵀ`` and T = BᵀB. Let v be *any* unit right singular vector of M, with value σ and
coordinates ŷ = YᵀPᵀv and z = P₊ᵀv. Multiplying the process' invariant by v from the left gives, for each Ritz value s_l and
``g_l = s_l tail_l``,

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

import torch
from torch import Tensor

from streamer.linalg.golub_kahan import RitzBasis

WINDOW = 100.0
"""τ/φ. A wider window merges more Ritz values, a narrower one increases the rounding term; at 100 rounding costs 1 %."""

MARGIN = 1.02
"""Factor on the largest sample, to cover the bound between samples; measured in docs/benchmarks.md."""

CHRISTOFFEL_BYTES = 4 << 20
"""Memory in bytes for evaluating the bound, chosen to fit the cache; measured in docs/benchmarks.md."""

NARROW = 32
"""Largest block width for which all σ share one table of p·b² values, so that H is one product. A wider block would make the table larger
than the basis."""

LEAST_WINDOW = 1e-5
"""Smallest τ/‖L‖: H grows with (‖L‖/τ)², and I + H must keep the I in float64. Only float64 matrices reach this limit."""


def window(ritz: RitzBasis, phi: float) -> float:
    """Compute τ, the distance within which Ritz values are treated as equal to σ."""
    tail = float(torch.linalg.matrix_norm(ritz.tail)) if ritz.tail.numel() else 0.0
    return max(WINDOW * phi, LEAST_WINDOW * tail / math.sqrt(len(ritz.S)), 1e-300)


def samples(S: Tensor, residual: Tensor, tau: float, bottom: float, top: float) -> Tensor:
    """Choose the σ at which to evaluate the bound: the Ritz values, 7 between each pair, and some around each at its own scales."""
    edges = torch.cat([S.new_tensor([bottom]), S[bottom < S].sort().values, S.new_tensor([top])])
    within = edges[:-1, None] + edges.diff()[:, None] * S.new_tensor([0.03, 0.12, 0.3, 0.5, 0.7, 0.88, 0.97])
    peaks = S[:, None] + residual[:, None] * S.new_tensor([-10, -3, -1, -0.3, -0.1, 0.1, 0.3, 1, 3, 10])
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
    once = CHRISTOFFEL_BYTES // (8 * (4 * p + 2 * b * b + 2 * k * b + (p * max(b, k) if b > NARROW else 0)))
    tau = window(ritz, phi)
    tables = (_products(g, g), _products(w, g)) if 0 < b <= NARROW else None
    parts = [_christoffel(some, ritz.S, g, w, phi, tau, tables) for some in torch.split(sigma, max(1, once))]
    return torch.cat(parts) if parts else w.new_zeros((0, k))


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Compute ``x_li y_lj`` for all i and j, (p, i·j)."""
    return (x[:, :, None] * y[:, None, :]).flatten(1)


def _christoffel(
    sigma: Tensor, S: Tensor, g: Tensor, w: Tensor, phi: float, tau: float, tables: tuple[Tensor, Tensor] | None
) -> Tensor:
    b, k = g.shape[1], w.shape[1]
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
