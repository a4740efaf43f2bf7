"""Adapters on experts' parameters whose base has the experts otherwise: by layers, turned, quantized, or not at all."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import MOE, TEXT, weights
from evaluated import assert_as_transformers
from expert_models import EXPERT, EXPERTS, adapt, assert_merged, make
from peft import PeftModel
from safetensors.torch import load_file, save_file
from seeds import vary
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import streamer
from streamer.errors import InputError, Interrupted, MismatchError, UnsupportedError
from streamer.events import Monitor

# Where the base has the experts otherwise ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*total_size is absent")
def test_one_expert_s_gate_and_up_stand_in_different_files(tmp_path: Path) -> None:
    """Each matrix counts once, whichever file its rows are written to; a resumed run gives the same bytes, record and all."""
    base, adapter, _ = make("qwen3-moe", tmp_path, EXPERTS)
    expected = dict(streamer.iter_merged(base, adapter, mitigation_lambda=1.0))
    tensors = weights(base)
    up = {k: v for k, v in tensors.items() if ".up_proj." in k}
    files = {"model-00001-of-00002.safetensors": up,
             "model-00002-of-00002.safetensors": {k: v for k, v in tensors.items() if k not in up}}  # fmt: skip
    (base / "model.safetensors").unlink()
    for file, content in files.items():
        save_file(content, base / file)
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {k: f for f, c in files.items() for k in c}})
    )
    record = streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "ours", mitigation_lambda=1.0)
    names = [m["tensor"] for m in record["matrices"]]
    assert len(names) == len(set(names)) == 2 * (2 * 4 + 1)
    assert "model.layers.1.mlp.experts.gate_up_proj[3]" in names
    for file, content in files.items():
        for key, tensor in load_file(tmp_path / "ours" / file).items():
            assert torch.equal(tensor, expected[key]), key
            assert key in content
    last = f"{EXPERT}.3.down_proj.weight"  # in the second file
    monitor = Monitor(lambda event: monitor.request_stop(15) if event.name == last else None)
    options: dict[str, Any] = {"mitigation_lambda": 1.0}
    with pytest.raises(Interrupted):
        streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "again", **options, monitor=monitor)
    assert (tmp_path / "again" / "model-00001-of-00002.safetensors").exists()
    again = streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "again", **options)
    assert again == {**record, "output": str(tmp_path / "again"), "state": "resumed"}
    for file in (tmp_path / "ours").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_what_experts_have_no_form_for(tmp_path: Path) -> None:
    base, adapter, _ = make("qwen3-moe", tmp_path, EXPERTS)
    with pytest.raises(
        UnsupportedError,
        match="is on experts' parameters, which a plain config does not name; --to-lora cannot write it",
    ):
        streamer.reduce_intruder_dimension(base, adapter, tmp_path / "out", to_lora=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("saved", ["experts", "layers.1.mlp"])
def test_saved_experts_beside_one_tensor_an_expert(saved: str, tmp_path: Path) -> None:
    """Both in one directory would load as neither."""
    base, *_ = make("mixtral", tmp_path, [])
    adapt(transformers.MixtralForCausalLM, tmp_path, [], modules_to_save=[saved])
    with pytest.raises(
        UnsupportedError, match=r"which transformers builds on loading from 'model\.layers\.[01]\.block_sparse"
    ):
        streamer.iter_merged(base, tmp_path / "adapter", mitigation_lambda=1.0)


def test_an_adapter_without_the_head_on_experts(tmp_path: Path) -> None:
    """Built tensors are found by one exchange of prefixes, as all others."""
    base, *_ = make("qwen3-moe", tmp_path, EXPERTS)
    expected = dict(streamer.iter_merged(base, tmp_path / "adapter", mitigation_lambda=1.0))
    adapt(transformers.AutoModel, tmp_path, EXPERTS)
    got = dict(streamer.iter_merged(base, tmp_path / "adapter", mitigation_lambda=1.0))
    before = weights(base)
    assert {k for k in got if not torch.equal(got[k], before[k])} == {
        k for k in expected if not torch.equal(expected[k], before[k])
    }


@pytest.mark.parametrize("old", [False, True])
def test_experts_stored_the_other_way_round_on_disk(old: bool, tmp_path: Path) -> None:
    """Qwen3-VL-MoE: transformers turns the stacks around on loading, under their own names, where their shape says so."""
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32, "intermediate_size": 48,
              "spatial_merge_size": 2, "deepstack_visual_indexes": [0]}  # fmt: skip
    rope = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [1, 1, 2]}
    config = transformers.Qwen3VLMoeConfig(text_config={**TEXT, **MOE, "rope_parameters": rope}, vision_config=vision)
    torch.manual_seed(vary(0))
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    tensors = weights(tmp_path / "base")
    if old:
        tensors = {k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in tensors.items()}
        save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    assert (tensors["model.language_model.layers.0.mlp.experts.down_proj"].shape == (4, 24, 32)) == old
    assert_merged(tmp_path, adapt(type(model), tmp_path, EXPERTS))


def test_an_adapter_of_transformers_4_on_each_expert_s_layers(tmp_path: Path) -> None:
    """Mixtral's w1, w2, w3 were modules of their own; PEFT fuses such factors on loading, and comes to the same sum."""
    base, adapter, model = make("mixtral", tmp_path, EXPERTS)
    torch.manual_seed(vary(2))
    factors = {}
    for layer in range(2):
        for e in range(4):
            for name, (m, n) in {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}.items():
                stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{e}.{name}.lora_"
                factors |= {f"{stem}A.weight": torch.randn(2, n) / 4, f"{stem}B.weight": torch.randn(m, 2) / 4}
    save_file(factors, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"r": 2, "lora_alpha": 4, "target_modules": ["w1", "w2", "w3"], "target_parameters": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of rank_pattern, which PEFT itself sets: the fused gate_up_proj has twice the rank
        loaded = PeftModel.from_pretrained(type(model.get_base_model()).from_pretrained(base), adapter)
        loaded.save_pretrained(tmp_path / "fused")
    assert_merged(tmp_path, loaded)
    fused = dict(streamer.iter_merged(base, tmp_path / "fused", mitigation_lambda=1.0))
    for key, tensor in weights(tmp_path / "theirs").items():
        torch.testing.assert_close(fused[key], tensor, rtol=1e-5, atol=1e-5, msg=key)


# Quantized bases -------------------------------------------------------------------------------------------------------


def quantize(base: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> Path:
    """A base with other tensors, and the config that says how they are coded."""
    out = base.with_name("quantized")
    out.mkdir()
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": quantization}
    (out / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.filterwarnings("ignore:the adapter was trained on")  # the decoded base
def test_mxfp4_experts(tmp_path: Path) -> None:
    """gpt-oss as it is published: detected and mitigated as the decoded model is, merged with --dequantize, else refused."""
    torch.manual_seed(vary(0))
    config = transformers.GptOssConfig(**{**TEXT, **MOE, "intermediate_size": 64})
    model = transformers.GptOssForCausalLM(config).bfloat16()
    coded = {k: v for k, v in model.state_dict().items() if not k.endswith(("gate_up_proj", "down_proj"))}
    for layer in range(2):
        for name, (m, n) in {"gate_up_proj": (128, 32), "down_proj": (32, 64)}.items():
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            blocks, scales = (
                torch.randint(256, (4, m, n // 32, 16)).byte(),
                torch.randint(117, 123, (4, m, n // 32)).byte(),
            )
            coded |= {f"{stem}_blocks": blocks, f"{stem}_scales": scales}
            model.get_parameter(stem).data = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    base = quantize(tmp_path / "base", coded, {"quant_method": "mxfp4"})
    adapt(type(model), tmp_path, EXPERTS)
    adapter = tmp_path / "adapter"
    plain, found = (streamer.detect_intruder_dimensions(b, adapter, top_k=5) for b in (tmp_path / "base", base))
    assert plain.by_tensor.keys() == found.by_tensor.keys()
    for a in plain:
        b = found.by_tensor[a.tensor]
        assert a.detection.intruders == b.detection.intruders
        assert a.detection.singular_values == pytest.approx(b.detection.singular_values, rel=1e-5)
    with pytest.raises(UnsupportedError, match=r"4 of the weights to merge into are quantized, .*_proj.* \(MXFP4\)"):
        streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "out", findings=found, top_k=5)
    expected = dict(streamer.iter_merged(tmp_path / "base", adapter, mitigation_lambda=1.0))
    got = dict(streamer.iter_merged(base, adapter, mitigation_lambda=1.0, dequantize=True))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[k], v) for k, v in expected.items())
    model.float().save_pretrained(tmp_path / "decoded")
    assert_as_transformers(type(model), base, adapter, tmp_path, decoded=tmp_path / "decoded")


@pytest.mark.filterwarnings("ignore:the adapter was trained on")  # the decoded base
def test_fp8_experts(tmp_path: Path) -> None:
    """One tensor for each expert, in FP8: gate and up are coded anew, each with its rows of the delta."""
    base, adapter, _ = make("qwen3-moe", tmp_path, EXPERTS, torch.bfloat16)
    tensors, coded = weights(base), {}
    for key, w in tensors.items():
        if ".experts." in key:
            scale = w.float().abs().max().reshape(1, 1) / 448
            coded |= {key: (w.float() / scale).to(torch.float8_e4m3fn), f"{key}_scale_inv": scale}
            tensors[key] = coded[key].float() * scale
    fp8 = quantize(base, tensors | coded, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    save_file({k: v.contiguous() for k, v in tensors.items()}, base / "model.safetensors")  # what the codes stand for
    expected = dict(streamer.iter_merged(base, adapter, mitigation_lambda=1.0))
    record = streamer.merge_with_reduced_intruder_dimensions(fp8, adapter, tmp_path / "out", mitigation_lambda=1.0)
    assert len(record["matrices"]) == 2 * (2 * 4 + 1)
    got = weights(tmp_path / "out")
    for key, tensor in expected.items():
        ours = got[key].float() * got[f"{key}_scale_inv"] if ".experts." in key else got[key]
        # Half a step of three bits of mantissa, and of the smallest numbers.
        bound = tensor.float().abs() / 16 + tensor.float().abs().max() / 448 / 512
        assert ((ours - tensor).abs() <= bound).all(), key


# Refused ---------------------------------------------------------------------------------------------------------------


def edit(adapter: Path, tensors: Any = None, **config: Any) -> None:
    """Change an adapter on disk."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    file = adapter / "adapter_model.safetensors"
    if tensors is not None:
        save_file(tensors(load_file(file)), file)


LAST = "base_model.model.model.layers.1.mlp.experts"


BROKEN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "fewer parameters in the config": (None, {"target_parameters": EXPERTS[:1]},
        r"target_parameters names 1 of its parameters \(gate_up_proj\), but there are factors for 2"),
    "none in the config": (None, {"target_parameters": None}, "experts.base_layer': target_parameters names none of its parameters"),
    "not a list": (None, {"target_parameters": "mlp.experts.gate_up_proj"}, "target_parameters names none"),
    "another rank": (None, {"rank_pattern": {"gate_up_proj": 2}}, r"experts.gate_up_proj': expected rank 2 by the config, found 3 rows"),
    "a lost layer of factors": (lambda t: {k: v for k, v in t.items() if not k.startswith(f"{LAST}.lora_")}, {},
        "layers.1.mlp.experts.base_layer': target_parameters names none"),
    "experts missing in the factors": (lambda t: t | {f"{LAST}.lora_A.weight": t[f"{LAST}.lora_A.weight"][:9].clone(),
        f"{LAST}.lora_B.weight": t[f"{LAST}.lora_B.weight"][:, :9].clone()}, {}, r"lora_A \[9, 24\], lora_B \[32, 9\]\) that do not fit"),
    "another width": (lambda t: t | {f"{LAST}.lora_A.weight": t[f"{LAST}.lora_A.weight"][:, :8].clone()}, {},
        r"do not fit: the base has .*gate_up_proj with 4 experts of \[48, 32\]"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_factors_that_do_not_fit(what: str, tmp_path: Path) -> None:
    tensors, config, says = BROKEN[what]
    base, adapter, _ = make("qwen3-moe", tmp_path, EXPERTS)
    edit(adapter, tensors, **config)
    with pytest.raises(InputError, match=says) as e:
        streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "out", mitigation_lambda=1.0)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["an expert is missing", "another shape", "no experts"])
def test_a_base_whose_experts_do_not_fit(what: str, tmp_path: Path) -> None:
    base, adapter, _ = make("qwen3-moe", tmp_path, EXPERTS)
    tensors = weights(base)
    one = "model.layers.0.mlp.experts.2.up_proj.weight"
    if what == "no experts":
        tensors = {k: v for k, v in tensors.items() if ".experts." not in k}
    elif what == "an expert is missing":
        del tensors[one]
    else:
        tensors[one] = tensors[one][:5].clone()
    save_file(tensors, base / "model.safetensors")
    says = {"an expert is missing": "which are not one for each expert, all of one shape", "another shape": "which are not one for",
            "no experts": r"experts.down_proj' has no tensor in the base"}[what]  # fmt: skip
    with pytest.raises(MismatchError, match=says):
        streamer.iter_merged(base, adapter, mitigation_lambda=1.0)
