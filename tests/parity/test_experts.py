"""LoRA on experts' parameters, as PEFT makes it and transformers saves the models, in both layouts, on all forms of bases."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architectures import MODELS, MOE, TEXT, weights
from evaluated import assert_as_transformers
from pairs import merge, mitigate, opened
from paths import DATA
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from seeds import vary
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import streamer
from streamer.adapters.adapter_config import stated_options
from streamer.errors import InputError, MismatchError, UnsupportedError

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make(
    name: str, home: Path, targets: list[str], dtype: torch.dtype = torch.float32
) -> tuple[Path, Path, Any]:
    """A tiny model and an adapter on its experts, saved: their directories, and PEFT's model."""
    cls, config, _ = MODELS[name]
    torch.manual_seed(vary(0))
    model = getattr(transformers, cls)(config()).to(dtype)
    model.save_pretrained(home / "base")
    return home / "base", home / "adapter", adapt(type(model), home, targets)


def adapt(cls: Any, home: Path, targets: list[str], **options: Any) -> Any:
    torch.manual_seed(vary(1))
    model = cls.from_pretrained(home / "base")
    lora = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=targets,
        init_lora_weights=False,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, lora)
        for key, p in model.named_parameters():
            if ".experts." in key and "lora_" in key:
                p.data.normal_(std=0.3)
        model.save_pretrained(home / "adapter")
    return model


def assert_merged(home: Path, model: Any, rtol: float = 1e-5) -> None:
    """`merge` at λ = 1 writes what PEFT's merged model saves."""
    streamer.merge_with_reduced_intruder_dimensions(
        home / "base", home / "adapter", home / "ours", mitigation_lambda=1.0
    )
    model.merge_and_unload().save_pretrained(home / "theirs")
    ours = weights(home / "ours")
    theirs = weights(home / "theirs")
    base = weights(home / "base")
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        if (
            tensor.shape != theirs[key].shape
        ):  # transformers does not always turn a stack back when it saves
            theirs[key] = theirs[key].transpose(1, 2)
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=rtol, atol=rtol, msg=key)
    same = {key for key, tensor in ours.items() if torch.equal(tensor, base[key])}
    assert same == {key for key in theirs if torch.equal(theirs[key], base[key])}


TARGETS = {
    "both": EXPERTS,
    "gate_up": EXPERTS[:1],
    "down": EXPERTS[1:],
    "router": [*reversed(EXPERTS), "mlp.gate.weight"],
}


@pytest.mark.parametrize(
    "what",
    ["both", *(pytest.param(n, marks=pytest.mark.long) for n in [*TARGETS, "both in bf16"][1:])],
)
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_merged_as_peft_merges(name: str, what: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if "bf16" in what else torch.float32
    *_, model = make(name, tmp_path, TARGETS[what.removesuffix(" in bf16")], dtype)
    assert_merged(
        tmp_path, model, rtol=1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    )


def test_stacks_of_an_unknown_class(tmp_path: Path) -> None:
    """gpt-oss stores its experts (in, out), most others (out, in): nothing in one file tells."""
    base, adapter, _ = make("gpt-oss", tmp_path, EXPERTS)
    expected = dict(streamer.iter_merged(base, adapter, mitigation_lambda=1.0))
    alone = base / "model.safetensors"
    (base / "config.json").unlink()
    with pytest.raises(
        MismatchError, match=r"does not say whether they are stored as .* with --architecture NAME"
    ):
        streamer.iter_merged(alone, adapter, mitigation_lambda=1.0)
    named = dict(
        streamer.iter_merged(
            alone, adapter, mitigation_lambda=1.0, architecture="GptOssForCausalLM"
        )
    )
    assert all(torch.equal(named[key], tensor) for key, tensor in expected.items())


# What other versions of PEFT wrote -------------------------------------------------------------------------------------


ADAPTERS = DATA / "experts"


REFUSED = {
    f"gpt_oss-square-peft{v}"
    for v in ("0.19.0-transformers5", "0.19.1-transformers4", "0.19.1-transformers5")
}


@pytest.mark.parametrize(
    "case", sorted(p.name for p in ADAPTERS.iterdir() if not p.name.startswith("base-"))
)
def test_of_other_versions(case: str, tmp_path: Path) -> None:
    """Which way round the factors are: by their shapes; of square experts by the others of the adapter; else by the version."""
    name, _, _, loader = case.split("-")
    base = ADAPTERS / f"base-{name}-{loader}"
    adapter = ADAPTERS / case / "adapter"
    if case in REFUSED:
        with pytest.raises(
            UnsupportedError,
            match=r"down_proj' are square \(8x8\), and peft_version '0.19.[01]' does not determine",
        ):
            streamer.detect_intruder_dimensions(base, adapter)
        return
    merge(base, adapter, tmp_path / "merged", 1.0)
    ours = weights(tmp_path / "merged")
    theirs = load_file(ADAPTERS / case / "merged.safetensors")
    before = weights(base)
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(theirs[key], before[key]) for key in theirs)
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-6, msg=key)


# Detection and mitigation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_a_mitigated_adapter_gives_the_mitigated_model(name: str, tmp_path: Path) -> None:
    """`mitigate`, then PEFT's merge, is `merge`: with the method that fits the rank exactly."""
    base, adapter, model = make(name, tmp_path, EXPERTS)
    findings = streamer.detect_intruder_dimensions(base, adapter, top_k=5)
    assert findings.intruders > 4
    options: dict[str, Any] = {
        "findings": findings,
        "top_k": 5,
        "mitigation_lambda": 0.25,
        "method": "project",
    }
    record = streamer.reduce_intruder_dimension(base, adapter, tmp_path / "mitigated", **options)
    merged = streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, tmp_path / "ours", **options
    )
    assert len(record["matrices"]) == len(merged["matrices"]) == len(findings)
    loaded = PeftModel.from_pretrained(
        type(model.get_base_model()).from_pretrained(base), tmp_path / "mitigated"
    )
    loaded.merge_and_unload().save_pretrained(tmp_path / "theirs")
    theirs = weights(tmp_path / "theirs")
    for key, tensor in weights(tmp_path / "ours").items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-5, msg=key)
    shrunk = mitigate(base, adapter, tmp_path / "shrunk", 0.5, method="shrink")
    assert shrunk["totals"]["equal_norm_shrink"] == pytest.approx(0.5)
    paper = streamer.reduce_intruder_dimension(
        base, adapter, tmp_path / "paper", **{**options, "method": "paper"}
    )
    assert 0 < paper["totals"]["dropped_max"] < 1


@pytest.mark.parametrize(
    "case", ["qwen3_moe-both-peft0.18.1-transformers5", "gpt_oss-both-peft0.17.1-transformers4"]
)
def test_turned_factors_are_written_back_turned(case: str, tmp_path: Path) -> None:
    name, _, _, loader = case.split("-")
    base = ADAPTERS / f"base-{name}-{loader}"
    adapter = ADAPTERS / case / "adapter"
    options: dict[str, Any] = {
        "top_k": 3,
        "mitigation_lambda": 0.25,
        "method": "project",
        "threshold_epsilon": 0.9,
    }
    record = streamer.reduce_intruder_dimension(base, adapter, tmp_path / "mitigated", **options)
    assert record["totals"]["intruders"] > 0
    direct = dict(streamer.iter_merged(base, adapter, **options))
    again = dict(streamer.iter_merged(base, tmp_path / "mitigated", mitigation_lambda=1.0))
    for key, tensor in direct.items():
        torch.testing.assert_close(tensor, again[key], rtol=1e-5, atol=1e-6, msg=key)


# Where the base has the experts otherwise ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*total_size is absent")
def test_one_expert_s_gate_and_up_stand_in_different_files(tmp_path: Path) -> None:
    """Each matrix counts once, whichever file its rows are written to."""
    base, adapter, _ = make("qwen3-moe", tmp_path, EXPERTS)
    expected = dict(streamer.iter_merged(base, adapter, mitigation_lambda=1.0))
    tensors = weights(base)
    up = {k: v for k, v in tensors.items() if ".up_proj." in k}
    files = {
        "model-00001-of-00002.safetensors": up,
        "model-00002-of-00002.safetensors": {k: v for k, v in tensors.items() if k not in up},
    }
    (base / "model.safetensors").unlink()
    for file, content in files.items():
        save_file(content, base / file)
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {k: f for f, c in files.items() for k in c}})
    )
    record = merge(base, adapter, tmp_path / "ours", 1.0)
    names = [m["tensor"] for m in record["matrices"]]
    assert len(names) == len(set(names)) == 2 * (2 * 4 + 1)
    assert "model.layers.1.mlp.experts.gate_up_proj[3]" in names
    for file, content in files.items():
        for key, tensor in load_file(tmp_path / "ours" / file).items():
            assert torch.equal(tensor, expected[key]), key
            assert key in content


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
        UnsupportedError, match=r"built on loading from 'model\.layers\.[01]\.block_sparse"
    ):
        streamer.iter_merged(base, tmp_path / "adapter", mitigation_lambda=1.0)


@pytest.mark.parametrize("old", [False, True])
def test_experts_stored_the_other_way_round_on_disk(old: bool, tmp_path: Path) -> None:
    """Qwen3-VL-MoE: transformers turns the stacks around on loading, under their own names, where their shape says so."""
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 4,
        "patch_size": 4,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "spatial_merge_size": 2,
        "deepstack_visual_indexes": [0],
    }
    rope = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [1, 1, 2]}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**TEXT, **MOE, "rope_parameters": rope}, vision_config=vision
    )
    torch.manual_seed(vary(0))
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    tensors = weights(tmp_path / "base")
    if old:
        tensors = {
            k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in tensors.items()
        }
        save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    assert (
        tensors["model.language_model.layers.0.mlp.experts.down_proj"].shape == (4, 24, 32)
    ) == old
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
                factors |= {
                    f"{stem}A.weight": torch.randn(2, n) / 4,
                    f"{stem}B.weight": torch.randn(m, 2) / 4,
                }
    save_file(factors, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["w1", "w2", "w3"],
        "target_parameters": None,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of rank_pattern, which PEFT itself sets: the fused gate_up_proj has twice the rank
        loaded = PeftModel.from_pretrained(
            type(model.get_base_model()).from_pretrained(base), adapter
        )
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
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    return out


@pytest.mark.filterwarnings("ignore:the adapter was trained on")  # the decoded base
def test_mxfp4_experts(tmp_path: Path) -> None:
    """gpt-oss as it is published: detected and mitigated as the decoded model is, merged with --dequantize, else refused."""
    torch.manual_seed(vary(0))
    config = transformers.GptOssConfig(**{**TEXT, **MOE, "intermediate_size": 64})
    model = transformers.GptOssForCausalLM(config).bfloat16()
    coded = {
        k: v for k, v in model.state_dict().items() if not k.endswith(("gate_up_proj", "down_proj"))
    }
    for layer in range(2):
        for name, (m, n) in {"gate_up_proj": (128, 32), "down_proj": (32, 64)}.items():
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            blocks = torch.randint(256, (4, m, n // 32, 16)).byte()
            scales = torch.randint(117, 123, (4, m, n // 32)).byte()
            coded |= {f"{stem}_blocks": blocks, f"{stem}_scales": scales}
            model.get_parameter(stem).data = convert_moe_packed_tensors(
                blocks, scales, dtype=torch.bfloat16
            )
    model.save_pretrained(tmp_path / "base")
    base = quantize(tmp_path / "base", coded, {"quant_method": "mxfp4"})
    adapt(type(model), tmp_path, EXPERTS)
    adapter = tmp_path / "adapter"
    plain, found = (
        streamer.detect_intruder_dimensions(b, adapter, top_k=5) for b in (tmp_path / "base", base)
    )
    assert plain.by_tensor.keys() == found.by_tensor.keys()
    for a in plain:
        b = found.by_tensor[a.tensor]
        assert a.detection.intruders == b.detection.intruders
        assert a.detection.singular_values == pytest.approx(b.detection.singular_values, rel=1e-5)
    with pytest.raises(
        UnsupportedError, match=r"4 of the weights to merge into are quantized, .*_proj.* \(MXFP4\)"
    ):
        streamer.merge_with_reduced_intruder_dimensions(
            base, adapter, tmp_path / "out", findings=found, top_k=5
        )
    expected = dict(streamer.iter_merged(tmp_path / "base", adapter, mitigation_lambda=1.0))
    got = dict(streamer.iter_merged(base, adapter, mitigation_lambda=1.0, dequantize=True))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[k], v) for k, v in expected.items())
    model.float().save_pretrained(tmp_path / "decoded")
    assert_as_transformers(type(model), base, adapter, tmp_path, decoded=tmp_path / "decoded")
    # Of an adapter on attention, which is plain, a merge leaves the codes as they are, or writes what transformers makes of them.
    adapt(type(model), tmp_path, [])
    for name, options in (("kept", {}), ("written", {"dequantize": True})):
        merge(base, adapter, tmp_path / name, 1.0, **options)
    kept = weights(tmp_path / "kept")
    q = "model.layers.0.self_attn.q_proj.weight"
    assert all(
        torch.equal(kept[k], t) for k, t in coded.items() if k.endswith(("_blocks", "_scales"))
    )
    loaded = opened(type(model), tmp_path / "written")
    assert torch.equal(loaded.get_parameter(q), kept[q])
    stacks = [
        name for name, _ in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))
    ]
    assert all(
        torch.equal(loaded.get_parameter(name), model.get_parameter(name).bfloat16())
        for name in stacks
    )


@pytest.mark.filterwarnings("ignore:the adapter was trained on")  # the decoded base
def test_fp8_experts(tmp_path: Path) -> None:
    """One tensor for each expert, in FP8: gate and up are coded anew, each with its rows of the delta."""
    base, adapter, _ = make("qwen3-moe", tmp_path, EXPERTS, torch.bfloat16)
    tensors = weights(base)
    coded = {}
    for key, w in tensors.items():
        if ".experts." in key:
            scale = w.float().abs().max().reshape(1, 1) / 448
            coded |= {key: (w.float() / scale).to(torch.float8_e4m3fn), f"{key}_scale_inv": scale}
            tensors[key] = coded[key].float() * scale
    fp8 = quantize(base, tensors | coded, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, base / "model.safetensors"
    )  # what the codes stand for
    expected = dict(streamer.iter_merged(base, adapter, mitigation_lambda=1.0))
    record = merge(fp8, adapter, tmp_path / "out", 1.0)
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
    "fewer parameters in the config": (
        None,
        {"target_parameters": EXPERTS[:1]},
        r"target_parameters names 1 of its parameters \(gate_up_proj\), but there are factors for 2",
    ),
    "none in the config": (
        None,
        {"target_parameters": None},
        "experts.base_layer': target_parameters names none of its parameters",
    ),
    "not a list": (
        None,
        {"target_parameters": "mlp.experts.gate_up_proj"},
        "target_parameters names none",
    ),
    "another rank": (
        None,
        {"rank_pattern": {"gate_up_proj": 2}},
        r"experts.gate_up_proj': expected rank 2 by the config, found 3 rows",
    ),
    "a lost layer of factors": (
        lambda t: {k: v for k, v in t.items() if not k.startswith(f"{LAST}.lora_")},
        {},
        "layers.1.mlp.experts.base_layer': target_parameters names none",
    ),
    "experts missing in the factors": (
        lambda t: (
            t
            | {
                f"{LAST}.lora_A.weight": t[f"{LAST}.lora_A.weight"][:9].clone(),
                f"{LAST}.lora_B.weight": t[f"{LAST}.lora_B.weight"][:, :9].clone(),
            }
        ),
        {},
        r"lora_A \[9, 24\], lora_B \[32, 9\]\) that do not fit",
    ),
    "another width": (
        lambda t: t | {f"{LAST}.lora_A.weight": t[f"{LAST}.lora_A.weight"][:, :8].clone()},
        {},
        r"do not fit: the base has .*gate_up_proj with 4 experts of \[48, 32\]",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_factors_that_do_not_fit(what: str, tmp_path: Path) -> None:
    tensors, config, says = BROKEN[what]
    base, adapter, _ = make("qwen3-moe", tmp_path, EXPERTS)
    edit(adapter, tensors, **config)
    with pytest.raises(InputError, match=says) as e:
        merge(base, adapter, tmp_path / "out", 1.0)
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
    says = (
        "experts.down_proj' has no tensor in the base"
        if what == "no experts"
        else "which do not fit together or lack an expert"
    )
    with pytest.raises(MismatchError, match=says):
        streamer.iter_merged(base, adapter, mitigation_lambda=1.0)


RANK = 3
COUNT = 4
NAMES = ["mixtral", "qwen3-moe"]
GROUPED = {"lora_B_layout": "grouped_by_expert"}
DETAILS = {
    "lora_A_layout": "grouped_by_expert",
    "parameters": {"gate_up_proj": {**GROUPED, "num_experts": COUNT}},
}


def grouped(adapter: Path, home: Path, **config: Any) -> Path:
    """A copy of an adapter whose columns of lora_B stand expert by expert: column e·r + k is PEFT's k·E + e."""
    home.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    columns = [k * COUNT + e for e in range(COUNT) for k in range(RANK)]
    for name, tensor in tensors.items():
        if ".experts." in name and "lora_B" in name:
            tensors[name] = tensor[:, columns].contiguous()
    save_file(tensors, home / "adapter_model.safetensors", {"format": "pt"})
    return stated(adapter, home, **config)


def stated(adapter: Path, home: Path, **config: Any) -> Path:
    """Write an adapter's config with other values into a directory."""
    values = json.loads((adapter / "adapter_config.json").read_text())
    (home / "adapter_config.json").write_text(json.dumps({**values, **config}))
    return home


def dense(adapter: Path, layer: str, is_grouped: bool) -> np.ndarray:
    """Δ of one stack, (E, out, in), in float64 by the definition: alpha / r times the sum of each expert's outer products."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    A, B = (
        tensors[f"base_model.model.{layer}.{factor}.weight"].double().numpy()
        for factor in ("lora_A", "lora_B")
    )
    out = np.zeros((COUNT, len(B), A.shape[1]))
    for e in range(COUNT):
        for k in range(RANK):
            out[e] += 2 * np.outer(
                B[:, e * RANK + k if is_grouped else k * COUNT + e], A[e * RANK + k]
            )
    return out


def merged(base: Path, adapter: Path, home: Path, **options: Any) -> Path:
    merge(base, adapter, home, 1.0, **options)
    return home


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model.eval()(torch.arange(2, 34)[None]).logits
    return answer


@pytest.mark.parametrize("name", NAMES)
def test_both_layouts_are_one_delta(name: str, tmp_path: Path) -> None:
    """Merged by streamer, and added in float64 to what transformers loads; the logits are those of PEFT's layers."""
    base, adapter, model = make(name, tmp_path, EXPERTS)
    theirs = logits(model)
    cls = type(model.get_base_model())
    unsloth = grouped(adapter, tmp_path / "grouped", **GROUPED, unsloth_fused_expert_lora=DETAILS)
    before = cls.from_pretrained(base).state_dict()
    for path, is_grouped in ((adapter, False), (unsloth, True)):
        loaded = cls.from_pretrained(merged(base, path, tmp_path / f"merged-{is_grouped}"))
        torch.testing.assert_close(logits(loaded), theirs, rtol=1e-4, atol=1e-4)
        for inner, parameter in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
            stack = f"model.layers.1.mlp.experts.{parameter}"
            delta = torch.from_numpy(dense(path, f"model.layers.1.mlp.experts{inner}", is_grouped))
            torch.testing.assert_close(
                loaded.state_dict()[stack].double(),
                before[stack].double() + delta,
                rtol=1e-6,
                atol=1e-6,
            )
    (tmp_path / "misread").mkdir()
    (tmp_path / "misread/adapter_model.safetensors").write_bytes(
        (unsloth / "adapter_model.safetensors").read_bytes()
    )
    misread = cls.from_pretrained(
        merged(base, stated(adapter, tmp_path / "misread"), tmp_path / "wrong")
    )
    assert (logits(misread) - theirs).abs().max() > 0.3 * theirs.abs().max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"method": "project", "mitigation_lambda": 0.25, "top_k": 4, "threshold_epsilon": 0.9},
        {"method": "shrink", "mitigation_lambda": 0.5},
        {"mitigation_lambda": 1.0},
    ],
    ids=lambda o: o.get("method", "unchanged"),
)
def test_a_mitigated_adapter_is_in_pefts_order(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base, adapter, model = make(name, tmp_path, EXPERTS)
    unsloth = grouped(adapter, tmp_path / "grouped", **GROUPED, unsloth_fused_expert_lora=DETAILS)
    mitigated = [tmp_path / "of PEFT", tmp_path / "of Unsloth"]
    for path, output in zip((adapter, unsloth), mitigated, strict=True):
        streamer.reduce_intruder_dimension(base, path, output, **options)
    config = json.loads((mitigated[1] / "adapter_config.json").read_text())
    assert config == json.loads((adapter / "adapter_config.json").read_text())
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in mitigated)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-6, msg=key)
    cls = type(model.get_base_model())
    loaded = cls.from_pretrained(merged(base, mitigated[1], tmp_path / "merged"))
    live = PeftModel.from_pretrained(cls.from_pretrained(base), mitigated[1])
    torch.testing.assert_close(logits(live), logits(loaded), rtol=1e-4, atol=1e-4)


def test_the_layout_is_asked_for(tmp_path: Path) -> None:
    base, adapter, _ = make("mixtral", tmp_path, EXPERTS)
    plain = grouped(adapter, tmp_path / "a", base_model_name_or_path="unsloth/mixtral")
    carded = grouped(adapter, tmp_path / "b")
    (carded / "README.md").write_text("---\ntags:\n- Unsloth\n---\n")
    marked = stated(adapter, grouped(adapter, tmp_path / "c"))
    tensors = load_file(marked / "adapter_model.safetensors")
    save_file(tensors, marked / "adapter_model.safetensors", {"trainer": "unsloth 2026.7"})
    options = "pass --lora-b-layout grouped_by_expert if .*, else --lora-b-layout rank_major$"
    for path in (plain, carded, marked):
        words = rf"and config, metadata or README.md names Unsloth, .*; {options}"
        with pytest.raises(UnsupportedError, match=words) as e:
            streamer.detect_intruder_dimensions(base, path)
        assert len(str(e.value).replace(str(path), "")) < 300
    wanted = dict(streamer.iter_merged(base, adapter, mitigation_lambda=1.0))
    for path in (plain, carded, marked):
        got = dict(
            streamer.iter_merged(
                base, path, mitigation_lambda=1.0, lora_b_layout="grouped_by_expert"
            )
        )
        assert all(
            torch.allclose(got[key], tensor, rtol=1e-5, atol=1e-6) for key, tensor in wanted.items()
        )
    # The option decides the findings, so they say it.
    findings = streamer.detect_intruder_dimensions(base, plain, lora_b_layout="grouped_by_expert")
    assert findings.adapter["lora_b_layout"] == "grouped_by_expert"
    assert stated_options(findings.adapter) == ["--lora-b-layout", "grouped_by_expert"]
    # What streamer writes of it is in PEFT's order, whatever its card and base are called.
    mitigate(
        base, plain, tmp_path / "mitigated", 0.5, method="shrink", lora_b_layout="grouped_by_expert"
    )
    half = dict(streamer.iter_merged(base, tmp_path / "mitigated", mitigation_lambda=1.0))
    before = dict(streamer.iter_merged(base, adapter, method="shrink", mitigation_lambda=0.5))
    assert all(
        torch.allclose(half[key], tensor, rtol=1e-5, atol=1e-6) for key, tensor in before.items()
    )


def test_an_adapter_without_stacks_is_not_asked(tmp_path: Path) -> None:
    base, adapter, _ = make("mixtral", tmp_path, [])
    streamer.detect_intruder_dimensions(
        base, stated(adapter, adapter, base_model_name_or_path="unsloth/mixtral")
    )


@pytest.mark.parametrize(("rank", "count"), [(1, 4), (3, 1)], ids=["rank 1", "one expert"])
def test_layouts_that_coincide(
    rank: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, config, more = MODELS["mixtral"]
    few = {**config().to_dict(), "num_local_experts": count, "num_experts_per_tok": 1}
    monkeypatch.setitem(MODELS, "mixtral", (cls, lambda: type(config())(**few), more))
    base, adapter, model = make("mixtral", tmp_path, [])
    adapt(
        type(model.get_base_model()), tmp_path, EXPERTS, rank_pattern=dict.fromkeys(EXPERTS, rank)
    )
    wanted = dict(streamer.iter_merged(base, adapter, mitigation_lambda=1.0))
    stated(adapter, adapter, base_model_name_or_path="unsloth/mixtral")
    got = dict(streamer.iter_merged(base, adapter, mitigation_lambda=1.0))
    assert all(torch.equal(got[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (
            {"lora_B_layout": "mixed"},
            {},
            "lora_B_layout is mixed, expected rank_major or grouped_by_expert",
        ),
        ({"lora_B_layout": ["rank_major"]}, {}, "expected rank_major or grouped_by_expert"),
        (
            {"lora_B_layout": "rank_major", "unsloth_fused_expert_lora": DETAILS},
            {},
            "lora_B_layout is grouped_by_expert, rank_major, expected",
        ),
        (
            {"unsloth_fused_expert_lora": {"lora_A_layout": "rank_major"}},
            {},
            "lora_A_layout is rank_major, expected grouped_by_expert",
        ),
        (
            GROUPED,
            {"lora_b_layout": "rank_major"},
            "is grouped_by_expert, expected rank_major .as --lora-b-layout says; leave it out.",
        ),
    ],
)
def test_layouts_that_are_refused(
    config: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    base, adapter, _ = make("mixtral", tmp_path, EXPERTS)
    with pytest.raises(UnsupportedError, match=words.replace("[", r"\[")):
        streamer.iter_merged(base, stated(adapter, adapter, **config), **options)
