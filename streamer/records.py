"""What an output says of itself: its record, ``streamer.json``, and the stamp in the metadata of its safetensors files.

Both name the inputs by the names of their directories, by their ids on the hub where these are known, and by digests; never by paths,
so that the same inputs give the same bytes on any machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from streamer import __version__
from streamer.intruders import DetectionOptions, MitigationOptions
from streamer.provenance import cached_model, hub_id, named_encoding, stated_name, stored_encoding

SCHEMA = "streamer.output/2"

STAMP = "streamer"
"""The key of the stamp in a file's metadata."""

DIGEST_CHARACTERS = 16
"""Hexadecimal characters of an input's digest: enough to tell any two apart, and short enough to be read out."""


class Source(TypedDict, total=False):
    """An input: its name, and what tells it from others.

    Attributes
    ----------
    name
        Of its directory or file; of a model in the hub's cache, the last part of its id.
    model_id, revision
        On the hub, where they are known.
    digest
        The first characters of the SHA-256 of the identity.
    base_model_name_or_path
        What an adapter's config calls its base, where that is no path.
    """

    name: str
    model_id: str
    revision: str
    digest: str
    files: list[dict[str, Any]]
    weights_sha256: str
    config_sha256: str
    modules: int
    base_model_name_or_path: str
    base_is_residual: bool


class DetectionRecord(TypedDict):
    """How the intruders were found; `certified` of the `matrices` have decisions that are certified."""

    top_k: int | float
    threshold_epsilon: float
    solver: str
    certified: int
    matrices: int


class MatrixRecord(TypedDict):
    """What mitigation did to one matrix.

    Attributes
    ----------
    intruders
        0-based ranks of those that were scaled.
    certified
        Whether the decisions on it are certified; None where none were needed.
    dropped
        ``‖Δ' − written‖_F / ‖Δ'‖_F``: what the rank of the adapter that was written leaves out; 0 for a merge.
    """

    tensor: str
    module: str
    intruders: list[int]
    certified: bool | None
    delta_norm: float
    delta_norm_after: float
    dropped: float


class Totals(TypedDict):
    """Sums over matrices; `equal_norm_shrink` is the uniform factor on the whole adapter that gives the same total norm."""

    matrices: int
    intruders: int
    changed: int
    delta_norm: float
    delta_norm_after: float
    equal_norm_shrink: float
    dropped_max: float
    bytes: int


class CarriedRecord(TypedDict):
    """What an adapter's tensor that is no factor does to a tensor of the base."""

    tensor: str
    change: str
    by: str


class FileRecord(TypedDict):
    """A file of the output."""

    file: str
    bytes: int
    sha256: str


# `lambda` is a keyword of the language, so these two are not classes.
Record = TypedDict(
    "Record",
    {
        "schema": str,
        "command": str,
        "version": str,
        "base": Source,
        "adapter": Source,
        "detection": DetectionRecord | None,
        "method": str,
        "scale": str,
        "lambda": float,
        "to_lora": int | None,
        "dequantize": bool,
        "totals": Totals,
        "warnings": list[str],
        "notes": list[str],
        "advice": list[str],
        "left_out": list[str],
        "carried": list[CarriedRecord],
        "tokenizer": Literal["adapter", "base"] | None,
        "matrices": list[MatrixRecord],
        "plan": str,
        "files": list[FileRecord],
    },
    total=False,
)
Record.__doc__ = """The record of an output, as it stands in ``streamer.json``.

`warnings` say where the result may differ from what was trained, `notes` what else happened, and `advice` what would be better, a line
each. `plan` is a digest over all that decides the output's bytes.
"""


class Written(Record, total=False):
    """A record, with where the output stands, and whether this run wrote it, took up an interrupted run, or found it finished."""

    output: str
    state: Literal["written", "resumed", "present"]


def base_source(
    path: Path, config: Mapping[str, Any], adapter_config: Mapping[str, Any], identity: Mapping[str, Any]
) -> Source:
    """Name a base.

    Its id is that of the cache that it lies in, or what the adapter's config or its own calls it, where that is by its last part the
    name of the directory: it may have been trained from what its own config names, or the adapter on another model. By its name a model
    in another encoding is another.
    """
    stated = adapter_config.get("base_model_name_or_path")
    model_id = None if bool(named_encoding(str(stated))) != bool(stored_encoding(config)) else hub_id(stated, path)
    return _source(path, identity, model_id or hub_id(config.get("_name_or_path"), path))


def adapter_source(path: Path, identity: Mapping[str, Any]) -> Source:
    """Name an adapter, or a fine-tuned model in its place."""
    # A config may call its base by a path.
    source = _source(path, {k: v for k, v in identity.items() if k != "base_model_name_or_path"})
    if named := stated_name(identity.get("base_model_name_or_path")):
        source["base_model_name_or_path"] = named
    return source


def _source(path: Path, identity: Mapping[str, Any], model_id: str | None = None) -> Source:
    cached = cached_model(path)
    source: dict[str, Any] = {"name": path.resolve().name}
    if cached is not None:
        model_id = cached[0]
        source["name"] = model_id.rpartition("/")[2]
    if model_id is not None:
        source["model_id"] = model_id
    if cached is not None:
        source["revision"] = cached[1]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cast(Source, {**source, "digest": digest[:DIGEST_CHARACTERS], **identity})


def in_short(source: Source) -> dict[str, str]:
    """A source's name, id and digest, without its identity."""
    return {key: str(source[key]) for key in ("name", "model_id", "revision", "digest") if key in source}


def detection_record(options: DetectionOptions, certified: int, matrices: int) -> DetectionRecord:
    """How the intruders of an output were found."""
    return {
        "top_k": options.top_k,
        "threshold_epsilon": options.threshold_epsilon,
        "solver": options.solver,
        "certified": certified,
        "matrices": matrices,
    }


def stamp(
    command: str,
    base: Source,
    adapter: Source,
    detection: DetectionRecord | None = None,
    mitigation: MitigationOptions | None = None,
) -> str:
    """What a file's metadata says of how it was made, as JSON."""
    tree: dict[str, Any] = {
        "version": __version__,
        "command": command,
        "base": in_short(base),
        "adapter": in_short(adapter),
    }
    if mitigation is not None:
        tree |= mitigation_json(mitigation)
    tree["detection"] = detection
    return json.dumps(tree, ensure_ascii=False)


def mitigation_json(options: MitigationOptions) -> dict[str, Any]:
    """How intruders were scaled, by the names that are written and printed."""
    return {"method": options.method, "scale": options.scale, "lambda": options.mitigation_lambda}


def certified_count(matrices: Sequence[MatrixRecord]) -> int:
    """How many matrices have certified decisions."""
    return sum(m["certified"] is True for m in matrices)
