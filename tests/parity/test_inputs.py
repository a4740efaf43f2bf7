"""Inputs of modules: their second moments are those that PEFT's layers are given, over architectures and kinds of adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
from causal_models import ADAPTERS, CAUSAL, make_adapter, make_base
from elsewhere import Away
from evaluated import sequences, token_ids
from peft_inputs import Moments, of_peft
from quantized_cases import decoded_base
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from streamer.linalg.second_moments import Moments as SecondMoments
from streamer.linalg.second_moments import OneHotMoments
from streamer.linalg.torch_state import threads
from streamer.plan.plan import make_plan
from streamer.plan.targets import Target
from streamer.streaming import values
from streamer.streaming.collecting import CollectingReader
from streamer.streaming.inputs import InputModel
from streamer.streaming.installed import InstalledModule
from streamer.streaming.model import StreamingModel
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


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
def test_matrices_are_read_a_few_rows_at_a_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that several matrices form, and a stack of experts, of which none is read whole."""
    monkeypatch.setattr(values, "BLOCK_BYTES", 1000)
    most, blocks = 0, values.Values.blocks

    def measured(self: values.Values, *args: Any) -> Any:
        nonlocal most
        for block in blocks(self, *args):
            most = max(most, block[2].nbytes)
            yield block

    monkeypatch.setattr(values.Values, "blocks", measured)
    whole, read = list[str](), CollectingReader.values_of

    def recorded(self: CollectingReader[Any], source: Any) -> torch.Tensor:
        whole.extend([self.name] if len(self.shape) > 1 else [])
        return read(self, source)

    monkeypatch.setattr(CollectingReader, "values_of", recorded)
    cls = make_base(name, tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", ["o_proj"], lora_alpha=4)
    assert_alike(cls, tmp_path / "base", adapter)
    assert (0 < most <= 1000, whole) == (True, [])


@pytest.mark.parametrize("encoding", ["fp8-blocks", "nf4", "gptq"])
def test_quantized_bases(encoding: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Inputs are those of the decoded base."""
    made = quantized.MAKERS[encoding](tmp_path / "base", plain[0])
    decoded = decoded_base(tmp_path / "decoded", plain[0], made)
    ids = [*token_ids(64, 2)]
    found, expected = collected(made.base, plain[1], ids, ids), collected(decoded, plain[1], ids, ids)
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        for own, theirs in zip(found[name], pair, strict=True):
            torch.testing.assert_close(own, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


def test_the_same_products_are_rounded_as_in_passes_that_measure(tmp_path: Path) -> None:
    cls = make_base("llama", tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", ["q_proj"], modules_to_save=["o_proj"])
    collecting = InputModel(make_plan(tmp_path / "base", adapter), rounds_products=True)
    measuring = StreamingModel(collecting.job)
    readers: dict[str, Any] = {path: module._parameters.get("weight") for path, module, _ in collecting.modules}
    rounded = {path for path, weight in readers.items() if weight is not None and weight.reader.rounded}
    owners = {path: getattr(module.forward, "__self__", None) for path, module, _ in measuring.modules}
    assert rounded == {path for path, own in owners.items() if isinstance(own, InstalledModule) and own.rounded}
    assert any("up_proj" in path for path in rounded)
    assert not any("o_proj" in path for path in rounded)
