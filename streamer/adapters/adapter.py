"""Define a source of deltas, module by module: a PEFT adapter, or a fine-tuned model used as one (`finetuned`)."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from streamer.adapters.adapter_config import CONFIG_NAME, AdapterConfig
from streamer.adapters.modules import Module
from streamer.adapters.rules import is_residual, unknown_keys, version_notes
from streamer.adapters.target_parameters import Wrapped, stored_layout
from streamer.adapters.tensor_names import Carried
from streamer.storage.buffers import views
from streamer.storage.identities import AdapterIdentity, StatedIdentity
from streamer.storage.tensor_file import TensorFile
from streamer.units import listed
from streamer.weights.base import StoredTensor


@dataclass(frozen=True)
class DeltaSource(ABC):
    """Open weights files, with the modules that add deltas to a base and the tensors that change it in other ways.

    Attributes
    ----------
    path
        Directory of the source, or a single file.
    config
        PEFT's config, or one in the same form that describes a fine-tuned model.
    files
        An adapter's single file, or all shards of a fine-tuned model.
    modules
        Modules by their names in the model.
    carried
        Tensors that form no delta.
    wrapped
        Modules whose parameters have factors of their own.
    describes_model
        Whether the source's config, tokenizer and other files describe the merged model, instead of the base's files.
    """

    path: Path
    config: AdapterConfig
    files: tuple[TensorFile, ...]
    modules: Mapping[str, Module]
    carried: tuple[Carried, ...] = ()
    wrapped: tuple[Wrapped, ...] = ()

    describes_model: ClassVar[bool]

    @property
    def file(self) -> TensorFile:
        """Return the weights file, or the first of several, for messages."""
        return self.files[0]

    @property
    def directory(self) -> Path | None:
        """Return the directory whose other files belong to the source; None if the user named a single file."""
        return self.path if self.path.is_dir() else None

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Return every tensor by name."""
        return {info.name: StoredTensor(file, info) for file in self.files for info in file.header.tensors}

    @cached_property
    def config_paths(self) -> tuple[Path, ...]:
        """List the file from which the config was read; empty if a model had no config when it was opened."""
        return (self.config.path,) if self.config.path.exists() else ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Return notes on parts of the source that detection does not judge, one line each."""
        return ()

    @property
    @abstractmethod
    def identity_bytes(self) -> int:
        """Return the number of bytes that `identity` reads."""

    @abstractmethod
    def identity(self) -> AdapterIdentity:
        """Compute digests of weights and config, which identify the source independently of its location."""

    @abstractmethod
    def trains(self, module: str) -> bool:
        """Test whether a carried tensor of this module was trained; otherwise it is a copy of the base's tensor."""

    def stored_sum(self, module: Module) -> StoredTensor | None:
        """Return ``W0 + Δ`` of a module if a file stores it; a PEFT adapter stores only deltas."""
        return None


class NoAdapter(DeltaSource):
    """Source without deltas, for runs on a base alone."""

    describes_model: ClassVar[bool] = False
    identity_bytes: ClassVar[int] = 0

    @classmethod
    def at(cls, base: Path) -> NoAdapter:
        """Make one for a base; messages name the base."""
        return cls(base, AdapterConfig({}, base / CONFIG_NAME), (), {})

    def identity(self) -> AdapterIdentity:
        """Return an identity without modules: nothing is changed."""
        return {"modules": 0}

    def trains(self, module: str) -> bool:
        """Return False: nothing was trained."""
        return False


class PeftAdapter(DeltaSource):
    """A PEFT adapter on disk."""

    describes_model = False

    @property
    def identity_bytes(self) -> int:
        """Return the size of the weights file in bytes."""
        return self.file.header.file_bytes

    @property
    def configs(self) -> tuple[AdapterConfig, ...]:
        """Return the configs of its modules."""
        return (self.config,)

    def weights_sha256(self) -> str:
        """Digest the whole weights file."""
        digest = hashlib.sha256(self.file.header.digest.encode())
        for info in self.file.header.tensors:
            for view in views(self.file.chunks(info)):
                digest.update(view)
        return digest.hexdigest()

    def identity(self) -> AdapterIdentity:
        """Digest the whole weights file and the config."""
        identity: AdapterIdentity = {
            "weights_sha256": self.weights_sha256(),
            "config_sha256": hashlib.sha256(self.config.path.read_bytes()).hexdigest(),
            "modules": len(self.modules),
            "base_model_name_or_path": self.config.base_model,
        }
        return {**self._stated(), **identity}

    def _stated(self) -> StatedIdentity:
        """Return what the user stated about this adapter, if its files cannot be read without it."""
        stated: StatedIdentity = {"base_is_residual": True} if any(map(is_residual, self.configs)) else {}
        if self.wrapped and (layout := self.config.stated.lora_b_layout) and stored_layout(self.config) is None:
            stated["lora_b_layout"] = layout
        unknown = dict.fromkeys(key for config in self.configs for key in unknown_keys(config))
        if ignored := [key for key in unknown if key in self.config.stated.ignore_keys]:
            stated["ignored_keys"] = ignored
        return stated

    @property
    def notes(self) -> tuple[str, ...]:
        """Warn of config keys that the user chose to ignore, and of rules that PEFT has changed since."""
        ignored = self._stated().get("ignored_keys", [])
        are, them = ("is", "it") if len(ignored) == 1 else ("are", "them")
        line = f"{listed(map(repr, ignored))} of {self.config.path.name} {are} ignored: the result relies on {them} not changing the delta"
        return (*((line,) if ignored else ()), *version_notes(self.config))

    def trains(self, module: str) -> bool:
        """Apply PEFT's rule: a module is trained if its path, or a parent's path, ends in an entry of ``modules_to_save``."""
        parts = module.split(".")
        paths = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        return any(path.endswith(entry) for path in paths for entry in self.config.strings("modules_to_save"))
