"""Targets for the files that `map`, `fit` and `evaluate` write."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_inputs import Target
from learned import make_learned
from mutate import header_of, mutate_json, mutate_safetensors, with_header

import streamer
from streamer.cli.evaluation_table import evaluation_table
from streamer.evaluation.view import Names

SEQUENCES = 24


def _learned(home: Path) -> dict[str, object]:
    """A base, an adapter and two texts; the keywords of the texts."""
    make_learned(home, SEQUENCES)
    return {
        "general": home / "general.npy",
        "task": home / "task.npy",
        "sequences": SEQUENCES,
        "on_event": lambda _: None,
    }


def _sealed(data: bytes, key: str, content: Callable[[Any, dict[str, bytes], Any], list[bytes]]) -> bytes:
    """A file whose digest fits its arrays, if both can be found; `content` lists what the digest is of.

    One in eight keeps its digest and its header's form.
    """
    if zlib.crc32(data) % 8 == 0:
        return data
    try:
        tree, rest = header_of(data)
        arrays = {name: rest[slice(*info["data_offsets"])] for name, info in tree.items() if name != "__metadata__"}
        inner = json.loads(tree["__metadata__"][key])
        inner["sha256"] = hashlib.sha256(b"".join(content(inner, arrays, tree))).hexdigest()
        tree["__metadata__"][key] = json.dumps(inner)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
        return data
    return with_header(tree, rest)


def _of_map(inner: Any, arrays: dict[str, bytes], tree: Any) -> list[bytes]:
    found = []
    for one in sorted(inner["inputs"], key=lambda one: (one["names"][0], one["one_hot"])):
        name = one["names"][0]
        first, second = (".frequencies", "") if one["one_hot"] else (".eigenvalues", ".vectors")
        size = tree[name + (second or first)]["shape"][-1]
        found += [
            f"{tuple(one['names'])} {one['tokens']} {size} {float(one['trace'])!r}\n".encode(),
            arrays[name + first],
        ]
        found += [arrays[name + second]] if second else []
    return found


def _of_coefficients(inner: Any, arrays: dict[str, bytes], tree: Any) -> list[bytes]:
    return [part for name in sorted(arrays) for part in (f"{name}{tree[name]['shape']}\n".encode(), arrays[name])]


def input_map(home: Path) -> Target:
    """A map of a base's inputs: read, and applied."""
    texts = _learned(home)
    del texts["task"]
    path = home / "m.map.safetensors"
    streamer.map_inputs(home / "base", path, vectors=2, **texts)

    def run(data: bytes) -> None:
        path.write_bytes(_sealed(data, "streamer.map", _of_map))
        repr(streamer.load_map(path))
        for _ in streamer.iter_merged(home / "base", home / "adapter", map=path):
            pass

    return Target([path.read_bytes()], mutate_safetensors, run)


def coefficients(home: Path) -> Target:
    """A file of coefficients or of right factors: read, and applied."""
    texts = _learned(home)
    path, seeds = home / "c.safetensors", []
    for options in ({"grain": "inputs"}, {"grain": "all", "steps": 1}):
        streamer.fit_coefficients(home / "base", home / "adapter", path, overwrite=True, **options, **texts)
        seeds.append(path.read_bytes())

    def run(data: bytes) -> None:
        path.write_bytes(_sealed(data, "streamer.coefficients", _of_coefficients))
        keep = streamer.load_coefficients(path).keeps[0]
        for _ in streamer.iter_merged(home / "base", home / "adapter", coefficients=path, keep=keep):
            pass

    return Target(seeds, mutate_safetensors, run)


def evaluation(home: Path) -> Target:
    """The file of an evaluation: read, and shown."""
    path = home / "e.json"
    streamer.evaluate_variants(
        home / "base", home / "adapter", path, methods=["shrink"], lambdas=[0.5], **_learned(home)
    )

    def run(data: bytes) -> None:
        path.write_bytes(data)
        evaluation_table(streamer.load_evaluation(path), Names())

    return Target([path.read_bytes()], mutate_json, run)
