"""Define a source of deltas, module by module: a PEFT adapter, or a fine-tuned model used as one (`finetuned`).

Assign roles to an adapter's tensors by name. A new kind of tensor is a new entry of `ROLES`; the first match wins.

``base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight`` → factor A of ``model.layers.0.self_attn.q_proj``;
``base_model.model.score.modules_to_save.default.weight``, also without ``default`` → ``weight`` of ``score``, saved whole;
``base_model.model.lm_head.base_layer.weight`` → ``weight`` of ``lm_head``, saved whole, with a delta added to it.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from streamer.adapters.adapter_config import CONFIG_NAME, AdapterConfig, Wrapped, stored_layout
from streamer.adapters.modules import Module
from streamer.adapters.rules import is_residual, unknown_keys, version_notes
from streamer.errors import FormatError, MismatchError
from streamer.storage.atomic_file import views
from streamer.storage.files import AdapterIdentity, StatedIdentity
from streamer.storage.tensor_file import TensorFile
from streamer.units import listed
from streamer.weights.base import StoredTensor

FACTORS = ("factor", "embedding", "magnitude")
"""Roles of tensors that form a LoRA module."""

_ADAPTER = r"(?:\.(?P<adapter>[^.]+))?"

ROLES = (
    (re.compile(rf"^(?P<module>.+)\.lora_(?P<factor>[AB]){_ADAPTER}\.weight$"), "factor"),
    (re.compile(rf"^(?P<module>.+)\.lora_embedding_(?P<factor>[AB]){_ADAPTER}$"), "embedding"),
    (re.compile(rf"^(?P<module>.+)\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?$"), "magnitude"),
    (re.compile(rf"^(?P<module>.+)\.lora_B{_ADAPTER}\.bias$"), "lora_bias"),
    (re.compile(rf"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta{_ADAPTER}$"), "tokens"),
    # The base's own values, kept by trainers that save a module's whole state.
    (re.compile(r"\.trainable_tokens_original(\.|$)|\.original_module\."), "original"),
    (re.compile(r"\.(hada_|lokr_|lora_|ranknum|vera_|oft_|boft_|ia3_)"), "other"),
    # PEFT strips the adapter's name if it is the last part but one; parameters directly in the module are stored without it.
    (re.compile(r"^(?P<module>.+?)\.modules_to_save\.(?:[^.]+\.)?(?P<parameter>.+)$"), "saved"),
    (re.compile(r"^(?P<module>.+?)(?:\.token_adapter)?\.base_layer\.(?P<parameter>[^.]+)$"), "saved"),
    (re.compile(r"^(?P<module>.+)\.(?P<parameter>[^.]+)$"), "saved"),
    (re.compile(r""), "other"),
)
"""Roles by patterns for normalised names, whose groups name the ``module``, the ``factor`` (A or B) and the module's ``parameter``.

Tensors of the role ``other`` belong to another method, or their meaning is unknown: they are refused.
"""

PREFIX = "base_model.model."
"""Prefix of the names in a PEFT adapter: ``model.layers.0.mlp.up_proj`` → ``base_model.model.model.layers.0.mlp.up_proj.lora_A.weight``."""

_WRAPPERS = re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")


def normalize(name: str) -> str:
    """Strip wrappers from a tensor's name: PEFT's prefix, DDP's, torch.compile's, FSDP's.

    ``module.base_model.model.model.layers.0._orig_mod.mlp.up_proj.lora_A.weight`` → ``model.layers.0.mlp.up_proj.lora_A.weight``.
    """
    return _WRAPPERS.sub(r"\1", name).removeprefix("module.").removeprefix(PREFIX)


def saved_names(names: Collection[str]) -> dict[str, str]:
    """Map the names under which PEFT stores and finds an adapter's tensors → their names in its file.

    They have PEFT's prefix, and neither wrappers nor the adapter's name. If two would get the same name, only wrappers go.
    """
    plain = {normalize(name) for name in names}
    found = {_saved_name(normalize(name), plain): name for name in names}
    return found if len(found) == len(names) else {PREFIX + normalize(name): name for name in names}


def _saved_name(plain: str, names: set[str]) -> str:
    role, match = classify(plain)
    if role == "saved" and ".modules_to_save." in plain:
        short = f"{match['module']}.{match['parameter']}"
        # PEFT's copies of biases below a saved module keep their names: the module's own tensors are beside them.
        return PREFIX + (plain if {short, plain.replace(".modules_to_save.", ".")} & names else short)
    if match.groupdict().get("adapter") in (None, "weight"):  # lora_magnitude_vector.weight, which PEFT reads too
        return PREFIX + plain
    return PREFIX + plain[: match.start("adapter") - 1] + plain[match.end("adapter") :]


def classify(name: str) -> tuple[str, re.Match[str]]:
    """Return the role of a normalised tensor name, and the match of its pattern."""
    return next((role, match) for pattern, role in ROLES if (match := pattern.search(name)))


@dataclass(frozen=True)
class Carried:
    """Tensor of the adapter that is not a factor, with its effect on one tensor of the model.

    Attributes
    ----------
    role
        ``saved``: replaces the tensor. ``lora_bias``: is added to it, times `scaling`. ``tokens``: replaces the rows in `indices`.
        ``original``: the base's own values, without effect.
    module, parameter
        The tensor's name in the model, ``module.parameter``; the module is empty if the model itself holds the parameter.
    source
        The tensor's name in the adapter's file.
    """

    role: str
    module: str
    parameter: str
    source: str
    scaling: float = 1.0
    indices: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the model's tensor."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


def carried_tensor(
    role: str, match: re.Match[str], source: str, modules: Mapping[str, Module], file: Path, config: AdapterConfig
) -> Carried:
    """Find the module and parameter that a tensor other than a factor changes.

    Parameters
    ----------
    role, match
        Role and match of the rule for its name.
    source
        Its name in the file.
    modules
        Modules that have factors.
    file
        Path of the weights, for messages.
    """
    groups = match.groupdict()
    module = groups.get("module") or source
    if role == "lora_bias":
        if module not in modules:
            raise FormatError(f"{file}: {source!r} has no lora_A and lora_B beside it; save the adapter again")
        if not config.get("lora_bias"):
            raise MismatchError(
                f"{config.path}: lora_bias is {config.get('lora_bias')!r}, but the file has {source!r}; set lora_bias to true, or use the "
                "config that was saved with these weights"
            )
        return Carried(role, module, "bias", source, modules[module].scaling)
    if role == "tokens":
        return Carried(role, module, "weight", source, indices=_token_indices(config, module))
    return Carried(role, module, groups.get("parameter") or "weight", source)


def _token_indices(config: AdapterConfig, module: str) -> tuple[int, ...]:
    """Return the rows that trained tokens replace; PEFT stores them in the config, for the input embedding or by module.

    Empty if the config names other modules.
    """
    stated = config.get("trainable_token_indices")
    if isinstance(stated, dict) and stated:
        stated = next((v for key, v in stated.items() if f".{module}".endswith(f".{key}")), ())
    numbers = [i for i in stated if type(i) is int and i >= 0] if isinstance(stated, list) else []
    if stated != () and (not numbers or numbers != stated or len(set(numbers)) != len(numbers)):
        raise no_indices(config, module, stated)
    return tuple(numbers)


def no_indices(config: AdapterConfig, module: str, found: object) -> FormatError:
    """Make the error for trained tokens whose rows the config does not state."""
    return FormatError(
        f"{config.path}: trainable_token_indices: expected the rows of {module!r} as different numbers, found {found!r}"
    )


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

    @property
    def parameters(self) -> list[str]:
        """List the names by which to search a base for the parameters that have deltas of their own."""
        return [wrapped.matched_as(parameter) for wrapped in self.wrapped for parameter in wrapped.parameters]

    @cached_property
    def config_paths(self) -> tuple[Path, ...]:
        """List the file from which the config was read; empty if a model had no config when it was opened."""
        return (self.config.path,) if self.config.path.exists() else ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Return notes on parts of the source that detection does not judge, one line each."""
        return ()

    @abstractmethod
    def identity(self) -> AdapterIdentity:
        """Compute digests of weights and config, which identify the source independently of its location."""

    def trains(self, module: str) -> bool:
        """Test whether a carried tensor of this module was trained; otherwise it is a copy of the base's tensor."""
        return self.describes_model

    def stored_sum(self, module: Module) -> StoredTensor | None:
        """Return ``W0 + Δ`` of a module if a file stores it; a PEFT adapter stores only deltas."""
        return None


class NoAdapter(DeltaSource):
    """Source without deltas, for runs on a base alone."""

    describes_model = False

    @classmethod
    def at(cls, base: Path) -> NoAdapter:
        """Make one for a base; messages name the base."""
        return cls(base, AdapterConfig({}, base / CONFIG_NAME), (), {})

    def identity(self) -> AdapterIdentity:
        """Return an identity without modules: nothing is changed."""
        return {"modules": 0}


class PeftAdapter(DeltaSource):
    """A PEFT adapter on disk."""

    describes_model = False

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
