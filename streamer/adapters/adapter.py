"""A PEFT adapter folder ↔ low-rank deltas, module by module."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamer.adapters.carried_roles import carried_tensor
from streamer.adapters.config_rules import FACTORS, classify, config_refusals, is_residual, normalize
from streamer.adapters.dora import dora_delta
from streamer.adapters.modules import Carried, LoraModule, MethodModule, Module
from streamer.adapters.peft_methods import METHODS, MethodInputs, PeftMethod
from streamer.adapters.scaling import config_number, finite_scale, scale_of
from streamer.adapters.target_parameters import Wrapped, find_wrapped, targeted_parameters
from streamer.errors import FormatError, InputError, MismatchError, MissingInputError, UnsupportedError
from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Delta, Dense
from streamer.storage.absent import absent
from streamer.storage.checkpoint import checkpoint_identity, read_json_object
from streamer.storage.header import TensorInfo
from streamer.storage.identities import AdapterIdentity
from streamer.storage.tensor_file import IOMode, TensorFile
from streamer.units import listed
from streamer.weights.base import StoredTensor
from streamer.weights.dtypes import encoding_of

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

INSTEAD = "merge such an adapter with PEFT instead"


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk: config, open weights files, its modules by name, wrapped ones, and what it carries besides.

    Attributes
    ----------
    files
        One file; of a fine-tuned model in an adapter's place (see `tuned`) all of its shards.
    config_path
        What `config` was read from, if anything.
    wrapped
        Modules of whose parameters there are factors.
    """

    path: Path
    config: dict[str, Any]
    files: tuple[TensorFile, ...]
    modules: Mapping[str, Module]
    carried: tuple[Carried, ...] = ()
    config_path: Path | None = None
    wrapped: tuple[Wrapped, ...] = ()

    @property
    def file(self) -> TensorFile:
        """The weights file, for messages the first one."""
        return self.files[0]

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor, by name."""
        return {info.name: StoredTensor(file, info) for file in self.files for info in file.header.tensors}

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the config says that the base stores (in, out)."""
        return bool(self.config.get("fan_in_fan_out", False))

    def factor(self, tensor: str, index: tuple[slice, ...] = ()) -> Tensor:
        """A tensor of the file, or a part of it, in its computing dtype; a copy, small."""
        part = self.tensors[tensor]
        return part.whole()[index].to(encoding_of(part.info, str(part.file.path)).compute, copy=True)

    @property
    def is_model(self) -> bool:
        """Whether it is a fine-tuned model in an adapter's place."""
        return self.config_path is None or self.config_path.name != CONFIG_NAME

    def change(self, module: Module, base: Tensor | None) -> Delta:
        """What a module adds to W0, (out, in), which must be given where the module is not of low rank."""
        if isinstance(module, MethodModule):
            W0 = torch.empty(0) if base is None else base
            tensors = {role: self.factor(name) for role, name in module.tensors.items()}
            if base is not None:
                tensors = {
                    role: t.to(base.device, torch.promote_types(t.dtype, base.dtype)) for role, t in tensors.items()
                }
            return METHODS[module.method].delta(MethodInputs(tensors, module.scale, self.config, module.shape), W0)
        if module.magnitude is None:
            return self.delta(module)
        assert base is not None
        return Dense(dora_delta(base, self.delta(module), self.factor(module.magnitude).flatten()))

    def delta(self, module: LoraModule) -> LowRank:
        """``scale · B @ A`` as (out, in) factors: all of a module's delta where that is of low rank."""
        a, b = module.expert_slices
        A, B = self.factor(module.a, a).flatten(1), self.factor(module.b, b).flatten(1)
        return LowRank(A.T * module.scale, B) if module.delta_transposed else LowRank(B * module.scale, A.T)

    def identity(self) -> AdapterIdentity:
        """What tells this adapter from another, wherever it lies: digests of weights and config."""
        if self.is_model:
            files = checkpoint_identity({file.path.name: file for file in self.files})["files"]
            return {"files": files, "modules": len(self.modules)}
        digest = hashlib.sha256(self.file.header.digest.encode())
        for info in self.file.header.tensors:
            for piece in self.file.chunks(info):
                digest.update(piece)
        config = (self.path / CONFIG_NAME).read_bytes()
        identity: AdapterIdentity = {
            "weights_sha256": digest.hexdigest(),
            "config_sha256": hashlib.sha256(config).hexdigest(),
            "modules": len(self.modules),
            "base_model_name_or_path": self.config.get("base_model_name_or_path"),
        }
        # Of a residual base, as the user has stated.
        return {"base_is_residual": True, **identity} if is_residual(self.config) else identity


def open_adapter(path: str | Path, io: IOMode = "mmap", base_is_residual: bool = False) -> Adapter:
    """Open a PEFT adapter's folder and account for every tensor in it.

    Parameters
    ----------
    base_is_residual
        The base that it is used with is the residual that it was trained on.

    Raises
    ------
    UnsupportedError
        If the adapter, or any tensor in it, is of a kind that is not handled; all reasons are named.
    FormatError, InputError
        If files are missing or broken, or tensors and config disagree.
    """
    path = Path(path)
    if path.is_file():
        raise InputError(f"{path}: expected the adapter's directory, found a file; name the one with {CONFIG_NAME}")
    if not path.is_dir():
        raise absent(path, "adapter")
    config = _read_config(path)
    refusals = config_refusals(config, base_is_residual)
    if refusals:
        raise UnsupportedError(f"{path / CONFIG_NAME}: refused: {listed(refusals, separator='; ')}; {INSTEAD}")
    file = TensorFile(path / WEIGHTS_NAME, io)
    method = METHODS.get(str(config.get("peft_type", "LORA")))
    found, rest = _sort(file, method)

    def is_matrix(parameter: str, a: str) -> bool:
        rank = config_number(config, "rank_pattern", "r", parameter, path / CONFIG_NAME)
        return file.header.by_name[a].shape[:1] == (rank,)

    wrapped, wrong = ([], []) if method else find_wrapped(found, config, is_matrix)
    if wrong:
        raise FormatError(f"{file.path}: {listed(wrong, separator='; ')}; config and weights are not of one adapter")
    inner = {name for w in wrapped for name in w.layers}
    modules: dict[str, Module] = {}
    for name, tensors in found.items():
        if name not in inner:
            modules[name] = (
                _module(name, tensors, file, config) if method is None else _method(name, tensors, file, config)
            )
    if not modules and not wrapped:
        what = "lora_A and lora_B" if method is None else method.title
        raise InputError(f"{file.path}: expected {what} tensors, found none; is this the adapter?")
    carried = tuple(
        carried_tensor(role, match, source, modules, file.path, config, path / CONFIG_NAME)
        for role, match, source in rest
    )
    seen: dict[tuple[str, str], str] = {}
    for c in carried:
        other = seen.setdefault((c.role, c.name), c.source)
        if other != c.source:
            raise FormatError(
                f"{file.path}: tensors {other!r} and {c.source!r} both change {c.name!r}; save one adapter at a time"
            )
    return Adapter(path, config, (file,), modules, carried, path / CONFIG_NAME, tuple(wrapped))


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG_NAME).exists():
        if (path / "config.json").exists():
            raise InputError(
                f"{path}: has no {CONFIG_NAME} but a config.json: it looks like a model; the order is BASE ADAPTER"
            )
        inside = listed(sorted(repr(p.parent.name) for p in path.glob(f"*/{CONFIG_NAME}")))
        what = f"name one of the adapters in it: {inside}" if inside else "is this a PEFT adapter?"
        raise MissingInputError(f"{path}: expected {CONFIG_NAME}, found none; {what}", path / CONFIG_NAME)
    if not (path / WEIGHTS_NAME).exists():
        if (path / "adapter_model.bin").exists():
            raise UnsupportedError(
                f"{path}: has adapter_model.bin, a pickle, which can run code when read; load it with PEFT where you trust it "
                f"and save it again with save_pretrained, which writes {WEIGHTS_NAME}"
            )
        raise MissingInputError(
            f"{path}: expected {WEIGHTS_NAME}, found none; finish the download", path / WEIGHTS_NAME
        )
    return read_json_object(path / CONFIG_NAME)


def _sort(
    file: TensorFile, method: PeftMethod | None
) -> tuple[dict[str, dict[str, str]], list[tuple[str, re.Match[str], str]]]:
    """Every tensor by its role: module → role → tensor, and (role, match, tensor) of those that are carried along."""
    found: dict[str, dict[str, str]] = {}
    shared: dict[str, str] = {}
    rest: list[tuple[str, re.Match[str], str]] = []
    refused: Counter[str] = Counter()
    example: dict[str, str] = {}
    own = method and re.compile(rf"^(?P<module>.+)\.(?P<factor>{method.roles})(?:\.[^.]+)?(?:\.weight)?$")
    for info in file.header.tensors:
        name = normalize(info.name)
        match = own and own.match(name)
        if method is not None and (role := name.rpartition(".")[2]) in method.shared:
            shared[role] = info.name
            continue
        if match:
            factor = match["factor"]
        else:
            rule, match = classify(name)
            if rule.refusal or (method is not None and rule.role in FACTORS):
                reason = rule.refusal or "another method's tensors"
                refused[reason] += 1
                example.setdefault(reason, info.name)
                continue
            if rule.role not in FACTORS:
                rest.append((rule.role, match, info.name))
                continue
            factor = "magnitude" if rule.role == "magnitude" else match["factor"]
        factors = found.setdefault(match["module"], {})
        if factor in factors:
            raise FormatError(
                f"{file.path}: tensors {factors[factor]!r} and {info.name!r} are the same factor of one module; save one adapter at a time"
            )
        factors[factor] = info.name
    if refused:
        kinds = [f"{n} × {reason}, {example[reason]!r} first" for reason, n in refused.items()]
        raise UnsupportedError(f"{file.path}: refused: not supported: {listed(kinds, separator='; ')}; {INSTEAD}")
    for name, factors in found.items():
        missing = {"A", "B"} - factors.keys()
        if method is None and missing:
            have = ", ".join(f"lora_{f}" if f in "AB" else "a magnitude" for f in factors)
            raise FormatError(f"{file.path}: module {name!r} has {have} but not its partner; save the adapter again")
    return {name: {**factors, **shared} for name, factors in found.items()}, rest


def _method(name: str, tensors: Mapping[str, str], file: TensorFile, config: Mapping[str, Any]) -> MethodModule:
    """A module of another method than LoRA."""
    key = str(config["peft_type"])
    infos = {role: file.header.by_name[tensor] for role, tensor in tensors.items()}
    for info in infos.values():
        encoding_of(info, str(file.path))
    shapes = {role: info.shape for role, info in infos.items()}
    where = file.path.with_name(CONFIG_NAME)
    rank, scale = 0, 1.0
    if METHODS[key].scaled:
        rank = int(config_number(config, "rank_pattern", "r", name, where))
        scale = finite_scale(
            config_number(config, "alpha_pattern", "alpha", name, where) / rank if rank else 0.0, name, where
        )
    return MethodModule(name, key, dict(tensors), shapes, rank, scale)


def _module(name: str, factors: Mapping[str, str], file: TensorFile, config: Mapping[str, Any]) -> LoraModule:
    a, b = file.header.by_name[factors["A"]], file.header.by_name[factors["B"]]
    for info in (a, b):
        encoding_of(info, str(file.path))
    form = _form(name, a, b, file.path)
    rank = a.shape[0]
    if b.shape[1] != rank or math.prod((*a.shape, *b.shape)) == 0:
        raise FormatError(
            f"{file.path}: module {name!r}: lora_B {list(b.shape)} and lora_A {list(a.shape)} do not multiply; save the adapter again"
        )
    where = file.path.with_name(CONFIG_NAME)
    # PEFT looks a parameter's rank and alpha up by the parameter's name.
    scale = scale_of(f"{name}.weight" if targeted_parameters(config, name) else name, rank, config, where)
    shape = (b.shape[0], math.prod(a.shape[1:]))
    magnitude = factors.get("magnitude")
    if (magnitude is not None) != bool(config.get("use_dora")):
        found = "has magnitudes" if magnitude else "has none"
        raise MismatchError(
            f"{where}: module {name!r}: use_dora is {config.get('use_dora')!r}, but the module {found}; "
            "config and weights are not of one adapter"
        )
    if magnitude is not None:
        m = file.header.by_name[magnitude]
        encoding_of(m, str(file.path))
        if math.prod(m.shape) != b.shape[0]:
            raise FormatError(
                f"{file.path}: module {name!r}: expected {b.shape[0]} magnitudes, found {list(m.shape)}; save the adapter again"
            )
    return LoraModule(name, a.name, b.name, rank, scale, shape, form, a.shape[2:], magnitude)


def _form(name: str, a: TensorInfo, b: TensorInfo, where: Path) -> str:
    """What kind of layer the factors are of, by their names and dimensions."""
    by_name = {classify(normalize(info.name))[0].role for info in (a, b)}
    dimensions = len(a.shape)
    if len(b.shape) != dimensions or not 2 <= dimensions <= 5 or len(by_name) != 1:
        raise FormatError(
            f"{where}: module {name!r}: lora_B {list(b.shape)} and lora_A {list(a.shape)} are not of one layer; save the adapter again"
        )
    if dimensions == 2:
        return "embedding" if by_name == {"embedding"} else "linear"
    if math.prod(b.shape[2:]) != 1 or by_name == {"embedding"}:
        raise UnsupportedError(
            f"{where}: refused: module {name!r}: lora_B {list(b.shape)} is not a convolution of kernel size 1; {INSTEAD}"
        )
    if b.shape[1] != a.shape[0] and b.shape[1] and a.shape[0] % b.shape[1] == 0:
        raise UnsupportedError(
            f"{where}: refused: module {name!r}: LoRA on a convolution with {a.shape[0] // b.shape[1]} groups, "
            f"whose delta is not the product of its factors; {INSTEAD}"
        )
    return "convolution"
