"""What an adapter's own files say: scales by PEFT's own rules, what is taken, and what is refused by its name."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import helpers
import pytest
import torch
from raw_adapter import MODULE, factors, one_module, write_raw
from safetensors.torch import save_file

from streamer.adapters.adapter import open_adapter
from streamer.adapters.adapter_config import (
    INSTEAD,
    AdapterConfig,
    Stated,
    refusals,
    stated_options,
)
from streamer.errors import FormatError, MismatchError, StreamerError, UnsupportedError, UsageError
from streamer.options import Ignoring

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
        (
            {"alpha_pattern": {"q_proj": 2, "self_attn.q_proj": 1}},
            4,
            0.5,
        ),  # the first in the config's order
        ({"alpha_pattern": {".*attn.*": 2}}, 4, 0.5),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 2}}, 4, 0.5),
        ({"alpha_pattern": {r"layers\.\d+\.self_attn\.(q|k)_proj": 2}}, 4, 0.5),
        ({"alpha_pattern": {MODULE: 2}}, 4, 0.5),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2}}, 4, 2.0),
        ({"rank_pattern": {"q_proj": 2}}, 2, 4.0),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 1}}, 2, 0.5),
        (
            {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"q_proj": 1}, "use_rslora": True},
            9,
            1 / 3,
        ),
        ({"rank_pattern": {}, "alpha_pattern": None}, 4, 2.0),
    ],
)
def test_the_scale_is_alpha_over_rank_or_its_root(
    tmp_path: Path, config: dict, rank: int, scale: float
) -> None:
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
        (
            {"rank_pattern": {"q_proj": 2}},
            MismatchError,
            "expected rank 2 by the config, found 4 rows",
        ),
        (
            {"alpha": 0},
            FormatError,
            "its alpha gives a scale of 0.0, expected a finite number other than 0",
        ),
        (
            {"alpha": "8"},
            FormatError,
            "lora_alpha of module 'model.layers.0.self_attn.q_proj': expected a number, found '8'",
        ),
        ({"alpha": True}, FormatError, "expected a number, found True"),
        ({"alpha_pattern": {"q_proj": None}}, FormatError, "expected a number, found None"),
        (
            {"alpha_pattern": ["q_proj"]},
            FormatError,
            "alpha_pattern: expected an object, found list",
        ),
        ({"alpha": 10**400}, FormatError, "is not a finite number"),
        ({"rank_pattern": {"a{99999999999}": 4}}, FormatError, "is not a regular expression"),
        ({"rank_pattern": {"(" * 5000: 4}}, FormatError, "is not a regular expression"),
        ({"rank_pattern": {"(": 4}}, FormatError, "pattern '(' is not a regular expression"),
    ],
)
def test_a_malformed_config_is_refused(
    tmp_path: Path, config: dict, error: type[StreamerError], words: str
) -> None:
    with pytest.raises(error) as e:
        one_module(tmp_path, **config)
    assert str(e.value).startswith(str(tmp_path / "adapter_config.json"))
    assert words in str(e.value)
    assert "\n" not in str(e.value)


def test_alpha_must_be_stated(tmp_path: Path) -> None:
    write_raw(
        tmp_path,
        dict(zip((f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"), factors(), strict=True)),
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(FormatError, match=r"lora_alpha of module .* expected a number, found None"):
        open_adapter(tmp_path)


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
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "residual-base"),
        ({"megatron_config": {"x": 1}}, "Megatron"),
        (
            {"invocation_string": "<|start_of_role|>"},
            "aLoRA: its change of the weights is not known here",
        ),
        ({"enable_lora": [True, False, True]}, "MergedLinear: its change of the weights"),
        ({"peft_type": "C3A"}, "C3A adapter"),
        ({"peft_type": ["LORA"]}, "adapter: its change of the weights is not known here"),
        (
            {"peft_type": "BOFT", "boft_n_butterfly_factor": 2},
            "BOFT: only a boft_n_butterfly_factor of 1",
        ),
        ({"peft_type": "OFT", "fan_in_fan_out": True}, "OFT: PEFT does not merge"),
        (
            {"peft_type": "OFT", "num_cayley_neumann_terms": None},
            "OFT: expected num_cayley_neumann_terms from 1 to 1000",
        ),
        ({"peft_type": "OFT", "eps": None}, "OFT: expected eps to be a number"),
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
        ({"lora_B_layout": "mixed"}, "lora_B_layout is mixed"),
    ],
)
def test_a_config_of_an_unsupported_adapter_is_refused(config: dict, kind: str) -> None:
    (reason,) = refusals(AdapterConfig(config, Path("adapter_config.json")))
    assert kind in reason
    assert reason.endswith(f"; {INSTEAD}") == ("unknown key" not in kind and "layout" not in kind)


@pytest.mark.parametrize(
    "config",
    [{"init_lora_weights": init} for init in (True, False, None, "gaussian", "eva", "orthogonal")]
    + [
        {"loftq_config": {}},
        {"bias": None},
        {"use_tomorrow": False},
        {"tomorrow_config": None},
        {"a_note": ""},
        {"tomorrow": []},
        {"tomorrow_config": {}},
        {"merge_weights": True},
        {"merge_weights": False},
        {"invocation_string": None},
        {"invocation_string": False},
        {"enable_lora": None},
        {"enable_lora": False},
        {
            "target_modules": ["q"],
            "layers_to_transform": [1],
            "lora_dropout": 0.1,
            "task_type": "CAUSAL_LM",
        },
    ],
)
def test_a_config_of_a_supported_adapter_is_accepted(config: dict) -> None:
    assert refusals(AdapterConfig(config, Path("adapter_config.json"))) == []


# Keys -----------------------------------------------------------------------------------------------------------------

# What could change a delta, as variants of LoRA call their options.
STRANGE = ["lora_scaling", "lora_variant", "block_diagonal", "shared_A", "qkv_fused", "lora_scale", "scaling",
           "lora_magnitude", "num_experts", "merged", "alpha", "use_new", "is_new", "new_config"]  # fmt: skip


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
    assert refusals(config)[0].startswith("KaSA: ")
    for keys in ("lora_scaling", 5, [5]):
        with pytest.raises(
            UsageError,
            match=f"^ignore_keys: expected a list of keys, found {re.escape(repr(keys))}$",
        ):
            Ignoring(ignore_keys=keys)  # type: ignore[arg-type]


# Other libraries' files -----------------------------------------------------------------------------------------------

OTHER = {
    "LoHa": ("lora_unet_down_blocks_0_attn.hada_w1_a", "last.safetensors"),
    "diffusers of old": (
        "unet.mid_block.attn.to_q_lora.down.weight",
        "pytorch_lora_weights.safetensors",
    ),
    "ComfyUI": ("diffusion_model.blocks.0.attn.to_q.lora_down.weight", "flux.safetensors"),
    "MLX": ("model.layers.0.self_attn.q_proj.lora_a", "adapters.safetensors"),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_lora_of_another_library_is_refused(tmp_path: Path, case: str) -> None:
    tensor, file = OTHER[case]
    save_file({tensor: torch.zeros(4, 5)}, tmp_path / file)
    if case == "MLX":
        (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "lora", "num_layers": 2}')
    for path in (tmp_path, tmp_path / file):
        with pytest.raises(
            UnsupportedError, match=r"another library.s LoRA; if of LyCORIS .* convert it"
        ):
            open_adapter(path)
    (tmp_path / file).rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    with pytest.raises(UnsupportedError, match="another library's LoRA"):
        open_adapter(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        ["lora_unet_conv_in.alpha", "lora_unet_conv_in.lora_down.weight"],
        ["unet.conv_in.lora_A.weight"],
        ["lora_unet_conv_in.alpha", "lora_unet_conv_in.lokr_w1"],
    ],
)
def test_two_files_of_a_pipelines_adapters(tmp_path: Path, tensors: list[str]) -> None:
    for name in ("a", "b"):
        save_file(
            {tensor: torch.zeros(4, 5) for tensor in tensors}, tmp_path / f"{name}.safetensors"
        )
    with pytest.raises(
        UnsupportedError,
        match=r"a\.safetensors: refused: another library's LoRA; .* name the one file",
    ):
        open_adapter(tmp_path)
