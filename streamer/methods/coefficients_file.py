"""Write and read a file of coefficients.

It is a safetensors file. For each `Target.tensor` ``T`` and K sets, it holds ``T.singular_values`` (p,) and ``T.coefficients`` (K, p),
float64, or, if fitted to inputs, ``T.right_factor`` (K, n, r), float32. The metadata's ``streamer.coefficients`` is JSON: the schema, the
shares that the sets keep, a digest of the arrays, and the facts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from streamer.detection.findings_file import COEFFICIENTS as KEY
from streamer.detection.findings_file import SCHEMA as FINDINGS_SCHEMA
from streamer.errors import FormatError
from streamer.methods.coefficient_set import CoefficientSet, Floats, MatrixCoefficients, fault_of
from streamer.methods.factors import FactorSet
from streamer.methods.fit_set import FitSet, share_name
from streamer.storage.buffers import Piece
from streamer.storage.header import TensorInfo
from streamer.storage.identities import check_identities
from streamer.storage.output_checks import check_replaced
from streamer.storage.shard_writer import plan_shard, write_shard
from streamer.storage.strict_json import strict_json
from streamer.storage.tensor_file import TensorFile

Array = npt.NDArray[Any]

SCHEMA, OF_FACTORS = "streamer.coefficients/1", "streamer.coefficients/2"
"""Schemas of files with coefficients, and of files with right factors."""

VALUES, SINGULAR_VALUES, FACTOR = ".coefficients", ".singular_values", ".right_factor"
"""Suffixes of the arrays' names."""

DTYPES = {"F64": "<f8", "F32": "<f4"}

OWN = ("schema", "keeps", "sha256")
"""Keys of the JSON that belong to the file; all others are `Coefficients.facts`."""


def save_sets(path: Path, sets: Sequence[FitSet], facts: Mapping[str, Any], overwrite: bool) -> None:
    """Write sets of coefficients atomically: the file appears complete or not at all; make missing directories.

    Parameters
    ----------
    overwrite
        Whether to replace a file of coefficients. Other files are never replaced, except empty ones.

    Raises
    ------
    OutputError
        If the path holds something that is not replaced, or cannot be a file.
    StorageError
        If the system refuses to write.
    UsageError
        If the coefficients are invalid; see `CoefficientSet.check`.
    """
    for one in sets:
        one.check()
    check_replaced(path, overwrite, is_coefficients_file, "coefficients")
    arrays, factors = _arrays(sets), isinstance(sets[0], FactorSet)
    tree = {
        **facts,
        "schema": OF_FACTORS if factors else SCHEMA,
        "keeps": [one.keep for one in sets],
        "sha256": _digest(arrays),
    }
    metadata = {"format": "pt", KEY: json.dumps(tree, sort_keys=True, ensure_ascii=False, allow_nan=False)}
    shard = plan_shard(
        path.name, [(name, "F32" if factors else "F64", array.shape) for name, array in arrays.items()], metadata
    )
    write_shard(path.parent, shard, ((info, [Piece(arrays[info.name].tobytes())]) for info in shard.header.tensors))


def is_coefficients_file(path: Path) -> bool:
    """Test whether a file's header says that it holds coefficients."""
    try:
        return KEY in TensorFile(path).header.metadata
    except (FormatError, OSError):
        return False


def read_sets(path: Path) -> tuple[tuple[FitSet, ...], dict[str, Any]]:
    """Read the sets and the facts from a file of coefficients.

    Raises
    ------
    FormatError
        If the file does not hold coefficients, or if an array is incomplete, not finite, or has coefficients outside [0, 1].
    """
    if path.is_dir():
        raise FormatError(f"{path}: expected a file of coefficients, found a directory; name the file in it")
    file = TensorFile(path)
    text, schema = file.header.metadata.get(KEY), f"{SCHEMA} or {OF_FACTORS}"
    if text is None:
        raise FormatError(f"{path}: expected coefficients ({schema}), found {_kind(file)}")
    try:
        tree = strict_json(text.encode())
        if not isinstance(tree, dict) or tree.get("schema") not in (SCHEMA, OF_FACTORS):
            raise ValueError(f"expected the schema {schema}")
        schema = tree["schema"]
        keeps = tree["keeps"]
        if not (isinstance(keeps, list) and keeps and all(map(_is_share, keeps)) and _all_differ(keeps)):
            raise ValueError("keeps are not different shares in (0, 1]")
        arrays = {info.name: _array(file, info) for info in file.header.tensors}
        made = _factor_sets if schema == OF_FACTORS else _coefficient_sets
        sets = made(arrays, [float(keep) for keep in keeps])
        check_identities(*(tree[key] for key in ("base", "adapter") if isinstance(tree.get(key), dict)))
        if tree["sha256"] != _digest(arrays):
            raise ValueError("the arrays differ from their digest")
    except (KeyError, TypeError, ValueError) as e:
        says = f"lacks {e}" if isinstance(e, KeyError) else str(e)
        raise FormatError(f"{path}: coefficients are not as {schema} has them ({says}); fit them again") from e
    return sets, {key: value for key, value in tree.items() if key not in OWN}


def _kind(file: TensorFile) -> str:
    """Describe a file that does not hold coefficients, and what to do about it."""
    if file.header.metadata.get("schema") == FINDINGS_SCHEMA:
        return "findings; pass them as findings, and make coefficients with `streamer fit`"
    return "another safetensors file; make them with `streamer fit`"


def _arrays(sets: Sequence[FitSet]) -> dict[str, Array]:
    """Return the arrays by their names in the file, little-endian."""
    out: dict[str, Array] = {}
    for tensor, matrix in sets[0].matrices.items():
        own = [one.matrices[tensor] for one in sets]
        if isinstance(matrix, MatrixCoefficients):
            out[tensor + SINGULAR_VALUES] = matrix.singular_values.astype("<f8")
            out[tensor + VALUES] = np.stack([one.values for one in own]).astype("<f8")
        else:
            out[tensor + FACTOR] = np.stack([one.contiguous().numpy() for one in own]).astype("<f4")
    return out


def _digest(arrays: dict[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):  # programs that copy the file may change the order
        digest.update(f"{name}{list(arrays[name].shape)}\n".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _array(file: TensorFile, info: TensorInfo) -> Array:
    if info.dtype not in DTYPES:
        raise ValueError(f"{info.name!r} is {info.dtype}, not {' or '.join(DTYPES)}")
    return np.frombuffer(bytes(file.view(info)), dtype=DTYPES[info.dtype]).reshape(info.shape)


def _coefficient_sets(arrays: dict[str, Array], keeps: Sequence[float]) -> tuple[FitSet, ...]:
    if narrow := [name for name, array in arrays.items() if array.dtype != "<f8"]:
        raise ValueError(f"{narrow[0]!r} is F32, not F64")
    matrices = _matrices(arrays, len(keeps))
    return tuple(
        CoefficientSet(
            keep, {tensor: MatrixCoefficients(s, np.ascontiguousarray(c[k])) for tensor, (s, c) in matrices.items()}
        )
        for k, keep in enumerate(keeps)
    )


def _factor_sets(arrays: dict[str, Array], keeps: Sequence[float]) -> tuple[FitSet, ...]:
    for name, array in arrays.items():
        if not name.endswith(FACTOR) or array.dtype != "<f4" or array.ndim != 3 or len(array) != len(keeps):
            raise ValueError(f"{name!r} does not hold {len(keeps)} factors in float32")
        if not np.isfinite(array).all():
            raise ValueError(f"{name!r} has a value that is NaN or Inf")
    if not arrays:
        raise ValueError("it has no factors")
    own = {name.removesuffix(FACTOR): torch.from_numpy(array.copy()) for name, array in arrays.items()}
    return tuple(
        FactorSet(keep, {tensor: factors[k] for tensor, factors in own.items()}) for k, keep in enumerate(keeps)
    )


def _matrices(arrays: dict[str, Array], sets: int) -> dict[str, tuple[Floats, Floats]]:
    """Pair singular values (p,) and coefficients (K, p) by tensor, and check them."""
    out = {}
    names = [name.removesuffix(VALUES) for name in arrays if name.endswith(VALUES)]
    for tensor in names:
        s, c = (arrays[tensor + end].astype(np.float64) for end in (SINGULAR_VALUES, VALUES))
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


def _all_differ(keeps: list[float]) -> bool:
    """Test whether each share names one set."""
    return len({share_name(keep) for keep in keeps}) == len(keeps)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
