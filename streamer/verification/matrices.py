"""Recompute matrices of a merged model or a mitigated adapter, and compare them with the written ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamer.verification.deltas import WitnessDelta
from streamer.verification.formulas import WEIGHTS_NAME, AdapterFiles
from streamer.verification.inventory import Part
from streamer.verification.mitigation import Mitigated, by_factor, mitigate
from streamer.verification.null_space import Known, by_map
from streamer.verification.result import Checked, NotRecomputed, Outcome
from streamer.verification.rounding import LARGEST_FP8, computing_precision, half_spacing
from streamer.verification.spectrum import (
    DENSE_SIDE,
    Triplets,
    base_vectors,
    leading_triplets,
    similarities,
)
from streamer.verification.tensors import FP8, Array, Matrix, TensorFiles, open_matrix

NORM_ERROR = 1e-4
"""Largest relative difference between norms in a record, which are float32 sums, and recomputed ones."""

CUTOFF = 1e-4
"""Base singular values below this share of the largest may or may not be covered by a decision; findings say which, records do not."""


@dataclass(frozen=True)
class Recomputation:
    """Recompute matrices of one output.

    Attributes
    ----------
    outcome
        Collects the differences.
    base, adapter
        The open inputs.
    record
        The output's ``streamer.json``.
    carried
        The model's tensor → the adapter's tensors that edit it (see `check_carried`).
    factors
        Right factors of a fit, by matrix; None if they were not given.
    inputs
        A map's knowledge of inputs, by matrix and number of inputs; None if no map was given.
    """

    outcome: Outcome
    base: TensorFiles
    adapter: AdapterFiles
    record: dict[str, Any]
    carried: dict[str, list[Part]]
    factors: dict[str, Array] | None = None
    inputs: dict[tuple[str, int], list[Known]] | None = None

    def check(self, row: dict[str, Any], files: TensorFiles | AdapterFiles) -> Checked:
        """Recompute the matrix of one row of the record.

        Parameters
        ----------
        row
            A row of the record's `matrices`.
        files
            The output's files: a merged model's, or a mitigated adapter's.

        Raises
        ------
        NotRecomputed
            If no plain formula covers it.
        """
        tensor, edits, source = row["tensor"], self.carried.get(row["tensor"], []), None
        if edits and (len(edits) > 1 or edits[0].role not in ("saved", "tied")):
            raise NotRecomputed("the adapter also replaces rows of it")
        if edits:
            source = (self.base if edits[0].role == "tied" else self.adapter.files), edits[0].source
        W0, delta, rank = self.adapter.delta(tensor, row["module"], bool(row.get("transposed")), self.base, source)
        before = len(self.outcome.differences)
        triplets, decisions = self._decide(row, W0, delta)
        if len(self.outcome.differences) > before:  # everything else about the matrix follows from its decisions
            return Checked(math.inf, decisions)
        if self.record["method"] == "regmean":
            if self.factors is None or tensor not in self.factors:
                raise NotRecomputed("its factors are in the file of the fit; pass it as --coefficients")
            mitigated = by_factor(delta, self.factors[tensor])
        elif self.record["method"] == "nullspace":
            if self.inputs is None:
                raise NotRecomputed("its inputs are in a map of the base; pass it as --map")
            known = self.inputs.get((tensor, W0.shape[1]), [])
            mitigated = by_map(W0, delta, known, float(self.record["lambda"]))
        else:
            mitigated = mitigate(W0, delta, triplets, row["intruders"], self.record)
        if isinstance(files, TensorFiles):
            error = self._check_merged(row, W0, mitigated, files, rank, tensor)
        elif (saved := files.saved_weight(row["module"])) is not None:
            error = self._check_merged(row, W0, mitigated, files.files, rank, saved)
        else:
            error = self._check_factors(row, W0, mitigated, files)
        return Checked(error, decisions)

    def _decide(self, row: dict[str, Any], W0: Matrix, delta: WitnessDelta) -> tuple[Triplets | None, bool]:
        """Compute the triplets that include the intruders; compare the decisions if LAPACK can decompose the base."""
        options = self.record["detection"]
        if options is None:
            return None, False
        if min(W0.shape) > DENSE_SIDE and not row["intruders"]:
            return None, False
        k = directions(options["top_k"], W0.shape)
        if max(row["intruders"], default=0) >= k:
            self.outcome.misrecorded(f"intruders among the first {k} directions", f"{row['intruders']}", row["tensor"])
            return None, False
        triplets = leading_triplets(delta.operator(W0), k)
        vectors = base_vectors(W0)
        if vectors is None:
            return triplets, False
        similar = similarities(triplets.U, vectors[0])
        covered = similarities(triplets.U, vectors[0][:, CUTOFF * vectors[1][0] <= vectors[1]])
        epsilon, intruders = options["threshold_epsilon"], row["intruders"]
        judged = range(k) if self.record["scale"] == "all" or not intruders else range(intruders[0] + 1)
        for j in judged:
            unsure = abs(similar[j] - epsilon) <= 2 * triplets.angle_errors()[j] or covered[j] < epsilon <= similar[j]
            if not unsure and (similar[j] < epsilon) != (j in intruders):
                verdict = "an intruder" if similar[j] < epsilon else "no intruder"
                self.outcome.misrecorded(
                    f"direction {j} to be {verdict}, with a similarity of {similar[j]:.4f} to the base",
                    f"intruders {intruders}{'' if row['certified'] else ', not certified: give detection more memory'}", row["tensor"],
                )  # fmt: skip
        return triplets, True

    def _check_merged(
        self, row: dict[str, Any], W0: Matrix, mitigated: Mitigated, files: TensorFiles, rank: int, tensor: str
    ) -> float:
        """Compare ``W0 + Δ'`` with the written tensor, and return the largest error in units of the rounding tolerance."""
        if tensor not in files or math.prod(files.stored(tensor).shape) != math.prod(W0.shape):
            found = f"shape {list(files.stored(tensor).shape)}" if tensor in files else "no such tensor"
            self.outcome.differ(self.outcome.output, f"a matrix of {list(W0.shape)}", found, tensor)
            return math.inf
        path = next(path for path, names in files.names.items() if tensor in names)
        written = open_matrix(files, tensor, W0.shape, W0.transposed)
        precision = (rank + len(row["intruders"]) + 8) * computing_precision(W0.dtype)
        worst, at, excess, norm_before, norm = 0.0, (0, 0), 0.0, 0.0, 0.0
        for i, j in W0.blocks():
            base = W0.rows(i, j)
            delta, after, bound = mitigated.rows(i, j, base)
            exact = base + after
            error = np.abs(written.rows(i, j) - exact)
            rounding = self._rounding(written, i, j, exact, precision * (np.abs(base) + bound))
            permitted = rounding + mitigated.row_error[i:j, None] + mitigated.column_error
            share = np.where(np.isnan(error), np.inf, error / permitted)
            if share.max() > worst:
                row_at, column = np.unravel_index(int(share.argmax()), share.shape)
                worst, at = float(share.max()), (i + int(row_at), int(column))
            excess += float(np.sum(np.maximum(error - rounding, 0) ** 2))
            norm_before, norm = norm_before + float(np.sum(delta**2)), norm + float(np.sum(after**2))
        spread = math.sqrt(excess) / mitigated.error if mitigated.error else 0.0
        if worst > 1:
            self.outcome.differ(
                path, "W0 + Δ' within one rounding", f"{worst:.3g} times that in element {list(at)}", tensor
            )
        elif not spread <= 1:
            self.outcome.differ(
                path, "W0 + Δ' within one rounding", f"{spread:.3g} times what is permitted in its norm", tensor
            )
        else:
            self._check_norms(row, math.sqrt(norm_before), math.sqrt(norm), mitigated.error)
        return max(worst, spread)

    def _rounding(self, written: Matrix, i: int, j: int, exact: Array, slack: Array) -> Array:
        """Bound the effect of one rounding to the written dtype on a sum that may be off by `slack`."""
        if written.dtype != FP8:
            return half_spacing(np.abs(exact) + slack, written.dtype) + slack
        quant_scales = np.broadcast_to(written.quant_scales(i, j), exact.shape)
        codes = (np.abs(exact) + slack) / quant_scales
        # The scale is rounded too, so the block's largest value may slightly exceed the largest code.
        beyond = np.where(codes < LARGEST_FP8 * (1 + 2.0**-8), np.maximum(codes - LARGEST_FP8, 0), 0)
        rounding: Array = np.maximum(half_spacing(codes, FP8) * (1 + 2.0**-20), beyond) * quant_scales + slack
        return rounding

    def _check_norms(self, row: dict[str, Any], before: float, after: float, error: float) -> None:
        """Compare the record's norms of Δ and Δ'."""
        for key, norm, more in (("delta_norm", before, 0.0), ("delta_norm_after", after, error)):
            if not abs(row[key] - norm) <= NORM_ERROR * max(norm, before) + more:
                self.outcome.misrecorded(f"{key} {norm:.6g}", f"{row[key]:.6g}", row["tensor"])

    def _check_factors(self, row: dict[str, Any], W0: Matrix, mitigated: Mitigated, files: AdapterFiles) -> float:
        """Compare ``s·B'·A'`` with Δ' at the written adapter's rank, and return the largest error in units of its tolerance."""
        path, tensor = self.outcome.output / WEIGHTS_NAME, row["tensor"]
        factors = files.factors(row["module"], row["tensor"] in self.carried)
        if factors.shape != W0.shape:
            self.outcome.differ(path, f"factors of a matrix of {list(W0.shape)}", f"of {list(factors.shape)}", tensor)
            return math.inf
        asked, rank = self.record["to_lora"], files.rank(row["module"])
        # Without --to-lora the product shows a lower rank.
        if asked is not None and (len(factors.A) != rank or (isinstance(asked, int) and rank != asked)):
            self.outcome.differ(path, f"factors of rank {asked or rank}", f"of {len(factors.A)}", tensor)
            return math.inf
        whole = mitigated.in_factors(W0)
        truncated = whole.truncated(len(factors.A))
        role = ("lora_embedding_A", "lora_embedding_B") if factors.embedding else ("lora_A", "lora_B")
        dtype_A, dtype_B = (files.files.stored(factors.names[r]).dtype for r in role)
        half_A, half_B = half_spacing(factors.A, dtype_A), half_spacing(factors.B, dtype_B)
        permitted = truncated.sensitivity * mitigated.error + 1e-6 * whole.norm()
        A, B, s = np.abs(factors.A), np.abs(factors.B), abs(factors.scaling)
        excess = norm = 0.0
        for i, j in W0.blocks():
            product = factors.scaling * factors.B[i:j] @ factors.A
            exact = truncated.low_rank.L[i:j] @ truncated.low_rank.R.T
            rounding = 1.01 * s * (half_B[i:j] @ (A + half_A) + B[i:j] @ half_A)
            excess += float(np.sum(np.maximum(np.abs(product - exact) - rounding, 0) ** 2))
            norm += float(np.sum(product**2))
        share = math.sqrt(excess) / permitted if permitted else float(excess > 0) * 2
        if not share <= 1:
            self.outcome.differ(
                path, "the nearest product of this rank to Δ' within one rounding of its factors",
                f"{share:.3g} times that in its norm", tensor,
            )  # fmt: skip
            return share
        self._check_norms(row, mitigated.delta.norm(W0), math.sqrt(norm), permitted)
        if isinstance(asked, float) and 1 - truncated.dropped**2 < asked - 1e-3:
            self.outcome.differ(path, f"{asked:g} of the energy of Δ'", f"{1 - truncated.dropped**2:.4g}", tensor)
        if not abs(row["dropped"] - truncated.dropped) <= 1e-3:
            self.outcome.misrecorded(f"dropped {truncated.dropped:.4g}", f"{row['dropped']:.4g}", tensor)
        return share


def directions(top_k: float, shape: Sequence[int]) -> int:
    """Return the number of directions to judge: `top_k`, or that share of min(m, n); at least 1 and at most min(m, n)."""
    side = min(shape)
    return min(side, top_k if isinstance(top_k, int) else max(1, round(top_k * side)))
