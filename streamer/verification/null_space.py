"""Read a map of a base's inputs, and compute the delta reduced by it, ``Δ' = Δ (I + ν C)^(−1/4)``."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamer.errors import MismatchError
from streamer.verification.deltas import LowRankDelta, WitnessDelta
from streamer.verification.mitigation import Mitigated
from streamer.verification.result import NotRecomputed
from streamer.verification.tensors import Array, Matrix

DECADES = 100 / math.log(10)
"""Search range for ν, in orders of magnitude on each side of the inverse of the largest eigenvalue; ν is clipped to this range."""


@dataclass(frozen=True)
class Known:
    """A map's knowledge of ``C``: eigenvalues (k,), orthonormal eigenvectors (n, k), and the mean of the other eigenvalues."""

    values: Array
    vectors: Array | None
    rest: float


def read_map(path: Path, sha256: str) -> dict[tuple[str, int], list[Known]]:
    """Read the map with the given digest; returns what it knows by matrix and number of inputs.

    Raises
    ------
    MismatchError
        If the file is not a map, or is a different one.
    """
    from safetensors import SafetensorError, safe_open

    digest, found = hashlib.sha256(), dict[tuple[str, int], list[Known]]()
    try:
        with safe_open(path, "pt") as file:
            tree = json.loads(file.metadata()["streamer.map"])
            for one in sorted(tree["inputs"], key=lambda one: (one["names"][0], one["one_hot"])):
                first, vectors = one["names"][0], None
                values = file.get_tensor(first + (".frequencies" if one["one_hot"] else ".eigenvalues")).numpy()
                n, trace = len(values), float(one["trace"])
                if not one["one_hot"]:
                    vectors = file.get_tensor(f"{first}.vectors")
                    n = vectors.shape[1]
                digest.update(f"{tuple(one['names'])} {one['tokens']} {n} {trace!r}\n".encode() + values.tobytes())
                known = Known(values, None, 0.0)
                if vectors is not None:
                    digest.update(vectors.view(dtype=_bytes()).numpy().tobytes())
                    rest = max(0.0, trace - values.sum()) / max(1, n - len(values))
                    known = Known(values, np.linalg.qr(vectors.double().numpy().T)[0], rest)
                for name in one["names"]:
                    found.setdefault((name, n), []).append(known)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise MismatchError(f"{path}: is not a map ({e}); give the one that the output was made with") from e
    if digest.hexdigest() != sha256:
        raise MismatchError(
            f"{path}: is not the map with digest {sha256[:16]}; give the one that the output was made with"
        )
    return found


def _bytes() -> Any:
    import torch

    return torch.uint8


def by_map(W0: Matrix, delta: WitnessDelta, known: list[Known], share: float) -> Mitigated:
    """Compute one matrix's Δ' for the method ``nullspace``.

    Parameters
    ----------
    known
        Entries for this matrix's inputs; unless there is exactly one, the matrix is unchanged.
    share
        λ.

    Raises
    ------
    NotRecomputed
        If an embedding's delta has no factors.
    """
    m, n = W0.shape
    none = np.zeros(m), np.zeros(n)
    same = Mitigated(delta, 1.0, np.zeros((m, 0)), np.zeros((0, n)), *none, 0.0)
    if share == 1 or len(known) != 1:
        return same
    values, V, rest = known[0].values, known[0].vectors, known[0].rest
    if isinstance(delta, LowRankDelta):
        left, right = np.linalg.qr(delta.L)[1], delta.R.T
        along = left @ (right if V is None else right @ V)
        whole = float(np.sum((left @ right) ** 2))
    else:
        if V is None:
            raise NotRecomputed("its delta is not a product of factors")
        along = np.concatenate([delta.rows(i, j, W0.rows(i, j))[0] @ V for i, j in W0.blocks()])
        whole = delta.norm(W0) ** 2
    squares = np.sum(along**2, axis=0)
    energies, others = squares * values, rest * max(0.0, whole - float(squares.sum()))
    if not energies.sum() + others > 0:
        return same
    gains, of_rest = _gains(values, rest, energies, others, share)
    if not isinstance(delta, LowRankDelta):
        assert V is not None
        return Mitigated(delta, of_rest, along * (gains - of_rest), V.T, *none, 0.0)
    R = (
        delta.R * gains[:, None]
        if V is None
        else of_rest * delta.R + V @ ((gains - of_rest)[:, None] * (V.T @ delta.R))
    )
    return Mitigated(delta, 0.0, delta.L, R.T, *none, 0.0)


def _gains(values: Array, rest: float, energies: Array, others: float, share: float) -> tuple[Array, float]:
    """Solve for ν, and return ``(1 + ν e)^(−1/4)`` for each known direction and for the others."""
    from scipy.optimize import brentq

    if share == 0:
        return (values == 0).astype(np.float64), float(rest == 0)
    largest, whole = max(float(values.max()), rest), energies.sum() + others

    def excess(decade: float) -> float:
        nu = 10**decade / largest
        left = np.sum(energies / np.sqrt(1 + nu * values)) + others / np.sqrt(1 + nu * rest)
        return float(left / whole - share)

    if excess(DECADES) > 0:
        decade = DECADES
    elif excess(-DECADES) < 0:
        decade = -DECADES
    else:
        decade = brentq(excess, -DECADES, DECADES, xtol=1e-14, rtol=1e-14)
    nu = 10**decade / largest
    return (1 + nu * values) ** -0.25, float((1 + nu * rest) ** -0.25)
