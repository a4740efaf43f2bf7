"""Write and read a map of a base's inputs.

It is a safetensors file. For each input, named after its first matrix ``T``, it holds ``T.vectors`` (k, n), bfloat16, and
``T.eigenvalues`` (k,), float64, or, for one-hot inputs, ``T.frequencies`` (n,), float64. The metadata's ``streamer.map`` is JSON: the
schema, the names, tokens and traces of all inputs, a digest, and the facts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamer.errors import FormatError
from streamer.methods.mapped_input import MappedInput, digest_of
from streamer.storage.buffers import Piece
from streamer.storage.identities import check_identities
from streamer.storage.output_checks import check_replaced
from streamer.storage.shard_writer import plan_shard, write_shard
from streamer.storage.strict_json import strict_json
from streamer.storage.tensor_file import TensorFile
from streamer.weights.dtypes import TORCH_DTYPES, as_tensor

KEY = "streamer.map"
"""Key in the file's metadata."""

SCHEMA = "streamer.map/1"

VECTORS, VALUES, FREQUENCIES = ".vectors", ".eigenvalues", ".frequencies"
"""Suffixes of the arrays' names."""

OWN = ("schema", "inputs", "sha256")
"""Keys of the JSON that belong to the file; all others are `InputMap.facts`."""

SKEW = 0.05
"""Largest product of two different vectors, and largest difference of a squared length from 1; rounding to bfloat16 causes less than a
tenth of this."""


def save_inputs(path: Path, mapped: Sequence[MappedInput], facts: Mapping[str, Any], overwrite: bool) -> None:
    """Write a map atomically; see `InputMap.save`."""
    check_replaced(path, overwrite, is_map_file, "a map")
    arrays: dict[str, tuple[str, Tensor]] = {}
    for one in mapped:
        name = one.names[0]
        if one.vectors is None:
            arrays[name + FREQUENCIES] = "F64", one.values
        else:
            arrays[name + VECTORS] = "BF16", one.vectors
            arrays[name + VALUES] = "F64", one.values
    inputs = [
        {"names": list(one.names), "tokens": one.tokens, "trace": one.trace, "one_hot": one.vectors is None}
        for one in mapped
    ]
    tree = {**facts, "schema": SCHEMA, "inputs": inputs, "sha256": digest_of(mapped)}
    metadata = {"format": "pt", KEY: json.dumps(tree, sort_keys=True, ensure_ascii=False, allow_nan=False)}
    shard = plan_shard(path.name, [(name, dtype, array.shape) for name, (dtype, array) in arrays.items()], metadata)
    write_shard(path.parent, shard, ((info, [Piece(_bytes(arrays[info.name][1]))]) for info in shard.header.tensors))


def is_map_file(path: Path) -> bool:
    """Test whether a file's header says that it holds a map."""
    try:
        return KEY in TensorFile(path).header.metadata
    except (FormatError, OSError):
        return False


def read_inputs(path: Path) -> tuple[tuple[MappedInput, ...], dict[str, Any]]:
    """Read the inputs of a map, and its facts.

    Raises
    ------
    FormatError
        If it is another file, or what it holds is not whole.
    """
    if path.is_dir():
        raise FormatError(f"{path}: expected a map of a base's inputs, found a directory; name the file in it")
    file = TensorFile(path)
    text = file.header.metadata.get(KEY)
    if text is None:
        raise FormatError(f"{path}: expected a map ({SCHEMA}), found another file; make one with `streamer map`")
    try:
        tree = strict_json(text.encode())
        if not isinstance(tree, dict) or tree.get("schema") != SCHEMA:
            raise ValueError(f"expected the schema {SCHEMA}")
        arrays = {
            info.name: as_tensor(file.view(info), TORCH_DTYPES[info.dtype], info.shape) for info in file.header.tensors
        }
        inputs = tuple(_input(one, arrays) for one in tree["inputs"])
        if arrays or not inputs:
            raise ValueError("its arrays do not match its inputs")
        facts = {key: value for key, value in tree.items() if key not in OWN}
        texts, vectors = facts["texts"], facts["vectors"]
        check_identities(facts["base"])
        if not (isinstance(texts, list) and type(vectors) is int and vectors >= 1):
            raise ValueError("texts or vectors are of another type")
        if not all(isinstance(text[key], str) for text in texts for key in ("name", "sha256")):
            raise ValueError("a text has no name or no digest")
        if tree["sha256"] != digest_of(inputs):
            raise ValueError("the arrays differ from their digest")
    except (KeyError, TypeError, ValueError) as e:
        says = f"lacks {e}" if isinstance(e, KeyError) else str(e)
        raise FormatError(f"{path}: the map is not as {SCHEMA} has it ({says}); make it again") from e
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


def _bytes(array: Tensor) -> memoryview:
    return memoryview(array.contiguous().view(torch.uint8).flatten().numpy())  # type: ignore[arg-type]  # an array is a buffer
