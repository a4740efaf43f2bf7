"""Fully fine-tuned mixtures that store their experts in stacks: detected and merged one matrix for each expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from architectures import MODELS, MOE, TEXT, text, weights
from safetensors.torch import save_file
from seeds import vary
from test_architectures_table import plain

import streamer
from streamer.errors import StreamerWarning, UnsupportedError
from streamer.plan.plan import make_plan

# Model → (its class, its config, which tensors on disk are stacks, and whether they are (in, out))
STACKED: dict[str, tuple[str, Any, tuple[str, ...], bool]] = {
    "gpt-oss": (*MODELS["gpt-oss"][:2], ("gate_up_proj", "down_proj"), True),
    "granite-moe": ("GraniteMoeForCausalLM", text("GraniteMoe", **MOE), ("input_linear.weight", "output_linear.weight"), False),
}  # fmt: skip


def pair(name: str, home: Path, only: str = "") -> tuple[Path, Path]:
    """A model, and the same with one large direction added to each matrix whose name holds `only`, and noise."""
    cls, config, *_ = STACKED[name]
    torch.manual_seed(vary(0))
    model = getattr(transformers, cls)(config())
    model.save_pretrained(home / "base")
    with torch.no_grad():
        for key, p in model.named_parameters():
            if only in key:
                p.add_(0.01 * torch.randn(p.shape))
                if p.dim() > 1:
                    p.add_(0.3 * torch.randn(*p.shape[:-1], 1) @ torch.randn(*p.shape[:-2], 1, p.shape[-1]))
    model.save_pretrained(home / "tuned")
    return home / "base", home / "tuned"


@pytest.mark.parametrize("name", STACKED)
def test_each_expert_is_a_matrix(name: str, tmp_path: Path) -> None:
    _, _, stacks, transposed = STACKED[name]
    base, tuned = pair(name, tmp_path)
    W0s, W1s = weights(base), weights(tuned)
    findings = streamer.detect_intruder_dimensions(base, tuned)
    found = {m.tensor: m for m in findings}
    stacked = [key for key in W0s if key.endswith(stacks)]
    experts = {f"{key}[{e}]": (key, e) for key in stacked for e in range(len(W0s[key]))}
    assert len(experts) == 2 * 2 * 4
    assert experts.keys() <= found.keys()
    expected = {key: torch.empty_like(W0s[key], dtype=torch.float64) for key in stacked}
    total = 0
    for tensor, (key, e) in experts.items():
        W0, W1 = (W[key][e].double().T if transposed else W[key][e].double() for W in (W0s, W1s))
        assert found[tensor].shape == tuple(W0.shape)
        U0 = torch.linalg.svd(W0, full_matrices=False).U
        U, S, Vh = torch.linalg.svd(W1, full_matrices=False)
        d = found[tensor].detection
        torch.testing.assert_close(torch.tensor(d.singular_values, dtype=torch.float64), S[:10], rtol=2e-6, atol=1e-9)
        similarity = (U0.T @ U[:, :10]).abs().amax(0)
        clear = [j for j in range(10) if abs(float(similarity[j]) - 0.5) > 1e-3]
        assert [j for j in d.intruders if j in clear] == [j for j in clear if similarity[j] < 0.5], tensor
        total += len(d.intruders)
        i = list(d.intruders)
        W = W1 - 0.5 * (U[:, i] * S[i]) @ Vh[i]
        expected[key][e] = W.T if transposed else W
    assert total > 0
    merged = dict(streamer.iter_merged(base, tuned, findings=findings, mitigation_lambda=0.5))
    for key, wanted in expected.items():
        torch.testing.assert_close(merged[key].double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    streamer.merge_with_reduced_intruder_dimensions(base, tuned, tmp_path / "out", mitigation_lambda=1.0)
    ours = weights(tmp_path / "out")
    assert ours.keys() == W1s.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in W1s.items())


def test_stacks_that_were_trained_have_no_place_in_a_lora_adapter(tmp_path: Path) -> None:
    base, tuned = pair("gpt-oss", tmp_path)
    with pytest.raises(UnsupportedError, match="is on experts' parameters"):
        streamer.reduce_intruder_dimension(base, tuned, tmp_path / "out", to_lora=4)
    base, tuned = pair("gpt-oss", tmp_path / "attention", only="q_proj.weight")
    streamer.reduce_intruder_dimension(base, tuned, tmp_path / "out", to_lora=4)
    assert not any("experts" in key for key in weights_of(tmp_path / "out"))


def weights_of(adapter: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(adapter / "adapter_model.safetensors")


def test_a_stack_of_an_unknown_class_is_refused(tmp_path: Path) -> None:
    for name, shift in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(
            json.dumps({"model_type": "elsewhere", "hidden_size": TEXT["hidden_size"]})
        )
        tensors = {"layers.0.experts.up": torch.ones(4, 6, 8) + shift, "cls_token": torch.ones(1, 1, 8) + shift}
        save_file({**tensors, "layers.0.q.weight": torch.eye(8) + shift}, tmp_path / name / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"'layers.0.experts.up' \[4, 6, 8\] may be a stack of experts"):
        make_plan(tmp_path / "base", tmp_path / "tuned")


@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_of_an_unknown_class_that_may_be_a_convolution(bias: bool, tmp_path: Path) -> None:
    """Its bias tells: experts have one each."""
    for name, shift in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        tensors = {
            "layers.0.proj.weight": torch.ones(6, 4, 8) + shift,
            "layers.0.depthwise.weight": torch.ones(6, 1, 3),
        }
        tensors |= {"layers.0.proj.bias": torch.ones(6)} if bias else {}
        save_file(tensors, tmp_path / name / "model.safetensors")
    if not bias:
        with pytest.raises(UnsupportedError, match=r"'layers.0.proj.weight' \[6, 4, 8\] may be a stack of experts"):
            make_plan(tmp_path / "base", tmp_path / "tuned")
        return
    assert [t.stored for t in make_plan(tmp_path / "base", tmp_path / "tuned").targets] == [(6, 1, 3), (6, 4, 8)]


def test_matrices_that_are_no_weights_of_layers_are_named(tmp_path: Path) -> None:
    torch.manual_seed(vary(0))
    model = transformers.MambaForCausalLM(plain("Mamba")())
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    model.save_pretrained(tmp_path / "tuned")
    said = make_plan(tmp_path / "base", tmp_path / "tuned").warnings
    assert said == (
        "matrices carried along without findings: 'backbone.layers.0.mixer.A_log', 'backbone.layers.1.mixer.A_log'",
    )


def test_a_table_of_positions_that_is_a_weight_by_its_name_on_disk(tmp_path: Path) -> None:
    """Kimi-K2.5's (64, 64, n) is ``pos_emb.weight`` on disk and a parameter of another name in the model."""
    base = zoo.build("Kimi_K25ForConditionalGeneration")
    base.save_pretrained(tmp_path / "base")
    for p in base.parameters():
        p.data.add_(0.05 * torch.randn(p.shape))
    base.save_pretrained(tmp_path / "tuned")
    with pytest.warns(
        StreamerWarning, match=r"carried along without findings: 'vision_tower.patch_embed.pos_emb.weight'"
    ):
        findings = streamer.detect_intruder_dimensions(tmp_path / "base", tmp_path / "tuned", top_k=1)
    modules = {m.module for m in findings}
    assert "vision_tower.encoder.patch_embed.proj" in modules
    assert "vision_tower.patch_embed.pos_emb" not in modules
