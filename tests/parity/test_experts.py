"""LoRA on experts' parameters, as PEFT makes it and transformers saves the models: merged as PEFT merges, detected expert by expert."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import LINEAR, MOE, TEXT, weights
from expert_models import EXPERTS, assert_merged, make
from paths import DATA
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from seeds import vary

import streamer
from streamer.errors import MismatchError, UnsupportedError


@pytest.mark.parametrize(
    "targets",
    [EXPERTS, EXPERTS[:1], EXPERTS[1:], [*reversed(EXPERTS), "mlp.gate.weight"]],
    ids=["both", "gate_up", "down", "router"],
)
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_merged_as_peft_merges(name: str, targets: list[str], tmp_path: Path) -> None:
    *_, model = make(name, tmp_path, targets)
    assert_merged(tmp_path, model)


# Name → class and config of models whose seven usual projections are layers and experts.
DEEPSEEK = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 8,
            "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4}  # fmt: skip
TOGETHER: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "Mixtral", MOE),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3Moe", MOE),
    "olmoe": ("OlmoeForCausalLM", "Olmoe", MOE),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "DeepseekV3", {**MOE, **DEEPSEEK}),
    "glm4-moe": ("Glm4MoeForCausalLM", "Glm4Moe",
                 {**MOE, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "gpt-oss": ("GptOssForCausalLM", "GptOss", MOE),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("targets", ["all-linear", "seven"])
@pytest.mark.parametrize("name", TOGETHER)
def test_attention_and_experts_together(name: str, targets: str, tmp_path: Path) -> None:
    """PEFT turns them into parameters without a path: ``gate_up_proj`` is one of any module that has one, and of no other."""
    cls, kind, values = TOGETHER[name]
    torch.manual_seed(vary(0))
    model = getattr(transformers, cls)(getattr(transformers, f"{kind}Config")(**{**TEXT, **values}))
    model.save_pretrained(tmp_path / "base")
    before = {k: v.double() for k, v in model.state_dict().items()}
    torch.manual_seed(vary(1))
    modules: Any = "all-linear" if targets == "all-linear" else [*LINEAR[:4], *(["gate_proj", "up_proj", "down_proj"])]
    parameters = ["gate_up_proj", "down_proj"] if name == "gpt-oss" else None  # which PEFT does not add of itself
    if name == "mixtral" and targets == "seven":
        modules = [*LINEAR[:4], "w1", "w2", "w3"]
    lora = LoraConfig(r=3, lora_alpha=24, target_modules=modules, target_parameters=parameters, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, lora)
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.data.normal_(std=0.3)
        model.save_pretrained(tmp_path / "adapter")
    bare = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_parameters"]
    assert {"gate_up_proj", "down_proj"} <= set(bare)
    assert_merged(tmp_path, model)
    findings = streamer.detect_intruder_dimensions(tmp_path / "base", tmp_path / "adapter")
    after = getattr(transformers, cls).from_pretrained(tmp_path / "theirs").state_dict()
    assert any(m.module.endswith("gate_up_proj[3]") for m in findings)
    assert (
        any(m.module.endswith("q_a_proj" if name == "deepseek-v3" else "q_proj") for m in findings)
        or targets == "seven"
    )
    for m in findings:
        key, _, number = m.module.removesuffix("]").partition("[")
        W0, W = (t[key][int(number)] if number else t[f"{key}.weight"] for t in (before, after))
        if number and name == "gpt-oss":
            W0, W = W0.T, W.T
        U0, U = (torch.linalg.svd(matrix.double(), full_matrices=False).U for matrix in (W0, W))
        similarity = (U0.T @ U[:, :10]).abs().amax(0)
        clear = [j for j in range(len(similarity)) if abs(float(similarity[j]) - 0.5) > 1e-3]
        assert [j for j in m.detection.intruders if j in clear] == [j for j in clear if similarity[j] < 0.5], m.module


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_bf16(name: str, tmp_path: Path) -> None:
    *_, model = make(name, tmp_path, EXPERTS, torch.bfloat16)
    assert_merged(tmp_path, model, rtol=2 * torch.finfo(torch.bfloat16).eps)


def test_stacks_of_an_unknown_class(tmp_path: Path) -> None:
    """gpt-oss stores its experts (in, out), most others (out, in): nothing in one file tells."""
    base, adapter, _ = make("gpt-oss", tmp_path, EXPERTS)
    expected = dict(streamer.iter_merged(base, adapter, mitigation_lambda=1.0))
    alone = base / "model.safetensors"
    (base / "config.json").unlink()
    with pytest.raises(MismatchError, match=r"does not say whether they are stored as .* with --architecture NAME"):
        streamer.iter_merged(alone, adapter, mitigation_lambda=1.0)
    named = dict(streamer.iter_merged(alone, adapter, mitigation_lambda=1.0, architecture="GptOssForCausalLM"))
    assert all(torch.equal(named[key], tensor) for key, tensor in expected.items())


# What other versions of PEFT wrote -------------------------------------------------------------------------------------


ADAPTERS = DATA / "experts"


REFUSED = {f"gpt_oss-square-peft{v}" for v in ("0.19.0-transformers5", "0.19.1-transformers4", "0.19.1-transformers5")}


@pytest.mark.parametrize("case", sorted(p.name for p in ADAPTERS.iterdir() if not p.name.startswith("base-")))
def test_of_other_versions(case: str, tmp_path: Path) -> None:
    """Which way round the factors are: by their shapes; of square experts by the others of the adapter; else by the version."""
    name, _, _, loader = case.split("-")
    base, adapter = ADAPTERS / f"base-{name}-{loader}", ADAPTERS / case / "adapter"
    if case in REFUSED:
        with pytest.raises(
            UnsupportedError, match=r"down_proj' are square \(8x8\), and peft_version '0.19.[01]' does not determine"
        ):
            streamer.detect_intruder_dimensions(base, adapter)
        return
    streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "merged", mitigation_lambda=1.0)
    ours, theirs, before = (
        weights(tmp_path / "merged"),
        load_file(ADAPTERS / case / "merged.safetensors"),
        weights(base),
    )
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(theirs[key], before[key]) for key in theirs)
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-6, msg=key)


def test_the_data_is_small() -> None:
    assert sum(p.stat().st_size for p in ADAPTERS.rglob("*") if p.is_file()) < 100_000


# Detection and mitigation ----------------------------------------------------------------------------------------------


def run_time_experts(model: Any) -> dict[str, torch.Tensor]:
    """Each expert's matrix (out, in) in a loaded model, by parameter and number."""
    turned = model.config.model_type == "gpt_oss"
    state = {k: v for k, v in model.state_dict().items() if k.endswith(("gate_up_proj", "down_proj"))}
    return {f"{k}[{e}]": (v[e].T if turned else v[e]).double() for k, v in state.items() for e in range(len(v))}


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("solver", ["dense", "certified"])
def test_every_expert_is_detected_as_the_dense_formula_has_it(name: str, solver: str, tmp_path: Path) -> None:
    base, adapter, model = make(name, tmp_path, EXPERTS)
    before = run_time_experts(model.get_base_model().from_pretrained(base))
    after = run_time_experts(model.merge_and_unload())
    findings = {m.module: m for m in streamer.detect_intruder_dimensions(base, adapter, top_k=5, solver=solver)}
    assert before.keys() < findings.keys()
    assert len(before) == 2 * 2 * 4
    intruders = 0
    for key, W0 in before.items():
        m = findings[key]
        assert m.shape == tuple(W0.shape)
        U0 = torch.linalg.svd(W0, full_matrices=False).U
        U, S, _ = torch.linalg.svd(after[key], full_matrices=False)
        similarity = (U0.T @ U[:, :5]).abs().amax(0)
        torch.testing.assert_close(torch.tensor(m.detection.singular_values).double(), S[:5], rtol=1e-4, atol=1e-5)
        clear = [j for j in range(5) if abs(float(similarity[j]) - 0.5) > 1e-3]
        assert [j for j in m.detection.intruders if j in clear] == [j for j in clear if similarity[j] < 0.5], key
        intruders += len(m.detection.intruders)
    assert intruders > 0


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_a_mitigated_adapter_gives_the_mitigated_model(name: str, tmp_path: Path) -> None:
    """`mitigate`, then PEFT's merge, is `merge`: with the method that fits the rank exactly."""
    base, adapter, model = make(name, tmp_path, EXPERTS)
    findings = streamer.detect_intruder_dimensions(base, adapter, top_k=5)
    assert findings.intruders > 4
    options: dict[str, Any] = {"findings": findings, "top_k": 5, "mitigation_lambda": 0.25, "method": "project"}
    record = streamer.reduce_intruder_dimension(base, adapter, tmp_path / "mitigated", **options)
    merged = streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "ours", **options)
    assert len(record["matrices"]) == len(merged["matrices"]) == len(findings)
    loaded = PeftModel.from_pretrained(type(model.get_base_model()).from_pretrained(base), tmp_path / "mitigated")
    loaded.merge_and_unload().save_pretrained(tmp_path / "theirs")
    theirs = weights(tmp_path / "theirs")
    for key, tensor in weights(tmp_path / "ours").items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-5, msg=key)
    shrunk = streamer.reduce_intruder_dimension(
        base, adapter, tmp_path / "shrunk", mitigation_lambda=0.5, method="shrink"
    )
    assert shrunk["totals"]["equal_norm_shrink"] == pytest.approx(0.5)
    paper = streamer.reduce_intruder_dimension(base, adapter, tmp_path / "paper", **{**options, "method": "paper"})
    assert 0 < paper["totals"]["dropped_max"] < 1


@pytest.mark.parametrize("case", ["qwen3_moe-both-peft0.18.1-transformers5", "gpt_oss-both-peft0.17.1-transformers4"])
def test_turned_factors_are_written_back_turned(case: str, tmp_path: Path) -> None:
    name, _, _, loader = case.split("-")
    base, adapter = ADAPTERS / f"base-{name}-{loader}", ADAPTERS / case / "adapter"
    options: dict[str, Any] = {"top_k": 3, "mitigation_lambda": 0.25, "method": "project", "threshold_epsilon": 0.9}
    record = streamer.reduce_intruder_dimension(base, adapter, tmp_path / "mitigated", **options)
    assert record["totals"]["intruders"] > 0
    direct = dict(streamer.iter_merged(base, adapter, **options))
    again = dict(streamer.iter_merged(base, tmp_path / "mitigated", mitigation_lambda=1.0))
    for key, tensor in direct.items():
        torch.testing.assert_close(tensor, again[key], rtol=1e-5, atol=1e-6, msg=key)
