"""Live PEFT models: against PEFT's own function, quantized, injected and compiled, with a fit, and what is refused."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import accelerate
import kinds_cases
import peft
import pytest
import torch
from fitted import random_coefficients, random_map
from kinds import llama_config
from kinds_cases import Made, quiet, relative
from live import adapter_state, assert_equal, assert_same_findings, load_state, loaded, of_peft
from pairs import mitigate
from peft.tuners.lora import intruders as theirs
from seeds import vary
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import streamer
import streamer.peft as live
from streamer.errors import MismatchError, StreamerWarning, UnsupportedError, UsageError
from streamer.methods.files import Coefficients


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A Llama with a trained adapter, on disk."""
    return kinds_cases.make("linear", torch.float32, tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def on_files(made: Made) -> streamer.Findings:
    return streamer.detect_intruder_dimensions(made.base, made.adapter)


@pytest.fixture(scope="module")
def expected(
    made: Made, on_files: streamer.Findings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The adapter that files give at λ = 0.5."""
    out = tmp_path_factory.mktemp("expected") / "out"
    mitigate(made.base, made.adapter, out, 0.5, findings=on_files)
    return out


def tokens() -> Tensor:
    return torch.arange(2 * 9).reshape(2, 9) % 61


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(tokens()).logits
    return out


class Layers(nn.Module):
    """Plain float32 linear layers, on which PEFT's function is right."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(vary(0))
        self.wide = nn.Linear(96, 48)
        self.tall = nn.Linear(48, 80)
        self.square = nn.Linear(80, 80)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(self.tall(self.wide(x)))


def layers(**options: Any) -> peft.PeftModel:
    """Such layers with a LoRA of large random factors, every time the same."""
    model = Layers()
    torch.manual_seed(vary(1))
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["wide", "tall", "square"],
        init_lora_weights=False,
        **options,
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("lam", [0.75, 0.0])
def test_the_same_adapter_as_peft_s_own_function(lam: float) -> None:
    ours = layers()
    other = layers()
    lines: list[str] = []
    found = live.reduce_intruder_dimension(ours, mitigation_lambda=lam, logging_sink=lines.append)
    said: list[str] = []
    theirs.reduce_intruder_dimension(other, mitigation_lambda=lam, logging_sink=said.append)
    assert lines == said
    assert found is not None
    assert found.intruders > 0
    for (name, mine), (_, peer) in zip(ours.named_modules(), other.named_modules(), strict=True):
        if hasattr(mine, "get_delta_weight"):
            a, b = (m.get_delta_weight("intruder_reduced").detach() for m in (mine, peer))
            assert relative(a, b) < 2e-5, name
    assert ours.active_adapters == other.active_adapters == ["intruder_reduced"]


def test_what_is_lost_in_projection_is_a_warning() -> None:
    model = layers()
    with warnings.catch_warnings(action="error"):
        live.reduce_intruder_dimension(
            model, "default", "exact", mitigation_lambda=0.0, method="project"
        )
        with pytest.raises(StreamerWarning, match="of 3 matrices, most in 'square"):
            live.reduce_intruder_dimension(model, mitigation_lambda=0.0)
    assert list(model.peft_config) == ["default", "exact"], (
        "a warning that is raised leaves the model as it was"
    )
    with pytest.warns(StreamerWarning, match='; method="project" or merge_and_unload_with_'):
        live.reduce_intruder_dimension(model, mitigation_lambda=0.0)


def lora(target: str, **options: object) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False, **options)


def on_llama(
    config: peft.PeftConfig, dtype: torch.dtype = torch.float32, **options: Any
) -> peft.PeftModel:
    torch.manual_seed(vary(0))
    return peft.get_peft_model(LlamaForCausalLM(llama_config()).to(dtype), config, **options)


def test_keeps_bfloat16() -> None:
    model = on_llama(lora("q_proj"), torch.bfloat16, autocast_adapter_dtype=False)
    live.reduce_intruder_dimension(model, threshold_epsilon=1.0)
    assert {t.dtype for t in adapter_state(model, "intruder_reduced").values()} == {torch.bfloat16}


def test_refuses_an_epsilon_that_no_similarity_reaches() -> None:
    """PEFT's own tests take 999 to have every direction judged an intruder: a similarity is at most 1, and so is epsilon here."""
    with pytest.raises(UsageError, match=r"expected a number in \(0, 1\], found 999"):
        live.reduce_intruder_dimension(on_llama(lora("q_proj")), threshold_epsilon=999)


def test_refuses_an_adapter_that_is_no_lora() -> None:
    with pytest.raises(ValueError, match="GRALORA adapter: its change of the weights is not known"):
        live.reduce_intruder_dimension(on_llama(peft.GraloraConfig(r=4, target_modules=["q_proj"])))


def test_what_accelerate_offloads_is_refused(made: Made) -> None:
    model = loaded(made)
    tuned = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(
        UnsupportedError,
        match=r"or accelerate offloads it.*; load the whole model, or use the commands on its files",
    ):
        live.detect_intruder_dimensions(model)
    assert torch.equal(logits(model), tuned)


def test_a_plain_model_with_an_injected_adapter(made: Made, expected: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(made.base)
    config = peft.PeftConfig.from_pretrained(made.adapter)
    peft.inject_adapter_in_model(config, model, "default")
    model.peft_config = {"default": config}
    peft.set_peft_model_state_dict(model, load_state(made.adapter))
    model.eval()
    tuned = logits(model)
    live.reduce_intruder_dimension(model, mitigation_lambda=0.5)
    assert torch.equal(logits(model), logits(made.peft(expected, torch.float32)))
    merged = live.merge_and_unload_with_reduced_intruder_dimensions(model, mitigation_lambda=1.0)
    assert merged is model
    assert not of_peft(model)
    assert not hasattr(model, "peft_config")
    assert relative(logits(merged), tuned) < 5e-6


@pytest.mark.parametrize(
    "mode", [pytest.param("compiled", marks=pytest.mark.long), "inference", "training"]
)
def test_modes_of_a_model(made: Made, expected: Path, mode: str) -> None:
    model: Any = loaded(made)
    with torch.inference_mode(mode == "inference"):
        if mode == "compiled":
            model = torch.compile(model, backend="eager")
            logits(model)
        model.train(mode == "training")
        live.reduce_intruder_dimension(model, mitigation_lambda=0.5)
        assert {m.training for m in model.modules()} == {mode == "training"}
        assert torch.equal(logits(model), logits(made.peft(expected, torch.float32)))


def test_dropout_and_the_generator_stay_as_they_were() -> None:
    model = layers(lora_dropout=0.5).eval()
    state = torch.get_rng_state()
    live.reduce_intruder_dimension(model)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.ones(1, 96)
    assert torch.equal(model(x), model(x))


def test_a_task_s_model_keeps_its_configs(tmp_path: Path) -> None:
    """PEFT's own function lengthens the old adapter's ``modules_to_save`` each time."""
    model = loaded(kinds_cases.make("modules_to_save, new", torch.float32, tmp_path))
    before = model.peft_config["default"].to_dict()
    live.reduce_intruder_dimension(model)
    assert model.peft_config["default"].to_dict() == before
    assert model.peft_config["intruder_reduced"].modules_to_save == before["modules_to_save"]


def test_findings_are_saved_and_serve_files(
    made: Made, expected: Path, on_files: streamer.Findings, tmp_path: Path
) -> None:
    found = live.detect_intruder_dimensions(loaded(made))
    assert found.base["in_memory"]
    found.save(tmp_path / "f.safetensors")
    mitigate(made.base, made.adapter, tmp_path / "out", 0.5, findings=tmp_path / "f.safetensors")
    assert_equal(load_state(tmp_path / "out"), load_state(expected))
    other = kinds_cases.make("linear", torch.float32, tmp_path / "other")
    other.base.joinpath("model.safetensors").write_bytes(
        made.base.joinpath("model.safetensors").read_bytes()
    )
    changed = loaded(other)
    with torch.no_grad():
        next(p for n, p in changed.named_parameters() if "lora_A" in n).mul_(1.5)
    for findings in (on_files, found):
        with pytest.raises(
            MismatchError, match=r"was judged with other values than .* have; run detect again"
        ):
            live.reduce_intruder_dimension(changed, findings=findings)
        assert list(changed.peft_config) == ["default"]
    with pytest.raises(MismatchError, match="made with top_k=10, asked for 3"):
        live.reduce_intruder_dimension(loaded(made), findings=on_files, top_k=3)


def test_a_wider_dtype_is_the_same_model_and_a_narrower_one_is_not(
    made: Made, on_files: streamer.Findings
) -> None:
    wide = loaded(made).to(torch.float64)
    assert {m.fingerprint for m in live.detect_intruder_dimensions(wide)} == {
        m.fingerprint for m in on_files
    }
    with pytest.raises(MismatchError, match="loaded in a narrower dtype"):
        live.reduce_intruder_dimension(loaded(made).to(torch.bfloat16), findings=on_files)


def test_what_is_refused_leaves_the_model_as_it_was(made: Made) -> None:
    model = loaded(made)
    with pytest.raises(UsageError, match="the model has none of this name; it has 'default'"):
        live.detect_intruder_dimensions(model, "other")
    with pytest.raises(UsageError, match="the model has one of this name"):
        live.reduce_intruder_dimension(model, new_adapter_name="default")
    with pytest.raises(
        UsageError, match="expected a model with PEFT adapters, found LlamaForCausalLM"
    ):
        live.detect_intruder_dimensions(LlamaForCausalLM(llama_config()))
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match="call unmerge_adapter"):
        live.detect_intruder_dimensions(model)
    model.unmerge_adapter()
    layer = next(m for m in model.modules() if hasattr(m, "scale_layer"))
    layer.scale_layer(2.0)
    with pytest.raises(
        UnsupportedError, match="is scaled by 6, but the config of adapter 'default' says 3"
    ):
        live.detect_intruder_dimensions(model)
    layer.unscale_layer()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings(action="error"):
        for act in (
            live.reduce_intruder_dimension,
            live.merge_and_unload_with_reduced_intruder_dimensions,
        ):
            with pytest.raises(streamer.StreamerError, match="NaN"):
                act(model, mitigation_lambda=0.5)
    after = model.state_dict()
    assert all(
        torch.equal(tensor.nan_to_num(7), after[name].nan_to_num(7))
        for name, tensor in before.items()
    )


def test_a_sum_that_overflows_is_refused_before_a_weight_is_changed() -> None:
    base = Layers().half()
    with torch.no_grad():
        base.square.weight[0, 0] = 60_000
    config = peft.LoraConfig(
        r=4, target_modules=["wide", "tall", "square"], init_lora_weights=False
    )
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for factor in (base.square.lora_A, base.square.lora_B):
            factor["default"].weight[0, 0] = 200
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(streamer.StreamerError, match="does not fit float16"):
        live.merge_and_unload_with_reduced_intruder_dimensions(model, mitigation_lambda=1.0)
    assert_equal(model.state_dict(), before)


def test_an_injected_adapter_that_peft_has_no_second_one_of() -> None:
    model = Layers()
    config = peft.LoraConfig(target_modules=["wide"], init_lora_weights=False, bias="all")
    peft.inject_adapter_in_model(config, model, "default")
    model.peft_config = {"default": config}
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="PEFT adds no second one"):
            live.reduce_intruder_dimension(model)
        assert list(model.peft_config) == ["default"]


def test_a_merge_that_torch_refuses_changes_no_weight(made: Made) -> None:
    with torch.inference_mode():
        model = loaded(made)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="inference tensor"):
        live.merge_and_unload_with_reduced_intruder_dimensions(model, mitigation_lambda=0.5)
    assert_equal(model.state_dict(), before)


def test_saved_modules_of_the_new_adapter_are_the_old_one_s(tmp_path: Path) -> None:
    model = loaded(kinds_cases.make("modules_to_save", torch.float32, tmp_path))
    tuned = logits(model)
    saved = adapter_state(model, "default")
    live.reduce_intruder_dimension(model, mitigation_lambda=0.5)
    new = adapter_state(model, "intruder_reduced")
    assert all(
        torch.equal(new[name], tensor) for name, tensor in saved.items() if "lora" not in name
    )
    assert not torch.equal(logits(model), tuned)
    model.set_adapter("default")
    assert torch.equal(logits(model), tuned)


@pytest.mark.parametrize("kind", ["tied, lm_head", "tied, embedding", "tied, both"])
def test_a_tied_embedding_and_head_part_where_one_is_merged(kind: str, tmp_path: Path) -> None:
    made = kinds_cases.make(kind, torch.float32, tmp_path)
    tuned = logits(loaded(made))
    merged = live.merge_and_unload_with_reduced_intruder_dimensions(
        loaded(made), mitigation_lambda=1.0
    )
    assert relative(logits(merged), tuned) < 5e-6


def test_an_adapter_beside_one_with_trained_tokens() -> None:
    """PEFT looks for tokens of every adapter."""
    both = on_llama(lora("q_proj", trainable_token_indices=[1, 5]), adapter_name="tokens")
    both.add_adapter("plain", lora("q_proj"))
    before = {name: t.clone() for name, t in both.state_dict().items()}
    with pytest.raises(UnsupportedError, match="adapter 'plain': PEFT cannot save it"):
        live.detect_intruder_dimensions(both, adapter_name="plain")
    assert all(torch.equal(t, before[name]) for name, t in both.state_dict().items())


@pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT", "ignore:Already found a `peft_config`"
)
def test_a_peft_model_in_another() -> None:
    outer = peft.PeftModel(on_llama(lora("q_proj")), lora("v_proj"))
    names = [name for name, _ in outer.named_modules()]
    with pytest.raises(UnsupportedError, match="a PeftModel around a PeftModel"):
        live.merge_and_unload_with_reduced_intruder_dimensions(outer)
    assert [name for name, _ in outer.named_modules()] == names


@pytest.fixture(scope="module")
def coefficients(made: Made) -> Coefficients:
    return random_coefficients(made.base, made.adapter)


@pytest.mark.parametrize("how", ["fit", "map"])
def test_they_do_what_they_do_to_files(
    made: Made, how: str, coefficients: Coefficients, tmp_path: Path
) -> None:
    model = loaded(made)
    options: Any = (
        {"coefficients": coefficients}
        if how == "fit"
        else {"map": random_map(made.base, made.adapter)}
    )
    assert live.reduce_intruder_dimension(model, **options) is None
    streamer.reduce_intruder_dimension(made.base, made.adapter, tmp_path / "out", **options)
    assert_equal(adapter_state(model, "intruder_reduced"), load_state(tmp_path / "out"))
    merged = live.merge_and_unload_with_reduced_intruder_dimensions(model, **options)
    theirs = dict(streamer.iter_merged(made.base, made.adapter, **options))
    assert_equal(kinds_cases.by_disk(merged.state_dict(), theirs), theirs)


def test_those_of_another_adapter_leave_the_model_as_it_was(
    made: Made, coefficients: Coefficients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another rank, or of fewer matrices: refused before any is read."""
    matrices = coefficients.matrices
    name = list(matrices)[-1]
    model = loaded(made)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.delattr("streamer.methods.files.Coefficients.mitigated")
    narrow = {**matrices, name: matrices[name][:, :1]}
    fewer = {key: matrix for key, matrix in matrices.items() if key != name}
    for wrong_matrices, words in (
        (narrow, "do not fit 1 of the adapter's matrices"),
        (fewer, "fit them to this adapter"),
    ):
        wrong = dataclasses.replace(coefficients, matrices=wrong_matrices)
        for act in (
            live.reduce_intruder_dimension,
            live.merge_and_unload_with_reduced_intruder_dimensions,
        ):
            with pytest.raises(MismatchError, match=words):
                act(model, coefficients=wrong)
            assert model.state_dict().keys() == before.keys()
            assert_equal(model.state_dict(), before)


@pytest.mark.parametrize("coding", ["nf4", "int8"])
def test_layers_of_bitsandbytes(coding: str, tmp_path: Path) -> None:
    """They are decoded as their files are; merged values do not fit their codes."""
    options: dict[str, Any] = (
        {"load_in_8bit": True}
        if coding == "int8"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    )
    torch.manual_seed(vary(0))
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path / "plain")
    base = LlamaForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(**options)
    )
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(vary(1))
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    with quiet():  # it was trained on these codes, and names the model that they were made of
        on_files = streamer.detect_intruder_dimensions(tmp_path / "base", tmp_path / "adapter")
        assert_same_findings(live.detect_intruder_dimensions(model), on_files)
        live.reduce_intruder_dimension(model, findings=on_files)
    with pytest.raises(UnsupportedError, match="4 of the weights to merge into are quantized"):
        live.merge_and_unload_with_reduced_intruder_dimensions(model)


@pytest.mark.parametrize("part", ["module", "weight", "memory", "head"])
def test_a_parameter_of_two_places_of_which_the_adapter_changes_one_is_not_merged(
    part: str,
) -> None:
    """PEFT's own merge changes both places."""
    base = LlamaForCausalLM(llama_config())
    first, second = (layer.self_attn for layer in base.model.layers)
    if part == "module":
        second.q_proj = first.q_proj
    elif part == "head":  # the config says that they are separate
        base.lm_head.weight = base.model.embed_tokens.weight
    else:
        second.q_proj.weight = (
            first.q_proj.weight if part == "weight" else nn.Parameter(first.q_proj.weight.data)
        )
    target = "embed_tokens" if part == "head" else "layers.0.self_attn.q_proj"
    lora = peft.LoraConfig(target_modules=[target], init_lora_weights=False)
    model = peft.get_peft_model(base, lora)
    with pytest.raises(
        UnsupportedError,
        match=r"'.*' and '.*' are one parameter, but the adapter changes only the former",
    ):
        live.merge_and_unload_with_reduced_intruder_dimensions(model, mitigation_lambda=1.0)
