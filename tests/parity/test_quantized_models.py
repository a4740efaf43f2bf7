"""Whole models that are quantized in parts: FP8 written anew, MXFP4 experts, layers stored transposed, saved modules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import quantized
import torch
from peft import LoraConfig, get_peft_model
from quantized import Quantized
from quantized_cases import FP8, Case, all_tensors, decode, decoded_base, merged_by_peft
from quantized_layers import MAKERS, torchao_weight
from safetensors.torch import load_file, save_file
from seeds import vary
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
)
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from verified import lines

import streamer
from streamer.errors import MismatchError, UnsupportedError


@pytest.fixture(scope="module", params=FP8)
def fp8(request: pytest.FixtureRequest, plain: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp(request.param)
    return Case(request.param, MAKERS[request.param](directory / "base", plain[0]), plain[1], plain[0])


def test_fp8_is_coded_anew_with_the_least_scales(fp8: Case, tmp_path: Path) -> None:
    streamer.merge_with_reduced_intruder_dimensions(fp8.made.base, fp8.adapter, tmp_path / "out", mitigation_lambda=1)
    before, after = all_tensors(fp8.made.base), all_tensors(tmp_path / "out")
    assert {k: (t.dtype, t.shape) for k, t in before.items()} == {k: (t.dtype, t.shape) for k, t in after.items()}
    factors = load_file(fp8.adapter / "adapter_model.safetensors")
    for name, W in fp8.made.decoded.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        exact = W.double() + 2 * factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double()
        got = decode(after, name)
        scale = (got / after[name].float()).nan_to_num(0).abs()
        scale = torch.where(scale > 0, scale, scale.max())  # of a zero it cannot be told
        # Half a unit in the last of 4 significant bits; below 2^-6 codes are multiples of 2^-9. The largest may be cut by a scale in bf16.
        bound = torch.maximum(exact.abs() * 2.0**-4, scale * 2.0**-10) * 1.001 + exact.abs() * 2.0**-8
        assert ((got - exact).abs() <= bound).all()
    for name, t in before.items():
        if name.removesuffix("_scale").removesuffix("_scale_inv") not in fp8.made.decoded:
            assert torch.equal(t.flatten().view(torch.uint8), after[name].flatten().view(torch.uint8))
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (fp8.made.base / "config.json").read_text()
    )


def test_fp8_blocks_are_what_transformers_would_code(plain: tuple[Path, Path], tmp_path: Path) -> None:
    made = quantized.fp8_blocks(tmp_path / "base", plain[0])
    streamer.merge_with_reduced_intruder_dimensions(made.base, plain[1], tmp_path / "out", mitigation_lambda=1)
    after = all_tensors(tmp_path / "out")
    decoded = decoded_base(tmp_path / "decoded", plain[0], made)
    exact = merged_by_peft(decoded, plain[1])
    quantizer = type("Quantizer", (), {"quantization_config": FineGrainedFP8Config(weight_block_size=(64, 64))})()
    for name in made.decoded:
        theirs = Fp8Quantize(quantizer)._quantize_one(name, exact[name].float())
        scale = f"{name.removesuffix('.weight')}.weight_scale_inv"
        assert torch.allclose(after[scale], theirs[scale], rtol=1e-6, atol=0)
        assert (after[name].float() != theirs[name].float()).float().mean() < 2e-3
    # What transformers loads is what these codes mean.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], decode(after, name)) for name in made.decoded)


@pytest.mark.parametrize("name", ["mxfp8", "torchao-fp8"])
def test_transformers_opens_fp8_that_was_coded_anew(name: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    made = MAKERS[name](tmp_path / "base", plain[0])
    streamer.merge_with_reduced_intruder_dimensions(made.base, plain[1], tmp_path / "out", mitigation_lambda=1)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model(torch.arange(1, 9)[None])  # the library decodes before the first use
    state, after = model.state_dict(), all_tensors(tmp_path / "out")
    for key in made.decoded:
        loaded = state[key].dequantize() if name == "torchao-fp8" else state[key]
        assert torch.equal(loaded, decode(after, key).bfloat16())


def test_fp8_rows_are_what_torchao_would_code(plain: tuple[Path, Path], tmp_path: Path) -> None:
    made = MAKERS["torchao-fp8"](tmp_path / "base", plain[0])
    streamer.merge_with_reduced_intruder_dimensions(made.base, plain[1], tmp_path / "out", mitigation_lambda=1)
    after = all_tensors(tmp_path / "out")
    exact = merged_by_peft(decoded_base(tmp_path / "decoded", plain[0], made), plain[1])
    for name in made.decoded:
        theirs, _ = torchao_weight(exact[name].float(), "fp8-row")
        assert torch.allclose(after[f"{name}_scale"], theirs.scale, rtol=1e-6, atol=0)
        assert (after[name].float() != theirs.qdata.float()).float().mean() < 2e-3


def test_fp8_with_scales_that_are_powers_of_two(plain: tuple[Path, Path], tmp_path: Path) -> None:
    made = quantized.fp8_blocks(tmp_path / "base", plain[0], scale_fmt="ue8m0")
    streamer.merge_with_reduced_intruder_dimensions(made.base, plain[1], tmp_path / "out", mitigation_lambda=1)
    after = all_tensors(tmp_path / "out")
    scales = [t for k, t in after.items() if k.endswith("_scale_inv")]
    assert all(t.dtype == torch.float8_e8m0fnu for t in scales)
    codes = [t.float().abs().max() for k, t in after.items() if k in made.decoded]
    assert all(224 < largest <= 448 for largest in codes)


def test_fp8_keeps_its_bytes_where_the_delta_is_zero(fp8: Case, tmp_path: Path) -> None:
    streamer.merge_with_reduced_intruder_dimensions(
        fp8.made.base, fp8.adapter, tmp_path / "out", mitigation_lambda=0, method="shrink"
    )
    for file in fp8.made.base.glob("*.safetensors"):
        assert load_file(file).keys() == load_file(tmp_path / "out" / file.name).keys()
        ours, theirs = ((d / file.name).read_bytes() for d in (tmp_path / "out", fp8.made.base))
        assert (
            ours[-(len(ours) - 8 - int.from_bytes(ours[:8], "little")) :]
            == theirs[-(len(theirs) - 8 - int.from_bytes(theirs[:8], "little")) :]
        )


def tiny_gpt_oss() -> GptOssForCausalLM:
    config = GptOssConfig(vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=16, num_local_experts=3, num_experts_per_tok=2, pad_token_id=0,
                          layer_types=["full_attention"])  # fmt: skip
    return GptOssForCausalLM(config).to(torch.bfloat16)


def with_mxfp4_experts(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The model's tensors with random codes for the experts', and what transformers decodes from these."""
    decoded = {}
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(115, 122, (experts, outputs, inputs // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        decoded[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return tensors, decoded


def test_gpt_oss_with_experts_in_mxfp4(tmp_path: Path) -> None:
    """An adapter on attention; the experts' codes become the tensors that transformers makes of them."""
    torch.manual_seed(vary(0))
    model = tiny_gpt_oss()
    model.save_pretrained(tmp_path / "plain")
    tensors, decoded = with_mxfp4_experts(load_file(tmp_path / "plain" / "model.safetensors"))
    assert len(decoded) == 2
    base = quantized.write(tmp_path / "base", tmp_path / "plain", tensors, {"quant_method": "mxfp4"})
    torch.manual_seed(vary(1))
    lora = get_peft_model(model.float(), LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "adapter")
    found = streamer.detect_intruder_dimensions(base, tmp_path / "adapter")
    assert len(found) == 2
    # Attention is plain there: a merge leaves the codes as they are.
    streamer.merge_with_reduced_intruder_dimensions(base, tmp_path / "adapter", tmp_path / "kept", mitigation_lambda=1)
    kept = all_tensors(tmp_path / "kept")
    assert all(torch.equal(kept[k], t) for k, t in tensors.items() if k.endswith(("_blocks", "_scales")))
    out = tmp_path / "out"
    streamer.merge_with_reduced_intruder_dimensions(
        base, tmp_path / "adapter", out, mitigation_lambda=1, dequantize=True
    )
    written = all_tensors(out)
    assert all(torch.equal(written[name], t.bfloat16()) for name, t in decoded.items())
    assert torch.equal(
        written["model.layers.0.self_attn.q_proj.weight"], kept["model.layers.0.self_attn.q_proj.weight"]
    )
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = loaded.state_dict()
    assert all(torch.equal(state[name], t.bfloat16()) for name, t in decoded.items())


def test_layers_that_a_plain_model_stores_transposed(tmp_path: Path) -> None:
    """GPT-2's layers are (in, out) when plain and (out, in) when quantized: found either way; written, they would have to be turned."""
    torch.manual_seed(vary(0))
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=64, n_positions=32))
    model.save_pretrained(tmp_path / "plain")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    made = quantized.by_bitsandbytes(tmp_path / "base", tmp_path / "plain", options)
    lora = get_peft_model(
        model, LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    )
    lora.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    tensors |= {name: t.T.contiguous() for name, t in made.decoded.items()}
    (tmp_path / "decoded").mkdir()
    shutil.copy(tmp_path / "plain" / "config.json", tmp_path / "decoded")
    save_file(tensors, tmp_path / "decoded" / "model.safetensors")
    ours, theirs = (
        streamer.detect_intruder_dimensions(tmp_path / d, tmp_path / "adapter") for d in ("base", "decoded")
    )
    assert [m.tensor for m in ours] == [m.tensor for m in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.detection.singular_values == pytest.approx(other.detection.singular_values, rel=1e-5)
    with pytest.raises(UnsupportedError, match="a quantized gpt2 stores its layers"):
        streamer.iter_merged(tmp_path / "base", tmp_path / "adapter", mitigation_lambda=1, dequantize=True)


def test_an_embedding_in_gptq_is_not_dequantized(plain: tuple[Path, Path], tmp_path: Path) -> None:
    """GPTQModel 7 stores it like a linear layer of the vocabulary, so its values are (hidden, vocabulary)."""
    made = MAKERS["gptq"](tmp_path / "base", plain[0])
    stated = json.loads((made.base / "config.json").read_text())["quantization_config"]
    tensors = {k: t for k, t in all_tensors(made.base).items() if "embed_tokens" not in k}
    layer = "model.layers.0.self_attn.q_proj."
    tensors |= {k.replace(layer, "model.embed_tokens."): t.clone() for k, t in tensors.items() if k.startswith(layer)}
    base = quantized.write(tmp_path / "embedding", plain[0], tensors, stated)
    with pytest.raises(UnsupportedError, match=r"'model.embed_tokens.weight' is an embedding in GPTQ"):
        streamer.iter_merged(base, plain[1], mitigation_lambda=1, dequantize=True)


@pytest.mark.filterwarnings("ignore:the adapter was trained on")  # the decoded base
@pytest.mark.parametrize("name", ["nf4", "fp8-blocks"])
def test_dora_and_saved_modules_on_codes(name: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """What the other kinds of adapters do is done to the decoded weights."""
    made = MAKERS[name](tmp_path / "base", plain[0])
    decoded = decoded_base(tmp_path / "decoded", plain[0], made)
    model = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], use_dora=True, modules_to_save=["lm_head"], init_lora_weights=False
    )
    lora = get_peft_model(model, config)
    with torch.no_grad():
        for key, p in lora.named_parameters():
            if "magnitude" in key or "modules_to_save" in key:
                p.mul_(1.1)
    lora.save_pretrained(tmp_path / "adapter")
    exact = merged_by_peft(decoded, tmp_path / "adapter")
    out = tmp_path / "out"
    streamer.merge_with_reduced_intruder_dimensions(
        made.base, tmp_path / "adapter", out, mitigation_lambda=1, dequantize=True
    )
    tensors = all_tensors(out)
    assert set(tensors) == set(exact)
    for key, t in tensors.items():
        rounded = exact[key].to(torch.bfloat16)
        assert (t != rounded).float().mean() < 2e-3, key
        assert torch.allclose(t.double(), rounded.double(), rtol=2**-7, atol=1e-6), key
    if name in FP8:
        streamer.merge_with_reduced_intruder_dimensions(
            made.base, tmp_path / "adapter", tmp_path / "fp8", mitigation_lambda=1
        )
        kept = all_tensors(tmp_path / "fp8")
        for key in made.decoded:
            error = torch.linalg.norm(decode(kept, key).double() - exact[key]) / torch.linalg.norm(exact[key])
            assert error < 0.04
        assert torch.equal(kept["lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize("name", ["nf4", "fp8-blocks", "gptq"])
def test_a_saved_module_that_stands_as_codes(name: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """It is carried along like any other; only a merge has to write it, and refuses."""
    base = MAKERS[name](tmp_path / "base", plain[0]).base
    lora = get_peft_model(quantized.llama().float(), LoraConfig(target_modules=["q_proj"], modules_to_save=["o_proj"]))
    lora.save_pretrained(tmp_path / "adapter")
    assert len(streamer.detect_intruder_dimensions(base, tmp_path / "adapter")) == 2
    streamer.reduce_intruder_dimension(base, tmp_path / "adapter", tmp_path / "out", mitigation_lambda=0.5)
    with pytest.raises(
        UnsupportedError, match=r"saves '.*o_proj.weight' \(modules_to_save\), which stands quantized in"
    ):
        streamer.iter_merged(base, tmp_path / "adapter", dequantize=True)


@pytest.mark.filterwarnings("ignore:the adapter was trained on")  # the decoded base
@pytest.mark.parametrize("name", ["nf4", "int8", "fp8-blocks", "gptq"])
def test_trained_rows_of_codes(name: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Codes do not hold them: they are written into the decoded weight, or the merge is refused."""
    made = MAKERS[name](tmp_path / "base", plain[0])
    decoded = decoded_base(tmp_path / "decoded", plain[0], made)
    model = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32)
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], trainable_token_indices={"o_proj": [3, 100]}))
    with torch.no_grad():
        for key, p in lora.named_parameters():
            if "trainable_tokens" in key:
                p.add_(torch.randn(p.shape))
    lora.save_pretrained(tmp_path / "adapter")
    exact, out = merged_by_peft(decoded, tmp_path / "adapter"), tmp_path / "out"
    inputs = made.base, tmp_path / "adapter"
    streamer.merge_with_reduced_intruder_dimensions(*inputs, out, mitigation_lambda=1, dequantize=True)
    for key, t in all_tensors(out).items():
        assert torch.allclose(t.double(), exact[key].double(), rtol=2**-7, atol=1e-6), key
    found = lines(out, *inputs, sample="all")
    assert (
        found == []
        if name == "fp8-blocks"
        else "not verified: 2 matrices cannot be recomputed: it is stored as" in found[0]
    )
    with pytest.raises(UnsupportedError, match="of the weights to merge into are quantized"):
        streamer.iter_merged(*inputs, mitigation_lambda=1)
    config = json.loads((inputs[1] / "adapter_config.json").read_text())
    config["trainable_token_indices"] = {"o_proj": [3, 128]}
    (inputs[1] / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match="row 128 of trainable_token_indices is beyond the 128 rows of"):
        streamer.iter_merged(*inputs, mitigation_lambda=1, dequantize=True)


@pytest.mark.filterwarnings("ignore:the adapter was trained on")  # the decoded base
def test_adapters_on_experts_in_mxfp4(tmp_path: Path) -> None:
    """Each expert is decoded by itself; the stack is written with PEFT's deltas in it."""
    torch.manual_seed(vary(0))
    tiny_gpt_oss().save_pretrained(tmp_path / "plain")
    tensors, decoded = with_mxfp4_experts(load_file(tmp_path / "plain" / "model.safetensors"))
    base = quantized.write(tmp_path / "base", tmp_path / "plain", tensors, {"quant_method": "mxfp4"})
    plain = decoded_base(tmp_path / "decoded", tmp_path / "plain", Quantized(base, decoded))
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names))
    with torch.no_grad():
        for key, p in lora.named_parameters():
            if "lora_" in key:
                p.normal_(0, 0.1)
    lora.save_pretrained(tmp_path / "adapter")
    ours, theirs = (streamer.detect_intruder_dimensions(b, tmp_path / "adapter") for b in (base, plain))
    assert len(ours) == len(theirs) == 1 + 2 * 3
    assert ours.intruders > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.tensor, mine.detection.singular_values) == (other.tensor, other.detection.singular_values)
    with pytest.raises(
        UnsupportedError, match=r"2 of the weights .*'model\.layers\.0\.mlp\.experts\.\w+' first \(MXFP4\)"
    ):
        streamer.iter_merged(base, tmp_path / "adapter", mitigation_lambda=1)
    exact = merged_by_peft(plain, tmp_path / "adapter")
    merged = dict(streamer.iter_merged(base, tmp_path / "adapter", mitigation_lambda=1, dequantize=True))
    assert set(merged) == set(exact)
    for key, t in merged.items():
        rounded = exact[key].to(torch.bfloat16)
        assert (t != rounded).float().mean() < 2e-3, key
        assert torch.allclose(t.double(), rounded.double(), rtol=2**-7, atol=1e-6), key
