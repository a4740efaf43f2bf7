"""Read a PEFT adapter's directory: assign every tensor to a module and role, or refuse it by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from streamer.adapters.adapter import PeftAdapter
from streamer.adapters.adapter_config import (
    CONFIG_NAME,
    NOTHING_STATED,
    WEIGHTS_NAME,
    AdapterConfig,
    Stated,
    read_adapter_config,
)
from streamer.adapters.modules import DoraModule, LoraModule, MethodModule, Module
from streamer.adapters.peft_methods import METHODS, PeftMethod
from streamer.adapters.rules import INSTEAD, refuse_kinds, refuse_other_formats
from streamer.adapters.target_parameters import find_wrapped, targeted_parameters
from streamer.adapters.tensor_names import FACTORS, Carried, carried_tensor, classify, no_indices, normalize
from streamer.errors import FormatError, InputError, MismatchError, UnsupportedError
from streamer.storage.files import absent
from streamer.storage.header import TensorInfo
from streamer.storage.tensor_file import IOMode, TensorFile
from streamer.units import listed
from streamer.weights.base import StoredTensor, equal
from streamer.weights.dtypes import encoding_of


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
        raise FormatError(
            f"{file.path}: {listed(wrong, separator='; ')}; config and weights belong to different adapters"
        )
    inner = {name for w in wrapped for name in w.layers}
    modules: dict[str, Module] = {}
    for name, tensors in found.items():
        if name in inner:
            continue
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
    carried = _without_copies(
        file, [carried_tensor(role, match, source, modules, file.path, config) for role, match, source in rest]
    )
    carried = _with_indices(file, carried, config)
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
            raise FormatError(
                f"{file.path}: tensors {other.source!r} and {c.source!r} both change {c.name!r}; save one adapter at a time"
            )
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
            raise FormatError(
                f"{file.path}: tensors {factors[factor]!r} and {info.name!r} are the same factor of one module; save one adapter at a time"
            )
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
    alike = (
        len(roles) == 1 and len(b.shape) == dimensions and 2 <= dimensions <= (2 if layer_kind == "embedding" else 5)
    )
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
