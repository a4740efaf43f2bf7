"""Check a findings file: its own digest, its arrays, and, if inputs are given, its triplets and similarities."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamer.errors import FormatError, UnsupportedError
from streamer.events import Event, Monitor
from streamer.verification.deltas import WitnessDelta
from streamer.verification.formulas import AdapterFiles
from streamer.verification.hashing import PIECE_BYTES
from streamer.verification.matrices import directions
from streamer.verification.record import DIGEST
from streamer.verification.result import Checked, NotRecomputed, Outcome
from streamer.verification.spectrum import (
    DOUBLE_ROUNDINGS,
    ROUNDINGS,
    Triplets,
    base_vectors,
    leading_triplets,
    similarities,
)
from streamer.verification.tensors import Array, Matrix, TensorFiles

SCHEMA = "streamer.findings/1"
FACTORS = ("U", "S", "Vh")
NUMBERS = ("singular_values", "similarity", "similarity_low", "similarity_high", "base_singular_values")
ARRAYS = (*FACTORS, *NUMBERS, "intruders")

FIGURE_ERROR = 1e-3
"""Largest relative difference of norms and shares: findings store float32 values, from vectors with an angle error."""


def read_findings(outcome: Outcome, has_inputs: bool, monitor: Monitor) -> dict[str, Any] | None:
    """Compare a findings file with its own digest, and return its JSON, or None if it differs.

    Raises
    ------
    FormatError
        If it is another kind of safetensors file.
    UnsupportedError
        If it has no digest, and no inputs are given to recompute it from.
    """
    from safetensors import SafetensorError

    path = outcome.output
    outcome.files, outcome.nbytes = 1, path.stat().st_size
    try:
        with TensorFiles([path]) as file:
            metadata = file.metadata[path]
    except SafetensorError as e:
        outcome.differ(path, "a safetensors file", f"{e}")
        return None
    own = {"schema", "findings", "streamer", DIGEST}
    if not own & metadata.keys() or ("findings" not in metadata and DIGEST not in metadata):
        raise FormatError(
            f"{path}: expected findings or an output's directory, found another safetensors file; name what streamer wrote"
        )
    # A later version may add keys, which a digest covers; without a digest any other key is damage.
    unknown = metadata.keys() - own if DIGEST not in metadata else ()
    if metadata.get("schema") != SCHEMA or "findings" not in metadata or unknown:
        outcome.differ(path, f"metadata of {SCHEMA}", f"schema {metadata.get('schema')!r} and keys {sorted(metadata)}")
        return None
    stated = metadata.get(DIGEST)
    if stated is None:
        if not has_inputs:
            raise UnsupportedError(
                f"{path}: holds no digest, like all findings from versions before 0.2; give BASE ADAPTER and --sample all to recompute it"
            )
    elif (found := _digest(path, stated, monitor)) != stated:
        outcome.differ(path, f"SHA-256 {stated} by its own metadata", found)
        return None
    return _parsed(outcome, metadata["findings"])


def _digest(path: Path, stated: str, monitor: Monitor) -> str:
    """Compute the SHA-256 of a file with zeros in place of the digest in its header."""
    total = path.stat().st_size
    with path.open("rb") as f:
        length = f.read(8)
        # The library has already read the header, so its length is within the format's limit.
        header = length + f.read(int.from_bytes(length, "little"))
        digest, done = hashlib.sha256(header.replace(stated.encode(), b"0" * 64, 1)), len(header)
        while piece := f.read(PIECE_BYTES):
            monitor.checkpoint()
            monitor.emit(Event("verify", path.name, done, total, 0, 1))
            digest.update(piece)
            done += len(piece)
    monitor.emit(Event("verify", "", total, total, 1, 1))
    return digest.hexdigest()


def _parsed(outcome: Outcome, text: str) -> dict[str, Any] | None:
    """Return the findings' JSON if each matrix has exactly its own arrays; otherwise note differences and return None."""
    path = outcome.output
    try:
        tree: dict[str, Any] = json.loads(text)
        options, rows = tree["options"], tree["matrices"]
        with TensorFiles([path]) as file:
            left = set(file.names[path])
            for row in rows:
                _check_arrays(row, directions(options["top_k"], row["shape"]), file, outcome)
                left -= {f"{row['tensor']}/{key}" for key in ARRAYS}
                if not outcome.differences:
                    _check_intervals(row, float(options["threshold_epsilon"]), file, outcome)
        for name in sorted(left):
            outcome.differ(path, "only arrays of its matrices", "another", name)
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        outcome.differ(path, f"JSON of {SCHEMA} in its metadata", f"{type(e).__name__} ({e})")
    return None if outcome.differences else tree


def _check_arrays(row: dict[str, Any], k: int, file: TensorFiles, outcome: Outcome) -> None:
    m, n = row["shape"]
    name = f"{row['tensor']}/intruders"
    q = file.stored(name).shape[0] if name in file else 0
    shapes = dict.fromkeys(NUMBERS, (k,)) | {"U": (m, q), "S": (q,), "Vh": (q, n), "intruders": (q,)}
    for key, shape in shapes.items():
        name = f"{row['tensor']}/{key}"
        found = file.stored(name).shape if name in file else None
        if found != shape:
            outcome.differ(outcome.output, f"shape {list(shape)}", "none" if found is None else f"{list(found)}", name)


def _check_intervals(row: dict[str, Any], epsilon: float, file: TensorFiles, outcome: Outcome) -> None:
    """Check a matrix's decisions against its own intervals: which directions are intruders, and whether all are certified."""
    keys = "similarity_low", "similarity", "similarity_high", "intruders"
    low, similar, high, intruders = (file.values(f"{row['tensor']}/{key}") for key in keys)
    room, clusters = 1e-6, row["degenerate"]
    outside = np.flatnonzero(~((low - room <= similar) & (similar <= high + room) & (low >= 0) & (high <= 1)))
    certain = (low >= epsilon) | (high < epsilon)
    decided = np.flatnonzero(similar < epsilon).tolist()
    if len(outside):
        j = int(outside[0])
        expected = f"similarity {similar[j]:.4f} of direction {j} in its interval"
        found = f"[{low[j]:.4f}, {high[j]:.4f}]"
    elif decided != intruders.tolist():
        expected, found = f"intruders {decided}, by its similarities", f"{intruders.tolist()}"
    elif bool(row["certified"]) != (bool(certain.all()) and not clusters):
        expected = f"certified {str(not row['certified']).lower()}, by its intervals"
        found = str(row["certified"]).lower()
    else:
        return
    outcome.differ(outcome.output, expected, found, row["tensor"])


@dataclass(frozen=True)
class FindingsCheck:
    """Recompute matrices of a findings file.

    Attributes
    ----------
    outcome
        Collects the differences.
    tree
        The findings' JSON.
    base, adapter
        The open inputs.
    file
        The open findings.
    """

    outcome: Outcome
    tree: dict[str, Any]
    base: TensorFiles
    adapter: AdapterFiles
    file: TensorFiles

    def check(self, row: dict[str, Any]) -> Checked:
        """Recompute one matrix's triplets and residuals, and its similarities if LAPACK can decompose the base.

        The first failed check ends the matrix, because later checks use the same values.

        Raises
        ------
        NotRecomputed
            If no plain formula covers it.
        """
        transposed = row["transposed"]
        W0, delta, rank = self.adapter.delta(row["tensor"], row["module"], transposed, self.base)
        if (tuple(row["shape"]), row["rank"] if rank else 0) != (W0.shape, rank):
            self._differ(row, f"shape {list(W0.shape)} and rank {rank}", f"{row['shape']} and {row['rank']}")
            return Checked(math.inf, False)
        found = Checked(0.0, False)
        for step in self._steps(row, W0, delta):
            found = Checked(max(found.error, step.error), step.decisions)
            if found.error > 1:
                break
        return found

    def _steps(self, row: dict[str, Any], W0: Matrix, delta: WitnessDelta) -> Iterator[Checked]:
        """Yield the result of each check of a matrix; an error above 1 is already noted as a difference."""
        names = {key: f"{row['tensor']}/{key}" for key in ARRAYS}
        arrays = {key: self.file.whole(name) for key, name in names.items()}
        W = delta.operator(W0)
        triplets = leading_triplets(W, len(arrays["singular_values"]))
        first = float(triplets.S[0]) or 1.0
        loose = triplets.angle * np.minimum(triplets.gaps, first) + ROUNDINGS * first
        yield Checked(
            self._compare(row, "singular values", np.abs(arrays["singular_values"] - triplets.S) / loose), False
        )
        intruders = arrays["intruders"].astype(int)
        U, S, V = arrays["U"], arrays["S"], arrays["Vh"].T
        if len(intruders):
            residuals = np.maximum(np.linalg.norm(W @ V - U * S, axis=0), np.linalg.norm(W.rmatmat(U) - V * S, axis=0))
            yield Checked(self._compare(row, "residuals of its triplets", residuals / loose[intruders]), False)
            off = np.abs(np.concatenate([U.T @ U - np.eye(len(S)), V.T @ V - np.eye(len(S))])) / 1e-4
            yield Checked(self._compare(row, "orthonormal vectors", off.max(axis=0)), False)
            same = np.abs(S - arrays["singular_values"][intruders]) / (1e-6 * first)
            yield Checked(self._compare(row, "S among its singular values", same), False)
        yield Checked(self._check_figures(row, arrays, W0, delta), False)
        vectors = base_vectors(W0)
        if vectors is not None:
            yield Checked(self._check_base(row, arrays["base_singular_values"], vectors[1]), False)
            error = self._check_similarities(row, arrays, triplets, vectors)
            yield Checked(error, True)

    def _differ(self, row: dict[str, Any], expected: str, found: str) -> None:
        self.outcome.differ(self.outcome.output, expected, found, row["tensor"])

    def _compare(self, row: dict[str, Any], what: str, shares: Array) -> float:
        """Note a difference if any error exceeds its tolerance, and return the largest error in units of its tolerance."""
        worst = float(np.where(np.isnan(shares), np.inf, shares).max(initial=0.0))
        if worst > 1:
            self._differ(
                row,
                f"{what} as recomputed",
                f"direction {int(np.argmax(shares))} off by {worst:.3g} times what is permitted",
            )
        return worst

    def _check_figures(self, row: dict[str, Any], arrays: dict[str, Array], W0: Matrix, delta: WitnessDelta) -> float:
        """Compare the delta's norm, the intruders' share of it, and what projection would lose."""
        U, S, Vh = (arrays[key] for key in FACTORS)
        norm = delta.norm(W0)
        share = float(np.linalg.norm(delta.left_product(U, W0))) / norm if norm else 0.0
        figures = {"delta_norm": norm, "intruder_energy": min(1.0, share**2)}
        if len(S):
            with contextlib.suppress(NotRecomputed):  # a tie leaves only this figure undefined
                figures["dropped_at_zero"] = delta.dropped_without(U, S, Vh, row["rank"])
        worst = 0.0
        for key, value in figures.items():
            error = abs(row[key] - value) / (FIGURE_ERROR * max(1.0 if key != "delta_norm" else value, 1e-300))
            if not error <= 1:
                self._differ(row, f"{key} {value:.6g}", f"{row[key]:.6g}")
                return math.inf if math.isnan(error) else error
            worst = max(worst, error)
        return worst

    def _check_base(self, row: dict[str, Any], stated: Array, S: Array) -> float:
        """Compare the base's singular values; the certified solver's Ritz values may be smaller."""
        true = np.sort(S)[::-1][: len(stated)]
        above = stated[: len(true)] - true
        off = np.abs(above) if row["solver"] == "dense" else np.maximum(above, -stated[: len(true)])
        return self._compare(row, "singular values of the base", off / (ROUNDINGS * (float(true[0]) or 1.0)))

    def _check_similarities(
        self, row: dict[str, Any], arrays: dict[str, Array], triplets: Triplets, vectors: tuple[Array, Array]
    ) -> float:
        """Compare each direction's interval and decision with its similarity to the base's singular vectors."""
        base, S = vectors
        similar = similarities(triplets.U, base[:, row["cutoff"] * S[0] <= S])
        exact = row["precision"] == "float64" and row["solver"] == "dense"
        errors = triplets.angle_errors(exact)
        defined = np.array([j not in row["degenerate"] for j in range(len(similar))])
        room = (DOUBLE_ROUNDINGS if exact else ROUNDINGS) + errors
        below, above = arrays["similarity_low"] - similar, similar - arrays["similarity_high"]
        worst = self._compare(
            row, "similarities within their intervals", np.where(defined, np.maximum(below, above) / room, 0.0)
        )
        epsilon = self.tree["options"]["threshold_epsilon"]
        listed = np.isin(np.arange(len(similar)), arrays["intruders"].astype(int))
        # With too little memory for the dense solver an interval may stay open; its direction then does not count as an intruder.
        limited = self.tree["options"].get("max_memory") is not None and not row["certified"]
        sure = defined & (np.abs(similar - epsilon) > 2 * errors) & (listed | (not limited))
        for j in np.flatnonzero(sure & ((similar < epsilon) != listed)):
            verdict = "no intruder" if listed[j] else "an intruder"
            self._differ(
                row,
                f"direction {j} to be {verdict}",
                f"a decision against its similarity, {similar[j]:.4f}",
            )
        return worst
