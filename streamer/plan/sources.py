"""Name the inputs of an output.

Names are directory names, hub ids if known, and digests, but never paths, so the same inputs give the same bytes on any machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast

from streamer.json_types import Keywords
from streamer.storage.files import AdapterIdentity, BaseIdentity
from streamer.storage.remote_source import read_manifest
from streamer.weights.model_config import ModelConfig

DIGEST_CHARACTERS = 16
"""Hexadecimal characters of an input's digest: enough to distinguish inputs, short enough to read aloud."""


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

DIRECTORIES = {"base", "checkpoint", "checkpoints", "ckpt", "ckpts", "data", "exp", "experiments", "hf_models", "llms", "merged", "model",
               "models", "my_models", "out", "output", "outputs", "pretrain", "pretrained", "results", "runs", "save", "saves", "tmp",
               "weights"}  # fmt: skip
"""Names of directories that commonly contain models, as opposed to owners on the hub."""


# fmt: off
class NameSource(TypedDict, total=False):
    """Name and identity of an input."""
    name: Annotated[str, "Name of the directory or file; for a model in the hub's cache, the last part of its id. Never a path."]
    address: Annotated[str, "Address that it was read from, as given, without secrets; for the hub, see the next two keys."]
    model_id: Annotated[str, "Id on the hub, if known from the path of the cache, or from a config's name for it that ends in its name."]
    revision: Annotated[str, "Revision on the hub, if known."]
    digest: Annotated[str, Keywords(pattern="^[0-9a-f]{16}$"), "The first 16 digits of a SHA-256 that identifies the input."]
# fmt: on


class BaseSource(NameSource, BaseIdentity):
    """The base model: its name, and what identifies it independently of its location."""


class AdapterSource(NameSource, AdapterIdentity):
    """The adapter, or the fine-tuned model used as one, described in the same way."""


def base_source(path: Path, config: ModelConfig, stated: object, identity: Mapping[str, Any]) -> BaseSource:
    """Name a base; `stated` is the name that the adapter's config gives its base.

    The id is the one of the hub's cache if the base is in it, else the name in the adapter's config or the base's own, provided that its
    last part is the directory's name: the base's config may name the model from which it was trained, and the adapter's another model.
    """
    model_id = hub_id(stated, path) or hub_id(config.values.get("_name_or_path"), path)
    return cast(BaseSource, _source(path, identity, model_id))


def adapter_source(path: Path, identity: Mapping[str, Any]) -> AdapterSource:
    """Name an adapter, or a fine-tuned model used as one."""
    # A config may name its base by a path.
    unnamed = {k: v for k, v in identity.items() if k != "base_model_name_or_path"}
    source = cast(AdapterSource, _source(path, unnamed))
    named = identity.get("base_model_name_or_path")
    if isinstance(named, str) and re.fullmatch(rf"{HUB_ID.pattern}|[A-Za-z0-9][\w.-]*", named):
        source["base_model_name_or_path"] = named
    return source


def _source(path: Path, identity: Mapping[str, Any], model_id: str | None = None) -> dict[str, Any]:
    cached = cached_model(path)
    # JSON cannot hold bytes that are not UTF-8.
    source: dict[str, Any] = {"name": os.fsencode(path.resolve().name).decode(errors="backslashreplace")}
    if cached is not None:
        model_id = cached[0]
        source["name"] = model_id.rpartition("/")[2]
    elif (manifest := read_manifest(path if path.is_dir() else path.parent)) is not None:
        source["address"] = manifest.address
    if model_id is not None:
        source["model_id"] = model_id
    if cached is not None:
        source["revision"] = cached[1]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return {**source, "digest": digest[:DIGEST_CHARACTERS], **identity}


def in_short(source: NameSource) -> dict[str, str]:
    """Return a source's name, id, revision and digest, without its identity."""
    return {key: str(source[key]) for key in ("name", "model_id", "revision", "digest") if key in source}


def hub_id(stated: object, path: Path) -> str | None:
    """Return a config's name for a model if it can be taken as the hub id, ``owner/name``, of the model at `path`; else None.

    A relative path of two parts looks like an id. It is taken as an id if it ends in the model's name, but not if it is the path of this
    model or starts with a usual name for a directory of models. Whether other paths exist does not matter, so the same inputs get the same
    names wherever a run starts.
    """
    if not isinstance(stated, str) or not HUB_ID.fullmatch(stated):
        return None
    owner, _, name = stated.partition("/")
    lies = path.resolve()
    if name != lies.name or owner == lies.parent.name or owner.lower() in DIRECTORIES:
        return None
    return stated


def cached_model(path: Path) -> tuple[str, str] | None:
    """Return the id and revision of a model in the hub's cache, ``models--OWNER--NAME/snapshots/REVISION``; else None."""
    parts = path.resolve().parts
    for at in range(len(parts) - 2):
        if parts[at].startswith("models--") and parts[at + 1] == "snapshots":
            return parts[at].removeprefix("models--").replace("--", "/"), parts[at + 2]
    return None
