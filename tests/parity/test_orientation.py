"""Square layers of Linear, Conv1D and 4-bit codes, whatever the adapter's fan_in_fan_out says: merged and detected as PEFT's model is."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import BERT, GPT2, TEXT, assert_merged, config, weights
from bitsandbytes import functional as bnb
from command_line import run_cli
from pairs import assert_decided, merge
from peft import LoraConfig, PeftModel, get_peft_model
from quantized import floats_config, small_floats
from safetensors.torch import load_file, save_file
from seeds import vary

import streamer
from streamer.errors import MismatchError, UnsupportedError, UsageError

CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")


def gpt2(**values: Any) -> Any:
    return config("GPT2", **GPT2, **values)


def bert(**values: Any) -> Any:
    return config("Bert", **BERT, **values)


def two(encoder: Any, decoder: Any) -> Any:
    made = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    made.decoder_start_token_id = made.pad_token_id = 0
    return made


# Name → (class, config, target modules, tokens of the decoder as well)
MODELS: dict[str, tuple[str, Callable[[], Any], list[str]]] = {
    "linear": (
        "LlamaForCausalLM",
        lambda: config("Llama", **TEXT | {"num_key_value_heads": 4}),
        ["q_proj", "v_proj", "o_proj"],
    ),
    "conv1d": ("GPT2LMHeadModel", gpt2, ["attn.c_proj"]),
    "conv1d, wide": ("GPT2LMHeadModel", gpt2, ["c_attn", "c_proj"]),
    "conv1d and a head": (
        "GPT2ForSequenceClassification",
        lambda: gpt2(num_labels=3, pad_token_id=0),
        ["attn.c_proj", "score"],
    ),
    "linear, then conv1d": (
        "EncoderDecoderModel",
        lambda: two(bert(), gpt2()),
        ["query", "attn.c_proj", "q_attn", "c_fc"],
    ),
    "conv1d, then linear": (
        "EncoderDecoderModel",
        lambda: two(gpt2(), bert()),
        ["query", "attn.c_proj", "output.dense"],
    ),
}


def make(name: str, home: Path, flag: bool | None = None) -> Any:
    """A tiny model in ``base`` and an adapter on it in ``adapter``, whose flag is set; returns the model's class."""
    cls, made, targets = MODELS[name]
    torch.manual_seed(vary(0))
    model = getattr(transformers, cls)(made())
    model.save_pretrained(home / "base")
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=targets, init_lora_weights=False)
    with warnings.catch_warnings(action="ignore"):  # of the flag, which PEFT corrects itself
        get_peft_model(model, lora).save_pretrained(home / "adapter", save_embedding_layers=False)
    if flag is not None:
        path = home / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": flag}))
    return type(model)


def peft_model(cls: Any, home: Path) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return PeftModel.from_pretrained(
            cls.from_pretrained(home / "base"), home / "adapter"
        ).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 9)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.mark.parametrize("flag", [pytest.param(None, marks=pytest.mark.long), True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_class_decides_and_not_the_flag(name: str, flag: bool | None, tmp_path: Path) -> None:
    base, adapter, out, theirs = (tmp_path / d for d in ("base", "adapter", "out", "theirs"))
    cls = make(name, tmp_path, flag)
    model = peft_model(cls, tmp_path)
    expected = logits(model)
    model.merge_and_unload().save_pretrained(theirs)
    merge(base, adapter, out, 1.0)
    assert_merged(weights(out), weights(theirs))
    torch.testing.assert_close(
        logits(cls.from_pretrained(out).eval()), expected, rtol=1e-4, atol=1e-4
    )
    findings = streamer.detect_intruder_dimensions(base, adapter)
    states = weights(base), weights(theirs)
    sides = [
        [t[m.tensor].T if m.module.endswith(CONV1D) else t[m.tensor] for t in states]
        for m in findings
    ]
    assert sum(assert_decided(m, *pair) for m, pair in zip(findings, sides, strict=True)) > 0
    verification = streamer.verify_output(out, base, adapter, sample="all")
    assert len(verification["recomputed"]) == len(findings)


def one_file(home: Path) -> Path:
    return shutil.copy(home / "base" / "model.safetensors", home / "alone.safetensors")


@pytest.mark.parametrize(("name", "flag"), [("linear", True), ("conv1d", True), ("conv1d", False)])
def test_square_layers_of_an_unknown_class(name: str, flag: bool, tmp_path: Path) -> None:
    """They are refused where the flag, or another layer, says that the base has Conv1D; the user can name the class."""
    cls = make(name, tmp_path, flag)
    adapter = tmp_path / "adapter"
    with pytest.raises(
        MismatchError,
        match=r"does not show whether it is stored as .* name its class with --architecture NAME",
    ):
        streamer.detect_intruder_dimensions(one_file(tmp_path), adapter)
    expected = dict(streamer.iter_merged(tmp_path / "base", adapter, mitigation_lambda=1.0))
    named = dict(
        streamer.iter_merged(
            one_file(tmp_path), adapter, mitigation_lambda=1.0, architecture=cls.__name__
        )
    )
    assert_merged(named, expected)


def without_biases(home: Path) -> Path:
    """Rewrite the base without its biases: as of a model that has none."""
    kept = {
        name: tensor
        for name, tensor in weights(home / "base").items()
        if not name.endswith(".bias")
    }
    save_file(kept, home / "alone.safetensors")
    return home / "alone.safetensors"


def test_nothing_tells_that_a_square_layer_is_a_conv1d(tmp_path: Path) -> None:
    """No flag, no bias, no other layer: ``c_proj`` is a Conv1D in some classes, and a Linear in others."""
    make("conv1d", tmp_path, flag=False)
    with pytest.raises(
        MismatchError, match=r"does not show whether it is stored as .* with --architecture NAME"
    ):
        streamer.detect_intruder_dimensions(without_biases(tmp_path), tmp_path / "adapter")


@pytest.mark.parametrize("by", ["biases", "layers of the adapter"])
def test_linear_layers_that_are_called_as_conv1d_are(by: str, tmp_path: Path) -> None:
    """Of the same stack of layers, a bias or a layer of the adapter that is not square tells."""
    torch.manual_seed(vary(0))
    cls = transformers.GPTBigCodeForCausalLM
    model = cls(config("GPTBigCode", **GPT2))
    model.save_pretrained(tmp_path / "base")
    targets = ["attn.c_proj"] if by == "biases" else ["attn.c_proj", "c_fc"]
    peft = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=64, target_modules=targets, init_lora_weights=False)
    )
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    peft.merge_and_unload().save_pretrained(tmp_path / "theirs")
    base = one_file(tmp_path) if by == "biases" else without_biases(tmp_path)
    merged = dict(streamer.iter_merged(base, tmp_path / "adapter", mitigation_lambda=1.0))
    theirs = weights(tmp_path / "theirs")
    assert_merged(merged, {name: theirs[name] for name in merged})


@pytest.mark.parametrize("name", ["conv1d", "linear"])
def test_a_class_of_another_library_of_a_known_type(name: str, tmp_path: Path) -> None:
    """All classes of its type agree."""
    make(name, tmp_path, flag=name == "linear")
    expected = dict(
        streamer.iter_merged(tmp_path / "base", tmp_path / "adapter", mitigation_lambda=1.0)
    )
    path = tmp_path / "base" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"architectures": ["OursForRanking"]})
    )
    assert_merged(
        dict(streamer.iter_merged(tmp_path / "base", tmp_path / "adapter", mitigation_lambda=1.0)),
        expected,
    )
    path.write_text(
        json.dumps(
            json.loads(path.read_text()) | {"auto_map": {"AutoModel": "ours.OursForRanking"}}
        )
    )
    with pytest.raises(MismatchError, match="--architecture NAME"):
        streamer.detect_intruder_dimensions(tmp_path / "base", tmp_path / "adapter")


def test_a_fine_tuned_model_of_an_unknown_class(tmp_path: Path) -> None:
    """Its Conv1D would be judged on the side of the inputs."""
    make("conv1d", tmp_path)
    torch.manual_seed(vary(5))
    transformers.GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path / "tuned")
    expected = streamer.detect_intruder_dimensions(tmp_path / "base", tmp_path / "tuned")
    assert {m.tensor: m.shape for m in expected}["transformer.h.0.attn.c_attn.weight"] == (96, 32)
    for home in ("base", "tuned"):
        (tmp_path / home / "config.json").unlink()
    with pytest.raises(MismatchError, match="--architecture NAME"):
        streamer.detect_intruder_dimensions(tmp_path / "base", tmp_path / "tuned")
    named = streamer.detect_intruder_dimensions(
        tmp_path / "base", tmp_path / "tuned", architecture="GPT2LMHeadModel"
    )
    assert [(m.tensor, m.shape, m.detection.intruders) for m in named] == [
        (m.tensor, m.shape, m.detection.intruders) for m in expected
    ]


def test_the_class_that_is_named_stands_in_the_records(tmp_path: Path) -> None:
    make("conv1d", tmp_path)
    base = one_file(tmp_path)
    adapter = tmp_path / "adapter"
    findings = streamer.detect_intruder_dimensions(
        base, adapter, tmp_path / "f.safetensors", architecture="GPT2LMHeadModel"
    )
    assert findings.base["architecture"] == "GPT2LMHeadModel"
    options: dict[str, Any] = {
        "findings": tmp_path / "f.safetensors",
        "architecture": "GPT2LMHeadModel",
    }
    record = streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, tmp_path / "out", **options
    )
    assert record["base"]["architecture"] == "GPT2LMHeadModel"
    assert streamer.verify_output(tmp_path / "out", base, adapter, sample="all")["recomputed"]
    assert (
        "architecture" not in streamer.detect_intruder_dimensions(tmp_path / "base", adapter).base
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "GPT2LMHead",
            r"architecture: expected a class of model_type 'gpt2', found 'GPT2LMHead'; near it: GPT2LMHeadModel",
        ),
        (
            "LlamaForCausalLM",
            r"architecture: expected a class of model_type 'gpt2', found 'LlamaForCausalLM'",
        ),
    ],
)
def test_a_class_that_is_not_known(given: str, said: str, tmp_path: Path) -> None:
    make("conv1d", tmp_path)
    with pytest.raises(UsageError, match=said):
        streamer.detect_intruder_dimensions(
            tmp_path / "base", tmp_path / "adapter", architecture=given
        )
    done = run_cli("inspect", tmp_path / "base", tmp_path / "adapter", "--architecture", given)
    assert done.returncode == 2
    assert "--architecture: expected a class of model_type 'gpt2'" in done.stderr


SIZE = 64


def nf4(W: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, state = bnb.quantize_4bit(W.contiguous(), quant_type="nf4")
    parts = {f".weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {".weight": codes, **parts}, bnb.dequantize_4bit(codes, state)


ENCODINGS = {
    "nf4": (
        nf4,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "nvfp4": (
        partial(small_floats, encoding="nvfp4-pack-quantized"),
        floats_config("nvfp4-pack-quantized"),
    ),
}


def quantized_base(
    home: Path, cls: str, config: transformers.PreTrainedConfig, layer: str, encoding: str
) -> dict[str, torch.Tensor]:
    """Save a model whose square layers of this name are quantized, and an adapter on them; return the decoded layers as (out, in)."""
    torch.manual_seed(vary(0))
    model = getattr(transformers, cls)(config)
    model.save_pretrained(home / "base")
    peft = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=32, target_modules=[layer], init_lora_weights=False)
    )
    peft.save_pretrained(home / "adapter", save_embedding_layers=False)
    path = home / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": True}))
    tensors = load_file(home / "base" / "model.safetensors")
    decoded = {}
    for name in [name for name in tensors if name.endswith(f"{layer}.weight")]:
        W = tensors.pop(name)
        W = W.T if cls.startswith("GPT2") else W
        parts, decoded[name] = ENCODINGS[encoding][0](W)
        tensors |= {name.removesuffix(".weight") + key: part for key, part in parts.items()}
    save_file(tensors, home / "base" / "model.safetensors", metadata={"format": "pt"})
    path = home / "base" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": ENCODINGS[encoding][1]})
    )
    return decoded


def square_gpt2() -> transformers.PreTrainedConfig:
    return transformers.GPT2Config(n_embd=SIZE, n_layer=2, n_head=4, vocab_size=96, n_positions=32)


def square_llama() -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(
        hidden_size=SIZE,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
    )


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # which PEFT corrects itself
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("cls", "config", "layer", "encoding"),
    [
        ("LlamaForCausalLM", square_llama, "o_proj", "nf4"),
        ("LlamaForCausalLM", square_llama, "o_proj", "nvfp4"),
        ("GPT2LMHeadModel", square_gpt2, "attn.c_proj", "nf4"),
        ("GPT2LMHeadModel", square_gpt2, "c_attn", "nf4"),
    ],
)
def test_four_bits_are_out_by_in_whatever_the_flag_says(
    cls, config, layer: str, encoding: str, named: bool, tmp_path: Path
) -> None:
    decoded = quantized_base(tmp_path, cls, config(), layer, encoding)
    if not named:
        stated = json.loads((tmp_path / "base" / "config.json").read_text())
        (tmp_path / "base" / "config.json").write_text(
            json.dumps({"quantization_config": stated["quantization_config"]})
        )
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    findings = streamer.detect_intruder_dimensions(tmp_path / "base", tmp_path / "adapter")
    assert len(findings) == len(decoded) == 2
    for m in findings:
        A, B = (factors[f"base_model.model.{m.module}.lora_{f}.weight"].double() for f in "AB")
        assert assert_decided(m, decoded[m.tensor], decoded[m.tensor].double() + 16 * B @ A)
    if cls.startswith("GPT2") and named:  # written, its layers would have to be turned
        with pytest.raises(UnsupportedError, match="a quantized gpt2 stores its layers"):
            streamer.iter_merged(
                tmp_path / "base", tmp_path / "adapter", mitigation_lambda=1, dequantize=True
            )
