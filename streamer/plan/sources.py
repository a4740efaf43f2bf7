"""Name the inputs of an output.

Names are directory names, hub ids if known, and digests, but never paths, so the same inputs give the same bytes on any machine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast

from streamer.json_types import Keywords
from streamer.plan.provenance import cached_model, hub_id, named_encoding, stated_name, stored_encoding
from streamer.storage.identities import AdapterIdentity, BaseIdentity
from streamer.storage.remote_source import read_manifest
from streamer.weights.model_config import ModelConfig

DIGEST_CHARACTERS = 16
"""Hexadecimal characters of an input's digest: enough to distinguish inputs, short enough to read aloud."""


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
    last part is the directory's name: the base's config may name the model from which it was trained, and the adapter's another model. If
    the adapter's config names another encoding, it means another model.
    """
    model_id = None if bool(named_encoding(str(stated))) != bool(stored_encoding(config)) else hub_id(stated, path)
    return cast(BaseSource, _source(path, identity, model_id or hub_id(config.values.get("_name_or_path"), path)))


def adapter_source(path: Path, identity: Mapping[str, Any]) -> AdapterSource:
    """Name an adapter, or a fine-tuned model used as one."""
    # A config may name its base by a path.
    unnamed = {k: v for k, v in identity.items() if k != "base_model_name_or_path"}
    source = cast(AdapterSource, _source(path, unnamed))
    if named := stated_name(identity.get("base_model_name_or_path")):
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
