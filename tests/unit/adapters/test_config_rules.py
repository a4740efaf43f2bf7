"""An adapter's config: scales by PEFT's own rules, what is taken, and what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import helpers
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_adapter import MODULE, factors, one_module, write_raw

from streamer.adapters.adapter_config import AdapterConfig
from streamer.adapters.config_keys import KNOWN_KEYS
from streamer.adapters.config_rules import CONFIG_RULES, config_refusals
from streamer.adapters.reader import open_adapter
from streamer.adapters.stated import Stated, stated_options
from streamer.errors import FormatError, InputError, MismatchError, StreamerError, UnsupportedError, UsageError

# Scales ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "rank", "scale"),
    [
        ({}, 4, 2.0),
        ({"use_rslora": True}, 4, 8 / math.sqrt(4)),
        ({"alpha": 7.5}, 4, 7.5 / 4),
        ({"alpha_pattern": {"q_proj": 1}}, 4, 0.25),
        ({"alpha_pattern": {"k_proj": 1}}, 4, 2.0),
        ({"alpha_pattern": {"proj": 1}}, 4, 2.0),  # a key is a whole component, or several
        ({"alpha_pattern": {"self_attn.q_proj": 1, "q_proj": 2}}, 4, 0.25),
        ({"alpha_pattern": {"q_proj": 2, "self_attn.q_proj": 1}}, 4, 0.5),  # the first in the config's order
        ({"alpha_pattern": {".*attn.*": 2}}, 4, 0.5),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 2}}, 4, 0.5),
        ({"alpha_pattern": {r"layers\.\d+\.self_attn\.(q|k)_proj": 2}}, 4, 0.5),
        ({"alpha_pattern": {MODULE: 2}}, 4, 0.5),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2}}, 4, 2.0),
        ({"rank_pattern": {"q_proj": 2}}, 2, 4.0),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 1}}, 2, 0.5),
        ({"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"q_proj": 1}, "use_rslora": True}, 9, 1 / 3),
        ({"rank_pattern": {}, "alpha_pattern": None}, 4, 2.0),
    ],
)
def test_scale(tmp_path: Path, config: dict, rank: int, scale: float) -> None:
    module = one_module(tmp_path, rank=rank, **config)
    assert (module.rank, module.shape) == (rank, (6, 5))
    assert module.scaling == pytest.approx(scale, rel=1e-15)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (
            {"r": 8},
            MismatchError,
            "expected rank 8 by the config, found 4 rows in lora_A; config and weights belong to different adapters",
        ),
        ({"rank_pattern": {"q_proj": 2}}, MismatchError, "expected rank 2 by the config, found 4 rows"),
        ({"alpha": 0}, FormatError, "its alpha gives a scale of 0.0, expected a finite number other than 0"),
        (
            {"alpha": "8"},
            FormatError,
            "lora_alpha of module 'model.layers.0.self_attn.q_proj': expected a number, found '8'",
        ),
        ({"alpha": True}, FormatError, "expected a number, found True"),
        ({"alpha_pattern": {"q_proj": None}}, FormatError, "expected a number, found None"),
        ({"alpha_pattern": ["q_proj"]}, FormatError, "alpha_pattern: expected an object, found list"),
        ({"alpha": 10**400}, FormatError, "is out of range"),
        ({"rank_pattern": {"a{99999999999}": 4}}, FormatError, "is not a regular expression"),
        ({"rank_pattern": {"(" * 5000: 4}}, FormatError, "is not a regular expression"),
        ({"rank_pattern": {"(": 4}}, FormatError, "pattern '(' is not a regular expression"),
    ],
)
def test_a_config_that_is_wrong(tmp_path: Path, config: dict, error: type[StreamerError], words: str) -> None:
    with pytest.raises(error) as e:
        one_module(tmp_path, **config)
    assert str(e.value).startswith(str(tmp_path / "adapter_config.json"))
    assert words in str(e.value)
    assert "\n" not in str(e.value)


def test_alpha_must_be_stated(tmp_path: Path) -> None:
    write_raw(tmp_path, dict(zip((f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"), factors(), strict=True)))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(FormatError, match=r"lora_alpha of module .* expected a number, found None"):
        open_adapter(tmp_path)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "bias",
                                        "init_lora_weights", "use_dora", "modules_to_save", "new_key", "use_new"]),
                       st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
                                    lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=3), s, max_size=3),
                                    max_leaves=5)))  # fmt: skip
def test_any_config_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, config: dict) -> None:
    """No config, however odd, ends in anything but an adapter or one line."""
    home = tmp_path_factory.mktemp("a")
    A, B = factors()
    write_raw(home, {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B}, **config)
    said = ""
    try:
        scale = open_adapter(home).modules[MODULE].scaling
    except InputError as e:
        said = str(e)
    assert str(home) in said if said else math.isfinite(scale)
    assert "\n" not in said


# Kinds, by config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, "residual-base"),
        ({"init_lora_weights": "PiSSA"}, "residual-base"),
        ({"init_lora_weights": "loftq"}, "residual-base"),
        ({"init_lora_weights": "corda"}, "residual-base"),
        ({"init_lora_weights": "lora_ga"}, "residual-base"),
        ({"init_lora_weights": "tomorrow"}, "unknown initialisation"),
        ({"loftq_config": {"loftq_bits": 4}}, "LoftQ"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"arrow_config": {"k": 1}}, "Arrow"),
        ({"use_bdlora": {"x": 1}}, "BD-LoRA"),
        ({"kasa_config": {"x": 1}}, "KaSA"),
        ({"monteclora_config": {"x": 1}}, "MonteCLoRA"),
        ({"megatron_config": {"x": 1}}, "Megatron"),
        ({"invocation_string": "<|start_of_role|>"}, "aLoRA: acts on some tokens only"),
        ({"enable_lora": [True, False, True]}, "MergedLinear: its delta is for some parts of a fused layer"),
        ({"enable_lora": True}, "unknown key 'enable_lora' (True)"),
        ({"peft_type": "HRA"}, "HRA adapter"),
        ({"peft_type": ["LORA"]}, "adapter: its change of the weights is not known here"),
        ({"peft_type": "BOFT", "boft_n_butterfly_factor": 2}, "BOFT: boft_n_butterfly_factor=2"),
        ({"peft_type": "OFT", "fan_in_fan_out": True}, "OFT: fan_in_fan_out=true"),
        ({"peft_type": "LOKR", "use_tomorrow": True}, "unknown key 'use_tomorrow' (True)"),
        ({"peft_type": "ADALORA", "use_rslora": True}, "unknown key 'use_rslora' (True)"),
        (
            {"use_tomorrow": True},
            "unknown key 'use_tomorrow' (True), which may change the delta; pass --ignore-key KEY if KEY does not",
        ),
        (
            {"tomorrow_config": {"x": 1}, "lora_scaling": 0},
            "unknown keys 'tomorrow_config' ({'x': 1}), 'lora_scaling' (0)",
        ),
        ({"lora_B_layout": "mixed"}, "lora_B_layout is 'mixed'"),
    ],
)
def test_refused_by_config(config: dict, kind: str) -> None:
    reasons = config_refusals(AdapterConfig(config, Path("adapter_config.json")))
    assert len(reasons) == 1
    assert kind in reasons[0]


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": init} for init in (True, False, None, "gaussian", "eva", "orthogonal")
    ] + [{"loftq_config": {}}, {"bias": None}, {"use_tomorrow": False}, {"tomorrow_config": None}, {"a_note": ""},
         {"tomorrow": []}, {"tomorrow_config": {}}, {"merge_weights": True}, {"merge_weights": False},
         {"invocation_string": None}, {"invocation_string": False}, {"enable_lora": None}, {"enable_lora": False},
         {"target_modules": ["q"], "layers_to_transform": [1], "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}],
)  # fmt: skip
def test_taken_by_config(config: dict) -> None:
    assert config_refusals(AdapterConfig(config, Path("adapter_config.json"))) == []


# Keys -----------------------------------------------------------------------------------------------------------------

# Fields of LoraConfig, by the first version from 0.11 that has them; none has gone since.
FIELDS = {
    "0.11": "r target_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights layers_to_transform "
            "layers_pattern rank_pattern alpha_pattern megatron_config megatron_core loftq_config use_dora layer_replication peft_type "
            "auto_mapping base_model_name_or_path revision task_type inference_mode",
    "0.12": "runtime_config", "0.14": "exclude_modules eva_config lora_bias", "0.15": "trainable_token_indices corda_config",
    "0.16": "use_qalora qalora_group_size", "0.17": "target_parameters",
    "0.18": "alora_invocation_tokens arrow_config ensure_weight_tying peft_version", "0.19": "lora_ga_config use_bdlora",
    "0.20": "velora_config monteclora_config", "0.21": "kasa_config",
}  # fmt: skip

# What could change a delta, as variants of LoRA call their options.
STRANGE = ["lora_scaling", "lora_variant", "block_diagonal", "shared_A", "qkv_fused", "enable_lora", "lora_scale", "scaling",
           "lora_magnitude", "num_experts", "merged", "alpha", "use_new", "is_new", "new_config"]  # fmt: skip


@pytest.mark.parametrize("field", [field for fields in FIELDS.values() for field in fields.split()])
def test_every_field_of_lora_is_known(field: str) -> None:
    assert field in KNOWN_KEYS["LORA"] or field in {rule.key for rule in CONFIG_RULES}


def test_a_known_key_has_no_rule_besides() -> None:
    assert not KNOWN_KEYS["LORA"] & {rule.key for rule in CONFIG_RULES if rule.key != "init_lora_weights"}


@pytest.mark.parametrize("key", STRANGE)
def test_an_unknown_key_is_refused_until_it_is_ignored(key: str, tmp_path: Path) -> None:
    adapter = helpers.write_adapter(tmp_path, {MODULE: factors()}, r=4)
    values = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**values, key: {"value": 2}}))
    with pytest.raises(UnsupportedError, match=f"unknown key '{key}' .*--ignore-key KEY"):
        open_adapter(adapter)
    opened = open_adapter(adapter, stated=Stated(ignore_keys=[key, "another"]))
    assert opened.identity()["ignored_keys"] == [key]
    assert stated_options(opened.identity()) == ["--ignore-key", key]
    assert opened.notes == (
        f"{key!r} of adapter_config.json is ignored: the result relies on it not changing the delta",
    )


def test_what_cannot_be_ignored(tmp_path: Path) -> None:
    """A key with a rule has its effect, whatever the user says; and keys come in a list."""
    config = AdapterConfig({"kasa_config": {"x": 1}}, Path(), Stated(ignore_keys=["kasa_config"]))
    assert len(config_refusals(config)) == 1
    for keys in ("lora_scaling", 5, [5]):
        with pytest.raises(UsageError, match=f"^ignore_keys: expected a list of keys, found {re.escape(repr(keys))}$"):
            Stated(ignore_keys=keys)  # type: ignore[arg-type]
