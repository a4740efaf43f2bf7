"""Meanings of an adapter's tensors by their names; a new kind of tensor is a new entry of `TENSOR_RULES`, the first match wins.

``base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight`` → factor A of ``model.layers.0.self_attn.q_proj``;
``base_model.model.score.modules_to_save.default.weight``, also without ``default`` → ``weight`` of ``score``, saved whole;
``base_model.model.lm_head.base_layer.weight`` → ``weight`` of ``lm_head``, saved whole, to which a delta is added.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streamer.adapters.adapter_config import AdapterConfig
from streamer.adapters.modules import Module
from streamer.errors import FormatError


@dataclass(frozen=True)
class TensorRule:
    """A role of an adapter's tensors, by their normalised names; refused where `refusal` gives a reason.

    The groups of the pattern name the ``module``, the ``factor`` (A or B), and the ``parameter`` of the module.
    """

    pattern: re.Pattern[str]
    role: str
    refusal: str = ""


FACTORS = ("factor", "embedding", "magnitude")
"""Roles of the tensors that make a LoRA module."""

_ADAPTER = r"(?:\.(?P<adapter>[^.]+))?"

TENSOR_RULES: tuple[TensorRule, ...] = (
    TensorRule(re.compile(rf"^(?P<module>.+)\.lora_(?P<factor>[AB]){_ADAPTER}\.weight$"), "factor"),
    TensorRule(re.compile(rf"^(?P<module>.+)\.lora_embedding_(?P<factor>[AB]){_ADAPTER}$"), "embedding"),
    TensorRule(re.compile(rf"^(?P<module>.+)\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?$"), "magnitude"),
    TensorRule(re.compile(rf"^(?P<module>.+)\.lora_B{_ADAPTER}\.bias$"), "lora_bias"),
    TensorRule(re.compile(rf"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta{_ADAPTER}$"), "tokens"),
    # What the base has there: kept by trainers that save a module's whole state.
    TensorRule(re.compile(r"\.trainable_tokens_original(\.|$)|\.original_module\."), "original"),
    TensorRule(re.compile(r"\.(hada_|lokr_|lora_|ranknum|vera_|oft_|boft_|ia3_)"), "other", "another method's tensors"),
    # PEFT strips the adapter's name where it is the last but one: a parameter that is the module's own stands without it.
    TensorRule(re.compile(r"^(?P<module>.+?)\.modules_to_save\.(?:[^.]+\.)?(?P<parameter>.+)$"), "saved"),
    TensorRule(re.compile(r"^(?P<module>.+?)(?:\.token_adapter)?\.base_layer\.(?P<parameter>[^.]+)$"), "saved"),
    TensorRule(re.compile(r"^(?P<module>.+)\.(?P<parameter>[^.]+)$"), "saved"),
    TensorRule(re.compile(r""), "unknown", "a tensor of unknown meaning"),
)

_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")


def normalize(name: str) -> str:
    """Strip a tensor's name of wrappers: PEFT's prefix, DDP's, torch.compile's, FSDP's.

    ``module.base_model.model.model.layers.0._orig_mod.mlp.up_proj.lora_A.weight`` → ``model.layers.0.mlp.up_proj.lora_A.weight``.
    """
    name = _WRAPPERS.sub(r"\1", name).replace("..", ".").removeprefix(".").removeprefix("module.")
    return name.removeprefix("base_model.model.")


def classify(name: str) -> tuple[TensorRule, re.Match[str]]:
    """Find the rule for a normalised tensor name, and its match."""
    for rule in TENSOR_RULES:
        match = rule.pattern.search(name)
        if match:
            return rule, match
    raise AssertionError("the last rule matches everything")


@dataclass(frozen=True)
class Carried:
    """A tensor of the adapter that is no factor: its effect on one tensor of the model.

    Attributes
    ----------
    role
        ``saved``: takes the tensor's place. ``lora_bias``: is added to it, times `scaling`. ``tokens``: takes the place of the rows
        that `indices` name. ``original``: the base's own values, of no effect.
    module, parameter
        The tensor's name in the model: ``module.parameter``; the module is empty where the model itself holds the parameter.
    source
        Its name in the adapter's file.
    """

    role: str
    module: str
    parameter: str
    source: str
    scaling: float = 1.0
    indices: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Name of the model's tensor."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


def carried_tensor(
    role: str, match: re.Match[str], source: str, modules: Mapping[str, Module], file: Path, config: AdapterConfig
) -> Carried:
    """Give a tensor that is no factor the module and parameter that it changes.

    Parameters
    ----------
    role, match
        By the rule that its name falls under.
    source
        Its name in the file.
    modules
        Those that have factors.
    file
        Path of the weights, for messages.
    """
    groups = match.groupdict()
    module = groups.get("module") or source
    if role == "lora_bias":
        if module not in modules:
            raise FormatError(f"{file}: {source!r} has no lora_A and lora_B beside it; save the adapter again")
        return Carried(role, module, "bias", source, modules[module].scaling)
    if role == "tokens":
        return Carried(role, module, "weight", source, indices=_token_indices(config, module))
    return Carried(role, module, groups.get("parameter") or "weight", source)


def _token_indices(config: AdapterConfig, module: str) -> tuple[int, ...]:
    """Return the rows that trained tokens replace: PEFT stores them in the config, for the input embedding or by module."""
    stated = config.get("trainable_token_indices")
    if isinstance(stated, dict):
        stated = next((v for key, v in stated.items() if f".{module}".endswith(f".{key}")), None)
    numbers = [i for i in stated if type(i) is int and i >= 0] if isinstance(stated, list) else []
    if not numbers or numbers != stated or len(set(numbers)) != len(numbers):
        raise FormatError(
            f"{config.path}: trainable_token_indices: expected the rows of {module!r} as different numbers, found {stated!r}"
        )
    return tuple(numbers)
