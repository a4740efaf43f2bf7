"""Decide which leading singular directions of one matrix are intruders.

Notation: W0 (m, n) is the base weight, Δ = s·B·A the adapter's delta, W = W0 + Δ, and u_j, σ_j, v_j are W's leading
singular triplets. Direction j is an intruder if ``max_i |⟨u_j, u⁰_i⟩| < ε`` over all left singular vectors u⁰_i of W0
(Shuttleworth et al., arXiv 2410.21228, Algorithm 1). Left always means the output side.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass, fields
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamer.detection.options import RANKS, DetectionOptions, PerDirection
from streamer.detection.solvers import SOLVERS, chosen_solver
from streamer.errors import NumericError
from streamer.json_types import Amount, Count, Keywords, Selection, Share
from streamer.linalg.operators import Delta, LowRank, Matrix, all_finite
from streamer.linalg.svd import DEGENERATE
from streamer.linalg.torch_state import CPU, full_float32


@dataclass(frozen=True, repr=False, eq=False)
class Detection:
    """Decisions for each of the k leading directions of ``W = W0 + Δ``, and the factors of the intruders.

    Attributes
    ----------
    singular_values
        (k,) singular values σ_1 … σ_k of W.
    similarity
        (k,) similarity of each direction to the nearest left singular vector of the base, as used for the decision; with the
        certified solver, the bound that decided.
    similarity_low, similarity_high
        (k,) interval around the similarity.
    base_singular_values
        (k,) largest singular values of W0; with the certified solver Ritz values, which are at most as large.
    intruders
        0-based ranks of the intruders, ascending.
    U, S, Vh
        (m, q), (q,), (q, n): the intruders' triplets, float32 (float64 for a float64 base).
    certified
        Whether each interval lies on one side of ε and no direction is degenerate. This covers all singular vectors of the base except
        those below `cutoff`.
    degenerate
        0-based ranks of directions in a cluster so tight that no solver can define a single vector.
    solver, escalated
        The solver that decided, and whether the certified solver gave up first.
    precision
        ``float32`` or ``float64``: the precision of the decisions.
    steps, products, cutoff
        Cost of the certificate, and δ: it does not cover base singular values below ``δ·σ⁰_1`` (0: it covers all).
    delta_norm
        ``‖Δ‖_F``.
    intruder_energy
        ``‖U_Iᵀ Δ‖_F² / ‖Δ‖_F²``: the share of the delta's energy on the intruders' output side, in [0, 1].
    dropped_at_zero
        Relative norm that projection onto the adapter's rank would lose at λ = 0 with ``--method paper``; 0 for a dense delta.
    """

    # fmt: off
    certified: Annotated[bool, "Every direction's interval lies on one side of epsilon, and none is degenerate."]
    degenerate: Annotated[tuple[Count, ...], RANKS, "directions in so tight a cluster that no single vector is defined."]
    solver: Annotated[str, Keywords(enum=["certified", "dense"]), "The solver that decided."]
    escalated: Annotated[bool, "Whether the certified solver was tried first and the dense one decided."]
    precision: Annotated[str, Keywords(enum=["float32", "float64"]), "float64 for a base of another dtype: float32 left a direction open."]
    steps: Annotated[Count, "Block steps that the certificate needed."]
    products: Annotated[Count, "Products with the base that the certificate needed."]
    cutoff: Annotated[Amount, "The certificate does not cover base singular values below this share of the largest; 0: it covers all."]
    delta_norm: Annotated[Amount, "Frobenius norm of the delta."]
    intruder_energy: Annotated[Share, "The intruders' share of the delta's squared norm."]
    dropped_at_zero: Annotated[Amount, "Share of the mitigated delta's norm lost in projection with --method paper and lambda 0."]
    singular_values: Annotated[PerDirection, "singular values of base + delta."]
    similarity: Annotated[PerDirection, "similarity to the nearest left singular vector of the base, as used for the decision."]
    similarity_low: Annotated[PerDirection, "lower end of an interval around the similarity."]
    similarity_high: Annotated[PerDirection, "upper end of the interval."]
    base_singular_values: Annotated[PerDirection, "the largest singular values of the base, or Ritz values, which are at most as large."]
    intruders: Annotated[tuple[Count, ...], RANKS, "the intruders."]
    U: Tensor
    S: Tensor
    Vh: Tensor
    # fmt: on

    def summary(self) -> str:
        """Summarise the decision in one line. Ranks count from 0."""
        ranks = ", ".join(map(str, self.intruders[:10])) + (
            ", …" if len(self.intruders) > 10 else ""
        )
        text = f"intruders [{ranks}] (ranks from 0) of" if self.intruders else "no intruder in"
        least = f", least similarity {min(self.similarity):.3f}" if self.similarity else ""
        return f"{text} {len(self.singular_values)} directions{least}, {self.solver}{'' if self.certified else ', not certified'}"

    def __repr__(self) -> str:
        return f"<Detection: {self.summary()}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Detection):
            return NotImplemented
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]  # tensors have no hash by value

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the factors by value: torch would pass them to other processes in shared memory, which ends with the process."""
        values = [getattr(self, f.name) for f in fields(self)]
        return _from_values, tuple(
            v.numpy(force=True) if isinstance(v, Tensor) else v for v in values
        )

    def factors(self, select: Selection) -> tuple[Tensor, Tensor, Tensor]:
        """Return U (m, q), S (q,), Vh (q, n) of the intruders to scale: all of them, or only the highest-ranked."""
        q = len(self.intruders) if select == "all" else min(1, len(self.intruders))
        return self.U[:, :q], self.S[:q], self.Vh[:q]


def _from_values(*values: Any) -> Detection:
    read: list[Any] = [torch.tensor(v) if isinstance(v, np.ndarray) else v for v in values]
    return Detection(*read)


class Decision(NamedTuple):
    """A detection, and whether float64 may settle a direction that rounding left open."""

    detection: Detection
    may_settle_in_float64: bool


def decide(
    W0: Matrix,
    delta: Delta,
    options: DetectionOptions,
    rank: int | None = None,
    name: str = "",
    allow_dense: bool = True,
) -> Decision:
    """Find the intruder dimensions of ``W0 + Δ``, in the base's precision, and whether more of it may settle what is open.

    Parameters
    ----------
    W0
        The base, (m, n), float32 or float64, on any device, in memory or by blocks of rows.
    delta
        Δ of the same shape, as factors or dense; it is converted to the base's dtype.
    rank
        The adapter's rank, for `Detection.dropped_at_zero`; by default the delta's.
    name
        Seeds the random start of the Krylov processes, so that a matrix gives the same bits in any order of matrices.
    allow_dense
        Whether there is memory for the dense solver. Without it, directions that bounds cannot settle stay open.

    Raises
    ------
    NumericError
        If an input holds NaN or Inf, or the solver does not converge. Solvers never get non-finite values.
    """
    inputs = itertools.chain(
        (("the base matrix", piece) for piece in W0.pieces()), delta.named_tensors()
    )
    for what, tensor in inputs:
        if not all_finite(tensor):
            raise NumericError(f"{what} holds NaN or Inf; check the file it came from")
    delta = delta.to(W0.like.dtype, W0.like.device)
    norm = delta.norm()
    if not norm < torch.finfo(W0.like.dtype).max:
        raise NumericError(f"the delta's norm, {norm:.3g}, overflows; check the adapter's scale")
    k = options.directions(W0.shape)
    solver = chosen_solver(W0.shape, k, options.solver, allow_dense)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    try:
        with full_float32():
            result = SOLVERS[solver](
                W0, delta, k, options.threshold_epsilon, generator, allow_dense
            )
    except torch.linalg.LinAlgError as e:  # type: ignore[attr-defined]  # torch's stubs do not export it
        raise NumericError(
            f"the {solver} solver did not converge ({e}); the matrix may be badly scaled"
        ) from e
    triplets = result.triplets
    bounds = result.bounds
    if not all_finite(triplets.S):
        raise NumericError("base + delta overflows; check the adapter's scale")
    error = triplets.angle_error_estimate
    chosen = torch.nonzero(result.similarity < options.threshold_epsilon).flatten()
    on_one_side = (bounds.low >= options.threshold_epsilon) | (
        bounds.high < options.threshold_epsilon
    )
    degenerate = torch.nonzero(error > DEGENERATE).flatten()
    index = chosen.to(triplets.U.device)
    U = triplets.U[:, index].cpu()
    S = triplets.S[index].cpu()
    Vh = triplets.Vh[index].cpu()
    delta = delta.to(W0.like.dtype, CPU)
    share = delta.projected_norm(U) / norm if norm > 0 and len(chosen) else 0.0
    dropped = 0.0
    if len(chosen) and isinstance(delta, LowRank):
        dropped = delta.precise().plus_triplets(U, S, Vh, -1).truncated(rank or delta.rank)[1]
    certified = bool(on_one_side.all()) and len(degenerate) == 0
    detection = Detection(
        singular_values=tuple(triplets.S.double().tolist()),
        similarity=tuple(result.similarity.tolist()),
        similarity_low=tuple(bounds.low.tolist()),
        similarity_high=tuple(bounds.high.tolist()),
        intruders=tuple(chosen.tolist()),
        U=U.contiguous(),
        S=S.contiguous(),
        Vh=Vh.contiguous(),
        certified=certified,
        degenerate=tuple(degenerate.tolist()),
        solver=result.solver,
        escalated=result.escalated,
        steps=bounds.steps,
        products=bounds.products,
        cutoff=bounds.cutoff,
        delta_norm=norm,
        intruder_energy=min(1.0, share**2),
        dropped_at_zero=dropped,
        precision=str(W0.like.dtype).removeprefix("torch."),
        base_singular_values=tuple(bounds.values.tolist()),
    )
    return Decision(detection, may_settle_in_float64=not (certified or result.limited))
