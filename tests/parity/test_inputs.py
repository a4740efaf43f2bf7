"""Inputs of modules: their second moments are those that PEFT's layers are given, over architectures and kinds of adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal_models import ADAPTERS, CAUSAL, make_adapter, make_base
from elsewhere import Away
from evaluated import sequences, token_ids
from peft_inputs import Moments, of_peft
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import streamer
from streamer.errors import UnsupportedError
from streamer.linalg.second_moments import Moments as SecondMoments
from streamer.linalg.second_moments import OneHotMoments
from streamer.linalg.torch_state import threads
from streamer.plan.plan import make_plan
from streamer.plan.targets import Target
from streamer.streaming.inputs import InputModel
from streamer.streaming.streams import GENERAL_AS, TASK_AS, Group

ARCHITECTURES = [
    "llama",
    "gpt2",
    "gemma2",
    "phi3",
    "opt",
    "bloom",
    "gpt-neox",
    "qwen3-moe",
    "mixtral",
    "deepseek-v3",
    "gemma3n",
]


def formed(moments: SecondMoments) -> torch.Tensor:
    """Form them, those of one-hot inputs as the diagonal; of others products must agree."""
    if isinstance(moments, OneHotMoments):
        return moments.diagonal
    C, V = moments.matrix(), torch.randn(moments.size, 3, dtype=torch.float64)
    torch.testing.assert_close(moments.products(V), C @ V, rtol=0, atol=1e-12 * float(C.norm() * V.norm()))
    torch.testing.assert_close(
        moments.products(V.float()), (C @ V).float(), rtol=0, atol=1e-5 * float(C.norm() * V.norm())
    )
    assert moments.trace == pytest.approx(float(C.trace()), rel=1e-12)
    return C


def collected(
    base: Path, adapter: Path, general: list[torch.Tensor], task: list[torch.Tensor], moves: bool = True
) -> Moments:
    """Means over the tokens of both texts, by the module's name in the adapter; the sequences of the general text run together."""
    plan, passes = make_plan(base, adapter), list[Moments]()

    def take(targets: list[Target], moments: Mapping[int, SecondMoments]) -> None:
        of_general, of_task = (formed(moments[variant]) for variant in (GENERAL_AS, TASK_AS))
        for target in targets:
            assert target.module.name not in passes[-1]
            passes[-1][target.module.name] = of_general, of_task

    texts = [(torch.stack(general), GENERAL_AS), *((ids[None], TASK_AS) for ids in task)]
    groups = [Group(sequences(ids), stream, lambda tensor: None) for ids, stream in texts]
    away = Away(plan)
    for elsewhere in (None, away):
        passes.append({})
        model = InputModel(plan, elsewhere=elsewhere)
        with threads():
            model.collect(groups, take)
        assert model.unseen == []
    found, again = passes
    assert again.keys() == found.keys()
    assert all(torch.equal(a, b) for name in found for a, b in zip(found[name], again[name], strict=True))
    assert bool(away.ran) == moves
    return found


def assert_alike(cls: Any, base: Path, adapter: Path) -> None:
    *general, long, short = token_ids(64, 5)
    task = [long[:9], short[:7]]
    found, expected = collected(base, adapter, general, task), of_peft(cls, base, adapter, general, task)
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        for own, theirs in zip(found[name], pair, strict=True):
            torch.testing.assert_close(
                own, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()), msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, tmp_path: Path) -> None:
    cls = make_base(name, tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", CAUSAL[name][2], lora_alpha=4)
    assert_alike(cls, tmp_path / "base", adapter)


# As `ADAPTERS`: those whose deltas have factors, on layers that PEFT wraps one by one.
KINDS = ["saved head and norms", "saved embedding, tied", "LoRA on a tied head", "LoRA on a tied embedding", "LoRA's own biases",
         "embeddings of positions"]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("what", ["writes", "is given a list"])
def test_layers_that_cannot_run_elsewhere_run_here(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(
        make_base("llama", tmp_path / "base"), tmp_path / "base", tmp_path / "adapter", ["q_proj", "up_proj"]
    )
    before = LlamaDecoderLayer.__call__ if what == "is given a list" else LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **given: Any) -> Any:
        if what == "writes":
            hidden_states.add_(1)
            return before(self, hidden_states, *args, **given)
        return before(self, hidden_states, *args, **given, seen=[])

    monkeypatch.setattr(LlamaDecoderLayer, "forward" if what == "writes" else "__call__", forward)
    collected(tmp_path / "base", adapter, [*token_ids(64, 2)], [*token_ids(64, 2)], moves=False)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, tmp_path: Path) -> None:
    name, targets, options = ADAPTERS[kind]
    cls = make_base(name, tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", targets, **{"lora_alpha": 4, **options})
    assert_alike(cls, tmp_path / "base", adapter)


@pytest.mark.parametrize("kind", ["experts, one tensor each", "experts, stacked", "router"])
def test_experts_are_given_the_tokens_that_are_routed_to_them(kind: str, tmp_path: Path) -> None:
    """The moments of all experts of a layer add up to those of as many tokens as there are experts for each."""
    name, targets, options = ADAPTERS[kind]
    cls = make_base(name, tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", targets, **{"lora_alpha": 4, **options})
    plan, found = make_plan(tmp_path / "base", adapter), dict[str, torch.Tensor]()

    def take(given: list[Target], moments: Mapping[int, SecondMoments]) -> None:
        own = formed(moments[GENERAL_AS])
        found.update({target.tensor: own for target in given})

    ids = token_ids(64)
    model = InputModel(plan)
    with threads():
        model.collect([Group(sequences(ids), v, lambda tensor: None) for v in (GENERAL_AS, TASK_AS)], take)
    assert {*found, *model.unseen} == {target.tensor for target in plan.targets}
    layer = {t.tensor: t for t in plan.targets if ".0." in t.tensor and "q_proj" not in t.tensor and t.tensor in found}
    assert layer
    for tensor, target in layer.items():
        own = found[tensor]
        assert own.shape == (target.module.shape[1],) * 2
        torch.testing.assert_close(own, own.T)
        assert float(torch.linalg.eigvalsh(own)[0]) >= -1e-6 * float(own.diagonal().max())
        assert int(torch.linalg.matrix_rank(own, rtol=1e-9)) <= ids.numel()


def test_deltas_without_factors_are_refused_by_name(tmp_path: Path) -> None:
    name, targets, options = ADAPTERS["DoRA"]
    cls = make_base(name, tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", targets, **{"lora_alpha": 4, **options})
    ids = token_ids(64, 16)
    np.save(tmp_path / "t.npy", ids.numpy())
    with pytest.raises(
        UnsupportedError, match=r"have no factors, .* first, and grain 'inputs' changes factors; use grain 'direction'"
    ):
        streamer.fit_coefficients(
            tmp_path / "base", adapter, general=tmp_path / "t.npy", task=tmp_path / "t.npy", grain="inputs"
        )
