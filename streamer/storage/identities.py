"""What tells inputs from each other, wherever they lie: digests and sizes, as types of JSON values."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class FileIdentity(TypedDict):
    """What tells a safetensors file from another: its name, size, and SHA-256 (hex) of its header and of a sample of each tensor."""

    file: str
    bytes: int
    header_sha256: str
    sample_sha256: str


class BaseIdentity(TypedDict):
    """What tells a base model from another, wherever it lies."""

    files: list[FileIdentity]


class AdapterIdentity(TypedDict):
    """What tells an adapter from another, wherever it lies: digests of its weights and config; of a fine-tuned model its files."""

    base_is_residual: NotRequired[bool]

    modules: int
    weights_sha256: NotRequired[str]
    config_sha256: NotRequired[str]
    base_model_name_or_path: NotRequired[str | None]
    files: NotRequired[list[FileIdentity]]
