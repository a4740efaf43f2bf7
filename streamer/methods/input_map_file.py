"""Write and read a map of a base's inputs.

It is a safetensors file. For each input, named after its first matrix ``T``, it holds ``T.vectors`` (k, n), bfloat16, and
``T.eigenvalues`` (k,), float64, or, for one-hot inputs, ``T.frequencies`` (n,), float64. The metadata's ``streamer.map`` is JSON: the
schema, the names, tokens and traces of all inputs, and the facts. See `SealedKind`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamer.methods.mapped_input import MappedInput
from streamer.methods.sealed_file import SealedKind
from streamer.storage.identities import check_identities

MAP = SealedKind("streamer.map", "streamer.map/2", "a map", "make a map with `streamer map`")

VECTORS, VALUES, FREQUENCIES = ".vectors", ".eigenvalues", ".frequencies"
"""Suffixes of the arrays' names."""

OWN = ("schema", "inputs")
"""Keys of the JSON that belong to the file; all others are `InputMap.facts`."""

SKEW = 0.05
"""Largest product of two different vectors, and largest difference of a squared length from 1; rounding to bfloat16 causes less than a
tenth of this."""


def save_inputs(path: Path, mapped: Sequence[MappedInput], facts: Mapping[str, Any], overwrite: bool) -> None:
    """Write a map atomically; see `InputMap.save`."""
    arrays: dict[str, Tensor] = {}
    for one in mapped:
        name = one.names[0]
        if one.vectors is None:
            arrays[name + FREQUENCIES] = one.values
        else:
            arrays |= {name + VECTORS: one.vectors, name + VALUES: one.values}
    inputs = [
        {"names": list(one.names), "tokens": one.tokens, "trace": one.trace, "one_hot": one.vectors is None}
        for one in mapped
    ]
    MAP.save(path, {**facts, "inputs": inputs}, arrays, overwrite)


def parsed_inputs(tree: dict[str, Any], arrays: dict[str, Tensor]) -> tuple[tuple[MappedInput, ...], dict[str, Any]]:
    """Parse what a file holds as inputs and facts; raise `ValueError` if they are not whole."""
    inputs = tuple(_input(one, arrays) for one in tree["inputs"])
    if arrays or not inputs:
        raise ValueError("its arrays do not match its inputs")
    facts = {key: value for key, value in tree.items() if key not in OWN}
    texts, vectors = facts["texts"], facts["vectors"]
    check_identities(facts["base"])
    if not isinstance(facts["configs"]["base"], dict):
        raise ValueError("the base's config is of another type")
    if not (isinstance(texts, list) and type(vectors) is int and vectors >= 1):
        raise ValueError("texts or vectors are of another type")
    if not all(isinstance(text[key], str) for text in texts for key in ("name", "sha256")):
        raise ValueError("a text has no name or no digest")
    return inputs, facts


def _input(tree: dict[str, Any], arrays: dict[str, Tensor]) -> MappedInput:
    names, trace, tokens = tuple(tree["names"]), tree["trace"], tree["tokens"]
    if not (names and all(isinstance(name, str) for name in names)):
        raise ValueError("the names of an input are not strings")
    first = names[0]
    if not (math.isfinite(trace) and trace >= 0 and type(tokens) is int and tokens > 0):
        raise ValueError(f"{first!r} has an invalid trace or number of tokens")
    values = arrays.pop(first + (FREQUENCIES if tree["one_hot"] else VALUES))
    if values.dtype != torch.float64 or values.ndim != 1 or not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError(f"{first!r} has invalid eigenvalues")
    if tree["one_hot"]:
        return MappedInput(names, tokens, len(values), float(trace), values, None)
    vectors = arrays.pop(first + VECTORS)
    if vectors.dtype != torch.bfloat16 or vectors.ndim != 2 or not 0 < len(values) == len(vectors) <= vectors.shape[1]:
        raise ValueError(f"{first!r} has vectors of another dtype or shape")
    gram = vectors.float() @ vectors.float().T
    if not bool(((gram - torch.eye(len(vectors))).abs() <= SKEW).all()):
        raise ValueError(f"the vectors of {first!r} are not orthonormal")
    return MappedInput(names, tokens, vectors.shape[1], float(trace), values, vectors)
