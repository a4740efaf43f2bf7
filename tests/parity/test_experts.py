"""LoRA on experts' parameters, as PEFT makes it and transformers saves the models: merged as PEFT merges, detected expert by expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import weights
from expert_models import EXPERTS, assert_merged, make
from paths import DATA
from peft import PeftModel
from safetensors.torch import load_file

import streamer
from streamer.errors import UnsupportedError


@pytest.mark.parametrize(
    "targets",
    [EXPERTS, EXPERTS[:1], EXPERTS[1:], [*reversed(EXPERTS), "mlp.gate.weight"]],
    ids=["both", "gate_up", "down", "router"],
)
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_merged_as_peft_merges(name: str, targets: list[str], tmp_path: Path) -> None:
    *_, model = make(name, tmp_path, targets)
    assert_merged(tmp_path, model)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_bf16(name: str, tmp_path: Path) -> None:
    *_, model = make(name, tmp_path, EXPERTS, torch.bfloat16)
    assert_merged(tmp_path, model, rtol=2 * torch.finfo(torch.bfloat16).eps)


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
            UnsupportedError, match=r"down_proj' are square \(8x8\), and by peft_version '0.19.[01]' it cannot be told"
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
