"""Refuse adapters, and warn of them, by their own files. A new kind is an entry of `RULES`; a new key without effect, of `KNOWN_KEYS`.

Any other key of ``adapter_config.json`` may change what the tensors mean, so it is refused unless it is empty or the user insists.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from streamer.adapters.adapter_config import LAYOUT_DETAILS, LAYOUT_KEY, AdapterConfig, layout_refusals
from streamer.errors import InputError, UnsupportedError
from streamer.storage.tensor_file import TensorFile
from streamer.units import listed, quoted

INSTEAD = "merge it with PEFT if it can, else use it unmerged"

RESIDUAL = "residual-base initialisation"

_ON_RESIDUAL = (
    "its delta is relative to a residual of the base; save the adapter again with path_initial_model_for_weight_conversion, or give the "
    "residual as the base and pass --base-is-residual"
)
_RESIDUAL_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "default", "true", "false")
_TURNED = "PEFT does not merge this method into a layer that stores (in, out)"
_SOME_TOKENS = "acts on some tokens only, which no merged weight can express"


class Rule(NamedTuple):
    """Refusal by a key of a LoRA's config: the kind of adapter that it shows, the reason, and the test of its value."""

    key: str
    kind: str
    reason: str
    applies: Callable[[Any], bool] = bool


def _no_number(value: object) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30


RULES = (
    Rule("init_lora_weights", RESIDUAL, _ON_RESIDUAL, lambda v: isinstance(v, str) and v.lower().startswith(_RESIDUAL_INITS)),
    Rule("loftq_config", RESIDUAL, _ON_RESIDUAL),
    Rule("init_lora_weights", "unknown initialisation", "it may have changed the base",
         lambda v: isinstance(v, str) and v.lower() not in _PLAIN_INITS and not v.lower().startswith(_RESIDUAL_INITS)),
    Rule("alora_invocation_tokens", "aLoRA", _SOME_TOKENS),
    Rule("invocation_string", "aLoRA", _SOME_TOKENS),
    Rule("enable_lora", "MergedLinear", "its delta is for some parts of a fused layer, and only PEFT before 0.3 reads it"),
    Rule("arrow_config", "Arrow", "routes between adapters at run time, which no merged weight can express"),
    Rule("use_qalora", "QALoRA", "pools its input, so lora_A does not have the base's width"),
    Rule("use_bdlora", "BD-LoRA", "stores block-diagonal factors"),
    Rule("kasa_config", "KaSA", "changes the base and adds a diagonal between the factors"),
    Rule("monteclora_config", "MonteCLoRA", "samples its factors"),
    Rule("velora_config", "VeLoRA", "keeps buffers beside the factors"),
    Rule("layer_replication", "layer replication", "the model has layers that the base on disk does not have"),
    Rule("megatron_config", "Megatron LoRA", "its tensors are split over ranks; convert it to plain PEFT first"),
)  # fmt: skip

_NUMBER = "expected a number"
MOST_TERMS = 1000
"""Most terms of a Neumann series; PEFT's default is 5. A config may ask for any number, and each term costs a product for each matrix."""

METHOD_RULES = {
    "ADALORA": (Rule("lora_alpha", "AdaLoRA", _NUMBER, _no_number), Rule("init_r", "AdaLoRA", _NUMBER, _no_number)),
    "VERA": (Rule("save_projection", "VeRA", "its projections are not in the file, and only the library that trained it can generate them "
                  "again", lambda v: not v),),
    "OFT": (Rule("eps", "OFT", _NUMBER, _no_number), Rule("fan_in_fan_out", "OFT", _TURNED),
            Rule("num_cayley_neumann_terms", "OFT", f"expected 1 to {MOST_TERMS}", lambda v: _no_number(v) or not 1 <= v <= MOST_TERMS)),
    "BOFT": (Rule("fan_in_fan_out", "BOFT", _TURNED),
             Rule("boft_n_butterfly_factor", "BOFT", "only 1 can be checked against PEFT on a CPU", lambda v: v != 1)),
}  # fmt: skip
"""The same for the keys that configs of other methods state."""

NEUTRAL = {
    # The name of the base, its revision on the hub, and the class that PEFT wrapped.
    "base_model_name_or_path", "revision", "auto_mapping",
    # Whether the adapter stays frozen when it is loaded.
    "inference_mode",
    # Written by trainers: Unsloth's mark that it corrected the base's tokenizer; ms-swift's dtype and learning rates.
    "unsloth_fixed", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
}  # fmt: skip
"""Keys that say nothing of the delta."""

_EVERY_METHOD = NEUTRAL | {
    # Read: the method; the orientation of square experts, by version; the class of a merged model, by task; modules saved whole; ranks and
    # scalings; which biases are saved; whether the base stores (in, out).
    "peft_type", "peft_version", "task_type", "modules_to_save", "r", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out",
    # Where the adapter is attached: the tensor names say the same.
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip

# The scaling is read; the tensor shapes show use_effective_conv2d; the other keys concern training and initial values.
_LYCORIS = _EVERY_METHOD | {"alpha", "rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"}

KNOWN_KEYS = {
    # Read: the scaling; initialisations; whether the adapter has magnitudes, or biases beside lora_B; the rows of trained tokens;
    # parameters with factors of their own; whether a tied head gets the embedding's delta; the order of lora_B's columns for stacked
    # experts. The rest: training; options of an initialisation, of megatron_config and of use_qalora; where PEFT keeps the factors at run
    # time, and whether PEFT before 0.3 kept the model merged at run time.
    "LORA": _EVERY_METHOD | {rule.key for rule in RULES} | {
        "lora_alpha", "use_rslora", "use_dora", "lora_bias", "trainable_token_indices", "target_parameters", "ensure_weight_tying",
        LAYOUT_KEY, LAYOUT_DETAILS,
        "lora_dropout", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config",
        "merge_weights"},
    "LOHA": _LYCORIS,
    # The shapes show how w1 and w2 are decomposed.
    "LOKR": _LYCORIS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
    # AdaLoRA's config has all of LoRA's keys but reads only some; keys that PEFT refuses or ignores for AdaLoRA are omitted here. Of its
    # own keys only init_r is read, for the scaling; the others are used only in training.
    "ADALORA": _EVERY_METHOD | {
        "lora_alpha", "lora_dropout", "trainable_token_indices", "runtime_config", "megatron_core", "qalora_group_size",
        "init_lora_weights", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"},
    # Read: that the file holds the projections; their seed is then not needed.
    "VERA": _EVERY_METHOD | {"save_projection", "projection_prng_key", "vera_dropout", "d_initial", "init_weights"},
    # Read: constrained rotations with their bound, and the series with its number of terms. The shapes show the blocks.
    "OFT": _EVERY_METHOD | {
        "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms", "oft_block_size", "block_share", "module_dropout", "init_weights"},
    # Read: the number of factors; only 1 is supported. The shapes show the blocks.
    "BOFT": _EVERY_METHOD | {"boft_n_butterfly_factor", "boft_block_size", "boft_block_num", "boft_dropout", "init_weights"},
}  # fmt: skip
"""Known keys by PEFT's name of the method."""

FORMATS = {
    "LyCORIS (LoHa, LoKr)": (r"^lora_\w+\.(?:hada|lokr)_w", "convert it to LoRA"),
    "MLX": (r"\.lora_[ab]$", "transpose lora_a and lora_b to lora_A.weight and lora_B.weight, and write PEFT's adapter_config.json "
            "(lora_alpha is MLX's scale times the rank)"),
    "ComfyUI or old versions of diffusers": (
        r"^(?:diffusion_model|(?:unet|transformer(?!\.h\.)|text_encoder\w*)\..*lora)\..*(?:lora_[AB]|down|up)\.weight$",
        "load it in diffusers, save it with save_lora_weights, and give that file alone"),
    "kohya or diffusers": (r"^(?:lora_\w+\.lora_(?:down|up)|(?:unet|transformer(?!\.h\.)|text_encoder(?:_2)?)\..*\.lora_[AB])\.weight$",
                           "name the one file, with a diffusers pipeline as the base"),
}  # fmt: skip
"""LoRA files of other libraries, by tensor names (GPT-2's layers are named ``transformer.h``), and what to do with them."""


def refuse_kinds(config: AdapterConfig) -> None:
    """Raise `UnsupportedError` with all reasons if the config shows an unsupported kind of adapter."""
    if reasons := refusals(config):
        raise UnsupportedError(f"{config.path}: refused: {listed(reasons, separator='; ')}")


def refusals(config: AdapterConfig) -> list[str]:
    """Return the reasons to refuse an adapter with this config, one phrase each; empty if it is supported."""
    kind = config.peft_type
    if not isinstance(kind, str) or kind not in KNOWN_KEYS:
        return [f"{kind} adapter: its change of the weights is not known here; {INSTEAD}"]
    rules = [r for r in RULES if not (r.kind == RESIDUAL and config.stated.base_is_residual)] if kind == "LORA" else []
    reasons = [f"{rule.kind}: {rule.reason}" for rule in rules if rule.applies(config.get(rule.key))]
    wrong = [(r, v) for r in METHOD_RULES.get(kind, ()) if r.key in config.values and r.applies(v := config.get(r.key))]
    reasons += [f"{rule.kind}: {rule.key}={quoted(value, 30)}: {rule.reason}" for rule, value in wrong]
    if reasons := [*dict.fromkeys(reasons)]:
        reasons[-1] += f"; {INSTEAD}"
    reasons += layout_refusals(config) if kind == "LORA" else []
    # PEFT would drop these keys and read the adapter without them.
    if unknown := [key for key in unknown_keys(config) if key not in config.stated.ignore_keys]:
        what = listed(f"{quoted(key, 30)} ({quoted(config.values[key], 30)})" for key in unknown)
        keys = "keys" if len(unknown) > 1 else "key"
        reasons.append(f"unknown {keys} {what}, which may change the delta; pass --ignore-key KEY if KEY does not")
    return reasons


def unknown_keys(config: AdapterConfig) -> list[str]:
    """List the nonempty keys of a config that are not known, whether or not the user ignores them."""
    known = KNOWN_KEYS.get(config.peft_type, set())
    return [k for k, v in config.values.items() if k not in known and v is not False and v not in (None, "", [], {})]


def is_residual(config: AdapterConfig) -> bool:
    """Test whether an adapter with this config is relative to a residual of its base."""
    return any(rule.kind == RESIDUAL and rule.applies(config.get(rule.key)) for rule in RULES)


def version_notes(config: AdapterConfig) -> Iterator[str]:
    """Warn of what PEFT computed otherwise before 0.18, from which on configs state the version that trained them."""
    says = "the config states no peft_version; if PEFT {} trained the adapter, this result differs: {} meant something else"
    patterns = f"{config.get('rank_pattern')} {config.get('alpha_pattern')}"
    series = config.get("use_cayley_neumann") and config.get("num_cayley_neumann_terms") not in (1, 2)
    if not config.get("peft_version") and config.peft_type == "LORA" and re.search(r"[|^]", patterns):
        yield says.format("up to 0.14", "'|' and '^' in rank_pattern and alpha_pattern")
    if not config.get("peft_version") and config.peft_type == "OFT" and series:
        yield says.format("before 0.18", "num_cayley_neumann_terms")


def mitigated_before(metadata: Mapping[str, str]) -> list[str]:
    """Note if `mitigate` made the adapter, by the metadata of its file: any λ other than 1 would scale its intruders twice."""
    try:
        made = json.loads(metadata.get("streamer", ""))
        mitigated, method = made["command"] == "mitigate" and made["lambda"] != 1, made["method"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []  # written by another program
    if not mitigated:
        return []
    how, then = (
        f"by `streamer mitigate` with method {method}",
        "lambda 1 leaves it unchanged, any other is applied in addition",
    )
    return [f"the adapter is mitigated already, {how}: {then}"]


def refuse_other_formats(path: Path) -> None:
    """Refuse a LoRA of another library and name that library; `path` is a safetensors file, or a directory with some.

    Raises
    ------
    UnsupportedError
        If a file is in another format. Files that are not safetensors are skipped.
    """
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        names: list[str] = []
        with contextlib.suppress(InputError):
            names = [info.name for info in TensorFile(file).header.tensors]
        for title, (pattern, instead) in FORMATS.items():
            if any(re.search(pattern, name) for name in names):
                what = f"a LoRA in the format of {title}, not supported here; {instead}"
                raise UnsupportedError(f"{file}: refused: {what}")
