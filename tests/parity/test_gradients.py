"""Gradients of streaming passes: those of transformers and PEFT with the whole matrices, over architectures and kinds of adapters."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized
import torch
from architectures import ATTENTION, LINEAR
from causal_models import ADAPTERS, CAUSAL, EXPERTS, make_adapter, make_base
from evaluated import sequences, streamed, token_ids
from fitted_models import OBJECTIVES, assert_gradients, coefficients_of
from peft import LoHaConfig, LoKrConfig, get_peft_model
from quantized_cases import decoded_base
from seeds import vary
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from streamer.errors import NumericError, UnsupportedError
from streamer.linalg.torch_state import threads
from streamer.measuring.sequences import TextSequences
from streamer.plan.plan import make_plan
from streamer.streaming import products, values
from streamer.streaming.differentiable import DifferentiableReader
from streamer.streaming.gradients import GradientModel
from streamer.streaming.installed import InstalledModule
from streamer.streaming.model import StreamingModel
from streamer.streaming.variants import make_variants

ARCHITECTURES = [
    "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3-text", "gemma3-vision", "phi3", "gpt2", "gpt-neox", "falcon", "bloom", "opt",
    "mpt", "cohere", "olmo2", "mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3", "llama4-text", "qwen3-next", "jamba", "qwen2.5-vl",
    "gemma3n", "gemma4", "apertus",
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, tmp_path: Path) -> None:
    cls = make_base(name, tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", CAUSAL[name][2], lora_alpha=4)
    assert_gradients(cls, tmp_path / "base", adapter, token_ids(64))


# As `ADAPTERS`
KINDS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    **ADAPTERS,
    "rsLoRA and patterns": ("llama", LINEAR, {"use_rslora": True, "rank_pattern": {"q_proj": 3, "down_proj": 1}}),
    "LoRA on the head alone": ("llama", ["lm_head"], {}),
    "experts that all tokens run through": ("llama4-text", ["q_proj"], {"target_parameters": EXPERTS}),
    "saved positions": ("opt", ["q_proj"], {"modules_to_save": ["embed_positions"]}),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, tmp_path: Path) -> None:
    name, targets, options = KINDS[kind]
    cls = make_base(name, tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", targets, **{"lora_alpha": 4, **options})
    assert_gradients(cls, tmp_path / "base", adapter, token_ids(64))


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_a_method_with_a_dense_delta(config: Any, tmp_path: Path) -> None:
    cls = make_base("llama", tmp_path / "base")
    torch.manual_seed(vary(1))
    model = get_peft_model(cls.from_pretrained(tmp_path / "base"), config(r=2, target_modules=["q_proj", "up_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    assert_gradients(cls, tmp_path / "base", tmp_path / "adapter", token_ids(64))


@pytest.mark.parametrize("encoding", ["fp8-blocks", "nf4", "gptq"])
def test_quantized_bases(encoding: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Those of the decoded base."""
    made = quantized.MAKERS[encoding](tmp_path / "base", plain[0])
    decoded = decoded_base(tmp_path / "decoded", plain[0], made)
    assert_gradients(LlamaForCausalLM, made.base, plain[1], token_ids(64), decoded=decoded)


def small_model(path: Path, name: str = "llama", **options: Any) -> tuple[Any, Path, Path]:
    """A base and an adapter on attention, the head and the embedding: class, base, adapter."""
    cls = make_base(name, path / "base")
    targets = [*ATTENTION, "lm_head", "embed_tokens"]
    return cls, path / "base", make_adapter(cls, path / "base", path / "adapter", targets, lora_alpha=4, **options)


def test_matrices_are_read_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "BLOCK_BYTES", 1000)
    cls = make_base("mixtral", tmp_path / "base")
    options: dict[str, Any] = {"target_parameters": EXPERTS, "lora_alpha": 4}
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", [*ATTENTION, "lm_head"], **options)
    most = 0
    multiply = products.StreamedMatrix.multiply

    def measured(self: products.StreamedMatrix, X: torch.Tensor, transposed: bool) -> torch.Tensor:
        nonlocal most
        for _, _, rows in self.blocks():
            most = max(most, rows.nbytes)
        return multiply(self, X, transposed)

    monkeypatch.setattr(products.StreamedMatrix, "multiply", measured)
    assert_gradients(cls, tmp_path / "base", adapter, token_ids(64))
    assert 0 < most <= 1000


@pytest.mark.parametrize("name", ["llama4-text", "mixtral", "gpt-oss"])
def test_experts_are_read_one_at_a_time_as_the_memory_estimate_counts_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = make_base(name, tmp_path / "base")
    options: dict[str, Any] = {"target_parameters": EXPERTS, "lora_alpha": 4}
    model = GradientModel(
        make_plan(tmp_path / "base", make_adapter(cls, tmp_path / "base", tmp_path / "adapter", ["q_proj"], **options))
    )
    whole, read = list[str](), DifferentiableReader.read

    def recorded(self: DifferentiableReader) -> torch.Tensor:
        whole.extend([self.name] if self.tensor.stacked and not self.name.endswith("bias") else [])
        return read(self)

    monkeypatch.setattr(DifferentiableReader, "read", recorded)
    model.gradient(sequences(token_ids(64)), coefficients_of(model), "base")
    assert whole == []
    if name == "llama4-text":  # every token runs through every expert
        experts = {t.name: t.shape for _, _, own in model.modules for t in own.values() if t.stacked}
        assert all(model.size.products[name] == np.prod(shape) for name, shape in experts.items())


def test_sequences_of_several_lengths_run_together_as_one_by_one(tmp_path: Path) -> None:
    _, base, adapter = small_model(tmp_path)
    ids = [row.numpy() for row in token_ids(64)]
    ids = [ids[0], ids[1][:5], ids[2][:9]]
    counted = [np.arange(len(own)) % 3 > 0 for own in ids]
    text = TextSequences(tuple(ids), tuple(counted))
    model = GradientModel(make_plan(base, adapter))
    coefficients = coefficients_of(model)
    for against in OBJECTIVES:
        together = model.gradient(text, coefficients, against)
        alone = [model.gradient(text.take([i]), coefficients, against) for i in range(3)]
        assert together.tokens == text.tokens == sum(one.tokens for one in alone)
        assert together.value == pytest.approx(sum(one.value for one in alone), rel=1e-5)
        for name, gradient in together.gradient.items():
            np.testing.assert_allclose(gradient, sum(one.gradient[name] for one in alone), rtol=1e-3, atol=1e-4)


def test_gradients_of_an_embedding_are_the_same_bits_each_time(tmp_path: Path) -> None:
    """Each row is looked up by thousands of tokens, and the threads that add up their gradients would come in any order."""
    _, base, adapter = small_model(tmp_path)
    model = GradientModel(make_plan(base, adapter))
    (own,) = (own for path, _, own in model.modules if path.endswith("embed_tokens"))
    reader = DifferentiableReader(model.setting, own["weight"])
    (target,) = (t for t in model.job.plan.targets if "embed_tokens" in t.tensor)
    torch.manual_seed(vary(0))
    ids, found = torch.randint(64, (64, 4096)), []
    weight = torch.randn(*ids.shape, 32)
    for _ in range(6):
        leaf = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)
        model.setting.deltas.coefficients = {target.tensor: leaf}
        with threads(4):
            rows = reader.gather(ids)
            assert rows is not None
            (rows * weight).sum().backward()
        assert leaf.grad is not None
        found.append(leaf.grad.tolist())
    assert all(one == found[0] for one in found)


def test_temporary_files_are_given_back_when_the_model_is_closed(tmp_path: Path) -> None:
    _, base, adapter = small_model(tmp_path)
    model = GradientModel(make_plan(base, adapter))
    model.gradient(sequences(token_ids(64)), coefficients_of(model), "base")
    files = [spool._fd for spool in (model.spool, model.states, model.setting.deltas.spool)]
    model.close()
    for file in files:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)


def test_a_reference_runs_once_for_a_text(tmp_path: Path) -> None:
    """What its layers give is found again, whichever text came between."""
    _, base, adapter = small_model(tmp_path)
    texts = [sequences(token_ids(64)), sequences(token_ids(64, 2, 7))]
    model = GradientModel(make_plan(base, adapter))
    coefficients, read = coefficients_of(model), list[str]()
    model.batch.on_read = lambda tensor: read.append(tensor.name)
    counts, results = [], []
    for text in (*texts, *texts):
        read.clear()
        results.append(model.gradient(text, coefficients, "base"))
        counts.append(sum("layers.0.mlp.up_proj" in name for name in read))
    assert counts == [4, 4, 3, 3]  # the reference's, forward, again, and backward
    for first, second in zip(results[:2], results[2:], strict=True):
        assert first.value == second.value
        assert all((first.gradient[name] == second.gradient[name]).all() for name in first.gradient)


def test_of_coefficients_of_1_the_model_is_the_adapted_one(tmp_path: Path) -> None:
    _, base, adapter = small_model(tmp_path, "mixtral")
    model, text = GradientModel(make_plan(base, adapter)), sequences(token_ids(64))
    ones = {name: np.ones_like(c) for name, c in coefficients_of(model).items()}
    same = model.gradient(text, ones, "adapter")
    assert abs(same.value) < 1e-4
    measured = streamed(base, adapter, make_variants(("shrink",), (0.5,), "all"), None, token_ids(64))
    assert model.gradient(text, ones, "labels").value == pytest.approx(measured.loss[1].sum(), rel=1e-5)
    assert model.gradient(text, ones, "base").value == pytest.approx(measured.kl[1].sum(), rel=1e-4)


@pytest.mark.parametrize("kind", ["saved", "dense"])
def test_the_same_products_are_rounded_as_in_passes_that_measure(kind: str, tmp_path: Path) -> None:
    cls = make_base("llama", tmp_path / "base")
    if kind == "saved":
        adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", ["q_proj"], modules_to_save=["o_proj"])
        other = "o_proj"
    else:
        config = LoKrConfig(r=2, target_modules=["q_proj"])
        get_peft_model(cls.from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
        adapter, other = tmp_path / "adapter", "q_proj"
    plan = make_plan(tmp_path / "base", adapter)
    fitting = GradientModel(plan, rounds_products=True)
    measuring = StreamingModel(fitting.job)
    rounded = {path for path, _, own in fitting.modules if "weight" in own and own_reader(fitting, path).rounded}
    owners = {path: getattr(module.forward, "__self__", None) for path, module, _ in measuring.modules}
    assert rounded == {path for path, own in owners.items() if isinstance(own, InstalledModule) and own.rounded}
    assert any("up_proj" in path for path in rounded)
    assert not any(other in path for path in rounded)


def own_reader(model: GradientModel, path: str) -> Any:
    """What reads a module's weight."""
    (found,) = (module._parameters["weight"] for at, module, _ in model.modules if at == path)
    return found.reader  # type: ignore[union-attr]  # a LazyTensor, which torch types a Parameter


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    _, base, adapter = small_model(tmp_path)
    model = GradientModel(make_plan(base, adapter))
    huge = {name: np.full_like(c, 1e30) for name, c in coefficients_of(model).items()}
    with pytest.raises(
        NumericError, match=r"(an objective|the gradient of '.*') .*NaN or Inf.*; check the adapter's scale"
    ):
        model.gradient(sequences(token_ids(64)), huge, "base")


def test_a_layer_that_depends_on_what_ran_before_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base, adapter = small_model(tmp_path)
    numbers = itertools.count(1)
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: next(numbers) * forward(self, x))
    model = GradientModel(make_plan(base, adapter))
    with pytest.raises(UnsupportedError, match=r"layer 'model.layers.1' gives another result when it runs again"):
        model.gradient(sequences(token_ids(64)), coefficients_of(model), "labels")


def test_a_class_without_layers_that_may_run_again_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base, adapter = small_model(tmp_path)
    monkeypatch.setattr("streamer.streaming.gradients.layer_modules", lambda model: {})
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM has no layers that can run again"):
        GradientModel(make_plan(base, adapter))
