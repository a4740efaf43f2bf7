"""Merged models whose embedding and head were one tensor: transformers loads them, and they answer as PEFT's model does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from architectures import merge
from forks import server
from pairs import opened
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from seeds import vary
from test_architectures_table import nest, plain
from verified import lines

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Case(NamedTuple):
    """A model, and what of it is adapted."""

    cls: str
    config: Callable[[], Any]
    targets: list[str]
    saved: list[str] | None = None
    grown: bool = False
    options: tuple[tuple[str, Any], ...] = ()


HEADS = {
    "mamba": ("MambaForCausalLM", plain("Mamba"), "embeddings", "lm_head", "in_proj"),
    "modernbert": (
        "ModernBertForMaskedLM",
        plain("ModernBert", cls_token_id=1, sep_token_id=2),
        "tok_embeddings",
        "decoder",
        "Wqkv",
    ),
    "bert": (
        "BertForMaskedLM",
        plain("Bert"),
        "word_embeddings",
        "cls.predictions.decoder",
        "query",
    ),
    "roberta": (
        "RobertaForMaskedLM",
        plain("Roberta"),
        "word_embeddings",
        "lm_head.decoder",
        "query",
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        plain("Whisper"),
        "decoder.embed_tokens",
        "proj_out",
        "q_proj",
    ),
    "llama, tied": (
        "LlamaForCausalLM",
        plain("Llama", tie_word_embeddings=True),
        "embed_tokens",
        "lm_head",
        "q_proj",
    ),
}


def answer(model: torch.nn.Module) -> torch.Tensor:
    """Logits of a few tokens."""
    g = torch.Generator().manual_seed(vary(1))
    ids = torch.randint(3, 60, (2, 9), generator=g)
    config = model.config
    inputs: dict[str, Any] = {"input_ids": ids}
    if config.model_type == "whisper":
        frames = 2 * config.max_source_positions
        inputs = {
            "input_features": torch.randn(2, config.num_mel_bins, frames, generator=g),
            "decoder_input_ids": ids,
        }
    elif config.model_type == "vision-encoder-decoder":
        size = config.encoder.image_size
        inputs = {
            "pixel_values": torch.randn(2, 3, size, size, generator=g),
            "decoder_input_ids": ids,
        }
    elif config.is_encoder_decoder or config.model_type == "encoder-decoder":
        inputs["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        return model.eval()(**inputs).logits


def trained(model: Any, case: Case, directory: Path) -> PeftModel:
    """An adapter with all that it trains changed, saved by PEFT."""
    if case.grown:
        nested = model.config.is_encoder_decoder and hasattr(model.config, "decoder")
        (model.decoder if nested else model).resize_token_embeddings(70, mean_resizing=False)
    peft = get_peft_model(
        model,
        LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=case.targets,
            modules_to_save=case.saved,
            **dict(case.options),
        ),
    )
    g = torch.Generator().manual_seed(vary(2))
    for p in peft.parameters():
        if p.requires_grad:
            p.data.add_(
                0.2 * torch.randn(p.shape, generator=g)
            )  # in place: what PEFT ties stays one
    peft.save_pretrained(directory, save_embedding_layers=True if case.grown else "auto")
    return peft


def merged(case: Case, home: Path) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """What PEFT's model answers, what the merged one does, and how that was loaded."""
    torch.manual_seed(vary(0))
    cls = getattr(transformers, case.cls)
    model = cls(case.config())
    for p in model.parameters():
        p.data = p.data + 0.05 * torch.randn(p.shape)
    model.save_pretrained(home / "base")
    peft = trained(cls.from_pretrained(home / "base"), case, home / "adapter")
    done = server().run(
        "merge", home / "base", home / "adapter", "-o", home / "out", "--lambda", 1, "--json"
    )
    assert done.code == 0, done.err
    assert lines(home / "out", home / "base", home / "adapter", sample="all") == []
    loaded, info = cls.from_pretrained(home / "out", output_loading_info=True)
    return answer(peft), answer(loaded), info


# Name → (class, config, target modules, modules to save): PEFT saves the embeddings of the whole model itself, and no decoder's
GROWN = {
    "t5": ("T5ForConditionalGeneration", plain("T5"), ["q"], None),
    "t5, untied": (
        "T5ForConditionalGeneration",
        plain("T5", tie_word_embeddings=False),
        ["q"],
        None,
    ),
    "marian": ("MarianMTModel", plain("Marian"), ["q_proj"], None),
    "bert and gpt2": (
        "EncoderDecoderModel",
        nest("EncoderDecoder", encoder="Bert", decoder="GPT2"),
        ["query"],
        ["wte", "lm_head"],
    ),
    "vit and trocr": (
        "VisionEncoderDecoderModel",
        nest("VisionEncoderDecoder", encoder="ViT", decoder="TrOCR"),
        r".*decoder\..*q_proj",
        ["embed_tokens", "output_projection"],
    ),
    "vit and gpt2": (
        "VisionEncoderDecoderModel",
        nest("VisionEncoderDecoder", encoder="ViT", decoder="GPT2"),
        ["c_attn"],
        ["wte", "lm_head"],
    ),
}


@pytest.mark.parametrize("name", GROWN)
def test_a_vocabulary_grows_where_the_config_states_it(name: str, tmp_path: Path) -> None:
    """An encoder's stays what it is where a decoder's has grown."""
    cls, config, targets, saved = GROWN[name]
    case = Case(cls, config, targets, saved, grown=True)
    expected, found, info = merged(case, tmp_path)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    stated, before = (
        json.loads((tmp_path / home / "config.json").read_text()) for home in ("out", "base")
    )
    assert (stated.get("decoder") or stated)["vocab_size"] == 70
    if "encoder" in before:
        assert stated["encoder"] == before["encoder"]
        assert "vocab_size" not in stated


def test_all_names_of_a_tied_embedding_are_saved_and_merged_back(tmp_path: Path) -> None:
    """T5 ties four; of a vocabulary that has grown an adapter of the tuned model has them all."""
    cls = transformers.T5ForConditionalGeneration
    config = plain("T5")
    torch.manual_seed(vary(0))
    model = cls(config())
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70, mean_resizing=False)
    for name, p in model.named_parameters():
        p.data += 0.1 * torch.randn(p.shape) if name.endswith((".q.weight", "shared.weight")) else 0
    model.save_pretrained(tmp_path / "tuned")
    for command in (
        ("mitigate", "base", "tuned", "adapter", "--to-lora", 32),
        ("merge", "base", "adapter", "out"),
    ):
        verb, base, adapter, out, *more = command
        done = server().run(
            verb, tmp_path / base, tmp_path / adapter, "-o", tmp_path / out, "--lambda", 1, *more
        )
        assert done.code == 0, done.err
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[
        "modules_to_save"
    ]
    assert saved == ["decoder.embed_tokens", "encoder.embed_tokens", "lm_head", "shared"]
    loaded = opened(cls, tmp_path / "out")
    torch.testing.assert_close(answer(loaded), answer(model), rtol=1e-3, atol=1e-4)
    grown = cls.from_pretrained(tmp_path / "base")
    grown.resize_token_embeddings(70, mean_resizing=False)
    torch.testing.assert_close(
        answer(PeftModel.from_pretrained(grown, tmp_path / "adapter")),
        answer(model),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("kind", [LoraConfig, LoHaConfig])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_untrained_bias_grows_with_its_head_by_way_of_a_lora(
    name: str, kind: Any, tmp_path: Path
) -> None:
    """PEFT saves it with the head, under one of its two names, and not because it trained it: LoHa cannot even train biases."""
    cls, config, *_, layer = HEADS[name]
    base, adapter, lora = (tmp_path / place for place in ("base", "adapter", "lora"))
    torch.manual_seed(vary(0))
    getattr(transformers, cls)(config()).save_pretrained(base)
    model = getattr(transformers, cls).from_pretrained(base)
    model.resize_token_embeddings(70, mean_resizing=False)
    model.get_output_embeddings().bias.data.normal_()
    start = {"init_weights": False} if kind is LoHaConfig else {"init_lora_weights": False}
    peft = get_peft_model(model, kind(r=2, target_modules=[layer], **start))
    peft.save_pretrained(adapter, save_embedding_layers=True)
    runs = (
        ("mitigate", adapter, "lora", "--to-lora", 32),
        ("merge", lora, "by way"),
        ("merge", adapter, "out"),
    )
    for verb, source, out, *more in runs:
        done = server().run(verb, base, source, "-o", tmp_path / out, "--lambda", 1, *more)
        assert done.code == 0, done.err
        assert lines(tmp_path / out, base, source, sample="all") == []
        if verb == "merge":
            loaded = getattr(transformers, cls).from_pretrained(tmp_path / out)
            torch.testing.assert_close(answer(loaded), answer(peft), rtol=1e-4, atol=1e-5)
    grown = getattr(transformers, cls).from_pretrained(base)
    grown.resize_token_embeddings(70, mean_resizing=False)
    torch.testing.assert_close(
        answer(PeftModel.from_pretrained(grown, lora)), answer(peft), rtol=1e-4, atol=1e-5
    )


def test_a_method_for_which_peft_takes_what_it_refuses_lora_for(tmp_path: Path) -> None:
    cls, config, *_ = HEADS["mamba"]
    model = getattr(transformers, cls)(config())
    model.save_pretrained(tmp_path / "base")
    loha = LoHaConfig(r=2, target_modules=["out_proj"], init_weights=False)
    get_peft_model(model, loha).save_pretrained(tmp_path / "adapter")
    done = server().run(
        "mitigate",
        tmp_path / "base",
        tmp_path / "adapter",
        "-o",
        tmp_path / "out",
        "--lambda",
        1,
        "--to-lora",
        4,
    )
    assert done.code == 3
    assert "mixer.out_proj', which PEFT refuses LoRA for in models of type 'mamba'" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama, tied", "modernbert", "mamba", "whisper"])
@pytest.mark.parametrize("what", ["factors", "factors of DoRA", "saved", "tokens"])
def test_what_peft_ties_stays_one(name: str, what: str, tmp_path: Path) -> None:
    """With ``ensure_weight_tying`` PEFT ties some embeddings by their names, and leaves others alone; tokens it always ties."""
    cls, config, embedding, _, layer = HEADS[name]
    options: dict[str, Any] = {"ensure_weight_tying": True}
    if what == "tokens":
        options = {"trainable_token_indices": {embedding: [3, 5]}}
    if what == "factors of DoRA":
        options["use_dora"] = True
    targets = f"(.*{layer}|.*{embedding})" if "factors" in what else [layer]
    case = Case(
        cls,
        config,
        targets,
        [embedding] if what == "saved" else None,
        options=tuple(options.items()),
    )
    expected, found, info = merged(case, tmp_path)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    if (name, what) == (
        "modernbert",
        "tokens",
    ):  # PEFT's forward pass leaves out the head's bias, its own merge does not
        expected = expected + load_file(tmp_path / "base" / "model.safetensors")["decoder.bias"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_factors_that_peft_trained_apart_are_refused(tmp_path: Path) -> None:
    """PEFT's cast to float32 separates the factors of a bfloat16 model, and how it loads them depends on the dtype."""
    cls, config, embedding, head, layer = HEADS["llama, tied"]
    torch.manual_seed(vary(0))
    model = getattr(transformers, cls)(config())
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    case = Case(cls, config, [layer, embedding, head], options=(("ensure_weight_tying", True),))
    peft = trained(type(model).from_pretrained(tmp_path / "base"), case, tmp_path / "adapter")
    command = (
        "merge",
        tmp_path / "base",
        tmp_path / "adapter",
        "-o",
        tmp_path / "out",
        "--lambda",
        1,
    )
    done = server().run(*command)
    assert done.code == 3
    assert "'lm_head' are not those of one delta" in done.err
    assert (
        "set ensure_weight_tying to false in its config, and name both in target_modules"
        in done.err
    )
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ensure_weight_tying": False}))
    assert server().run(*command).code == 0
    merged = {
        name: values.double()
        for name, values in load_file(tmp_path / "out" / "model.safetensors").items()
    }
    stored = load_file(tmp_path / "base" / "model.safetensors")[
        "model.embed_tokens.weight"
    ].double()
    for name, module in (
        ("model.embed_tokens", peft.base_model.model.model.embed_tokens),
        ("lm_head", peft.base_model.model.lm_head),
    ):
        delta = module.get_delta_weight("default").double()
        torch.testing.assert_close(merged[f"{name}.weight"], stored + delta, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("what", ["tokens", "grown", "head"])
@pytest.mark.parametrize("name", ["llama, tied", "whisper"])
def test_the_adapter_says_which_class_it_was_trained_on(
    name: str, what: str, tmp_path: Path
) -> None:
    """Ties of a type's classes differ; without a task PEFT writes the class into the adapter's config."""
    kind, config, embedding, head, layer = HEADS[name]
    options = (("trainable_token_indices", {embedding: [3, 5]}),) if what == "tokens" else ()
    case = Case(
        kind,
        config,
        [layer, head] if what == "head" else [layer],
        grown=what == "grown",
        options=options,
    )
    cls = getattr(transformers, kind)
    cls(config()).save_pretrained(tmp_path / "base")
    expected = answer(trained(cls.from_pretrained(tmp_path / "base"), case, tmp_path / "adapter"))
    path = tmp_path / "base" / "config.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "architectures"})
    )
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    loaded = opened(cls, tmp_path / "out")
    torch.testing.assert_close(answer(loaded), expected, rtol=1e-4, atol=1e-5)
