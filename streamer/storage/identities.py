"""Identities of inputs, by digests and sizes and independent of paths, as types of JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict


class FileIdentity(TypedDict):
    """Identity of a safetensors file: its name, size, and SHA-256 (hex) of its header and of a sample of each tensor."""

    file: str
    bytes: int
    header_sha256: str
    sample_sha256: str


class BaseIdentity(TypedDict):
    """Identity of a base model: those of its files, and its class where the user named it.

    Of a model in memory its tensors stand for a file, and `in_memory` is True.
    """

    architecture: NotRequired[str]
    in_memory: NotRequired[bool]
    files: list[FileIdentity]


class StatedIdentity(TypedDict):
    """What the user has stated of an adapter, where its files leave it open: see `streamer.adapters.stated`."""

    base_is_residual: NotRequired[bool]
    lora_b_layout: NotRequired[str]
    ignored_keys: NotRequired[list[str]]


class AdapterIdentity(StatedIdentity):
    """Identity of an adapter: SHA-256 (hex) of its weights and config; of a fine-tuned model those of its files."""

    modules: int
    weights_sha256: NotRequired[str]
    config_sha256: NotRequired[str]
    base_model_name_or_path: NotRequired[str | None]
    files: NotRequired[list[FileIdentity]]


def difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Say in a few words in what two identities differ."""
    keys = [k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)]
    if "files" in keys:
        a, b = mine.get("files", []), theirs.get("files", [])
        if [f["file"] for f in a] != [f["file"] for f in b]:
            return f"files {[f['file'] for f in a][:3]} against {[f['file'] for f in b][:3]}"
        changed = next(x["file"] for x, y in zip(a, b, strict=True) if x != y)
        return f"the content of {changed} differs"
    return f"{', '.join(keys)} differ"
