"""Read the right factors of a fit; an output's record holds only their digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from streamer.errors import MismatchError
from streamer.verification.tensors import Array

FACTOR = ".right_factor"
"""Suffix of the names of arrays (K, n, r), with one entry for each set."""


def read_factors(path: Path, sha256: str) -> dict[str, Array]:
    """Read the set of factors with the given digest, by matrix: (n, r), float64.

    Raises
    ------
    MismatchError
        If the file has no such set.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            arrays = {name.removesuffix(FACTOR): file.get_tensor(name) for name in file.keys() if name.endswith(FACTOR)}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError) as e:
        raise MismatchError(
            f"{path}: is not a coefficients file ({e}); give the one that the output was made with"
        ) from e
    for k in range(min((len(array) for array in arrays.values()), default=0)):
        digest = hashlib.sha256()
        for tensor in sorted(arrays):
            digest.update(f"{tensor}\n".encode() + np.ascontiguousarray(arrays[tensor][k], "<f4").tobytes())
        if digest.hexdigest() == sha256:
            return {tensor: array[k].astype(np.float64) for tensor, array in arrays.items()}
    raise MismatchError(
        f"{path}: has no factors with digest {sha256[:16]}; give the file that the output was made with"
    )
