"""A gallery of generated matrices: what the certified solver claims, against float64's full SVD.

``python tests/property/gallery.py --count 1000`` prints the tally. A claim is an interval and a decision on one direction: it fails if
the true similarity lies outside the interval by more than `TOLERANCE`, or if the decision is wrong where the similarity is clear of ε.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import numpy as np
import torch
from helpers import detect, spectrum_matrix
from seeds import vary

from streamer.detection.intruders import Detection
from streamer.detection.options import DetectionOptions
from streamer.linalg.operators import Dense, LowRank

EPSILONS = (0.1, 0.3, 0.5, 0.8)
TOLERANCE = 1e-5
CLEAR = 1e-4
TOP = 10


def _ones(p: int) -> torch.Tensor:
    return torch.ones(p, dtype=torch.float64)


def _rank(p: int) -> torch.Tensor:
    return torch.arange(1, p + 1, dtype=torch.float64)


def _tie(p: int) -> torch.Tensor:
    s = _rank(p) ** -0.7
    s[TOP : TOP + 1] = s[TOP - 1 : TOP]  # σ_k = σ_{k+1}
    return s


SPECTRA: dict[str, Callable[[int], torch.Tensor]] = {
    "zero": lambda p: 0 * _ones(p),
    "rank 1": lambda p: (_rank(p) == 1).double(),
    "deficient": lambda p: _rank(p) ** -0.7 * (_rank(p) <= math.ceil(p / 4)),
    "flat": lambda p: torch.linspace(1.5, 1, p, dtype=torch.float64),
    "power": lambda p: _rank(p) ** -0.7,
    "steep": lambda p: _rank(p) ** -2,
    "geometric": lambda p: 0.9 ** _rank(p),
    "clustered": lambda p: ((_rank(p) + 3) // 4) ** -0.7 * (1 - 1e-7 * _rank(p) / p),
    "pairs": lambda p: ((_rank(p) + 1) // 2) ** -0.7 * (1 - 1e-4 * _rank(p) / p),
    "equal": _ones,
    "tie": _tie,
    "huge": lambda p: 1e30 * _rank(p) ** -0.7,
    "tiny": lambda p: 1e-30 * _rank(p) ** -0.7,
    "subnormal": lambda p: 1e-38 * _rank(p) ** -0.7,
    "outlier": lambda p: torch.cat(
        [3000 * _ones(1), torch.linspace(2, 1, p - 1, dtype=torch.float64)]
    ),
}
BASES = (*SPECTRA, "identity", "outlier column", "gaussian")
DELTAS = (
    "intruder", "zero", "parallel", "cancelling", "larger", "much larger", "over rank", "deep", "blown up", "mixture", "slight",
    "top mixture",
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (1, 40), (40, 1), (7, 5), (17, 31), (31, 17), (61, 67), (67, 61), (96, 96), (64, 160), (160, 64), (500, 48), (48, 500),
    (8, 300), (300, 8), (128, 200), (200, 128), (257, 251), (251, 257), (384, 384), (512, 300), (300, 512), (512, 512),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One base and one delta, float32."""

    name: str
    base: torch.Tensor
    delta: LowRank
    epsilons: tuple[float, ...] = EPSILONS


def make_base(kind: str, m: int, n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A float32 matrix of values that `dtype` can hold."""
    g = torch.Generator().manual_seed(vary(seed))
    if kind == "identity":
        base = torch.eye(m, n, dtype=torch.float64)
    elif kind in ("gaussian", "outlier column"):
        base = torch.randn(m, n, generator=g, dtype=torch.float64) / n**0.5
        if kind == "outlier column":
            base[:, n // 2] *= 1000
    else:
        base = spectrum_matrix(m, n, SPECTRA[kind](min(m, n)), seed)
    if kind in ("huge", "tiny", "subnormal") and dtype == torch.float16:
        dtype = torch.float32  # float16 has no such values
    return base.to(dtype).float()


def make_delta(kind: str, base: torch.Tensor, epsilon: float, seed: int) -> LowRank:
    """Factors of a delta that stands in the given relation to the base."""
    m, n = base.shape
    p = min(m, n)
    g = torch.Generator().manual_seed(vary(seed + 7))
    U0, S0, V0h = torch.linalg.svd(base.double(), full_matrices=False)
    size = float(S0[0]) or 1.0
    r = p + 3 if kind == "over rank" else min(4, p)
    L = 0.02 * size * torch.randn(m, r, generator=g, dtype=torch.float64) / m**0.5
    R = torch.randn(n, r, generator=g, dtype=torch.float64) / n**0.5
    u, v = (
        torch.nn.functional.normalize(torch.randn(d, generator=g, dtype=torch.float64), dim=0)
        for d in (m, n)
    )
    deep = p // 2
    if kind == "zero":
        L *= 0
    elif kind == "slight":
        L *= 1e-3
    elif kind == "parallel":
        L[:, 0], R[:, 0] = U0[:, p // 8] * size * 0.7, V0h[p // 8]
    elif kind == "cancelling":
        L[:, 0], R[:, 0] = -U0[:, min(1, p - 1)] * S0[min(1, p - 1)], V0h[min(1, p - 1)]
    elif kind == "blown up":
        L[:, 0], R[:, 0] = U0[:, -1] * 1.3 * size, V0h[-1]
    elif kind == "mixture":
        L[:, 0], R[:, 0] = (U0[:, deep] + U0[:, max(0, deep - 1)]) * size, v
    elif kind == "top mixture" and p > 1:
        # Of the two leading base directions the sum is blown up and the difference removed.
        s = 0.5**0.5
        c = S0[:2].diag()
        Q = torch.tensor([[s, s], [s, -s]], dtype=torch.float64)
        change = Q @ torch.tensor([[1.5 * size, 0], [0, 0]], dtype=torch.float64) @ Q.T - c
        L[:, :2], R[:, :2] = U0[:, :2] @ change, V0h[:2].T
    elif kind == "deep":
        # Overlap ε ± 1e-3 with one direction of the bulk; the rest is spread.
        c = epsilon + (1e-3 if seed % 2 else -1e-3)
        u = torch.nn.functional.normalize(u - U0[:, deep] * (U0[:, deep] @ u), dim=0)
        L[:, 0], R[:, 0] = (c * U0[:, deep] + (1 - c * c) ** 0.5 * u) * 30 * size, v
    else:
        L[:, 0], R[:, 0] = u * 0.8 * size, v
        L *= {"larger": 20.0, "much larger": 1e6}.get(kind, 1.0)
    # The size goes where float32 can hold it.
    return LowRank(L.clamp(-3e38, 3e38).float(), R.float())


def make_case(
    base_kind: str, delta_kind: str, shape: tuple[int, int], dtype: torch.dtype, i: int = 0
) -> Case:
    """The case with these ingredients; i seeds it, and turns the ε of the larger ones."""
    epsilon = EPSILONS[i % 4]
    base = make_base(base_kind, *shape, dtype, i)
    delta = make_delta(delta_kind, base, epsilon, i)
    name = f"{i}: {base_kind}, {delta_kind}, {shape[0]}x{shape[1]}, {str(dtype).removeprefix('torch.')}"
    return Case(name, base, delta, EPSILONS if min(shape) < 100 else (epsilon,))


def ingredients(i: int) -> tuple[str, str, tuple[int, int], torch.dtype]:
    """The i-th step of a walk over all combinations, a different one each time."""
    total = len(BASES) * len(DELTAS) * len(SHAPES) * len(DTYPES)
    rest, b = divmod(i * 5023 % total, len(BASES))  # a prime that does not divide the total
    rest, d = divmod(rest, len(DELTAS))
    t, s = divmod(rest, len(SHAPES))
    return BASES[b], DELTAS[d], SHAPES[s], DTYPES[t]


def cases(count: int, first: int = 0) -> Iterator[Case]:
    """A part of the walk."""
    return (make_case(*ingredients(i), i) for i in range(first, first + count))


def truth(case: Case) -> np.ndarray:
    """Similarities of the leading directions, by two full SVDs in float64."""
    base = case.base.double().numpy()
    W = base + case.delta.L.double().numpy() @ case.delta.R.double().numpy().T
    U0 = np.linalg.svd(base, full_matrices=False)[0]
    U = np.linalg.svd(W, full_matrices=False)[0]
    return np.abs(U0.T @ U[:, :TOP]).max(0)


@dataclass
class Tally:
    """Counts, and a line for each claim that failed."""

    matrices: int = 0
    runs: int = 0
    directions: int = 0
    certified: int = 0
    certified_runs: int = 0
    escalated: int = 0
    worst: float = 0.0
    disagreements: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    unsettled: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The counts in one line."""
        return (
            f"numeric gallery: {self.matrices} matrices, {self.runs} runs ({self.certified_runs} certified whole, "
            f"{self.escalated} escalated), {self.directions} directions, {self.certified} certified; "
            f"{len(self.disagreements)} decisions disagree, {len(self.outside)} similarities outside their interval"
        )


def judge(
    case: Case, found: Detection, similarity: np.ndarray, epsilon: float, tally: Tally
) -> None:
    """Count one detection; a direction is claimed if its interval lies on one side of ε and it is not degenerate."""
    low = np.array(found.similarity_low)
    high = np.array(found.similarity_high)
    one_side = (low >= epsilon) | (high < epsilon)
    claimed = one_side & ~np.isin(np.arange(len(low)), found.degenerate)
    excess = np.maximum(low - similarity, similarity - high)
    wrong = np.isin(np.arange(len(low)), found.intruders) != (similarity < epsilon)
    tally.runs += 1
    tally.directions += len(low)
    tally.certified += int(claimed.sum())
    tally.certified_runs += found.certified
    tally.escalated += found.escalated
    tally.worst = max(tally.worst, float(excess[claimed].max(initial=0)))
    for j in np.flatnonzero(claimed):
        what = f"{case.name}, ε = {epsilon}, direction {j}: {similarity[j]:.6f} in [{low[j]:.6f}, {high[j]:.6f}] by {found.solver}"
        if excess[j] > TOLERANCE:
            tally.outside.append(what)
        if wrong[j] and abs(similarity[j] - epsilon) > CLEAR:
            tally.disagreements.append(what)
    if found.certified != bool(claimed.all()):
        tally.unsettled.append(
            f"{case.name}, ε = {epsilon}: certified is {found.certified}, its directions say otherwise"
        )
    if not found.certified and found.solver != "dense":
        tally.unsettled.append(f"{case.name}, ε = {epsilon}: neither certified nor dense")


def run(
    what: Iterator[Case],
    tally: Tally,
    find: Callable[..., Detection] = detect,
    seconds: float = math.inf,
) -> Tally:
    """Judge every case at each of its ε, until the time is up."""
    start = time.monotonic()
    for case in what:
        if time.monotonic() - start > seconds:
            break
        similarity = truth(case)
        tally.matrices += 1
        for epsilon in case.epsilons:
            found = find(
                Dense(case.base),
                case.delta,
                DetectionOptions(TOP, epsilon, "certified"),
                name=case.name,
            )
            judge(case, found, similarity, epsilon, tally)
    return tally


def main() -> None:
    """Run a part of the gallery and print its tally."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="matrices (default 1000)")
    parser.add_argument(
        "--first", type=int, default=0, help="where in the walk to begin (default 0)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.monotonic()
    tally = run(cases(arguments.count, arguments.first), Tally())
    for failure in (*tally.disagreements, *tally.outside, *tally.unsettled):
        print(failure)
    print(tally.line())
    print(f"worst excess {tally.worst:.1e}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
