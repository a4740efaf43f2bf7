"""Detect and mitigate the intruder dimensions of one matrix: pure functions from operators to results.

Notation: W0 (m, n) is the base weight, Δ = s·B·A the adapter's delta, W = W0 + Δ, and u_j, σ_j, v_j are W's leading
singular triplets. Direction j is an intruder if ``max_i |⟨u_j, u⁰_i⟩| < ε`` over all left singular vectors u⁰_i of W0
(Shuttleworth et al., arXiv 2410.21228, Algorithm 1). Left always means the output side.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from streamer.errors import NumericError, UsageError
from streamer.findings_records import OptionsRecord
from streamer.linalg import deltas
from streamer.linalg.deltas import Delta
from streamer.linalg.operators import Dense, LowRank, Matrix, all_finite
from streamer.linalg.precision import full_float32
from streamer.linalg.svd import DEGENERATE
from streamer.solvers import SOLVERS, cheaper

PROCESS_BYTES = 200 << 20
"""Anonymous memory of a process that has done nothing yet but import torch and read an adapter."""

Method = Literal["paper", "project", "shrink"]
Scale = Literal["all", "first"]


@dataclass(frozen=True)
class DetectionOptions:
    """What decides the findings.

    Attributes
    ----------
    top_k
        How many leading directions are judged: a count, or a share of min(m, n) as a float in (0, 1].
    threshold_epsilon
        A direction is an intruder if its similarity is below this; in (0, 1].
    solver
        ``auto`` or the name of a solver.
    max_memory
        Bytes of anonymous memory for the whole process, or None. A matrix that does not fit in the computing dtype is multiplied as
        it is stored; one that the dense solver has no room for stays open where bounds cannot settle it: `certified` is false then,
        and nothing is an intruder that is not proven to be one.
    """

    top_k: int | float = 10
    threshold_epsilon: float = 0.5
    solver: str = "auto"
    max_memory: int | None = None

    def __post_init__(self) -> None:
        k = self.top_k
        good = not isinstance(k, bool) and ((isinstance(k, int) and k >= 1) or (isinstance(k, float) and 0 < k <= 1))
        if not good:
            raise UsageError(f"top_k: expected a count from 1, or a share in (0, 1] with a decimal point, found {k!r}")
        if not 0 < self.threshold_epsilon <= 1:
            raise UsageError(f"threshold_epsilon: expected a number in (0, 1], found {self.threshold_epsilon!r}")
        if self.solver not in ("auto", *SOLVERS):
            raise UsageError(f"solver: expected one of auto, {', '.join(SOLVERS)}, found {self.solver!r}")
        memory = self.max_memory
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int)):
            raise UsageError(f"max_memory: expected a whole number of bytes, found {memory!r}")
        if memory is not None and memory <= PROCESS_BYTES:
            raise UsageError(
                f"max_memory: expected more than the {PROCESS_BYTES >> 20}M of Python and torch, found {memory >> 20}M"
            )

    def directions(self, shape: tuple[int, int]) -> int:
        """How many directions are judged in a matrix of this shape: at least one, at most min(m, n)."""
        p = min(shape)
        k = self.top_k if isinstance(self.top_k, int) else max(1, round(self.top_k * p))
        return min(k, p)

    def as_dict(self) -> OptionsRecord:
        """The options as JSON values."""
        return {"top_k": self.top_k, "threshold_epsilon": self.threshold_epsilon, "solver": self.solver,
                "max_memory": self.max_memory}  # fmt: skip


@dataclass(frozen=True)
class MitigationOptions:
    """What decides the mitigated delta, given the findings.

    Attributes
    ----------
    mitigation_lambda
        What is left of an intruder: 1 changes nothing, 0 removes it, above 1 amplifies it.
    method
        ``paper``: ``Δ' = Δ + (λ − 1) U_I Σ_I V_Iᵀ``. ``project``: ``Δ' = (I − (1 − λ) U_I U_Iᵀ) Δ``, which leaves the base's
        own share of the direction alone and needs no truncation. ``shrink``: ``Δ' = λ Δ``, the baseline; no detection.
    scale
        ``all`` intruders among the top k, or only the ``first`` (highest-ranked) of each matrix.
    """

    mitigation_lambda: float = 0.75
    method: Method = "paper"
    scale: Scale = "all"

    def __post_init__(self) -> None:
        if isinstance(self.mitigation_lambda, bool) or not math.isfinite(self.mitigation_lambda):
            raise UsageError(f"lambda: expected a finite number, found {self.mitigation_lambda!r}")
        if self.method not in get_args(Method):
            raise UsageError(f"method: expected one of {', '.join(get_args(Method))}, found {self.method!r}")
        if self.scale not in get_args(Scale):
            raise UsageError(f"scale: expected one of {', '.join(get_args(Scale))}, found {self.scale!r}")

    @property
    def needs_detection(self) -> bool:
        """Whether the result depends on the findings at all."""
        return self.method != "shrink" and self.mitigation_lambda != 1

    def as_dict(self) -> dict[str, Any]:
        """The options as JSON values."""
        return asdict(self)


@dataclass(frozen=True, repr=False, eq=False)
class Detection:
    """The decision on each of the k leading directions of ``W = W0 + Δ``, and the factors of the intruders.

    Attributes
    ----------
    singular_values
        (k,) σ_1 … σ_k of W.
    similarity
        (k,) each direction's similarity to the base's nearest left singular vector, as the decision took it; from the certified
        solver the bound that decided.
    similarity_low, similarity_high
        (k,) an interval around it.
    intruders
        0-based ranks of the intruders, rising.
    U, S, Vh
        (m, q), (q,), (q, n): the intruders' triplets, float32 (float64 for a float64 base).
    certified
        Each interval lies on one side of ε, and no direction is degenerate: for all singular vectors of the base but those below
        `cutoff`.
    degenerate
        0-based ranks of directions in a cluster so tight that no single vector is defined, by any solver.
    solver, escalated
        The solver that ran; whether the certified one had to give up for it.
    steps, products, cutoff
        What the certificate cost, and δ: base singular values below ``δ·σ⁰_1`` are not covered by it (0: all are).
    delta_norm
        ``‖Δ‖_F``.
    intruder_energy
        ``‖U_Iᵀ Δ‖_F² / ‖Δ‖_F²``: the share of the delta's energy on the intruders' side, in [0, 1].
    dropped_at_zero
        Relative norm that back-projection to the adapter's rank would drop at λ = 0 with ``--method paper``; 0 for a dense delta.
    """

    singular_values: tuple[float, ...]
    similarity: tuple[float, ...]
    similarity_low: tuple[float, ...]
    similarity_high: tuple[float, ...]
    intruders: tuple[int, ...]
    U: Tensor
    S: Tensor
    Vh: Tensor
    certified: bool
    degenerate: tuple[int, ...]
    solver: str
    escalated: bool
    steps: int
    products: int
    cutoff: float
    delta_norm: float
    intruder_energy: float
    dropped_at_zero: float

    def summary(self) -> str:
        """The decision in a line. Ranks count from 0."""
        ranks = ", ".join(map(str, self.intruders[:10])) + (", …" if len(self.intruders) > 10 else "")
        found = f"intruders [{ranks}] (ranks from 0) of" if self.intruders else "no intruder in"
        least = f", least similarity {min(self.similarity):.3f}" if self.similarity else ""
        return f"{found} {len(self.singular_values)} directions{least}, {self.solver}{'' if self.certified else ', not certified'}"

    def __repr__(self) -> str:
        return f"<Detection: {self.summary()}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Detection):
            return NotImplemented
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]  # tensors have no hash by value

    def factors(self, scale: Scale) -> tuple[Tensor, Tensor, Tensor]:
        """U, S, Vh of the intruders to scale: all, or the first."""
        q = len(self.intruders) if scale == "all" else min(1, len(self.intruders))
        return self.U[:, :q], self.S[:q], self.Vh[:q]


def detect(
    base: Matrix,
    delta: Delta,
    options: DetectionOptions,
    rank: int | None = None,
    name: str = "",
    may_form: bool = True,
) -> Detection:
    """Find the intruder dimensions of ``W0 + Δ``.

    Parameters
    ----------
    base
        W0, (m, n), float32 or float64, on any device, in memory or by blocks of rows.
    delta
        Δ of the same shape, in factors or dense; its dtype is made the base's.
    rank
        The adapter's rank, for `Detection.dropped_at_zero`; by default the delta's.
    name
        Seeds the random start of the Krylov processes, so that a matrix gives the same bits in whatever order it comes.
    may_form
        Whether there is memory for the dense solver. Without it, what bounds cannot settle stays open.

    Raises
    ------
    NumericError
        If an input holds NaN or Inf, or the solver does not converge. Nothing non-finite reaches a solver.
    """
    for what, pieces in (("the base matrix", base.pieces()), *deltas.named_parts(delta)):
        if not all(map(all_finite, pieces)):
            raise NumericError(f"{what} holds NaN or Inf; check the file it came from")
    delta = deltas.cast(delta, base.like.dtype, base.like.device)
    norm = deltas.norm(delta)
    if not norm < torch.finfo(base.like.dtype).max:
        raise NumericError(f"the delta's norm, {norm:.3g}, overflows; check the adapter's scale")
    k = options.directions(base.shape)
    solver = options.solver
    if solver == "auto":
        solver = cheaper(base.shape, k) if may_form else "certified"
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    try:
        with full_float32():
            spectrum = SOLVERS[solver](base, delta, k, options.threshold_epsilon, generator, may_form)
    except torch.linalg.LinAlgError as e:  # type: ignore[attr-defined]  # torch's stubs do not export it
        raise NumericError(f"the {solver} solver did not converge ({e}); the matrix may be badly scaled") from e
    triplets, low, high = spectrum.triplets, spectrum.low, spectrum.high
    if not all_finite(triplets.S):
        raise NumericError("base + delta overflows; check the adapter's scale")
    error = triplets.angle_error_estimate
    chosen = torch.nonzero(spectrum.similarity < options.threshold_epsilon).flatten()
    on_one_side = (low >= options.threshold_epsilon) | (high < options.threshold_epsilon)
    degenerate = torch.nonzero(error > DEGENERATE).flatten()
    index = chosen.to(triplets.U.device)
    U, S, Vh = triplets.U[:, index].cpu(), triplets.S[index].cpu(), triplets.Vh[index].cpu()
    delta = deltas.cast(delta, base.like.dtype, torch.device("cpu"))
    share = deltas.side_norm(delta, U) / norm if norm > 0 and len(chosen) else 0.0
    dropped = 0.0
    if isinstance(delta, LowRank) and len(chosen):
        removed = delta.to(torch.float64) + LowRank(-U.double() * S.double(), Vh.double().T)
        dropped = removed.truncated(rank or delta.rank)[1]
    return Detection(
        singular_values=tuple(triplets.S.double().tolist()),
        similarity=tuple(spectrum.similarity.tolist()),
        similarity_low=tuple(low.tolist()),
        similarity_high=tuple(high.tolist()),
        intruders=tuple(chosen.tolist()),
        U=U.contiguous(),
        S=S.contiguous(),
        Vh=Vh.contiguous(),
        certified=bool(on_one_side.all()) and len(degenerate) == 0,
        degenerate=tuple(degenerate.tolist()),
        solver=spectrum.solver,
        escalated=spectrum.escalated,
        steps=spectrum.steps,
        products=spectrum.products,
        cutoff=spectrum.cutoff,
        delta_norm=norm,
        intruder_energy=min(1.0, share**2),
        dropped_at_zero=dropped,
    )


def mitigate(delta: Delta, detection: Detection | None, options: MitigationOptions) -> Delta:
    """The mitigated delta Δ'; the delta itself, as it is, where nothing changes.

    Parameters
    ----------
    delta
        Δ, (m, n), in factors or dense.
    detection
        The findings on this matrix; may be None where the options do not need them.

    Returns
    -------
    LowRank or Dense
        Factors are in float64, for ``paper`` of rank r + q, for the others of rank r; a dense Δ' has the dtype of Δ.
        `MitigationOptions` has the formulas.
    """
    lam = options.mitigation_lambda
    if lam == 1:
        return delta
    exact = deltas.cast(delta, torch.float64) if isinstance(delta, LowRank) else delta
    if options.method == "shrink":
        return exact.scaled(lam)
    if detection is None:
        raise UsageError(f"method {options.method!r} at lambda {lam} needs findings")
    U, S, Vh = detection.factors(options.scale)
    if len(S) == 0:
        return delta
    if isinstance(exact, Dense):
        matrix = exact.dense()
        U, S, Vh = (t.to(matrix) for t in (U, S, Vh))
        # One matrix more than Δ, the product being added as it is formed.
        if options.method == "project":
            return Dense(torch.addmm(matrix, U, U.T @ matrix, alpha=lam - 1))
        return Dense(torch.addmm(matrix, U * S, Vh, alpha=lam - 1))
    U, S, Vh = (t.double() for t in (U, S, Vh))
    if options.method == "project":
        # U_I is orthonormal to working precision only; the component it removes is (1 − λ) of what it measures.
        return LowRank(exact.L - (1 - lam) * (U @ (U.T @ exact.L)), exact.R)
    return exact + LowRank((lam - 1) * U * S, Vh.T)


def back_project(delta: LowRank, rank: int, scale: float) -> tuple[Tensor, Tensor, float]:
    """Adapter factors with ``scale · B @ A ≈ Δ'``, and the relative Frobenius norm that was dropped.

    Parameters
    ----------
    delta
        Δ' = L Rᵀ, (m, n).
    rank
        The adapter's rank r. Where Δ' has no more columns its factors are kept and nothing is dropped; else it is
        truncated to the nearest matrix of rank r, and ``√Σ`` is shared evenly between B and A.
    scale
        The LoRA scale s, not zero.

    Returns
    -------
    B, A, dropped
        (m, r), (r, n), and ``‖Δ' − s·B·A‖_F / ‖Δ'‖_F``.
    """
    delta = delta.to(torch.float64)
    if delta.rank <= rank:
        return delta.L / scale, delta.R.T, 0.0
    root, dropped = delta.scaled(1 / scale).truncated(rank)
    return root.L, root.R.T, dropped
