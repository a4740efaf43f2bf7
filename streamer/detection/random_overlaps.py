"""Recognise findings for a base other than the adapter's: its directions then look like random vectors.

Let u be a random unit vector of R^m, and u⁰_1 … u⁰_p orthonormal. Each ⟨u, u⁰_i⟩² has the distribution Beta(1/2, (m − 1)/2). By the union
bound, max_i |⟨u, u⁰_i⟩|, which is near √(2 ln p / m), is at most `random_overlap` with a probability of at least 1 − `ALPHA`.
After training, most directions of a delta are closer than that to some singular vector of its own base.
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
"""Largest share of random vectors that are closer to the base than `random_overlap`."""

# Share of matrices that satisfy `_is_random`, for adapters that PEFT trained on a Llama of width 128 and 288, and on MiniLM:
#   their own base, or that trained further      0.00 … 0.25
#   their own base, at a rate that destroys it   0.54
#   the base of another seed                     0.88 … 1.00   with three to six intruders per matrix
#   the base of another seed                     0.36 … 0.57   with two or three: it is not recognised
# A planted direction is random on any base: adapters with one per matrix score 0, because `_is_random` needs two intruders.
MOST = 2 / 3
"""Least share of matrices for findings to look like another base's."""

LEAST_MATRICES = 8
"""Least number of matrices that can be judged: a few may look random by chance."""

NARROW = 0.7
"""Matrices whose random overlap is above this share of epsilon show nothing: in few dimensions any intruder looks random."""


def random_overlap(shape: tuple[int, int]) -> float:
    """Bound the largest overlap of a random unit vector with the left singular vectors of an (m, n) matrix; see `ALPHA`.

    >>> round(random_overlap((4096, 4096)), 3), round((2 * math.log(4096) / 4096) ** 0.5, 3)
    (0.074, 0.064)
    """
    m, p = shape[0], min(shape)
    return math.sqrt(betaincinv(0.5, (m - 1) / 2, 1 - ALPHA / p)) if m > 1 else 1.0


def look_random(matrices: Sequence[MatrixFinding], epsilon: float) -> bool | None:
    """Test whether the leading directions of most matrices are intruders no closer to the base than random vectors; None if too few."""
    judged = [m for m in matrices if random_overlap(m.shape) <= NARROW * epsilon]
    return sum(map(_is_random, judged)) >= MOST * len(judged) if len(judged) >= LEAST_MATRICES else None


def _is_random(m: MatrixFinding) -> bool:
    """Test whether the leading direction is one of several intruders and not proven closer to the base than a random vector."""
    d = m.detection
    return len(d.intruders) >= 2 and d.intruders[0] == 0 and d.similarity_low[0] <= random_overlap(m.shape)
