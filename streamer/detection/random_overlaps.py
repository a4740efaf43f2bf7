"""Recognise findings on another base than the adapter was trained on: there the adapter's directions are like random vectors.

Let u be a random unit vector of R^m, and u⁰_1 … u⁰_p orthonormal. Each ⟨u, u⁰_i⟩² has the distribution Beta(1/2, (m − 1)/2). By the union
bound, max_i |⟨u, u⁰_i⟩|, which is near √(2 ln p / m), is at most `random_overlap` with a probability of at least 1 − `ALPHA`.
Training leaves most directions of a delta closer than that to some singular vector of its own base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import betaincinv

from streamer.detection.matrix_finding import MatrixFinding

ANOTHER_BASE = (
    "this looks like another base: in most matrices the leading direction is no closer to it than a random vector; check that the adapter "
    "was trained on this base (one that was trained at far too high a rate can look the same)"
)

ALPHA = 0.01
"""Share of random vectors, at most, that are closer to the base than `random_overlap`."""

# Shares of matrices that `_is_random` holds for, of adapters that PEFT trained on a Llama of width 128 and 288, and on MiniLM:
#   their own base, or that trained further      0.00 … 0.25
#   their own base, at a rate that destroys it   0.54
#   the base of another seed                     0.88 … 1.00   with three to six intruders a matrix
#   the base of another seed                     0.36 … 0.57   with two or three: it is not recognised
# A planted direction is random on any base: adapters with one in a matrix have 0, since `_is_random` wants two intruders.
MOST = 2 / 3
"""Share of the matrices from which on the findings look like those on another base."""

LEAST_MATRICES = 8
"""Matrices that can be judged, at least: a few may be random by chance."""

NARROW = 0.7
"""Random overlaps of a matrix above this share of epsilon say nothing: in few dimensions any intruder is like a random vector."""


def random_overlap(shape: tuple[int, int]) -> float:
    """Bound the largest overlap of a random unit vector with the left singular vectors of an (m, n) matrix; see `ALPHA`.

    >>> round(random_overlap((4096, 4096)), 3), round((2 * math.log(4096) / 4096) ** 0.5, 3)
    (0.074, 0.064)
    """
    m, p = shape[0], min(shape)
    return math.sqrt(betaincinv(0.5, (m - 1) / 2, 1 - ALPHA / p)) if m > 1 else 1.0


def look_random(matrices: Sequence[MatrixFinding], epsilon: float) -> bool | None:
    """Test whether the leading directions of most matrices are intruders no closer to the base than random vectors; None: too few."""
    judged = [m for m in matrices if random_overlap(m.shape) <= NARROW * epsilon]
    return sum(map(_is_random, judged)) >= MOST * len(judged) if len(judged) >= LEAST_MATRICES else None


def _is_random(m: MatrixFinding) -> bool:
    """Test whether the leading direction is one of several intruders, and not proven to be closer to the base than a random vector."""
    d = m.detection
    return len(d.intruders) >= 2 and d.intruders[0] == 0 and d.similarity_low[0] <= random_overlap(m.shape)
