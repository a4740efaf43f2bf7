"""Repaired adapters: what PEFT loads of one adds Δ' = L R'ᵀ with the factors of the fit, over architectures and kinds.

That the factors are those of the formula is tested in test_sweep.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import LINEAR
from causal_models import ADAPTERS, CAUSAL
from evaluated import delta_of, fitted, token_ids
from pairs import make_pair
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding as EmbeddingLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file

import streamer
from streamer.fitting.solver import unchanged
from streamer.methods.files import Coefficients


def check(name: str, targets: list[str] | str, options: dict[str, Any], tmp_path: Path) -> None:
    cls, base, adapter = make_pair(name, tmp_path, targets, **{"lora_alpha": 4, **options})
    sweep = fitted(base, adapter, *token_ids(64, 12).split(6), (0.6,))
    out = tmp_path / "repaired"
    plan = sweep.plan
    rights = {tensor: own for tensor, (own,) in sweep.rights.items()}
    facts = {"base": {**plan.base_identity}, "adapter": {**plan.adapter_identity}}
    coefficients = Coefficients(0.9, {**unchanged(plan), **rights}, facts)
    streamer.reduce_intruder_dimension(base, adapter, out, coefficients=coefficients)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, out))
    assert before.keys() == after.keys()
    kept = [key for key in before if "lora_A" not in key and "embedding_A" not in key]
    assert all(torch.equal(before[key], after[key]) for key in kept)
    with warnings.catch_warnings(action="ignore"):  # of a tied embedding that an adapter changes
        model = peft.PeftModel.from_pretrained(cls.from_pretrained(base), out)
    layers = {
        n.removeprefix("base_model.model."): m
        for n, m in model.named_modules()
        if isinstance(m, LoraLayer)
    }
    compared = 0
    for target in plan.targets:
        layer = layers.get(target.module.name)
        if layer is None or isinstance(layer, ParamWrapper):  # of experts, which PEFT adds as one
            continue
        own = layer.get_delta_weight("default").detach()
        wanted = delta_of(plan, target, rights[target.tensor]).float()
        # PEFT gives those of Conv1D and of embeddings as they are stored, (inputs, outputs).
        stored = layer.fan_in_fan_out or isinstance(layer, EmbeddingLayer)
        torch.testing.assert_close(own.T if stored else own, wanted, rtol=1e-5, atol=1e-6)
        compared += 1
    assert compared


QUICK = (
    "llama",
    "gpt2",
    "gemma2",
    "phi3",
    "mixtral",
    "saved head and norms",
    "LoRA on a tied head",
    "embeddings of positions",
)


def slow_but(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow_but(CAUSAL))
def test_repairs_are_right_in_every_architecture(name: str, tmp_path: Path) -> None:
    check(name, CAUSAL[name][2], {}, tmp_path)


# As `ADAPTERS`: those with factors, but for a tied head whose lora_B is the embedding's lora_A.
KINDS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    **{kind: of for kind, of in ADAPTERS.items() if "DoRA" not in kind and "as one" not in kind},
    "rsLoRA": ("llama", LINEAR, {"use_rslora": True}),
    "patterns": ("llama", LINEAR, {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"up_proj": 3}}),
    "trained tokens": ("llama", LINEAR, {"trainable_token_indices": [5, 7, 9]}),
    "EVA's ranks": (
        "qwen3",
        ["q_proj", "down_proj"],
        {"rank_pattern": {"layers.1.mlp.down_proj": 1}},
    ),
    "some layers": ("llama", LINEAR, {"layers_to_transform": [1]}),
    "a saved router": ("mixtral", ["q_proj"], {"modules_to_save": ["gate"]}),
}


@pytest.mark.parametrize("kind", slow_but(KINDS))
def test_repairs_are_right_for_every_kind(kind: str, tmp_path: Path) -> None:
    check(*KINDS[kind], tmp_path)
