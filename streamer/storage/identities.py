"""Identities of inputs, by digests and sizes and independent of paths, as types of JSON values."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class FileIdentity(TypedDict):
    """Identity of a safetensors file: its name, size, and SHA-256 (hex) of its header and of a sample of each tensor."""

    file: str
    bytes: int
    header_sha256: str
    sample_sha256: str


class BaseIdentity(TypedDict):
    """Identity of a base model: those of its files, and its class where the user named it."""

    architecture: NotRequired[str]
    files: list[FileIdentity]


class AdapterIdentity(TypedDict):
    """Identity of an adapter: SHA-256 (hex) of its weights and config; of a fine-tuned model those of its files."""

    base_is_residual: NotRequired[bool]

    modules: int
    weights_sha256: NotRequired[str]
    config_sha256: NotRequired[str]
    base_model_name_or_path: NotRequired[str | None]
    files: NotRequired[list[FileIdentity]]
