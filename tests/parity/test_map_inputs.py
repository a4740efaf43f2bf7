"""Maps of bases: second moments of what PEFT's layers are given, in float64, over architectures and kinds of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from causal_models import ADAPTERS, CAUSAL, make_adapter, make_base
from evaluated import token_ids
from mapped import energy_form
from seeds import vary
from test_inputs import KINDS, of_peft
from verified import lines

import streamer
from streamer.linalg.second_moments import RowMoments, leading_vectors
from streamer.plan.plan import make_plan

ARCHITECTURES = [
    "llama", "llama-tied", "gpt2", "gemma2", "gemma", "phi3", "opt", "bloom", "gpt-neox", "falcon", "qwen3-moe", "mixtral",
    "deepseek-v3", "gemma3n", "gpt-oss",
]  # fmt: skip

IDS = [*token_ids(64, 12)]


def mapped(base: Path, place: Path, vectors: int = 512) -> streamer.InputMap:
    np.save(place / "g.npy", torch.stack(IDS).numpy())
    return streamer.map_inputs(base, general=place / "g.npy", vectors=vectors, on_event=lambda event: None)


def assert_alike(cls: Any, base: Path, adapter: Path, place: Path) -> None:
    made, plan = mapped(base, place), make_plan(base, adapter)
    moments, tokens = of_peft(cls, base, adapter, IDS, IDS[:1]), sum(map(len, IDS))
    assert moments
    for target in plan.targets:
        found = made.find(target.tensor, target.module.shape[1])
        assert found is not None, target.tensor
        if target.module.name not in moments:  # of an expert
            continue
        general = moments[target.module.name][0].numpy()
        expected = np.diag(general) if general.ndim == 1 else general
        assert found.trace == pytest.approx(np.trace(expected), rel=1e-5)
        assert found.tokens == tokens
        if general.ndim == 2:
            largest = np.linalg.eigvalsh(expected)[::-1]
            np.testing.assert_allclose(found.values, largest, atol=2e-5 * largest[0])
        # Vectors are rounded to bfloat16.
        np.testing.assert_allclose(
            energy_form(found), expected, atol=2e-2 * np.abs(expected).max(), err_msg=target.tensor
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, tmp_path: Path) -> None:
    if name not in CAUSAL:
        pytest.skip("this transformers lacks it")
    cls = make_base(name, tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", CAUSAL[name][2], lora_alpha=4)
    assert_alike(cls, tmp_path / "base", adapter, tmp_path)


@pytest.mark.parametrize("kind", [*KINDS, "experts, one tensor each", "experts, stacked", "router"])
def test_kinds(kind: str, tmp_path: Path) -> None:
    name, targets, options = ADAPTERS[kind]
    cls = make_base(name, tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", targets, **{"lora_alpha": 4, **options})
    made, plan = mapped(tmp_path / "base", tmp_path), make_plan(tmp_path / "base", adapter)
    lacking = [t.tensor for t in plan.targets if made.find(t.tensor, t.module.shape[1]) is None]
    assert {*lacking} <= {*made.facts["lacking"]} | {t.tensor for t in plan.targets if t.pieces}
    assert len(lacking) < len(plan.targets)
    if "experts" not in kind and kind != "router":
        assert not lacking
        assert_alike(cls, tmp_path / "base", adapter, tmp_path)
    streamer.reduce_intruder_dimension(tmp_path / "base", adapter, tmp_path / "out", map=made, on_event=lambda e: None)
    made.save(tmp_path / "m.safetensors")
    found = lines(tmp_path / "out", tmp_path / "base", adapter, sample="all", map=tmp_path / "m.safetensors")
    apart = kind == "experts, one tensor each"  # which of the factors are which parameter's, only a stack tells
    assert "not verified: 16 matrices cannot be recomputed" in found[0] if apart else found == []


POSITIONS = {
    "BartForCausalLM": "model.decoder.embed_positions", "BertLMHeadModel": "bert.embeddings.position_embeddings",
    "BioGptForCausalLM": "biogpt.embed_positions", "ElectraForCausalLM": "electra.embeddings.position_embeddings",
    "GPT2LMHeadModel": "transformer.wpe", "GPTBigCodeForCausalLM": "transformer.wpe", "GPTNeoForCausalLM": "transformer.wpe",
    "OPTForCausalLM": "model.decoder.embed_positions", "OpenAIGPTLMHeadModel": "transformer.positions_embed",
    "RobertaForCausalLM": "roberta.embeddings.position_embeddings", "XLMWithLMHeadModel": "transformer.position_embeddings",
}  # fmt: skip
"""Embeddings of positions, which some classes look up for each sequence and others once for all."""


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_are_counted_in_each_sequence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lookup = zoo.build(name), torch.nn.functional.embedding
    model.save_pretrained(tmp_path)
    table = model.get_parameter(f"{POSITIONS[name]}.weight")
    counts = np.zeros(len(table), int)

    def counted(ids: torch.Tensor, weight: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if weight is table:
            np.add.at(counts, ids.numpy(), 1)
        return lookup(ids, weight, *args, **options)

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(torch.nn.functional, "embedding", counted)
        for ids in IDS:
            model(input_ids=ids[None])
    found = mapped(tmp_path, tmp_path).find(f"{POSITIONS[name]}.weight", len(table))
    assert found is not None
    tokens = sum(map(len, IDS))
    assert counts.sum() == tokens == found.trace * tokens
    np.testing.assert_allclose(energy_form(found), np.diag(counts / tokens), atol=2e-2 * counts.max() / tokens)


def test_modules_with_the_same_inputs_share_them(tmp_path: Path) -> None:
    make_base("llama", tmp_path / "base")
    made = mapped(tmp_path / "base", tmp_path, 3)
    shared = {one.names for one in made.inputs if len(one.names) > 1}
    layer = "model.layers.0."
    assert tuple(f"{layer}self_attn.{name}_proj.weight" for name in "qkv") in shared
    assert tuple(f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up")) in shared
    assert {len(one.values) for one in made.inputs if one.vectors is not None} == {3}
    assert made.facts["lacking"] == []


def test_leading_vectors_of_wide_inputs() -> None:
    """By products with the inputs, where the moments are too large to be formed."""
    draw = np.random.default_rng(vary(0))
    x = draw.normal(size=(900, 700)) * 0.8 ** np.arange(700) * 30 + 0.01 * draw.normal(size=(900, 700))
    rows = torch.from_numpy(x).float()
    moments = RowMoments(700, 900, float((rows**2).sum()) / 900, lambda: iter(torch.split(rows, 128)))
    values, vectors = leading_vectors(moments, 16)
    C = x.T @ x / 900
    exact, V = np.linalg.eigh(C)
    np.testing.assert_allclose(values, exact[::-1][:16], rtol=1e-4)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(16), atol=1e-9)
    for i in range(8):
        assert abs(float(vectors[:, i] @ torch.from_numpy(V[:, -1 - i]))) > 1 - 1e-5
