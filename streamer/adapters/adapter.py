"""Open an adapter, PEFT's directory or a pipeline's one file with diffusers' or kohya's names; assign every tensor a role, or refuse it.

A new kind of tensor in PEFT's form is a new entry of `ROLES`; the first match wins.

``base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight`` → factor A of ``model.layers.0.self_attn.q_proj``;
``base_model.model.score.modules_to_save.default.weight``, also without ``default`` → ``weight`` of ``score``, saved whole;
``base_model.model.lm_head.base_layer.weight`` → ``weight`` of ``lm_head``, saved whole, with a delta added to it.

A pipeline's adapter is one safetensors file without a config. diffusers names a module by its component and its path in it, with the
factors ``lora_A`` and ``lora_B``; kohya joins both with underscores and calls the factors ``lora_down`` and ``lora_up``:
``unet.down_blocks.0.attentions.0.proj_in`` is ``lora_unet_down_blocks_0_attentions_0_proj_in``. Which tensor of the base a name means is
decided in `plan.pipelines`.

A module's scaling is ``alpha/rank`` by its ``.alpha`` tensor, 1 if the file has none, or follows the LoRA config that diffusers writes into
the file's metadata.
"""

from __future__ import annotations

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from streamer.adapters import adapter_config as rules
from streamer.adapters.adapter_config import AdapterConfig, Stated
from streamer.adapters.modules import (
    INDICES,
    PEFT_METHODS,
    LoraModule,
    MethodModule,
    Module,
    PeftMethod,
)
from streamer.errors import FormatError, InputError, MismatchError, UnsupportedError
from streamer.storage.atomic_file import views
from streamer.storage.checkpoint import IOMode, TensorFile, read_json_object
from streamer.storage.files import AdapterIdentity, StatedIdentity, absent, lacks, strict_json
from streamer.storage.header import TensorInfo
from streamer.units import listed
from streamer.weights.base import FLOATS, StoredTensor, TensorShape, equal, float_dtype

LORA_ROLES = ("factor", "embedding", "magnitude")
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
    (
        re.compile(r"^(?P<module>.+?)(?:\.token_adapter)?\.base_layer\.(?P<parameter>[^.]+)$"),
        "saved",
    ),
    (re.compile(r"^(?P<module>.+)\.(?P<parameter>[^.]+)$"), "saved"),
    (re.compile(r""), "other"),
)
"""Roles by patterns for normalised names, whose groups name the ``module``, the ``factor`` (A or B) and the module's ``parameter``.

Tensors of the role ``other`` belong to another method, or their meaning is unknown: they are refused.
"""

PREFIX = "base_model.model."
"""Prefix of the names in a PEFT adapter: ``model.layers.0.mlp.up_proj`` → ``base_model.model.model.layers.0.mlp.up_proj.lora_A.weight``."""

_WRAPPERS = re.compile(
    r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
)


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
    stored_as = {_saved_name(normalize(name), plain): name for name in names}
    if len(stored_as) == len(names):
        return stored_as
    return {PREFIX + normalize(name): name for name in names}


def _saved_name(plain: str, names: set[str]) -> str:
    role, match = classify(plain)
    if role == "saved" and ".modules_to_save." in plain:
        short = f"{match['module']}.{match['parameter']}"
        # PEFT's copies of biases below a saved module keep their names: the module's own tensors are beside them.
        taken = {short, plain.replace(".modules_to_save.", ".")} & names
        return PREFIX + (plain if taken else short)
    adapter = match.groupdict().get("adapter")
    # PEFT reads lora_magnitude_vector.weight, too.
    if adapter in (None, "weight"):
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
    indices: TensorShape = ()

    @property
    def name(self) -> str:
        """Return the name of the model's tensor."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


class TensorRole(NamedTuple):
    """A tensor's name in the file, the role that the name gives it, and the match of the role's pattern."""

    source: str
    role: str
    match: re.Match[str]


def carried_tensor(
    tensor: TensorRole, modules: Mapping[str, Module], file: Path, config: AdapterConfig
) -> Carried:
    """Find the module and parameter that a tensor other than a factor changes.

    Parameters
    ----------
    modules
        Modules that have factors.
    file
        Path of the weights, for messages.
    """
    source, role, match = tensor
    groups = match.groupdict()
    module = groups.get("module") or source
    if role == "tokens":
        return Carried(role, module, "weight", source, indices=_token_indices(config, module))
    if role != "lora_bias":
        return Carried(role, module, groups.get("parameter") or "weight", source)
    if module not in modules:
        raise FormatError(
            f"{file}: {source!r} has no lora_A and lora_B beside it; save the adapter again"
        )
    if not config.get("lora_bias"):
        raise MismatchError(
            f"{config.path}: lora_bias is {config.get('lora_bias')!r}, but the file has {source!r}; set lora_bias to true, or use the "
            "config that was saved with these weights"
        )
    return Carried(role, module, "bias", source, modules[module].scaling)


def _token_indices(config: AdapterConfig, module: str) -> TensorShape:
    """Return the rows that trained tokens replace; PEFT stores them in the config, for the input embedding or by module.

    Empty if the config names other modules.
    """
    stated = config.get("trainable_token_indices")
    if isinstance(stated, dict) and stated:
        stated = next((v for key, v in stated.items() if f".{module}".endswith(f".{key}")), ())
    if stated == ():
        return ()
    numbers = [i for i in stated if type(i) is int and i >= 0] if isinstance(stated, list) else []
    if not numbers or numbers != stated or len(set(numbers)) != len(numbers):
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
    wrapped: tuple[rules.Wrapped, ...] = ()

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
        return {
            info.name: StoredTensor(file, info)
            for file in self.files
            for info in file.header.tensors
        }

    @property
    def parameters(self) -> list[str]:
        """List the names by which to search a base for the parameters that have deltas of their own."""
        return [
            wrapped.matched_as(parameter)
            for wrapped in self.wrapped
            for parameter in wrapped.parameters
        ]

    @cached_property
    def config_paths(self) -> tuple[Path, ...]:
        """List the file from which the config was read; empty if a model had no config when it was opened."""
        is_weights = any(file.path == self.config.path for file in self.files)
        return (self.config.path,) if self.config.path.exists() and not is_weights else ()

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
        return cls(base, AdapterConfig({}, base / rules.CONFIG_NAME), (), {})

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
        config = self.config
        stated: StatedIdentity = {}
        if any(map(rules.is_residual, self.configs)):
            stated["base_is_residual"] = True
        layout = config.stated.lora_b_layout
        if self.wrapped and layout and rules.stored_layout(config) is None:
            stated["lora_b_layout"] = layout
        unknown = dict.fromkeys(key for of in self.configs for key in rules.unknown_keys(of))
        if ignored := [key for key in unknown if key in config.stated.ignore_keys]:
            stated["ignored_keys"] = ignored
        return stated

    @property
    def notes(self) -> tuple[str, ...]:
        """Warn of config keys that the user chose to ignore, and of rules that PEFT has changed since."""
        ignored = self._stated().get("ignored_keys", [])
        versions = rules.version_notes(self.config)
        if not ignored:
            return tuple(versions)
        if len(ignored) == 1:
            are = "is"
            them = "it"
        else:
            are = "are"
            them = "them"
        line = f"{listed(map(repr, ignored))} of {self.config.path.name} {are} ignored: the result relies on {them} not changing the delta"
        return line, *versions

    def trains(self, module: str) -> bool:
        """Apply PEFT's rule: a module is trained if its path, or a parent's path, ends in an entry of ``modules_to_save``."""
        return any(is_below(module, entry) for entry in self.config.strings("modules_to_save"))


def is_below(module: str, entry: str) -> bool:
    """Test whether an entry of ``modules_to_save`` names a module or a parent of it, by the end of its path."""
    return any(path.endswith(entry) for path in accumulate(module.split("."), "{}.{}".format))


def open_adapter(
    path: str | Path, io: IOMode = "mmap", stated: Stated = rules.NOTHING_STATED
) -> PeftAdapter:
    """Open an adapter, of a pipeline by its tensor names, else PEFT's directory, and account for every tensor in it.

    Parameters
    ----------
    stated
        Facts about the adapter that the user states.

    Raises
    ------
    UnsupportedError
        If the adapter or any tensor in it is of an unsupported kind; the message names all reasons.
    FormatError, InputError
        If files are missing or broken, or tensors and config disagree.
    """
    path = Path(path)
    config_path = path / rules.CONFIG_NAME
    weights_path = path / rules.WEIGHTS_NAME
    if (pipeline := _pipeline_adapter(path, io, stated)) is not None:
        return pipeline
    if path.exists() and not (config_path.exists() and weights_path.exists()):
        rules.refuse_other_formats(path)
    if path.is_file():
        expected = f"the directory with {rules.CONFIG_NAME}, or a pipeline's LoRA with names such as unet.… or lora_unet_…"
        raise InputError(f"{path}: expected {expected}; found another file")
    if not path.is_dir():
        raise absent(path, "adapter")
    for file in (config_path, weights_path):
        if not file.exists():
            advice = "name an adapter in PEFT's form, in the order BASE ADAPTER; save one with a pickle again as safetensors"
            raise lacks(path, file.name, advice)
    config = AdapterConfig(read_json_object(config_path), config_path, stated)
    rules.refuse_kinds(config)
    return adapter_from_tensors(path, config, TensorFile(weights_path, io))


def _pipeline_adapter(path: Path, io: IOMode, stated: Stated) -> PipelineAdapter | None:
    """Open a pipeline's adapter, recognised by its tensor names; None for anything else."""
    file = _weights_file(path)
    if file is None:
        return None
    try:
        opened = TensorFile(file, io)
    except InputError:
        if path.is_file():
            raise
        return None
    for whose, (_, recognised) in NAMINGS.items():
        if any(re.search(recognised, info.name) for info in opened.header.tensors):
            modules = _modules(opened, whose, stated)
            return PipelineAdapter(path, AdapterConfig({}, file, stated), (opened,), modules)
    opened.close()
    return None


def adapter_from_tensors(path: Path, config: AdapterConfig, file: TensorFile) -> PeftAdapter:
    """Account for every tensor of an adapter; raises the same errors as `open_adapter`.

    Parameters
    ----------
    file
        The adapter's tensors, under the names that PEFT saves.
    """
    method = PEFT_METHODS.get(str(config.peft_type))
    factors_of, others = _sort(file, method)

    def is_matrix(parameter: str, a: str) -> bool:
        return file.header.by_name[a].shape[:1] == (config.number("rank_pattern", "r", parameter),)

    wrapped: list[rules.Wrapped] = []
    if method is None:
        wrapped, wrong = rules.find_wrapped(factors_of, config, is_matrix)
        if wrong:
            problems = listed(wrong, separator="; ")
            raise FormatError(
                f"{file.path}: {problems}; config and weights belong to different adapters"
            )
    inner = {name for w in wrapped for name in w.layers}
    modules: dict[str, Module] = {}
    for name, tensors in factors_of.items():
        if name in inner:
            continue
        infos = {role: file.header.by_name[tensor] for role, tensor in tensors.items()}
        for role, info in infos.items():
            if not (role.endswith("indices") and info.dtype in INDICES):
                float_dtype(info, str(file.path))
        if method is None:
            modules[name] = lora_module(name, infos, file.path, config)
        else:
            if method.scaled:
                rank, scaling = config.method_scaling(name)
            else:
                rank = 0
                scaling = 1.0
            shapes = {role: info.shape for role, info in infos.items()}
            modules[name] = MethodModule(name, method, config, tensors, shapes, rank, scaling)
    if not modules and not wrapped:
        rules.refuse_other_formats(file.path)
        expected = "lora_A and lora_B" if method is None else method.title
        raise InputError(
            f"{file.path}: expected {expected} tensors, found none; is this the adapter?"
        )
    carried = _carried(file, others, modules, config)
    return PeftAdapter(path, config, (file,), modules, carried, tuple(wrapped))


def _carried(
    file: TensorFile,
    tensors: Iterable[TensorRole],
    modules: Mapping[str, Module],
    config: AdapterConfig,
) -> tuple[Carried, ...]:
    """Find what the tensors other than factors change, each tensor of the model once for each role."""
    stored = {info.name: StoredTensor(file, info) for info in file.header.tensors}
    effects: dict[tuple[str, str], Carried] = {}
    for tensor in tensors:
        effect = carried_tensor(tensor, modules, file.path, config)
        other = effects.setdefault((effect.role, effect.name), effect)
        # Copies that PEFT writes beside a saved module: tensors ending in ``bias``, and those below a resized embedding. PEFT looks for
        # ``score.bias``, not ``score.modules_to_save.bias``.
        if other is not effect and not equal(stored[other.source], stored[effect.source]):
            sources = f"tensors {other.source!r} and {effect.source!r}"
            raise FormatError(
                f"{file.path}: {sources} both change {effect.name!r}; save one adapter at a time"
            )
        if len(effect.source) < len(other.source):
            effects[effect.role, effect.name] = effect
    # PEFT saves the trained tokens of a tied head, too, but states the rows of one of the two.
    stating = [effect for effect in effects.values() if effect.role == "tokens" and effect.indices]
    for key, effect in effects.items():
        if effect.role == "tokens" and not effect.indices:
            own = stored[effect.source]
            twin = next((other for other in stating if equal(stored[other.source], own)), None)
            if twin is None:
                raise no_indices(config, effect.module, None)
            effects[key] = replace(effect, indices=twin.indices)
    return tuple(effects.values())


def _sort(
    file: TensorFile, method: PeftMethod | None
) -> tuple[dict[str, dict[str, str]], list[TensorRole]]:
    """Sort every tensor by role: module → factor → tensor, and the tensors other than factors."""
    factors_of: dict[str, dict[str, str]] = {}
    shared = {}
    others = []
    refused = []
    names = {normalize(name) for name in file.header.by_name}
    for info in file.header.tensors:
        name = normalize(info.name)
        # Until version 0.17, PEFT wrote copies of biases below a saved module, without the adapter's name.
        plain = name.replace(".modules_to_save.", ".")
        name = plain if plain in names else name
        last = name.rpartition(".")[2]
        if method is not None and last in method.shared:
            shared[last] = info.name
        elif (found := _factor_of(name, method)) is not None:
            module, factor = found
            factors = factors_of.setdefault(module, {})
            if factor in factors:
                both = f"tensors {factors[factor]!r} and {info.name!r} are the same factor of one module"
                raise FormatError(f"{file.path}: {both}; save one adapter at a time")
            factors[factor] = info.name
        else:
            role, match = classify(name)
            if role == "other" or role in LORA_ROLES:  # another method's
                refused.append(info.name)
            else:
                others.append(TensorRole(info.name, role, match))
    if refused:
        rules.refuse_other_formats(file.path)
        what = f"{listed(map(repr, refused), 1)} of another method or of unknown meaning"
        raise UnsupportedError(f"{file.path}: refused: {what}; {rules.INSTEAD}")
    if method is None:
        _check_pairs(file, factors_of)
    return {name: {**factors, **shared} for name, factors in factors_of.items()}, others


def _factor_of(name: str, method: PeftMethod | None) -> tuple[str, str] | None:
    """Find the module and the factor that a normalised name means, of LoRA or of another method; None for another tensor."""
    if method is not None:
        match = re.match(
            rf"^(?P<module>.+)\.(?P<factor>{method.roles})(?:\.[^.]+)?(?:\.weight)?$", name
        )
        return (match["module"], match["factor"]) if match else None
    role, found = classify(name)
    factor = "magnitude" if role == "magnitude" else found.groupdict().get("factor")
    return (found["module"], factor) if role in LORA_ROLES and factor else None


def _check_pairs(file: TensorFile, factors_of: Mapping[str, Mapping[str, str]]) -> None:
    for name, tensors in factors_of.items():
        if missing := {"A", "B"} - tensors.keys():
            have = f"{listed(map(repr, tensors.values()))} but no factor {min(missing)}"
            raise FormatError(f"{file.path}: module {name!r} has {have}; save the adapter again")


def lora_module(
    name: str, factors: Mapping[str, TensorInfo], where: Path, config: AdapterConfig
) -> LoraModule:
    """Make a module from the tensors of its factors, by role; `where` is the weights file, for messages."""
    a = factors["A"]
    b = factors["B"]
    magnitude = factors.get("magnitude")
    dimensions = len(a.shape)
    roles = {classify(normalize(info.name))[0] for info in (a, b)}
    is_embedding = roles == {"embedding"}
    layer_kind = "convolution" if dimensions > 2 else "linear"
    if is_embedding:
        layer_kind = "embedding"
    fits = len(roles) == 1 and len(b.shape) == dimensions and 0 not in (*a.shape, *b.shape)
    fits &= 2 <= dimensions <= (2 if is_embedding else 5)
    fits &= b.shape[1:2] == a.shape[:1] and math.prod(b.shape[2:]) == 1
    if not fits or (magnitude is not None and math.prod(magnitude.shape) != b.shape[0]):
        shapes = f"lora_B {list(b.shape)} and lora_A {list(a.shape)}"
        shapes += f" with magnitudes {list(magnitude.shape)}" if magnitude else ""
        what = "do not multiply to the delta of a layer (of one group, if it is a convolution)"
        raise FormatError(
            f"{where}: module {name!r}: {shapes} {what}; save the adapter again, or use it unmerged"
        )
    rank, *inputs = a.shape
    # PEFT looks up a parameter's rank and alpha by the parameter's name.
    named = rules.targeted_parameters(config, name)
    scaling = config.lora_scaling(f"{name}.weight" if "weight" in named else name, rank)
    if (magnitude is not None) != bool(config.get("use_dora")):
        state = "has magnitudes" if magnitude else "has none"
        raise MismatchError(
            f"{config.path}: module {name!r}: use_dora is {config.get('use_dora')!r}, but the module {state}; use the config that was "
            f"saved with these weights, or, if the config is wrong, set use_dora to {str(magnitude is not None).lower()}"
        )
    lengths = magnitude.name if magnitude else ""
    shape = (b.shape[0], math.prod(inputs))
    return LoraModule(
        name, a.name, b.name, rank, scaling, shape, layer_kind, a.shape[2:], magnitude=lengths
    )


METADATA_KEY = "lora_adapter_metadata"
TRAINERS_KEY = "lora_config"
"""Metadata in which finetrainers states a LoRA config; diffusers does not read it."""

FACTOR_OF_SUFFIX = {
    "lora_A": "A",
    "lora_down": "A",
    "lora_B": "B",
    "lora_up": "B",
    "lora_magnitude_vector": "magnitude",
}


_TEXT_DORA = re.compile(r"^text_encoder.*\.lora_magnitude_vector\b")
_COMPONENT = r"(?:unet|transformer|text_encoder|text_encoder_2)"

NAMINGS = {
    "diffusers'": (
        rf"^(?P<module>{_COMPONENT}\..+)\.(?:(?P<factor>lora_[AB](?=\.)|lora_magnitude_vector)(?:\.weight)?|alpha)$",
        rf"^{_COMPONENT}\..*\.lora_[AB]\.weight$",
    ),
    "kohya's": (
        r"^(?P<module>lora_(?:unet|te|te1|te2)_\w+)\.(?:(?P<factor>lora_down|lora_up)\.weight|alpha)$",
        r"^lora_[a-z0-9]+_\w+\.(?:lora_down|lora_up|lora_mid)\.weight$",
    ),
}
"""Whose names a pipeline's adapter has → patterns of the tensors that it may hold, and of those by which it is recognised."""


class PipelineAdapter(PeftAdapter):
    """A LoRA adapter of a diffusers pipeline: one file, whose header or alphas take the place of the config."""

    def identity(self) -> AdapterIdentity:
        """Digest the whole file."""
        identity: AdapterIdentity = {
            "weights_sha256": self.weights_sha256(),
            "modules": len(self.modules),
        }
        return {**self._stated(), **identity}

    @property
    def configs(self) -> tuple[AdapterConfig, ...]:
        """Return the configs of the components in the metadata."""
        return tuple((_metadata(self.file, self.config.stated) or {}).values())


def _weights_file(path: Path) -> Path | None:
    """Find the only file that may hold a pipeline's adapter: diffusers' name, or the only safetensors file, unless PEFT's files exist."""
    if path.is_file():
        return path if path.suffix == ".safetensors" else None
    if not path.is_dir() or any(
        (path / n).exists() for n in (rules.CONFIG_NAME, rules.WEIGHTS_NAME)
    ):
        return None
    named = path / rules.LORA_NAME
    weights = [named] if named.exists() else [*path.glob("*.safetensors")]
    return weights[0] if len(weights) == 1 else None


def _modules(file: TensorFile, whose: str, stated: Stated) -> dict[str, Module]:
    """Assign every tensor to a module, and refuse the others by name."""
    header = file.header
    pattern, _ = NAMINGS[whose]
    tensors_of: dict[str, dict[str, str]] = {}
    refused = []
    for info in header.tensors:
        match = re.match(pattern, info.name)
        if match and not _TEXT_DORA.match(info.name):
            role = FACTOR_OF_SUFFIX.get(match["factor"], "alpha")
            tensors_of.setdefault(match["module"], {})[role] = info.name
        else:
            refused.append(info.name)
    if refused:
        raise UnsupportedError(
            f"{file.path}: refused: {listed(map(repr, refused), 1)} not supported in {whose} form, only the factors of LoRA on unet, "
            "transformer, text_encoder and text_encoder_2 (DoRA: in diffusers' form, of the first two)"
        )
    _check_pairs(file, tensors_of)
    configs = _configs(file, whose, tensors_of, stated)
    modules: dict[str, Module] = {}
    for name, tensors in tensors_of.items():
        factors = {role: header.by_name[t] for role, t in tensors.items() if role != "alpha"}
        for info in factors.values():
            float_dtype(info, str(file.path))
        unscaled = {"lora_alpha": next(iter(factors["A"].shape), 1)}
        config = configs[name] or AdapterConfig(unscaled, file.path)
        if not header.metadata.get(METADATA_KEY):
            config = replace(config, values={**config.values, "use_dora": "magnitude" in factors})
        bare = name if whose == "kohya's" else name.partition(".")[2]
        modules[name] = replace(lora_module(bare, factors, file.path, config), name=name)
    return modules


def _configs(
    file: TensorFile, whose: str, tensors_of: Mapping[str, Mapping[str, str]], stated: Stated
) -> dict[str, AdapterConfig | None]:
    """Find the config of each module; None where nothing states a scaling, which is then 1.

    Raises
    ------
    FormatError, MismatchError, UnsupportedError
        If alphas and metadata contradict each other, or only some modules have an alpha.
    """
    in_metadata = _metadata(file, stated)
    alphas = {name: tensors["alpha"] for name, tensors in tensors_of.items() if "alpha" in tensors}
    if in_metadata is not None:
        if alphas or whose == "kohya's":
            raise MismatchError(
                f"{file.path}: has both alphas and a LoRA config in its metadata, so its scaling is ambiguous; save it again"
            )
        components = {name: name.partition(".")[0] for name in tensors_of}
        if lacking := [name for name in tensors_of if components[name] not in in_metadata]:
            raise FormatError(
                f"{file.path}: the metadata has no LoRA config of {lacking[0]!r}; save the adapter again"
            )
        return {name: in_metadata[component] for name, component in components.items()}
    if not alphas:
        _refuse_ignored_config(file.path)
        return dict.fromkeys(tensors_of)
    if unscaled := [name for name in tensors_of if name not in alphas]:
        raise FormatError(
            f"{file.path}: {len(alphas)} of its {len(tensors_of)} modules have an alpha, and {unscaled[0]!r} has none: programs "
            "assume different values for it; write an alpha for every module"
        )
    configs: dict[str, AdapterConfig | None] = {}
    for name, tensor in alphas.items():
        alpha = StoredTensor(file, file.header.by_name[tensor])
        dtype = alpha.info.dtype
        shape = alpha.info.shape
        if shape not in ((), (1,)) or not (dtype in FLOATS or dtype.startswith("I")):
            raise FormatError(
                f"{file.path}: {tensor!r}: expected one number, found {dtype} of shape {list(shape)}"
            )
        configs[name] = AdapterConfig({"lora_alpha": float(alpha.whole().item())}, file.path)
    return configs


def _refuse_ignored_config(path: Path) -> None:
    """Refuse a file without a scaling if PEFT's config beside it states another than 1, which diffusers ignores."""
    weights = path.with_name(rules.WEIGHTS_NAME)
    config = path.with_name(rules.CONFIG_NAME)
    if config.is_file() and (path == weights or not weights.exists()):
        values = read_json_object(config)
        patterns = any(map(values.get, ("alpha_pattern", "rank_pattern", "use_rslora")))
        if patterns or values.get("lora_alpha") != values.get("r"):
            raise UnsupportedError(
                f"{path}: states no scaling, and diffusers ignores {config.name} beside it and uses 1; multiply lora_B by that "
                f"and move {config.name} away, or write a LoRA config into the file's metadata"
            )


def _metadata(file: TensorFile, stated: Stated) -> dict[str, AdapterConfig] | None:
    """Read the LoRA config of each component from the metadata, as diffusers (``unet.r`` and so on) or finetrainers writes it."""
    raw = file.header.metadata.get(METADATA_KEY)
    if not raw:
        return _of_trainer(file, stated)
    values: dict[str, dict[str, Any]] = {}
    try:
        for key, value in strict_json(raw.encode()).items():
            component, _, name = key.partition(".")
            values.setdefault(component, {})[name] = value
    except (ValueError, AttributeError) as e:
        problem = f"{METADATA_KEY} of its metadata: expected a JSON object: {e}"
        raise FormatError(f"{file.path}: {problem}; save it again") from None
    configs = {
        component: AdapterConfig(config, file.path, stated) for component, config in values.items()
    }
    for config in configs.values():
        rules.refuse_kinds(config)
    return configs


def _of_trainer(file: TensorFile, stated: Stated) -> dict[str, AdapterConfig] | None:
    """Read the one LoRA config that finetrainers states for all components; None if the key holds anything else, or the file has alphas."""
    names = [info.name for info in file.header.tensors]
    try:
        tree = strict_json(file.header.metadata.get(TRAINERS_KEY, "").encode())
    except ValueError:
        return None
    alphas = any(name.endswith(".alpha") or name.startswith("lora_") for name in names)
    if alphas or not isinstance(tree, dict) or not {"r", "lora_alpha"} <= tree.keys():
        return None
    config = AdapterConfig(tree, file.path, stated)
    rules.refuse_kinds(config)
    return {name.partition(".")[0]: config for name in names}
