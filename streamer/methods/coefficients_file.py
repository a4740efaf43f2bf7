"""Write and read a file of coefficients.

It is a safetensors file. For each `Target.tensor` ``T`` and K sets, it holds ``T.singular_values`` (p,) and ``T.coefficients`` (K, p),
float64, or, if fitted to inputs, ``T.right_factor`` (K, n, r), float32. The metadata's ``streamer.coefficients`` is JSON: the schema, the
shares that the sets keep, and the facts. See `SealedKind`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamer.detection.findings_file import COEFFICIENTS
from streamer.methods.coefficient_set import CoefficientSet, Floats, MatrixCoefficients, fault_of
from streamer.methods.factors import FactorSet
from streamer.methods.fit_set import FitSet, share_name
from streamer.methods.sealed_file import SealedKind
from streamer.storage.identities import check_identities

FIT = SealedKind(COEFFICIENTS, "streamer.coefficients/3", "coefficients", "make coefficients with `streamer fit`")

VALUES, SINGULAR_VALUES, FACTOR = ".coefficients", ".singular_values", ".right_factor"
"""Suffixes of the arrays' names."""

OWN = ("schema", "keeps")
"""Keys of the JSON that belong to the file; all others are `Coefficients.facts`."""


def save_sets(path: Path, sets: Sequence[FitSet], facts: Mapping[str, Any], overwrite: bool) -> None:
    """Write sets of coefficients atomically; see `Coefficients.save`."""
    for one in sets:
        one.check()
    FIT.save(path, {**facts, "keeps": [one.keep for one in sets]}, _arrays(sets), overwrite)


def parsed_sets(tree: dict[str, Any], arrays: dict[str, Tensor]) -> tuple[tuple[FitSet, ...], dict[str, Any]]:
    """Parse what a file holds as sets and facts; raise `ValueError` if an array is incomplete, not finite, or outside [0, 1]."""
    keeps = tree["keeps"]
    shares = isinstance(keeps, list) and all(type(keep) in (int, float) and 0 < keep <= 1 for keep in keeps)
    if not (shares and keeps and len(set(map(share_name, keeps))) == len(keeps)):
        raise ValueError("keeps are not different shares in (0, 1]")
    made = _factor_sets if any(name.endswith(FACTOR) for name in arrays) else _coefficient_sets
    sets = made(arrays, [float(keep) for keep in keeps])
    check_identities(*(tree[key] for key in ("base", "adapter") if isinstance(tree.get(key), dict)))
    return sets, {key: value for key, value in tree.items() if key not in OWN}


def _arrays(sets: Sequence[FitSet]) -> dict[str, Tensor]:
    """Return the arrays by their names in the file."""
    out: dict[str, Tensor] = {}
    for tensor, matrix in sets[0].matrices.items():
        own = [one.matrices[tensor] for one in sets]
        if isinstance(matrix, MatrixCoefficients):
            out[tensor + SINGULAR_VALUES] = torch.from_numpy(matrix.singular_values)
            out[tensor + VALUES] = torch.from_numpy(np.stack([one.values for one in own]))
        else:
            out[tensor + FACTOR] = torch.stack(own).float()
    return out


def _coefficient_sets(arrays: dict[str, Tensor], keeps: Sequence[float]) -> tuple[FitSet, ...]:
    if narrow := [name for name, array in arrays.items() if array.dtype != torch.float64]:
        raise ValueError(f"{narrow[0]!r} is not F64")
    matrices = _matrices(arrays, len(keeps))
    return tuple(
        CoefficientSet(
            keep, {tensor: MatrixCoefficients(s, np.ascontiguousarray(c[k])) for tensor, (s, c) in matrices.items()}
        )
        for k, keep in enumerate(keeps)
    )


def _factor_sets(arrays: dict[str, Tensor], keeps: Sequence[float]) -> tuple[FitSet, ...]:
    for name, array in arrays.items():
        if not name.endswith(FACTOR) or array.dtype != torch.float32 or array.ndim != 3 or len(array) != len(keeps):
            raise ValueError(f"{name!r} does not hold {len(keeps)} factors in float32")
        if not bool(array.isfinite().all()):
            raise ValueError(f"{name!r} has a value that is NaN or Inf")
    own = {name.removesuffix(FACTOR): array.clone() for name, array in arrays.items()}
    return tuple(
        FactorSet(keep, {tensor: factors[k] for tensor, factors in own.items()}) for k, keep in enumerate(keeps)
    )


def _matrices(arrays: dict[str, Tensor], sets: int) -> dict[str, tuple[Floats, Floats]]:
    """Pair singular values (p,) and coefficients (K, p) by tensor, and check them."""
    out = {}
    names = [name.removesuffix(VALUES) for name in arrays if name.endswith(VALUES)]
    for tensor in names:
        s, c = (arrays[tensor + end].numpy().copy() for end in (SINGULAR_VALUES, VALUES))
        if c.shape[:-1] != (sets,):
            raise ValueError(
                f"{tensor!r} has {list(s.shape)} singular values, and coefficients of shape {list(c.shape)}"
            )
        if fault := fault_of(tensor, s, c):
            raise ValueError(fault)
        out[tensor] = s, c
    if not out or 2 * len(out) != len(arrays):
        raise ValueError("its arrays are not pairs of singular values and coefficients")
    return out
