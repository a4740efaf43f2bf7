"""Define identities of inputs as JSON types: digests and sizes, independent of paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from streamer.json_types import Count, Sha256


# fmt: off
class FileIdentity(TypedDict):
    """A safetensors file of an input."""
    file: Annotated[str, "Its name."]
    bytes: Annotated[Count, "Its size in bytes."]
    header_sha256: Annotated[Sha256, "Digest of its safetensors header (SHA-256, hexadecimal)."]
    sample_sha256: Annotated[Sha256, "Digest of a sample of every tensor (SHA-256, hexadecimal)."]

class BaseIdentity(TypedDict):
    """Identity of a base."""
    files: Annotated[list[FileIdentity], "Its safetensors files."]
    architecture: NotRequired[Annotated[str, "Class of the base, if the user named it (--architecture)."]]
    in_memory: NotRequired[Annotated[bool, "True if the model was in memory; its tensors are listed as one file. Otherwise absent."]]

class DigestedAdapter(TypedDict):
    """Identity of an adapter, or of a fine-tuned model used as one."""
    weights_sha256: NotRequired[Annotated[Sha256, "Digest of all tensors of an adapter (SHA-256, hexadecimal)."]]
    config_sha256: NotRequired[Annotated[Sha256, "Digest of its adapter_config.json (SHA-256, hexadecimal)."]]
    modules: Annotated[Count, "Modules that it changes."]
    base_model_name_or_path: NotRequired[Annotated[str | None, "The base's name in its config; in findings it may be a path."]]

class StatedIdentity(TypedDict):
    """Facts about an adapter that the user states if its files do not; see `streamer.adapters.adapter_config`."""
    base_is_residual: NotRequired[Annotated[bool, "True if --base-is-residual stated that the base is the adapter's residual."]]
    lora_b_layout: NotRequired[Annotated[Literal["rank_major", "grouped_by_expert"], "Order of lora_B's columns on "
        "stacked experts, if the user stated it."]]
    ignored_keys: NotRequired[Annotated[list[str], "Unknown keys of adapter_config.json that the user ignored (--ignore-key)."]]

class AdapterIdentity(DigestedAdapter, StatedIdentity):
    """Identity of an adapter, or of a fine-tuned model used as one."""
    files: NotRequired[Annotated[list[FileIdentity], "Its safetensors files; only for a fine-tuned model."]]
# fmt: on


def difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Describe briefly how two identities differ."""
    keys = [k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)]
    if "files" in keys:
        a, b = mine.get("files", []), theirs.get("files", [])
        if [f["file"] for f in a] != [f["file"] for f in b]:
            return f"files {[f['file'] for f in a][:3]} against {[f['file'] for f in b][:3]}"
        changed = next(x["file"] for x, y in zip(a, b, strict=True) if x != y)
        return f"the content of {changed} differs"
    return f"{', '.join(keys)} differ"


def check_identities(*identities: Any) -> None:
    """Raise ValueError unless all identities, read from a file, have the form that `difference` expects."""
    for identity in identities:
        files = identity.get("files", []) if isinstance(identity, dict) else None
        if not isinstance(files, list) or not all(
            isinstance(f, dict) and isinstance(f.get("file"), str) for f in files
        ):
            raise ValueError("the identity of the base or of the adapter has the wrong form")
