"""Refuse adapters by their config, naming the kind and the reason. A new kind is a new entry of `CONFIG_RULES`.

`reader` collects all of these refusals, and those based on tensor names (`tensor_names`), before it does anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from streamer.adapters.adapter_config import AdapterConfig
from streamer.adapters.config_keys import KNOWN_KEYS
from streamer.adapters.peft_methods import METHODS
from streamer.adapters.target_parameters import layout_refusals
from streamer.units import listed, quoted

_RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq")
_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica", "default", "true", "false"}


@dataclass(frozen=True)
class ConfigRule:
    """Refusal by `adapter_config.json`: a key, a test for the refused values, the kind of adapter and the reason.

    A `residual` rule does not apply if the user states that the base is the residual on which the adapter was trained. `mergeable` is
    False for kinds that PEFT cannot merge either.
    """

    key: str
    refuses: Callable[[Any], bool]
    kind: str
    reason: str
    residual: bool = False
    mergeable: bool = True


def _residual_init(value: object) -> bool:
    return isinstance(value, str) and value.lower().startswith(_RESIDUAL)


def _unknown_init(value: object) -> bool:
    return isinstance(value, str) and not _residual_init(value) and value.lower() not in _PLAIN_INITS


def _is_list(value: object) -> bool:
    return isinstance(value, list) and bool(value)


_NOT_YET = "is not supported"
_SOME_TOKENS = "acts on some tokens only, which no merged weight can express"

CONFIG_RULES: tuple[ConfigRule, ...] = (
    ConfigRule("init_lora_weights", _residual_init, "residual-base initialisation",
               "its delta is relative to a residual of the base; save the adapter again with path_initial_model_for_weight_conversion, "
               "or give the residual as the base and pass --base-is-residual", residual=True),
    ConfigRule("init_lora_weights", _unknown_init, "unknown initialisation", "it may have changed the base"),
    ConfigRule("loftq_config", bool, "LoftQ", "its delta is relative to a quantized base without its residual; give that base "
               "and pass --base-is-residual", residual=True),
    ConfigRule("alora_invocation_tokens", bool, "aLoRA", _SOME_TOKENS, mergeable=False),
    ConfigRule("invocation_string", bool, "aLoRA", _SOME_TOKENS, mergeable=False),
    ConfigRule("enable_lora", _is_list, "MergedLinear", "its delta is for some parts of a fused layer, and only PEFT before 0.3 reads it"),
    ConfigRule("arrow_config", bool, "Arrow", "routes between adapters at run time, which no merged weight can express",
               mergeable=False),
    ConfigRule("use_qalora", bool, "QALoRA", "pools its input, so lora_A does not have the base's width", mergeable=False),
    ConfigRule("use_bdlora", bool, "BD-LoRA", "stores block-diagonal factors"),
    ConfigRule("kasa_config", bool, "KaSA", "changes the base and adds a diagonal between the factors"),
    ConfigRule("monteclora_config", bool, "MonteCLoRA", "samples its factors"),
    ConfigRule("velora_config", bool, "VeLoRA", f"{_NOT_YET}: it keeps buffers beside the factors"),
    ConfigRule("layer_replication", bool, "layer replication", "the model has layers that the base on disk does not have",
               mergeable=False),
    ConfigRule("megatron_config", bool, "Megatron LoRA", "its tensors are split over ranks; convert it to plain PEFT first"),
)  # fmt: skip

NEVER_MERGED = frozenset({
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "LILY", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING",
    "SHADOW", "XLORA",
})  # fmt: skip
"""Methods that PEFT cannot merge into weights: prompts, additional layers, and mixtures of adapters."""


def is_residual(config: AdapterConfig) -> bool:
    """Test whether an adapter with this config is relative to a residual of its base."""
    return any(rule.residual and rule.refuses(config.get(rule.key)) for rule in CONFIG_RULES)


def peft_merges(config: AdapterConfig) -> bool:
    """Test whether PEFT can merge an adapter of a kind that is refused here."""
    kind = str(config.peft_type)
    turned = kind in METHODS and config.fan_in_fan_out  # the refusal's reason says that PEFT does not merge it
    return not (
        turned
        or kind in NEVER_MERGED
        or any(not rule.mergeable and rule.refuses(config.get(rule.key)) for rule in CONFIG_RULES)
    )


def config_refusals(config: AdapterConfig) -> list[str]:
    """Return the reasons to refuse an adapter with this config, one phrase each; empty if it is supported."""
    return [*kind_refusals(config), *_key_refusals(config)]


def kind_refusals(config: AdapterConfig) -> list[str]:
    """Return the reasons based on the kind of adapter."""
    peft_type = config.peft_type
    if isinstance(peft_type, str) and (method := METHODS.get(peft_type)) is not None:
        return [f"{method.title}: {reason}"] if (reason := method.refuses(config)) else []
    if peft_type == "LORA":
        rules = [rule for rule in CONFIG_RULES if not (rule.residual and config.stated.base_is_residual)]
        return [f"{rule.kind}: {rule.reason}" for rule in rules if rule.refuses(config.get(rule.key))]
    return [f"{peft_type} adapter: its change of the weights is not known here"]


def _key_refusals(config: AdapterConfig) -> list[str]:
    """Return the reasons based on keys that other programs wrote; PEFT would drop these keys and read the adapter without them."""
    if not isinstance(config.peft_type, str) or config.peft_type not in KNOWN_KEYS:
        return []
    reasons = layout_refusals(config) if config.peft_type == "LORA" else []
    if unknown := [key for key in unknown_keys(config) if key not in config.stated.ignore_keys]:
        what = listed(f"{quoted(key, 30)} ({quoted(config.values[key], 30)})" for key in unknown)
        reasons.append(
            f"unknown {'keys' if len(unknown) > 1 else 'key'} {what}, which may change the delta; pass --ignore-key KEY if KEY does not"
        )
    return reasons


def unknown_keys(config: AdapterConfig) -> list[str]:
    """List the nonempty keys of a config that are not known, whether or not the user ignores them."""
    ruled = {r.key for r in CONFIG_RULES if r.refuses(config.get(r.key))} if config.peft_type == "LORA" else set()
    known = KNOWN_KEYS.get(config.peft_type, set()) | ruled
    return [key for key, value in config.values.items() if key not in known and not _empty(value)]


def _empty(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)
