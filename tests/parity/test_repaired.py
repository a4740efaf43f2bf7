"""Repaired adapters: what PEFT loads of one adds Δ' by the formula, from the inputs of PEFT's own layers, over architectures and kinds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import LINEAR
from causal_models import ADAPTERS, CAUSAL
from evaluated import sequences, token_ids
from pairs import make_pair
from peft.tuners.lora.layer import ParamWrapper
from peft_inputs import adapted, of_peft
from safetensors.torch import load_file

import streamer
from streamer.linalg.moments import Moments
from streamer.linalg.regmean import DIRECT_BYTES, RIDGE, answers
from streamer.linalg.torch_state import threads
from streamer.methods.fits import Coefficients, FactorSet
from streamer.plan.plan import make_plan
from streamer.plan.targets import Target
from streamer.streaming.inputs import InputModel
from streamer.streaming.run_time import GENERAL_AS, TASK_AS, Group

MU = 0.6
TOKENS = 24, 16
"""Sequences of each text, and tokens of each."""


NOT_IN_FLOAT64 = {"XGLMForCausalLM"}


def fitted(base: Path, adapter: Path, general: torch.Tensor, task: torch.Tensor, memory: int, output: Path) -> None:
    """Write the factors for one μ as a fit does."""
    plan, factors = make_plan(base, adapter), dict[str, torch.Tensor]()

    def take(targets: list[Target], moments: Mapping[int, Moments]) -> None:
        own = [plan.finite_delta(target) for target in targets]
        rights, ridge = answers(
            [(d.L, d.R) for d in own], moments[TASK_AS], moments[GENERAL_AS], [MU], targets[0].tensor, memory
        )
        assert ridge == RIDGE
        factors.update({t.tensor: right.float() for t, (right,) in zip(targets, rights, strict=True)})

    model = InputModel(plan)
    with threads():
        model.collect(
            [Group(sequences(ids), v, lambda tensor: None) for v, ids in ((GENERAL_AS, general), (TASK_AS, task))], take
        )
    assert model.unseen == []
    facts = {"base": {**plan.base_identity}, "adapter": {**plan.adapter_identity}}
    Coefficients((FactorSet(0.9, factors),), facts).save(output)


def expected(delta: np.ndarray, of_general: np.ndarray, of_task: np.ndarray) -> np.ndarray:
    """Δ' (m, n) from whole matrices; those of one-hot inputs are diagonal."""
    of_general, of_task = (np.diag(C) if C.ndim == 1 else C for C in (of_general, of_task))
    kept = of_task + RIDGE * np.trace(of_task) / len(of_task) * np.eye(len(of_task))
    return np.linalg.solve(kept + MU * of_general, kept @ delta.T).T


def errors_of(cls: Any, tmp_path: Path, adapter: Path, memory: int) -> dict[str, float]:
    """Repair an adapter, and compare what PEFT adds with it; relative errors by module."""
    base, out = tmp_path / "base", tmp_path / "repaired"
    count, length = TOKENS
    general, task = torch.split(token_ids(64, 2 * count, length), count)
    fitted(base, adapter, general, task, memory, tmp_path / "fit.safetensors")
    streamer.reduce_intruder_dimension(base, adapter, out, coefficients=tmp_path / "fit.safetensors", keep=0.9)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, out))
    assert before.keys() == after.keys()
    kept = [name for name in before if "lora_A" not in name and "embedding_A" not in name]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    dtype = torch.float32 if cls.__name__ in NOT_IN_FLOAT64 else torch.float64
    moments = of_peft(cls, base, adapter, list(general), list(task), dtype)
    layers, repaired = (adapted(cls, base, path, dtype)[1] for path in (adapter, out))
    errors = {}
    for name, layer in layers.items():
        if isinstance(layer, ParamWrapper):  # of experts, whose inputs are chosen within
            continue
        delta, own = (of[name].get_delta_weight("default").detach().double().numpy() for of in (layers, repaired))
        of_general, of_task = (moment.numpy() for moment in moments[name])
        # PEFT gives Conv1D's and embeddings' as they are stored, (inputs, outputs).
        if layer.fan_in_fan_out or of_task.ndim == 1:
            delta, own = delta.T, own.T
        wanted = expected(delta, of_general, of_task)
        errors[name] = float(np.linalg.norm(own - wanted) / np.linalg.norm(wanted))
    return errors


def check(
    name: str, targets: list[str] | str, options: dict[str, Any], tmp_path: Path, memory: int = DIRECT_BYTES
) -> None:
    cls, _, adapter = make_pair(name, tmp_path, targets, **{"lora_alpha": 4, **options})
    errors = errors_of(cls, tmp_path, adapter, memory)
    assert errors
    assert {module: error for module, error in errors.items() if error > (1e-6 if memory else 1e-5)} == {}


@pytest.mark.parametrize("memory", [DIRECT_BYTES, 0])
def test_a_llama(memory: int, tmp_path: Path) -> None:
    """By matrices, and by products with the inputs."""
    check("llama", CAUSAL["llama"][2], {}, tmp_path, memory)


QUICK = "gpt2", "gemma2", "phi3", "mixtral", "saved head and norms", "LoRA on a tied head", "embeddings of positions"


def long_but(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in names]


@pytest.mark.parametrize("name", long_but(CAUSAL))
def test_architectures(name: str, tmp_path: Path) -> None:
    check(name, CAUSAL[name][2], {}, tmp_path)


# As `ADAPTERS`: those with factors, but for a tied head whose lora_B is the embedding's lora_A.
KINDS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    **{kind: of for kind, of in ADAPTERS.items() if "DoRA" not in kind and "as one" not in kind},
    "rsLoRA": ("llama", LINEAR, {"use_rslora": True}),
    "patterns": ("llama", LINEAR, {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"up_proj": 3}}),
    "trained tokens": ("llama", LINEAR, {"trainable_token_indices": [5, 7, 9]}),
    "EVA's ranks": ("qwen3", ["q_proj", "down_proj"], {"rank_pattern": {"layers.1.mlp.down_proj": 1}}),
    "some layers": ("llama", LINEAR, {"layers_to_transform": [1]}),
    "a saved router": ("mixtral", ["q_proj"], {"modules_to_save": ["gate"]}),
}


@pytest.mark.parametrize("kind", long_but(KINDS))
def test_kinds(kind: str, tmp_path: Path) -> None:
    check(*KINDS[kind], tmp_path)
