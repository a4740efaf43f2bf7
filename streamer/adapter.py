"""A PEFT adapter folder ↔ low-rank deltas, module by module."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from streamer.encodings import as_tensor, encoding_of
from streamer.errors import FormatError, InputError, MismatchError, UnsupportedError
from streamer.kinds import classify, config_refusals, normalize
from streamer.linalg.operators import LowRank
from streamer.patterns import first_match
from streamer.storage.checkpoint import read_json_object
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
        Names of lora_A (rank, in) and lora_B (out, rank) in the adapter's file.
    rank, scale
        Rows of lora_A; ``alpha/r``, or ``alpha/√r`` with rsLoRA.
    shape
        (out, in).
    """

    name: str
    a: str
    b: str
    rank: int
    scale: float
    shape: tuple[int, int]


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk: config, open weights file, and its modules by name."""

    path: Path
    config: dict[str, Any]
    file: TensorFile
    modules: dict[str, LoraModule]

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the config says that the base stores (in, out)."""
        return bool(self.config.get("fan_in_fan_out", False))

    def factor(self, tensor: str) -> Tensor:
        """A tensor of the file in its computing dtype; a copy, small."""
        info = self.file.header.by_name[tensor]
        encoding = encoding_of(info, str(self.file.path))
        return as_tensor(self.file.view(info), encoding.dtype, info.shape).to(encoding.compute, copy=True)

    def delta(self, module: LoraModule) -> LowRank:
        """``scale · B @ A`` as (out, in) factors."""
        return LowRank(self.factor(module.b) * module.scale, self.factor(module.a).T)

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
    pairs = _pair_up(file)
    modules = {name: _module(name, found, file, config) for name, found in pairs.items()}
    if not modules:
        raise InputError(f"{file.path}: expected lora_A and lora_B tensors, found none; is this the adapter?")
    return Adapter(path, config, file, modules)


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


def _pair_up(file: TensorFile) -> dict[str, dict[str, str]]:
    """Module name → {"A": tensor, "B": tensor}; refuses every tensor that is no LoRA factor of a linear layer."""
    pairs: dict[str, dict[str, str]] = {}
    refused: Counter[str] = Counter()
    example: dict[str, str] = {}
    for info in file.header.tensors:
        rule, match = classify(normalize(info.name))
        reason = rule.refusal
        if not reason and len(info.shape) != 2:
            reason = f"LoRA on a convolution or a parameter ({len(info.shape)} dimensions)"
        if reason:
            refused[reason] += 1
            example.setdefault(reason, info.name)
            continue
        factors = pairs.setdefault(match["module"], {})
        if match["factor"] in factors:
            raise FormatError(
                f"{file.path}: tensors {factors[match['factor']]!r} and {info.name!r} are the same factor of one module; "
                "save one adapter at a time"
            )
        factors[match["factor"]] = info.name
    if refused:
        listed = "; ".join(f"{n} × {reason}, {example[reason]!r} first" for reason, n in refused.items())
        raise UnsupportedError(f"{file.path}: refused: not supported: {listed}; {INSTEAD}")
    for name, factors in pairs.items():
        if len(factors) != 2:
            have = next(iter(factors))
            raise FormatError(
                f"{file.path}: module {name!r} has lora_{have} but not its partner; save the adapter again"
            )
    return pairs


def _module(name: str, factors: Mapping[str, str], file: TensorFile, config: Mapping[str, Any]) -> LoraModule:
    a, b = file.header.by_name[factors["A"]], file.header.by_name[factors["B"]]
    for info in (a, b):
        encoding_of(info, str(file.path))
    rank = a.shape[0]
    if b.shape[1] != rank or rank == 0 or min(b.shape[0], a.shape[1]) == 0:
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
    return LoraModule(name, a.name, b.name, rank, scale, (b.shape[0], a.shape[1]))


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
