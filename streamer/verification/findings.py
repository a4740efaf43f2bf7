"""Check a findings file: the digest that it holds of itself, its arrays, and, given the inputs, its triplets and similarities."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from streamer.errors import FormatError, UnsupportedError
from streamer.events import Event, Monitor
from streamer.verification.formulas import AdapterFiles, LowRankDelta
from streamer.verification.hashing import PIECE_BYTES
from streamer.verification.matrices import directions
from streamer.verification.mitigation import truncate
from streamer.verification.record import DIGEST
from streamer.verification.result import Checked, NotRecomputed, Outcome
from streamer.verification.spectrum import (
    ROUNDINGS,
    base_vectors,
    leading_triplets,
    load_operator,
    similarities,
)
from streamer.verification.tensors import Array, TensorFiles

SCHEMA = "streamer.findings/1"
ARRAYS = ("U", "S", "Vh", "singular_values", "similarity", "similarity_low", "similarity_high", "intruders")

FIGURE_ERROR = 1e-3
"""Relative difference of norms and shares: findings have them in float32, from vectors that are off by an angle."""


def read_findings(outcome: Outcome, has_inputs: bool, monitor: Monitor) -> dict[str, Any] | None:
    """Compare a findings file with the digest that it holds; its JSON, or None where it differs.

    Raises
    ------
    FormatError
        If it is a safetensors file of another kind.
    UnsupportedError
        If it holds no digest, and no inputs are given to recompute it from.
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
    if metadata.get("schema") != SCHEMA or "findings" not in metadata or not metadata.keys() <= own:
        outcome.differ(path, f"metadata of {SCHEMA}", f"schema {metadata.get('schema')!r} and keys {sorted(metadata)}")
        return None
    stated = metadata.get(DIGEST)
    if stated is None:
        if not has_inputs:
            raise UnsupportedError(
                f"{path}: holds no digest, as findings that a version before 0.2 wrote; give BASE ADAPTER and --sample all to recompute it"
            )
    elif (found := _digest(path, stated, monitor)) != stated:
        outcome.differ(path, f"SHA-256 {stated} by its own metadata", found)
        return None
    return _parsed(outcome, metadata["findings"])


def _digest(path: Path, stated: str, monitor: Monitor) -> str:
    """SHA-256 of a file in whose header the stated digest is replaced by zeros."""
    total = path.stat().st_size
    with path.open("rb") as f:
        length = f.read(8)
        header = length + f.read(
            int.from_bytes(length, "little")
        )  # the library has read it, so that it is within the format's limit
        digest, done = hashlib.sha256(header.replace(stated.encode(), b"0" * 64, 1)), len(header)
        while piece := f.read(PIECE_BYTES):
            monitor.checkpoint()
            monitor.emit(Event("verify", path.name, done, total, 0, 1))
            digest.update(piece)
            done += len(piece)
    monitor.emit(Event("verify", "", total, total, 1, 1))
    return digest.hexdigest()


def _parsed(outcome: Outcome, text: str) -> dict[str, Any] | None:
    """The JSON of findings, whose matrices have all their arrays, and no others."""
    path = outcome.output
    try:
        tree: dict[str, Any] = json.loads(text)
        options, rows = tree["options"], tree["matrices"]
        with TensorFiles([path]) as file:
            left = set(file.names[path])
            for row in rows:
                _check_arrays(row, directions(options["top_k"], row["shape"]), file, outcome)
                left -= {f"{row['tensor']}/{key}" for key in ARRAYS}
        for name in sorted(left):
            outcome.differ(path, "arrays of its matrices alone", "one of none", name)
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        outcome.differ(path, f"JSON of {SCHEMA} in its metadata", f"{type(e).__name__} ({e})")
    return None if outcome.differences else tree


def _check_arrays(row: dict[str, Any], k: int, file: TensorFiles, outcome: Outcome) -> None:
    m, n = row["shape"]
    name = f"{row['tensor']}/intruders"
    q = file.stored(name).shape[0] if name in file else 0
    shapes = dict.fromkeys(ARRAYS[3:7], (k,)) | {"U": (m, q), "S": (q,), "Vh": (q, n), "intruders": (q,)}
    for key, shape in shapes.items():
        name = f"{row['tensor']}/{key}"
        found = file.stored(name).shape if name in file else None
        if found != shape:
            outcome.differ(outcome.output, f"shape {list(shape)}", "none" if found is None else f"{list(found)}", name)


class FindingsCheck:
    """Recompute matrices of a findings file.

    Parameters
    ----------
    outcome
        Takes the differences.
    tree
        The findings' JSON.
    base, adapter
        The inputs, opened.
    """

    def __init__(self, outcome: Outcome, tree: dict[str, Any], base: TensorFiles, adapter: AdapterFiles) -> None:
        self.outcome, self.tree, self.base, self.adapter = outcome, tree, base, adapter
        self.file = TensorFiles([outcome.output], "pt")

    def check(self, row: dict[str, Any]) -> Checked:
        """Recompute the triplets and residuals of one matrix, and its similarities where LAPACK can decompose the base.

        Raises
        ------
        NotRecomputed
            If no plain formula covers it.
        """
        tensor = row["tensor"]
        W0, delta, rank = self.adapter.delta(tensor, row["module"], bool(row.get("transposed")), self.base)
        arrays = {key: self.file.whole(f"{tensor}/{key}") for key in ARRAYS}
        stated = (tuple(row["shape"]), row["rank"]) if rank else (tuple(row["shape"]), rank)
        if stated != (W0.shape, rank):
            self._differ(row, f"shape {list(W0.shape)} and rank {rank}", f"{row['shape']} and {row['rank']}")
            return Checked(math.inf, False)
        W = load_operator(W0, delta)
        k = len(arrays["singular_values"])
        triplets = leading_triplets(W, k)
        first = float(triplets.S[0]) or 1.0
        loose = triplets.angle * np.minimum(triplets.gaps, first) + ROUNDINGS * first
        values = np.abs(arrays["singular_values"] - triplets.S) / loose
        worst = self._compare(row, "singular values", values)
        intruders = arrays["intruders"].astype(int)
        U, S, V = arrays["U"], arrays["S"], arrays["Vh"].T
        if len(intruders):
            residuals = np.maximum(np.linalg.norm(W @ V - U * S, axis=0), np.linalg.norm(W.rmatmat(U) - V * S, axis=0))
            worst = max(
                worst,
                self._compare(row, "residuals of its triplets", residuals / loose[intruders]),
            )
            off = np.abs(np.concatenate([U.T @ U - np.eye(len(S)), V.T @ V - np.eye(len(S))])) / 1e-4
            worst = max(worst, self._compare(row, "orthonormal vectors", off.max(axis=0)))
            same = np.abs(S - arrays["singular_values"][intruders]) / (1e-6 * first)
            worst = max(worst, self._compare(row, "S among its singular values", same))
        worst = max(worst, self._check_figures(row, arrays, W0, delta))
        vectors = base_vectors(W0)
        if vectors is not None:
            worst = max(worst, self._check_similarities(row, arrays, triplets.U, triplets.angle_errors, vectors))
        return Checked(worst, vectors is not None)

    def _differ(self, row: dict[str, Any], expected: str, found: str) -> None:
        self.outcome.differ(self.outcome.output, expected, found, row["tensor"])

    def _compare(self, row: dict[str, Any], what: str, shares: Array) -> float:
        """Note a difference if a share of what is permitted is above 1; the largest one."""
        worst = float(np.where(np.isnan(shares), np.inf, shares).max(initial=0.0))
        if worst > 1:
            self._differ(
                row,
                f"{what} as recomputed",
                f"direction {int(np.argmax(shares))} off by {worst:.3g} times what is permitted",
            )
        return worst

    def _check_figures(self, row: dict[str, Any], arrays: dict[str, Array], W0: Any, delta: Any) -> float:
        """Compare the norm of the delta, the intruders' share of it, and what back-projection would drop."""
        squares = sum(float(np.sum(delta.rows(i, j, W0.rows(i, j))[0] ** 2)) for i, j in W0.blocks())
        share = float(np.sum(delta.left_product(arrays["U"], W0) ** 2)) / squares if squares else 0.0
        figures = {"delta_norm": math.sqrt(squares), "intruder_energy": min(1.0, share)}
        if isinstance(delta, LowRankDelta) and len(arrays["S"]):
            removed = LowRankDelta(
                np.concatenate([delta.L, -arrays["U"] * arrays["S"]], axis=1),
                np.concatenate([delta.R, arrays["Vh"].T], axis=1),
            )
            with contextlib.suppress(NotRecomputed):  # a tie leaves this figure alone undefined
                figures["dropped_at_zero"] = truncate(removed, row["rank"]).dropped
        worst = 0.0
        for key, value in figures.items():
            error = abs(row[key] - value) / (FIGURE_ERROR * max(1.0 if key != "delta_norm" else value, 1e-300))
            if not error <= 1:
                self._differ(row, f"{key} {value:.6g}", f"{row[key]:.6g}")
            worst = max(worst, error)
        return worst

    def _check_similarities(
        self, row: dict[str, Any], arrays: dict[str, Array], U: Array, errors: Array, vectors: tuple[Array, Array]
    ) -> float:
        """Compare each direction's interval and decision with its similarity to the base's singular vectors."""
        base, S = vectors
        similar = similarities(U, base[:, row["cutoff"] * S[0] <= S])
        defined = np.array([j not in row["degenerate"] for j in range(len(similar))])
        room = ROUNDINGS + errors
        below, above = arrays["similarity_low"] - similar, similar - arrays["similarity_high"]
        worst = self._compare(
            row, "similarities within their intervals", np.where(defined, np.maximum(below, above) / room, 0.0)
        )
        epsilon = self.tree["options"]["threshold_epsilon"]
        listed = np.isin(np.arange(len(similar)), arrays["intruders"].astype(int))
        sure = defined & (np.abs(similar - epsilon) > 2 * errors) & (listed | row["certified"])
        for j in np.flatnonzero(sure & ((similar < epsilon) != listed)):
            verdict = "no intruder" if listed[j] else "an intruder"
            self._differ(
                row,
                f"direction {j} to be {'no intruder' if verdict != 'an intruder' else verdict}",
                f"a decision against its similarity, {similar[j]:.4f}",
            )
        return worst
