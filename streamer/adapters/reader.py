"""Open an adapter, PEFT's directory or a pipeline's one file with diffusers' or kohya's names; assign every tensor, or refuse it.

The latter are one safetensors file without a config beside it. diffusers names a module by its component and its path in it, with the
factors ``lora_A`` and ``lora_B``; kohya joins both with underscores and calls the factors ``lora_down`` and ``lora_up``:
``unet.down_blocks.0.attentions.0.proj_in`` is ``lora_unet_down_blocks_0_attentions_0_proj_in``. Which tensor of the base a name means is
decided in `plan.pipeline_names`.

A module's scaling is ``alpha/rank`` by its ``.alpha`` tensor, 1 if the file has none, or follows the LoRA config that diffusers writes into
the file's metadata.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamer.adapters.adapter import FACTORS, Carried, PeftAdapter, carried_tensor, classify, no_indices, normalize
from streamer.adapters.adapter_config import (
    CONFIG_NAME,
    LORA_NAME,
    NOTHING_STATED,
    WEIGHTS_NAME,
    AdapterConfig,
    Stated,
    find_wrapped,
    read_adapter_config,
    targeted_parameters,
)
from streamer.adapters.modules import METHODS, DoraModule, LoraModule, MethodModule, Module, PeftMethod
from streamer.adapters.rules import INSTEAD, refuse_kinds, refuse_other_formats
from streamer.errors import FormatError, InputError, MismatchError, UnsupportedError
from streamer.storage.checkpoint import read_json_object
from streamer.storage.files import AdapterIdentity, absent, strict_json
from streamer.storage.header import TensorInfo
from streamer.storage.tensor_file import IOMode, TensorFile
from streamer.units import listed
from streamer.weights.base import ENCODINGS, StoredTensor, encoding_of, equal


def open_adapter(path: str | Path, io: IOMode = "mmap", stated: Stated = NOTHING_STATED) -> PeftAdapter:
    """Open a PEFT adapter's directory and account for every tensor in it.

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
    if path.exists() and not ((path / CONFIG_NAME).exists() and (path / WEIGHTS_NAME).exists()):
        refuse_other_formats(path)
    if path.is_file():
        raise InputError(
            f"{path}: expected the directory with {CONFIG_NAME}, or a pipeline's LoRA with names such as unet.… or "
            "lora_unet_…; found another file"
        )
    if not path.is_dir():
        raise absent(path, "adapter")
    config = read_adapter_config(path, stated)
    refuse_kinds(config)
    return sorted_adapter(path, config, TensorFile(path / WEIGHTS_NAME, io))


def sorted_adapter(path: Path, config: AdapterConfig, file: TensorFile) -> PeftAdapter:
    """Account for every tensor of an adapter; raises the same errors as `open_adapter`.

    Parameters
    ----------
    file
        The adapter's tensors, under the names that PEFT saves.
    """
    method = METHODS.get(str(config.peft_type))
    found, rest = _sort(file, method)

    def is_matrix(parameter: str, a: str) -> bool:
        return file.header.by_name[a].shape[:1] == (config.number("rank_pattern", "r", parameter),)

    wrapped, wrong = ([], []) if method else find_wrapped(found, config, is_matrix)
    if wrong:
        what = listed(wrong, separator="; ")
        raise FormatError(f"{file.path}: {what}; config and weights belong to different adapters")
    inner = {name for w in wrapped for name in w.layers}
    modules: dict[str, Module] = {}
    for name, tensors in ((name, tensors) for name, tensors in found.items() if name not in inner):
        infos = {role: file.header.by_name[tensor] for role, tensor in tensors.items()}
        for info in infos.values():
            encoding_of(info, str(file.path))
        if method is None:
            modules[name] = lora_module(name, infos, file.path, config)
        else:
            rank, scaling = config.method_scaling(name) if method.scaled else (0, 1.0)
            shapes = {role: info.shape for role, info in infos.items()}
            modules[name] = MethodModule(name, method, config, dict(tensors), shapes, rank, scaling)
    if not modules and not wrapped:
        refuse_other_formats(file.path)
        what = "lora_A and lora_B" if method is None else method.title
        raise InputError(f"{file.path}: expected {what} tensors, found none; is this the adapter?")
    others = [carried_tensor(role, match, source, modules, file.path, config) for role, match, source in rest]
    carried = _with_indices(file, _without_copies(file, others), config)
    return PeftAdapter(path, config, (file,), modules, carried, tuple(wrapped))


def _without_copies(file: TensorFile, carried: Iterable[Carried]) -> tuple[Carried, ...]:
    """Drop the copies that PEFT writes beside a saved module: tensors ending in ``bias``, and those below a resized embedding.

    ``score.modules_to_save.bias`` and ``embed_tokens.modules_to_save.weight`` are dropped if ``score.bias`` and
    ``embed_tokens.weight`` have the same bytes: PEFT looks for the latter names.
    """
    kept: dict[tuple[str, str], Carried] = {}
    for c in carried:
        other = kept.get((c.role, c.name), c)
        if other is not c and not equal(*(StoredTensor(file, file.header.by_name[one.source]) for one in (other, c))):
            both = f"tensors {other.source!r} and {c.source!r} both change {c.name!r}"
            raise FormatError(f"{file.path}: {both}; save one adapter at a time")
        kept[c.role, c.name] = min(other, c, key=lambda one: len(one.source))
    return tuple(kept.values())


def _with_indices(file: TensorFile, carried: Sequence[Carried], config: AdapterConfig) -> tuple[Carried, ...]:
    """Give trained tokens that the config does not name the rows of tokens with the same bytes: PEFT saves those of a tied head, too."""
    tokens = {c: StoredTensor(file, file.header.by_name[c.source]) for c in carried if c.role == "tokens"}

    def indices(c: Carried) -> tuple[int, ...]:
        stated = (one.indices for one, values in tokens.items() if one.indices and equal(values, tokens[c]))
        if found := c.indices or next(stated, ()):
            return found
        raise no_indices(config, c.module, None)

    return tuple(replace(c, indices=indices(c)) if c in tokens else c for c in carried)


def _sort(
    file: TensorFile, method: PeftMethod | None
) -> tuple[dict[str, dict[str, str]], list[tuple[str, re.Match[str], str]]]:
    """Sort every tensor by role: module → role → tensor, and (role, match, tensor) for carried tensors."""
    found: dict[str, dict[str, str]] = {}
    shared: dict[str, str] = {}
    rest: list[tuple[str, re.Match[str], str]] = []
    refused: list[str] = []
    own = method and re.compile(rf"^(?P<module>.+)\.(?P<factor>{method.roles})(?:\.[^.]+)?(?:\.weight)?$")
    names = {normalize(name) for name in file.header.by_name}
    for info in file.header.tensors:
        name = normalize(info.name)
        # Until version 0.17, PEFT wrote copies of biases below a saved module, without the adapter's name.
        name = plain if (plain := name.replace(".modules_to_save.", ".")) in names else name
        match = own and own.match(name)
        if method is not None and (last := name.rpartition(".")[2]) in method.shared:
            shared[last] = info.name
            continue
        if match:
            factor = match["factor"]
        else:
            role, match = classify(name)
            if role == "other" or (method is not None and role in FACTORS):
                refused.append(info.name)
                continue
            if role not in FACTORS:
                rest.append((role, match, info.name))
                continue
            factor = "magnitude" if role == "magnitude" else match["factor"]
        factors = found.setdefault(match["module"], {})
        if factor in factors:
            both = f"tensors {factors[factor]!r} and {info.name!r} are the same factor of one module"
            raise FormatError(f"{file.path}: {both}; save one adapter at a time")
        factors[factor] = info.name
    if refused:
        refuse_other_formats(file.path)
        what = f"{listed(map(repr, refused), 1)} of another method or of unknown meaning"
        raise UnsupportedError(f"{file.path}: refused: {what}; {INSTEAD}")
    for name, factors in found.items():
        missing = {"A", "B"} - factors.keys()
        if method is None and missing:
            have = ", ".join(f"lora_{f}" if f in "AB" else "a magnitude" for f in factors)
            raise FormatError(f"{file.path}: module {name!r} has {have} but not its partner; save the adapter again")
    return {name: {**factors, **shared} for name, factors in found.items()}, rest


def lora_module(name: str, factors: Mapping[str, TensorInfo], where: Path, config: AdapterConfig) -> LoraModule:
    """Make a module from the tensors of its factors, by role; `where` is the weights file, for messages."""
    a, b, magnitude = factors["A"], factors["B"], factors.get("magnitude")
    roles, dimensions = {classify(normalize(info.name))[0] for info in (a, b)}, len(a.shape)
    layer_kind = "embedding" if roles == {"embedding"} else "convolution" if dimensions > 2 else "linear"
    most = 2 if layer_kind == "embedding" else 5
    alike = len(roles) == 1 and len(b.shape) == dimensions and 2 <= dimensions <= most
    if not alike or b.shape[1] != a.shape[0] or math.prod(b.shape[2:]) != 1 or 0 in (*a.shape, *b.shape):
        raise FormatError(
            f"{where}: module {name!r}: lora_B {list(b.shape)} and lora_A {list(a.shape)} do not multiply to the delta of a layer "
            "(of one group, if it is a convolution); save the adapter again, or use it unmerged"
        )
    rank = a.shape[0]
    # PEFT looks up a parameter's rank and alpha by the parameter's name.
    scaling = config.lora_scaling(f"{name}.weight" if "weight" in targeted_parameters(config, name) else name, rank)
    shape = (b.shape[0], math.prod(a.shape[1:]))
    if (magnitude is not None) != bool(config.get("use_dora")):
        found = "has magnitudes" if magnitude else "has none"
        raise MismatchError(
            f"{config.path}: module {name!r}: use_dora is {config.get('use_dora')!r}, but the module {found}; use the config that was "
            f"saved with these weights, or, if the config is wrong, set use_dora to {str(magnitude is not None).lower()}"
        )
    if magnitude is None:
        return LoraModule(name, a.name, b.name, rank, scaling, shape, layer_kind, a.shape[2:])
    if math.prod(magnitude.shape) != b.shape[0]:
        raise FormatError(
            f"{where}: module {name!r}: expected {b.shape[0]} magnitudes, found {list(magnitude.shape)}; save the adapter again"
        )
    return DoraModule(name, a.name, b.name, rank, scaling, shape, layer_kind, a.shape[2:], magnitude=magnitude.name)


METADATA_KEY = "lora_adapter_metadata"
TRAINERS_KEY = "lora_config"
"""Metadata in which finetrainers states a LoRA config; diffusers does not read it."""

FACTOR = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B", "lora_magnitude_vector": "magnitude"}


@dataclass(frozen=True)
class Naming:
    """Patterns of the tensors that an adapter may hold, and of those by which it is recognised."""

    title: str
    tensor: re.Pattern[str]
    recognised: re.Pattern[str]


_TEXT_DORA = re.compile(r"^text_encoder.*\.lora_magnitude_vector\b")
_COMPONENT = r"(?:unet|transformer|text_encoder|text_encoder_2)"

NAMINGS = (
    Naming("diffusers'",
             re.compile(rf"^(?P<module>{_COMPONENT}\..+)\.(?:(?P<factor>lora_[AB](?=\.)|lora_magnitude_vector)(?:\.weight)?|alpha)$"),
             re.compile(rf"^{_COMPONENT}\..*\.lora_[AB]\.weight$")),
    Naming("kohya's", re.compile(r"^(?P<module>lora_(?:unet|te|te1|te2)_\w+)\.(?:(?P<factor>lora_down|lora_up)\.weight|alpha)$"),
             re.compile(r"^lora_[a-z0-9]+_\w+\.(?:lora_down|lora_up|lora_mid)\.weight$")),
)  # fmt: skip


class PipelineAdapter(PeftAdapter):
    """A LoRA adapter of a diffusers pipeline: one file, whose header or alphas take the place of the config."""

    def identity(self) -> AdapterIdentity:
        """Digest the whole file."""
        identity: AdapterIdentity = {"weights_sha256": self.weights_sha256(), "modules": len(self.modules)}
        return {**self._stated(), **identity}

    @property
    def configs(self) -> tuple[AdapterConfig, ...]:
        """Return the configs of the components in the metadata."""
        return tuple((_metadata(self.file, self.config.stated) or {}).values())

    @property
    def config_paths(self) -> tuple[Path, ...]:
        """Return nothing: there is no config beside the weights."""
        return ()


def open_lora(path: str | Path, io: IOMode = "mmap", stated: Stated = NOTHING_STATED) -> PeftAdapter:
    """Open an adapter: of a pipeline by its tensor names, else PEFT's directory; see `open_adapter`."""
    path = Path(path)
    if (file := _weights_file(path)) is not None:
        try:
            opened = TensorFile(file, io)
        except InputError:
            if path.is_file():
                raise
            return open_adapter(path, io, stated)
        names = [info.name for info in opened.header.tensors]
        naming = next((one for one in NAMINGS if any(map(one.recognised.search, names))), None)
        if naming is not None:
            return PipelineAdapter(path, AdapterConfig({}, file, stated), (opened,), _modules(opened, naming, stated))
        opened.close()
    return open_adapter(path, io, stated)


def _weights_file(path: Path) -> Path | None:
    """Find the only file that may hold a pipeline's adapter: diffusers' name, or the only safetensors file, unless PEFT's files exist."""
    if path.is_file():
        return path if path.suffix == ".safetensors" else None
    if not path.is_dir() or (path / CONFIG_NAME).exists() or (path / WEIGHTS_NAME).exists():
        return None
    if (path / LORA_NAME).exists():
        return path / LORA_NAME
    found = list(path.glob("*.safetensors"))
    return found[0] if len(found) == 1 else None


def _modules(file: TensorFile, naming: Naming, stated: Stated) -> dict[str, Module]:
    """Assign every tensor to a module, and refuse the others by name."""
    found: dict[str, dict[str, str]] = {}
    others = []
    for info in file.header.tensors:
        match = naming.tensor.match(info.name)
        if match and not _TEXT_DORA.match(info.name):
            found.setdefault(match["module"], {})[FACTOR.get(match["factor"], "alpha")] = info.name
        else:
            others.append(info.name)
    if others:
        raise UnsupportedError(
            f"{file.path}: refused: {listed(map(repr, others), 1)} not supported in {naming.title} form, only the factors of LoRA on unet, "
            "transformer, text_encoder and text_encoder_2 (DoRA: in diffusers' form, of the first two)"
        )
    for name, tensors in found.items():
        if missing := {"A", "B"} - tensors.keys():
            have = f"{listed(map(repr, tensors.values()))} but no factor {missing.pop()}"
            raise FormatError(f"{file.path}: module {name!r} has {have}; save the adapter again")
    configs = _configs(file, naming, found, stated)
    modules: dict[str, Module] = {}
    for name, tensors in found.items():
        factors = {role: file.header.by_name[tensor] for role, tensor in tensors.items() if role != "alpha"}
        for info in factors.values():
            encoding_of(info, str(file.path))
        unscaled = {"lora_alpha": factors["A"].shape[0] if factors["A"].shape else 1}
        config = configs[name] or AdapterConfig(unscaled, file.path)
        if not file.header.metadata.get(METADATA_KEY):
            config = replace(config, values={**config.values, "use_dora": "magnitude" in factors})
        bare = name if naming.title == "kohya's" else name.partition(".")[2]
        modules[name] = replace(lora_module(bare, factors, file.path, config), name=name)
    return modules


def _configs(
    file: TensorFile, naming: Naming, found: Mapping[str, Mapping[str, str]], stated: Stated
) -> dict[str, AdapterConfig | None]:
    """Find the config of each module; None where nothing states a scaling, which is then 1.

    Raises
    ------
    FormatError, MismatchError, UnsupportedError
        If alphas and metadata contradict each other, or only some modules have an alpha.
    """
    in_metadata = _metadata(file, stated)
    alphas = {name: tensors["alpha"] for name, tensors in found.items() if "alpha" in tensors}
    if in_metadata is not None:
        if alphas or naming.title == "kohya's":
            both = "has both alphas and a LoRA config in its metadata, so its scaling is ambiguous"
            raise MismatchError(f"{file.path}: {both}; save it again")
        if lacking := [name for name in found if name.partition(".")[0] not in in_metadata]:
            raise FormatError(f"{file.path}: the metadata has no LoRA config of {lacking[0]!r}; save the adapter again")
        return {name: in_metadata[name.partition(".")[0]] for name in found}
    beside = file.path.with_name(CONFIG_NAME)
    own = file.path.name == WEIGHTS_NAME or not file.path.with_name(WEIGHTS_NAME).exists()
    if not alphas and own and beside.is_file():
        stated_there = read_json_object(beside)
        patterns = any(stated_there.get(key) for key in ("alpha_pattern", "rank_pattern", "use_rslora"))
        if stated_there.get("lora_alpha") != stated_there.get("r") or patterns:
            raise UnsupportedError(
                f"{file.path}: states no scaling, and diffusers ignores {beside.name} beside it and uses 1; multiply lora_B by that and "
                f"move {beside.name} away, or write a LoRA config into the file's metadata"
            )
    if alphas and len(alphas) < len(found):
        raise FormatError(
            f"{file.path}: {len(alphas)} of its {len(found)} modules have an alpha, and {next(n for n in found if n not in alphas)!r} has "
            "none: programs assume different values for it; write an alpha for every module"
        )
    configs: dict[str, AdapterConfig | None] = dict.fromkeys(found)
    for name, tensor in alphas.items():
        alpha = StoredTensor(file, file.header.by_name[tensor])
        dtype, shape = alpha.info.dtype, alpha.info.shape
        if shape not in ((), (1,)) or not (dtype in ENCODINGS or dtype.startswith("I")):
            raise FormatError(f"{file.path}: {tensor!r}: expected one number, found {dtype} of shape {list(shape)}")
        configs[name] = AdapterConfig({"lora_alpha": float(alpha.whole().item())}, file.path)
    return configs


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
        what = f"{METADATA_KEY} of its metadata: expected a JSON object: {e}"
        raise FormatError(f"{file.path}: {what}; save it again") from None
    configs = {component: AdapterConfig(own, file.path, stated) for component, own in values.items()}
    for config in configs.values():
        refuse_kinds(config)
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
    refuse_kinds(config)
    return {name.partition(".")[0]: config for name in names}
