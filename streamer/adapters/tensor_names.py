"""Assign roles to an adapter's tensors by name. A new kind of tensor is a new entry of `ROLES`; the first match wins.

``base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight`` → factor A of ``model.layers.0.self_attn.q_proj``;
``base_model.model.score.modules_to_save.default.weight``, also without ``default`` → ``weight`` of ``score``, saved whole;
``base_model.model.lm_head.base_layer.weight`` → ``weight`` of ``lm_head``, saved whole, with a delta added to it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from streamer.adapters.adapter_config import AdapterConfig
from streamer.adapters.modules import Module
from streamer.errors import FormatError, MismatchError

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
    own = match.groupdict().get("adapter")
    if own is None or own == "weight":  # lora_magnitude_vector.weight, which PEFT reads too
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
