"""Inputs of modules, and maps of bases: their second moments are those that PEFT's layers are given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized
import torch
import zoo
from causal_models import ADAPTERS, CAUSAL, make_base
from elsewhere import Away
from evaluated import sequences, token_ids
from mapped import energy_form
from pairs import make_pair
from peft_inputs import Moments, of_peft
from quantized_cases import decoded_base
from seeds import vary
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from verified import lines

import streamer
from streamer.linalg.moments import Moments as SecondMoments
from streamer.linalg.moments import OneHotMoments, RowMoments, leading_vectors
from streamer.linalg.torch_state import threads
from streamer.plan.plan import make_plan
from streamer.plan.targets import Target
from streamer.streaming import values
from streamer.streaming.collecting import CollectingReader
from streamer.streaming.inputs import InputModel
from streamer.streaming.installed import InstalledModule
from streamer.streaming.model import StreamingModel
from streamer.streaming.run_time import GENERAL_AS, TASK_AS, Group


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


# As `ADAPTERS`: those whose deltas have factors, on layers that PEFT wraps one by one.
KINDS = ["saved head and norms", "saved embedding, tied", "LoRA on a tied head", "LoRA on a tied embedding", "LoRA's own biases",
         "embeddings of positions"]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("what", ["writes", "is given a list"])
def test_layers_that_cannot_run_elsewhere_run_here(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base, adapter = make_pair("llama", tmp_path, ["q_proj", "up_proj"])
    before = LlamaDecoderLayer.__call__ if what == "is given a list" else LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **given: Any) -> Any:
        if what == "writes":
            hidden_states.add_(1)
            return before(self, hidden_states, *args, **given)
        return before(self, hidden_states, *args, **given, seen=[])

    monkeypatch.setattr(LlamaDecoderLayer, "forward" if what == "writes" else "__call__", forward)
    collected(base, adapter, [*token_ids(64, 2)], [*token_ids(64, 2)], moves=False)


@pytest.mark.parametrize("kind", ["experts, one tensor each", "experts, stacked", "router"])
def test_experts_are_given_the_tokens_that_are_routed_to_them(kind: str, tmp_path: Path) -> None:
    """The moments of all experts of a layer add up to those of as many tokens as there are experts for each."""
    name, targets, options = ADAPTERS[kind]
    _, base, adapter = make_pair(name, tmp_path, targets, **{"lora_alpha": 4, **options})
    plan, found = make_plan(base, adapter), dict[str, torch.Tensor]()

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
    cls, base, adapter = make_pair(name, tmp_path, ["o_proj"], lora_alpha=4)
    assert_alike(cls, base, adapter)
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
    _, base, adapter = make_pair("llama", tmp_path, ["q_proj"], modules_to_save=["o_proj"])
    collecting = InputModel(make_plan(base, adapter), rounds_products=True)
    measuring = StreamingModel(collecting.job)
    readers: dict[str, Any] = {path: module._parameters.get("weight") for path, module, _ in collecting.modules}
    rounded = {path for path, weight in readers.items() if weight is not None and weight.reader.rounded}
    owners = {path: getattr(module.forward, "__self__", None) for path, module, _ in measuring.modules}
    assert rounded == {path for path, own in owners.items() if isinstance(own, InstalledModule) and own.rounded}
    assert any("up_proj" in path for path in rounded)
    assert not any("o_proj" in path for path in rounded)


MAPPED = [
    "llama", "llama-tied", "gpt2", "gemma2", "gemma", "phi3", "opt", "bloom", "gpt-neox", "falcon", "qwen3-moe", "mixtral",
    "deepseek-v3", "gemma3n", "gpt-oss",
]  # fmt: skip

IDS = [*token_ids(64, 12)]


def mapped(base: Path, place: Path, vectors: int = 512) -> streamer.InputMap:
    np.save(place / "g.npy", torch.stack(IDS).numpy())
    return streamer.map_inputs(base, general=place / "g.npy", vectors=vectors, on_event=lambda event: None)


def assert_mapped_alike(cls: Any, base: Path, adapter: Path, place: Path) -> None:
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


@pytest.mark.parametrize("name", MAPPED)
def test_maps_of_architectures(name: str, tmp_path: Path) -> None:
    if name not in CAUSAL:
        pytest.skip("this transformers lacks it")
    cls, base, adapter = make_pair(name, tmp_path, CAUSAL[name][2], lora_alpha=4)
    assert_mapped_alike(cls, base, adapter, tmp_path)


@pytest.mark.parametrize("kind", [*KINDS, "experts, one tensor each", "experts, stacked", "router"])
def test_maps_of_kinds(kind: str, tmp_path: Path) -> None:
    name, targets, options = ADAPTERS[kind]
    cls, base, adapter = make_pair(name, tmp_path, targets, **{"lora_alpha": 4, **options})
    made, plan = mapped(base, tmp_path), make_plan(base, adapter)
    lacking = [t.tensor for t in plan.targets if made.find(t.tensor, t.module.shape[1]) is None]
    assert {*lacking} <= {*made.facts["lacking"]} | {t.tensor for t in plan.targets if t.pieces}
    assert len(lacking) < len(plan.targets)
    if "experts" not in kind and kind != "router":
        assert not lacking
        assert_mapped_alike(cls, base, adapter, tmp_path)
    streamer.reduce_intruder_dimension(base, adapter, tmp_path / "out", map=made, on_event=lambda e: None)
    made.save(tmp_path / "m.safetensors")
    found = lines(tmp_path / "out", base, adapter, sample="all", map=tmp_path / "m.safetensors")
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
