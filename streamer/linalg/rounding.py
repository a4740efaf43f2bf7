"""Round a matrix to the values that codes represent, so that its response to a module's inputs changes least.

Rounding each value to the nearest loses a small update: values that codes represent return to themselves. Instead, each rounding takes into
account the errors E made so far in its row, as in GPTQ (Frantar, Ashkboos, Hoefler and Alistarh, ICLR 2023): value j is rounded from where
the best continuation of the row, over all values not yet rounded, would put it. For ``tr E C Eᵀ`` with ``C ∝ I + G Gᵀ``, G (n, k), that is

    w_j − s K_j,   s = Σ_{i<j} e_i G_i,   K_j = P_j G_j,   P_j = (I + Σ_{i≥j} G_iᵀ G_i)⁻¹

so a row's whole past is k numbers, and no matrix of the size of C is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.linalg.moments import Spectrum

DAMPING = 0.01
"""Least eigenvalue of C, relative to their mean: a text does not show all inputs."""

ROUNDED_COLUMNS = 32
"""Columns that are rounded before the errors enter a product."""


@dataclass(frozen=True)
class Grid:
    """The values ``(levels − zeros) · scales`` that the codes of some rows represent.

    Attributes
    ----------
    levels
        Values of the codes before scaling (codes,), ascending.
    scales, zeros
        Of each value, (m, n); zeros may be one number.
    """

    levels: Tensor
    scales: Tensor
    zeros: Tensor | float = 0.0


@dataclass(frozen=True)
class Feedback:
    """What a rounding must know of a module's inputs: G and K, (n, k) each, float32."""

    directions: Tensor
    gains: Tensor

    @classmethod
    def of(cls, spectrum: Spectrum) -> Feedback:
        """Compute G and K from the leading eigenvectors of C."""
        assert spectrum.vectors is not None
        n, k = spectrum.vectors.shape
        mean = (float(spectrum.values.sum()) + spectrum.rest * (n - k)) / n
        floor = max(spectrum.rest, DAMPING * mean)
        G = spectrum.vectors * (spectrum.values / floor - 1).clamp_min(0).sqrt()
        P = torch.eye(k, dtype=G.dtype)
        K = torch.empty_like(G)
        for j in reversed(range(n)):  # each P follows from the next one by a change of rank one
            v = P @ G[j]
            K[j] = v / (1 + G[j] @ v)
            P.addr_(v, K[j], alpha=-1)
        return cls(G.float(), K.float())

    def energy(self, a: Tensor, b: Tensor) -> float:
        """Compute ``tr A C Bᵀ`` up to the scale of C."""
        responses = (a @ self.directions).double() * (b @ self.directions)
        return float((a.double() * b).sum() + responses.sum())


def round_rows(values: Tensor, grid: Grid, feedback: Feedback) -> tuple[Tensor, Tensor]:
    """Round rows (m, n), float32; return the indices of the levels, and the values that these represent."""
    m, n = values.shape
    midpoints = (grid.levels[1:] + grid.levels[:-1]) / 2
    indices = torch.empty(n, m, dtype=torch.uint8)
    rounded = torch.empty(n, m)
    state = values.new_zeros(feedback.directions.shape[1], m)
    zeros = torch.as_tensor(grid.zeros).expand(m, n)
    for a in range(0, n, ROUNDED_COLUMNS):
        at = slice(a, min(n, a + ROUNDED_COLUMNS))
        # Transposed, so that each column is contiguous.
        exact, scales, shift = (t[:, at].T.contiguous() for t in (values, grid.scales, zeros))
        G = feedback.directions[at]
        K = feedback.gains[at]
        wanted = exact - K @ state
        later = K @ G.T
        errors = torch.zeros_like(exact)
        for j, value in enumerate(wanted):
            best = value - later[j, :j] @ errors[:j]
            indices[a + j] = index = torch.bucketize(best / scales[j] + shift[j], midpoints)
            rounded[a + j] = (grid.levels[index] - shift[j]) * scales[j]
            errors[j] = rounded[a + j] - exact[j]
        state += G.T @ errors
    return indices.T, rounded.T
