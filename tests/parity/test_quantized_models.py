"""Whole models that are quantized in parts: FP8 written anew, MXFP4 experts, layers stored transposed, saved modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import quantized
import torch
from pairs import merge, mitigate, opened
from peft import LoraConfig, get_peft_model
from quantized_cases import FP8, Case, all_tensors, decode, decoded_base, merged_by_peft
from quantized_layers import MAKERS, torchao_weight
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from verified import lines

import streamer
from streamer.errors import MismatchError, UnsupportedError


@pytest.fixture(scope="module", params=FP8)
def fp8(
    request: pytest.FixtureRequest,
    plain: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    directory = tmp_path_factory.mktemp(request.param)
    return Case(
        request.param, MAKERS[request.param](directory / "base", plain[0]), plain[1], plain[0]
    )


def test_fp8_is_coded_anew_with_the_least_scales(fp8: Case, tmp_path: Path) -> None:
    merge(fp8.made.base, fp8.adapter, tmp_path / "out", 1)
    before = all_tensors(fp8.made.base)
    after = all_tensors(tmp_path / "out")
    assert {k: (t.dtype, t.shape) for k, t in before.items()} == {
        k: (t.dtype, t.shape) for k, t in after.items()
    }
    factors = load_file(fp8.adapter / "adapter_model.safetensors")
    for name, W in fp8.made.decoded.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        exact = (
            W.double()
            + 2
            * factors[f"{stem}.lora_B.weight"].double()
            @ factors[f"{stem}.lora_A.weight"].double()
        )
        got = decode(after, name)
        scale = (got / after[name].float()).nan_to_num(0).abs()
        scale = torch.where(scale > 0, scale, scale.max())  # of a zero it cannot be told
        # Half a unit in the last of 4 significant bits; below 2^-6 codes are multiples of 2^-9. The largest may be cut by a scale in bf16.
        bound = (
            torch.maximum(exact.abs() * 2.0**-4, scale * 2.0**-10) * 1.001 + exact.abs() * 2.0**-8
        )
        assert ((got - exact).abs() <= bound).all()
    for name, t in before.items():
        if name.removesuffix("_scale").removesuffix("_scale_inv") not in fp8.made.decoded:
            assert torch.equal(
                t.flatten().view(torch.uint8), after[name].flatten().view(torch.uint8)
            )
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (fp8.made.base / "config.json").read_text()
    )


@pytest.mark.parametrize("name", ["fp8-blocks", "torchao-fp8", "mxfp8"])
def test_fp8_is_what_its_library_would_code_and_opens(
    name: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    """The codes of transformers or torchao for the merged weights; what transformers loads is what these codes mean."""
    made = MAKERS[name](tmp_path / "base", plain[0])
    merge(made.base, plain[1], tmp_path / "out", 1)
    after = all_tensors(tmp_path / "out")
    exact = merged_by_peft(decoded_base(tmp_path / "decoded", plain[0], made), plain[1])
    quantizer = type(
        "Quantizer", (), {"quantization_config": FineGrainedFP8Config(weight_block_size=(64, 64))}
    )()
    for key in made.decoded if name != "mxfp8" else ():
        if name == "torchao-fp8":
            weight, _ = torchao_weight(exact[key].float(), "fp8-row")
            theirs = {key: weight.qdata, f"{key}_scale": weight.scale}
        else:
            theirs = Fp8Quantize(quantizer)._quantize_one(key, exact[key].float())
        (scale,) = theirs.keys() - {key}
        assert torch.allclose(after[scale], theirs[scale], rtol=1e-6, atol=0)
        assert (after[key].float() != theirs[key].float()).float().mean() < 2e-3
    dtype = torch.float32 if name == "fp8-blocks" else torch.bfloat16
    model = opened(AutoModelForCausalLM, tmp_path / "out", dtype=dtype)
    model(torch.arange(1, 9)[None])  # the library decodes before the first use
    for key, loaded in ((key, model.state_dict()[key]) for key in made.decoded):
        assert torch.equal(
            loaded.dequantize() if name == "torchao-fp8" else loaded, decode(after, key).to(dtype)
        )


def test_fp8_with_scales_that_are_powers_of_two(plain: tuple[Path, Path], tmp_path: Path) -> None:
    made = quantized.fp8_blocks(tmp_path / "base", plain[0], scale_fmt="ue8m0")
    merge(made.base, plain[1], tmp_path / "out", 1)
    after = all_tensors(tmp_path / "out")
    scales = [t for k, t in after.items() if k.endswith("_scale_inv")]
    assert all(t.dtype == torch.float8_e8m0fnu for t in scales)
    codes = [t.float().abs().max() for k, t in after.items() if k in made.decoded]
    assert all(224 < largest <= 448 for largest in codes)


def test_fp8_keeps_its_bytes_where_the_delta_is_zero(fp8: Case, tmp_path: Path) -> None:
    merge(fp8.made.base, fp8.adapter, tmp_path / "out", 0, method="shrink")
    for file in fp8.made.base.glob("*.safetensors"):
        assert load_file(file).keys() == load_file(tmp_path / "out" / file.name).keys()
        ours, theirs = ((d / file.name).read_bytes() for d in (tmp_path / "out", fp8.made.base))
        assert (
            ours[-(len(ours) - 8 - int.from_bytes(ours[:8], "little")) :]
            == theirs[-(len(theirs) - 8 - int.from_bytes(theirs[:8], "little")) :]
        )


def test_an_embedding_in_gptq_is_not_dequantized(plain: tuple[Path, Path], tmp_path: Path) -> None:
    """GPTQModel 7 stores it like a linear layer of the vocabulary, so its values are (hidden, vocabulary)."""
    made = MAKERS["gptq"](tmp_path / "base", plain[0])
    stated = json.loads((made.base / "config.json").read_text())["quantization_config"]
    tensors = {k: t for k, t in all_tensors(made.base).items() if "embed_tokens" not in k}
    layer = "model.layers.0.self_attn.q_proj."
    tensors |= {
        k.replace(layer, "model.embed_tokens."): t.clone()
        for k, t in tensors.items()
        if k.startswith(layer)
    }
    base = quantized.write(tmp_path / "embedding", plain[0], tensors, stated)
    with pytest.raises(
        UnsupportedError, match=r"'model.embed_tokens.weight' is an embedding in GPTQ"
    ):
        streamer.iter_merged(base, plain[1], mitigation_lambda=1, dequantize=True)


@pytest.mark.filterwarnings("ignore:the adapter was trained on")  # the decoded base
@pytest.mark.parametrize("name", ["nf4", "fp8-blocks"])
def test_dora_and_saved_modules_on_codes(
    name: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    """What the other kinds of adapters do is done to the decoded weights."""
    made = MAKERS[name](tmp_path / "base", plain[0])
    decoded = decoded_base(tmp_path / "decoded", plain[0], made)
    model = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        use_dora=True,
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )
    lora = get_peft_model(model, config)
    with torch.no_grad():
        for key, p in lora.named_parameters():
            if "magnitude" in key or "modules_to_save" in key:
                p.mul_(1.1)
    lora.save_pretrained(tmp_path / "adapter")
    exact = merged_by_peft(decoded, tmp_path / "adapter")
    out = tmp_path / "out"
    merge(made.base, tmp_path / "adapter", out, 1, dequantize=True)
    tensors = all_tensors(out)
    assert set(tensors) == set(exact)
    for key, t in tensors.items():
        rounded = exact[key].to(torch.bfloat16)
        assert (t != rounded).float().mean() < 2e-3, key
        assert torch.allclose(t.double(), rounded.double(), rtol=2**-7, atol=1e-6), key
    if name in FP8:
        merge(made.base, tmp_path / "adapter", tmp_path / "fp8", 1)
        kept = all_tensors(tmp_path / "fp8")
        for key in made.decoded:
            error = torch.linalg.norm(decode(kept, key).double() - exact[key]) / torch.linalg.norm(
                exact[key]
            )
            assert error < 0.04
        assert torch.equal(kept["lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize("name", ["nf4", "fp8-blocks", "gptq"])
def test_a_saved_module_that_stands_as_codes(
    name: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    """It is carried along like any other; only a merge has to write it, and refuses."""
    base = MAKERS[name](tmp_path / "base", plain[0]).base
    lora = get_peft_model(
        quantized.llama().float(), LoraConfig(target_modules=["q_proj"], modules_to_save=["o_proj"])
    )
    lora.save_pretrained(tmp_path / "adapter")
    assert len(streamer.detect_intruder_dimensions(base, tmp_path / "adapter")) == 2
    mitigate(base, tmp_path / "adapter", tmp_path / "out", 0.5)
    with pytest.raises(
        UnsupportedError,
        match=r"saves '.*o_proj.weight' \(modules_to_save\), which stands quantized in",
    ):
        streamer.iter_merged(base, tmp_path / "adapter", dequantize=True)


@pytest.mark.filterwarnings("ignore:the adapter was trained on")  # the decoded base
@pytest.mark.parametrize("name", ["nf4", "int8", "fp8-blocks", "gptq"])
def test_trained_rows_of_codes(name: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Codes do not hold them: they are written into the decoded weight, or the merge is refused."""
    made = MAKERS[name](tmp_path / "base", plain[0])
    decoded = decoded_base(tmp_path / "decoded", plain[0], made)
    model = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32)
    lora = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], trainable_token_indices={"o_proj": [3, 100]})
    )
    with torch.no_grad():
        for key, p in lora.named_parameters():
            if "trainable_tokens" in key:
                p.add_(torch.randn(p.shape))
    lora.save_pretrained(tmp_path / "adapter")
    exact = merged_by_peft(decoded, tmp_path / "adapter")
    out = tmp_path / "out"
    inputs = made.base, tmp_path / "adapter"
    merge(*inputs, out, 1, dequantize=True)
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
    with pytest.raises(
        MismatchError, match="row 128 of trainable_token_indices is beyond the 128 rows of"
    ):
        streamer.iter_merged(*inputs, mitigation_lambda=1, dequantize=True)
