"""A PEFT adapter folder ↔ low-rank deltas, module by module."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from streamer.dora import dora_delta
from streamer.encodings import as_tensor, encoding_of
from streamer.errors import FormatError, InputError, MismatchError, UnsupportedError
from streamer.kinds import classify, config_refusals, normalize
from streamer.linalg.operators import Dense, LowRank
from streamer.patterns import first_match
from streamer.storage.checkpoint import read_json_object
from streamer.storage.header import TensorInfo
from streamer.storage.tensorfile import IOMode, TensorFile

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

INSTEAD = "merge such an adapter with PEFT instead"


@dataclass(frozen=True)
class LoraModule:
    """One adapted module: ``Δ = scale · B @ A``.

    Attributes
    ----------
    name
        Its path in the model, wrappers removed.
    a, b
        Names of lora_A (rank, in) and lora_B (out, rank) in the adapter's file. A convolution's have the dimensions of its kernel
        besides, those of lora_B of size 1.
    rank, scale
        Rows of lora_A; ``alpha/r``, or ``alpha/√r`` with rsLoRA.
    shape
        (out, in) of Δ as a matrix: (dim, vocabulary) for an embedding, (out, in·k) for a convolution with k elements in its kernel.
    form
        ``linear``, ``embedding`` or ``convolution``.
    kernel
        The kernel's dimensions.
    magnitude
        DoRA's magnitudes in the adapter's file; without them the delta is of low rank.
    """

    name: str
    a: str
    b: str
    rank: int
    scale: float
    shape: tuple[int, int]
    form: str = "linear"
    kernel: tuple[int, ...] = ()
    magnitude: str | None = None

    @property
    def low_rank(self) -> bool:
        """Whether Δ is the product of the factors and nothing else."""
        return self.magnitude is None

    @property
    def weight(self) -> tuple[int, ...]:
        """The shape of the weight in the model, unless it is a linear layer's that is stored (in, out)."""
        m, n = self.shape
        if self.form == "embedding":
            return n, m
        return (m, n // math.prod(self.kernel), *self.kernel)


@dataclass(frozen=True)
class Carried:
    """A tensor of the adapter that is no factor: what it does to one tensor of the model.

    Attributes
    ----------
    role
        ``saved``: takes the tensor's place. ``lora_bias``: is added to it, times `scale`. ``tokens``: takes the place of the rows
        that `indices` name. ``original``: the base's own values, of no effect.
    module, parameter
        The tensor's name in the model: ``module.parameter``.
    source
        Its name in the adapter's file.
    """

    role: str
    module: str
    parameter: str
    source: str
    scale: float = 1.0
    indices: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The name of the model's tensor."""
        return f"{self.module}.{self.parameter}"


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk: config, open weights file, its modules by name, and what it carries besides."""

    path: Path
    config: dict[str, Any]
    file: TensorFile
    modules: dict[str, LoraModule]
    carried: tuple[Carried, ...] = ()

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the config says that the base stores (in, out)."""
        return bool(self.config.get("fan_in_fan_out", False))

    def factor(self, tensor: str) -> Tensor:
        """A tensor of the file in its computing dtype; a copy, small."""
        info = self.file.header.by_name[tensor]
        encoding = encoding_of(info, str(self.file.path))
        return as_tensor(self.file.view(info), encoding.dtype, info.shape).to(encoding.compute, copy=True)

    def dense_delta(self, module: LoraModule, base: Tensor) -> Dense:
        """What a module that is not of low rank adds to its base, W0 (out, in)."""
        assert module.magnitude is not None
        return Dense(dora_delta(base, self.delta(module), self.factor(module.magnitude).flatten()))

    def delta(self, module: LoraModule) -> LowRank:
        """``scale · B @ A`` as (out, in) factors: all of a module's delta where that is of low rank."""
        return LowRank(self.factor(module.b).flatten(1) * module.scale, self.factor(module.a).flatten(1).T)

    def identity(self) -> dict[str, Any]:
        """What tells this adapter from another, wherever it lies: digests of weights and config."""
        digest = hashlib.sha256(self.file.header.digest.encode())
        for info in self.file.header.tensors:
            for piece in self.file.chunks(info):
                digest.update(piece)
        config = (self.path / CONFIG_NAME).read_bytes()
        return {
            "weights_sha256": digest.hexdigest(),
            "config_sha256": hashlib.sha256(config).hexdigest(),
            "modules": len(self.modules),
            "base_model_name_or_path": self.config.get("base_model_name_or_path"),
        }


def open_adapter(path: str | Path, io: IOMode = "mmap") -> Adapter:
    """Open a PEFT LoRA folder and account for every tensor in it.

    Raises
    ------
    UnsupportedError
        If the adapter, or any tensor in it, is of a kind that is not handled; all reasons are named.
    FormatError, InputError
        If files are missing or broken, or tensors and config disagree.
    """
    path = Path(path)
    if path.is_file():
        raise InputError(
            f"{path}: expected the adapter's directory, found a file; name the directory that holds {CONFIG_NAME}"
        )
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; check the path of the adapter")
    config = _read_config(path)
    refusals = config_refusals(config)
    if refusals:
        raise UnsupportedError(f"{path / CONFIG_NAME}: refused: {'; '.join(refusals)}; {INSTEAD}")
    file = TensorFile(path / WEIGHTS_NAME, io)
    pairs, rest = _sort(file)
    modules = {name: _module(name, found, file, config) for name, found in pairs.items()}
    if not modules:
        raise InputError(f"{file.path}: expected lora_A and lora_B tensors, found none; is this the adapter?")
    carried = tuple(_carried(role, match, source, modules, file, config) for role, match, source in rest)
    seen: dict[tuple[str, str], str] = {}
    for c in carried:
        other = seen.setdefault((c.role, c.name), c.source)
        if other != c.source:
            raise FormatError(
                f"{file.path}: tensors {other!r} and {c.source!r} both change {c.name!r}; save one adapter at a time"
            )
    return Adapter(path, config, file, modules, carried)


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG_NAME).exists():
        if (path / "config.json").exists():
            raise InputError(
                f"{path}: has no {CONFIG_NAME} but a config.json: it looks like a model; the order is BASE ADAPTER"
            )
        raise InputError(f"{path}: expected {CONFIG_NAME}, found none; is this a PEFT adapter?")
    if not (path / WEIGHTS_NAME).exists():
        if (path / "adapter_model.bin").exists():
            raise UnsupportedError(
                f"{path}: has adapter_model.bin, a pickle, which can run code when read; load it with PEFT where you trust it "
                f"and save it again with save_pretrained, which writes {WEIGHTS_NAME}"
            )
        raise InputError(f"{path}: expected {WEIGHTS_NAME}, found none; finish the download")
    return read_json_object(path / CONFIG_NAME)


def _sort(file: TensorFile) -> tuple[dict[str, dict[str, str]], list[tuple[str, re.Match[str], str]]]:
    """Every tensor by its role: module name → {"A": tensor, "B": tensor}, and (role, match, tensor) of those that are no factors."""
    pairs: dict[str, dict[str, str]] = {}
    rest: list[tuple[str, re.Match[str], str]] = []
    refused: Counter[str] = Counter()
    example: dict[str, str] = {}
    for info in file.header.tensors:
        rule, match = classify(normalize(info.name))
        if rule.refusal:
            refused[rule.refusal] += 1
            example.setdefault(rule.refusal, info.name)
            continue
        if rule.role not in ("factor", "embedding", "magnitude"):
            rest.append((rule.role, match, info.name))
            continue
        factors = pairs.setdefault(match["module"], {})
        factor = "magnitude" if rule.role == "magnitude" else match["factor"]
        if factor in factors:
            raise FormatError(
                f"{file.path}: tensors {factors[factor]!r} and {info.name!r} are the same factor of one module; save one adapter at a time"
            )
        factors[factor] = info.name
    if refused:
        listed = "; ".join(f"{n} × {reason}, {example[reason]!r} first" for reason, n in refused.items())
        raise UnsupportedError(f"{file.path}: refused: not supported: {listed}; {INSTEAD}")
    for name, factors in pairs.items():
        missing = {"A", "B"} - factors.keys()
        if missing:
            have = ", ".join(f"lora_{f}" if f in "AB" else "a magnitude" for f in factors)
            raise FormatError(f"{file.path}: module {name!r} has {have} but not its partner; save the adapter again")
    return pairs, rest


def _carried(
    role: str,
    match: re.Match[str],
    source: str,
    modules: Mapping[str, LoraModule],
    file: TensorFile,
    config: Mapping[str, Any],
) -> Carried:
    groups = match.groupdict()
    module = groups.get("module") or source
    if role == "lora_bias":
        if module not in modules:
            raise FormatError(f"{file.path}: {source!r} has no lora_A and lora_B beside it; save the adapter again")
        return Carried(role, module, "bias", source, modules[module].scale)
    if role == "tokens":
        return Carried(
            role, module, "weight", source, indices=_token_indices(config, module, file.path.with_name(CONFIG_NAME))
        )
    return Carried(role, module, groups.get("parameter") or "weight", source)


def _token_indices(config: Mapping[str, Any], module: str, where: Path) -> tuple[int, ...]:
    """The rows that trained tokens replace: PEFT stores them in the config, for the input embedding or by module."""
    stated = config.get("trainable_token_indices")
    if isinstance(stated, dict):
        stated = next((v for key, v in stated.items() if f".{module}".endswith(f".{key}")), None)
    numbers = [i for i in stated if type(i) is int and i >= 0] if isinstance(stated, list) else []
    if not numbers or numbers != stated or len(set(numbers)) != len(numbers):
        raise FormatError(
            f"{where}: trainable_token_indices: expected the rows of {module!r} as different numbers, found {stated!r}"
        )
    return tuple(numbers)


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
    stated = _number(config, "rank_pattern", "r", name, where, default=rank)
    if stated != rank:
        raise MismatchError(
            f"{where}: module {name!r}: expected rank {stated:g} by the config, found {rank} rows in lora_A; "
            "config and weights are not of one adapter"
        )
    alpha = _number(config, "alpha_pattern", "lora_alpha", name, where)
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    if not math.isfinite(scale) or scale == 0:
        raise FormatError(
            f"{where}: module {name!r}: alpha {alpha!r} gives a scale of {scale!r}; expected a finite number, not 0"
        )
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


def _number(
    config: Mapping[str, Any], pattern_key: str, key: str, module: str, where: Path, default: float | None = None
) -> float:
    patterns = config.get(pattern_key) or {}
    if not isinstance(patterns, dict):
        raise FormatError(f"{where}: {pattern_key}: expected an object, found {type(patterns).__name__}")
    try:
        found = first_match(patterns, module)
    except ValueError as e:
        raise FormatError(f"{where}: {pattern_key}: {e}") from None
    value = config.get(key, default) if found is None else patterns[found]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"{where}: {key} of module {module!r}: expected a number, found {value!r}")
    return float(value)
