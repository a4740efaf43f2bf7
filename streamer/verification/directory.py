"""Compare an output's files with its record, its index with its shards, and its tensors' names, dtypes and shapes with the base's."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from streamer.events import Monitor
from streamer.verification.hashing import hash_files
from streamer.verification.record import shards
from streamer.verification.result import RECORD_NAME, Outcome
from streamer.verification.tensors import TensorFiles

INDEX_NAME = "model.safetensors.index.json"

LOADED = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model.bin", "adapter_config.json")
"""Files that a loader takes for weights or for a sign of them. Of these and of `READ`, an output may contain only recorded ones."""

READ = (
    "config.json", "generation_config.json", "*processor_config.json", "*quant*config*.json", "*sentence*.json", "adapter_config.json",
    "tokenizer*.json", "*vocab*.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
    "modules.json", "tekken.json", "params.json", "*.jinja", "*.model", "*.spm", "*.tiktoken", "*.py",
)  # fmt: skip
"""Other files that loaders read: configs, tokenizers with their chat templates, and code that a config may name."""

TEMPLATES = "additional_chat_templates"
"""Directory in which transformers looks for chat templates."""

BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64, "BF16": 16}
"""Bits of an element for dtypes whose names do not end in the number of bits."""


def check_files(record: dict[str, Any], outcome: Outcome, monitor: Monitor) -> None:
    """Compare the presence, size and SHA-256 of every file with the record; only the first difference of a file is noted."""
    listed: dict[Path, dict[str, Any]] = {}
    for entry in record["files"]:
        name = Path(entry["file"])
        if name.is_absolute() or ".." in name.parts or not name.parts:
            outcome.misrecorded("names of files below it", repr(entry["file"]))
        else:
            listed[outcome.output / name] = entry
    present = {}
    for path, entry in listed.items():
        if not path.is_file():
            outcome.differ(path, f"a file of {entry['bytes']} bytes by {RECORD_NAME}", "none")
        elif (size := path.stat().st_size) != entry["bytes"]:
            outcome.differ(path, f"{entry['bytes']} bytes by {RECORD_NAME}", f"{size}")
        else:
            present[path] = size
    folders = {outcome.output, outcome.output / TEMPLATES, *(path.parent for path in listed)}
    beside = {
        path for folder in folders for pattern in (*LOADED, *READ) for path in folder.glob(pattern)
    } - listed.keys()
    if outcome.kind == "adapter":  # PEFT reads only its own config and runs no code
        beside -= {path for path in beside if path.name == "config.json" or path.suffix == ".py"}
    for path in sorted(path for path in beside if path.is_file() and not path.name.startswith(".")):
        outcome.differ(path, f"no such file by {RECORD_NAME}", "one")
    for path, digest in hash_files(present, monitor).items():
        if digest != listed[path]["sha256"]:
            outcome.differ(path, f"SHA-256 {listed[path]['sha256']} by {RECORD_NAME}", digest)
    outcome.files, outcome.nbytes = len(listed), sum(present.values())


def check_tensors(record: dict[str, Any], outcome: Outcome, base: TensorFiles | None) -> None:
    """Compare the headers of an output's files with the record, the index, and the base if given."""
    paths = [outcome.output / name for name in shards(record)]
    if any(map(outcome.differing, paths)):
        return
    with TensorFiles(paths) as files:
        index = outcome.output / INDEX_NAME
        if any(f["file"] == INDEX_NAME for f in record["files"]) and not outcome.differing(index):
            _check_index(index, files, outcome)
        for name, count in Counter(name for held in files.names.values() for name in held).items():
            if count > 1:
                outcome.differ(outcome.output, "a tensor in one shard", "it in several", name)
        if base is not None and record["command"] == "merge" and not record["dequantize"]:
            _check_shapes(record, files, base, outcome)


def _check_index(index: Path, files: TensorFiles, outcome: Outcome) -> None:
    """Compare an index with the shards: where each tensor is, missing and additional tensors, and the sum of bytes."""
    try:
        tree = json.loads(index.read_bytes())
        weight_map, total = dict(tree["weight_map"]), tree["metadata"]["total_size"]
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        outcome.differ(index, "an index with weight_map and metadata.total_size", f"{type(e).__name__} ({e})")
        return
    held = {name: path.name for path, names in files.names.items() for name in names}
    for name in sorted(weight_map.keys() | held.keys()):
        if weight_map.get(name) != held.get(name):
            outcome.differ(
                index, f"the shard that holds it, {held.get(name, 'none')}", f"{weight_map.get(name, 'none')}", name
            )
    size = sum(_nbytes(files, name) for name in held)
    if total != size:
        outcome.differ(index, f"total_size {size}, the bytes of all tensors", repr(total))


def _nbytes(files: TensorFiles, name: str) -> int:
    dtype, shape = files.stored(name)
    bits = BITS.get(dtype) or int("".join(c for c in dtype.partition("_")[0] if c.isdigit()))
    return bits * math.prod(shape) // 8


def _check_shapes(record: dict[str, Any], files: TensorFiles, base: TensorFiles, outcome: Outcome) -> None:
    """Compare names, dtypes and shapes with the base's, except for tensors that come from the adapter."""
    carried = {c["tensor"] for c in record["carried"]}
    mine, theirs = files.all_names, base.all_names
    for name in sorted((mine | theirs) - carried):
        found, wanted = (
            f"{f.stored(name)[0]} {list(f.stored(name)[1])}" if name in f else "no such tensor" for f in (files, base)
        )
        if found != wanted and (name in theirs or name not in {m["tensor"] for m in record["matrices"]}):
            outcome.differ(outcome.output, f"{wanted} as in the base", found, name)
