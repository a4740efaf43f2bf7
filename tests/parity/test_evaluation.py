"""Losses of all variants in one sweep: those of transformers with each merged model, over architectures and kinds of adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fitted
import numpy as np
import pytest
import quantized
import torch
import transformers
from architectures import ATTENTION, BERT, LINEAR, MODELS, TEXT, config
from causal_models import ADAPTERS, CAUSAL, EXPERTS, make_adapter, make_base
from evaluated import (
    TOP_K,
    answer,
    assert_as_transformers,
    assert_sums,
    loaded,
    merged_variants,
    precisions,
    streamed,
    sums_of,
    token_ids,
)
from pairs import make_pair, mitigate
from peft import LoHaConfig, PeftModel, get_peft_model
from quantized_cases import decoded_base
from safetensors.torch import load_file, save_file
from seeds import vary
from transformers import LlamaForCausalLM

import streamer
from streamer.errors import NumericError, UnsupportedError
from streamer.linalg.torch_state import has_fast_bfloat16
from streamer.plan.plan import make_plan
from streamer.streaming.sweep import SweepModel
from streamer.streaming.variants import BASE, Variant, VariantSet, make_variants


@pytest.mark.long
@pytest.mark.parametrize("name", CAUSAL)
def test_losses_equal_those_of_merged_models_in_every_architecture(
    name: str, tmp_path: Path
) -> None:
    cls, base, adapter = make_pair(name, tmp_path, CAUSAL[name][2])
    assert_as_transformers(cls, base, adapter, tmp_path)


# As `ADAPTERS`
KINDS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    **ADAPTERS,
    "trained tokens": ("llama", LINEAR, {"trainable_token_indices": [5, 7, 9]}),
    "trained tokens, tied": ("llama-tied", LINEAR, {"trainable_token_indices": [5, 7, 9]}),
    "saved router": ("mixtral", ["q_proj"], {"modules_to_save": ["gate"]}),
    "saved positions": ("gpt2", ["c_fc"], {"modules_to_save": ["wpe", "ln_1"]}),
    "saved positions, counted by the module": (
        "opt",
        ["q_proj"],
        {"modules_to_save": ["embed_positions"]},
    ),
    "saved embedding, scaled": (
        "gemma2",
        LINEAR,
        {"modules_to_save": ["embed_tokens", "input_layernorm"]},
    ),
    "saved norms of heads": ("qwen3", ["q_proj"], {"modules_to_save": ["q_norm", "k_norm"]}),
    "experts that all tokens run through": (
        "llama4-text",
        ["q_proj"],
        {"target_parameters": EXPERTS},
    ),
    "a weight read by another module": ("mamba", ["in_proj"], {"modules_to_save": ["conv1d"]}),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_those_of_merged_models_for_every_kind(kind: str, tmp_path: Path) -> None:
    name, targets, options = KINDS[kind]
    cls, base, adapter = make_pair(name, tmp_path, targets, **options)
    assert_as_transformers(cls, base, adapter, tmp_path)


def test_all_methods_and_lambdas(tmp_path: Path) -> None:
    cls, base, adapter = make_pair("llama", tmp_path, [*LINEAR, "lm_head"])
    assert_as_transformers(
        cls,
        base,
        adapter,
        tmp_path,
        methods=("paper", "project", "shrink"),
        lambdas=(0.75, -0.5, 2.0),
    )


def test_a_method_with_a_dense_delta(tmp_path: Path) -> None:
    cls = make_base("llama", tmp_path / "base")
    torch.manual_seed(vary(1))
    model = get_peft_model(
        cls.from_pretrained(tmp_path / "base"),
        LoHaConfig(r=2, target_modules=["q_proj", "up_proj"]),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    assert_as_transformers(cls, tmp_path / "base", tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_a_fine_tuned_model(name: str, tmp_path: Path) -> None:
    cls = make_base(name, tmp_path / "base")
    torch.manual_seed(vary(1))
    model = cls.from_pretrained(tmp_path / "base")
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    assert_as_transformers(cls, tmp_path / "base", tmp_path / "tuned", tmp_path)


def test_a_checkpoint_of_the_model_within(tmp_path: Path) -> None:
    """Names without the prefix of the model below the head, as GPT-2's checkpoint has them."""
    cls, base, adapter = make_pair("gpt2", tmp_path, ["c_attn", "c_fc"])
    file = base / "model.safetensors"
    save_file(
        {name.removeprefix("transformer."): t for name, t in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    assert_as_transformers(cls, base, adapter, tmp_path)


def test_of_projected_deltas_the_losses_are_those_of_the_adapters_that_mitigate_writes(
    tmp_path: Path,
) -> None:
    cls = make_base("llama", tmp_path / "base")
    base = tmp_path / "base"
    adapter = make_adapter(cls, base, tmp_path / "adapter", LINEAR)
    ids = token_ids(64)
    found = streamer.detect_intruder_dimensions(base, adapter, top_k=TOP_K)
    variants = make_variants(("paper", "project"), (0.25,), "all")
    ours, complete = (
        streamed(base, adapter, variants, found, ids, projected=projected)
        for projected in (True, False)
    )
    for v, variant in enumerate(variants[2:], 2):
        assert variant.method is not None
        out = tmp_path / variant.method
        mitigate(base, adapter, out, 0.25, findings=found, top_k=TOP_K, method=variant.method)
        with torch.no_grad():
            logits = (
                PeftModel.from_pretrained(cls.from_pretrained(base, dtype=torch.float32), out)
                .eval()(input_ids=ids)
                .logits
            )
        loss, _, _ = sums_of(
            logits.double().log_softmax(-1)[:, :-1], logits.double().log_softmax(-1)[:, :-1], ids
        )
        assert abs(ours.loss[v].sum() - loss.sum()) / ours.tokens.sum() <= 1e-5
    cut = abs(ours.loss - complete.loss).max(1)
    assert cut[2] > 1e-3 > 1e-5 > cut[3]  # `project` needs no cut


# Model → its adapter's modules, and further options of the adapter
ROUNDED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "llama-tied": ([*LINEAR, "embed_tokens"], {}),
    "llama": (ATTENTION, {"modules_to_save": ["lm_head", "norm"]}),
    "gpt2": (["c_attn", "c_proj", "c_fc"], {}),
    "falcon": (["query_key_value"], {}),
    "mixtral": (["q_proj"], {"target_parameters": EXPERTS}),
}


@pytest.mark.skipif(
    not has_fast_bfloat16(), reason="this processor has no instructions for bfloat16"
)
@pytest.mark.parametrize("name", ROUNDED)
def test_products_of_bfloat16_move_the_means_little(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    variants = make_variants(("shrink",), (0.75, 0.25), "all")
    cls, (targets, options) = make_base(name, base), ROUNDED[name]
    with torch.no_grad():  # next tokens about as likely as under a trained model
        model = cls.from_pretrained(base)
        model.get_output_embeddings().weight.mul_(0.2)
        model.save_pretrained(base)
    adapter = make_adapter(cls, base, tmp_path / "adapter", targets, **options, lora_alpha=2)
    ids = token_ids(64)
    full, rounded = (
        streamed(base, adapter, variants, None, ids, rounds_products=rounds)
        for rounds in (False, True)
    )
    moved = {
        measure: abs((getattr(full, measure) - getattr(rounded, measure)).sum(1))
        for measure in ("loss", "kl")
    }
    # transformers in bfloat16 rounds these products and all else: by d a log-probability, and so a token's loss. The sums of ours move by
    # less than its tokens do together. The KL Σ p0 (log p0 − log p) moves by Σ p0 d at most, and as p0 moves by p0 d0, by
    # Σ p0 d0 (1 + |log p0 − log p|) more; that both round alike cannot be counted on where deltas are added to products.
    of_base: list[torch.Tensor] = []
    for v, merged in enumerate(merged_variants(base, adapter, variants, None, tmp_path)):
        with torch.no_grad():
            own, off = (
                loaded(cls, merged, dtype)(input_ids=ids).logits.double().log_softmax(-1)[:, :-1]
                for dtype in (torch.float32, torch.bfloat16)
            )
        off = (off - own).abs()
        of_base = of_base or [own, off]
        apart = 1 + (of_base[0] - own).abs()
        assert moved["loss"][v] <= off.gather(-1, ids[:, 1:, None]).sum(), variants[v].name
        assert moved["kl"][v] <= (of_base[0].exp() * (off + of_base[1] * apart)).sum(), variants[
            v
        ].name
    assert all(sums.max() > 0 for sums in moved.values())


def test_as_many_rows_as_tokens(tmp_path: Path) -> None:
    """Three variants of two sequences of six tokens: no shape tells rows from tokens."""
    cls = make_base("llama", tmp_path / "base")
    base = tmp_path / "base"
    adapter = make_adapter(cls, base, tmp_path / "adapter", [*LINEAR, "lm_head", "embed_tokens"])
    ids = token_ids(64, 2, 6)
    variants = make_variants(("shrink",), (0.5,), "all")
    together = streamed(base, adapter, variants, None, ids)
    for i in range(2):
        alone = streamed(base, adapter, variants, None, ids[i : i + 1])
        np.testing.assert_allclose(together.loss[:, i], alone.loss[:, 0], rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("encoding", quantized.MAKERS)
def test_quantized_bases(encoding: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Those of the decoded base."""
    made = quantized.MAKERS[encoding](tmp_path / "base", plain[0])
    decoded = decoded_base(tmp_path / "decoded", plain[0], made)
    assert_as_transformers(LlamaForCausalLM, made.base, plain[1], tmp_path, decoded=decoded)


def test_what_no_text_reaches_is_refused_rather_than_wrong(tmp_path: Path) -> None:
    """A vision tower."""
    cls, base, adapter = make_pair("llava", tmp_path, LINEAR)
    with pytest.raises(NumericError, match="were not used in a sweep over the text"):
        assert_as_transformers(cls, base, adapter, tmp_path)


@pytest.mark.parametrize("targets", [["q_proj", "gate_proj"], ["down_proj"]])
def test_a_weight_that_a_class_multiplies_with_itself(
    targets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without calling the layer."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(
            self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight
        )

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", forward)
    assert_as_transformers(*make_pair("llama", tmp_path, targets), tmp_path)


IMAGES = {
    "vq_config": {
        "embed_dim": 8,
        "num_embeddings": 8,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "latent_channels": 8,
        "resolution": 8,
    },
    "vocabulary_map": {"<image>": 8, "IMGIMGAZ": 4, "IMGIMGBZ": 50},
}
RWKV = {
    "hidden_size": 32,
    "attention_hidden_size": 32,
    "num_hidden_layers": 4,
    "vocab_size": 64,
    "rescale_every": 2,
}
FOLLOWS = "a token sees those that follow it"
# What → the model's class, its config, and the words of the refusal
OTHERWISE: dict[str, tuple[str, Any, str]] = {
    "a prefix that sees itself": (
        "PaliGemmaForConditionalGeneration",
        MODELS["paligemma"][1],
        FOLLOWS,
    ),
    "an encoder with a head": ("BertLMHeadModel", lambda: config("Bert", **BERT), FOLLOWS),
    "weights changed on the way": (
        "RwkvForCausalLM",
        lambda: config("Rwkv", **RWKV),
        r"weight' is changed by the model as it runs",
    ),
    "tokens masked by number": (
        "ChameleonForConditionalGeneration",
        lambda: config("Chameleon", **TEXT, **IMAGES),
        "changes the logits of some tokens by their number",
    ),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_a_model_that_computes_otherwise_is_refused(what: str, tmp_path: Path) -> None:
    kind, make, message = OTHERWISE[what]
    torch.manual_seed(vary(0))
    model = getattr(transformers, kind)(make())
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "base")
    adapter = make_adapter(
        type(model), tmp_path / "base", tmp_path / "adapter", ["q_proj", "query", "key"]
    )
    np.save(tmp_path / "g.npy", token_ids(60) + 4)
    np.save(tmp_path / "t.npy", token_ids(50) + 4)
    with pytest.raises(UnsupportedError, match=message):
        streamer.evaluate_variants(
            tmp_path / "base",
            adapter,
            general=tmp_path / "g.npy",
            task=tmp_path / "t.npy",
            methods=["shrink"],
        )


def test_a_quantized_base_of_conv1d_layers_is_refused(tmp_path: Path) -> None:
    _, base, adapter = make_pair("gpt2", tmp_path, ["c_fc"])
    file = base / "model.safetensors"
    name = "transformer.h.0.attn.c_proj"
    tensors = load_file(file)
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{name}.weight_scale"] = torch.ones(1)
    save_file(tensors, file, metadata={"format": "pt"})
    path = base / "config.json"
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "quantization_config": quantization})
    )
    with pytest.raises(UnsupportedError, match="a quantized gpt2 stores its layers"):
        streamed(base, adapter, make_variants(("shrink",), (0.5,), "all"), None, token_ids(64))


def test_the_length_from_which_longrope_is_another_is_known(tmp_path: Path) -> None:
    """The model's own forward on a short sequence beside a long one differs there, so that they do not go together."""
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "rope_theta": 10000.0,
    }
    torch.manual_seed(vary(0))
    model = transformers.Phi3ForCausalLM(
        config("Phi3", **TEXT, original_max_position_embeddings=16, rope_parameters=rope)
    ).eval()
    model.save_pretrained(tmp_path / "base")
    adapter = make_adapter(type(model), tmp_path / "base", tmp_path / "adapter", ["qkv_proj"])
    assert (
        SweepModel(
            VariantSet(make_plan(tmp_path / "base", adapter), (Variant(BASE, None),), None)
        ).size.short
        == 16
    )
    ids = token_ids(64, 1, 17)
    with torch.no_grad():
        short = model(input_ids=ids[:, :16]).logits
        padded = model(input_ids=ids).logits[:, :16]
    assert (short - padded).abs().max() > 1e-4


# What → the model, the adapter's modules, and further options of the adapter
SOME_KINDS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "head and embedding": ("llama", [*LINEAR, "lm_head", "embed_tokens"], {}),
    "DoRA": ("llama", LINEAR, {"use_dora": True}),
    "saved modules": ("llama-tied", LINEAR, {"modules_to_save": ["embed_tokens", "norm"]}),
    "experts": ("mixtral", ["q_proj"], {"target_parameters": EXPERTS}),
}


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_it_makes_no_difference_which_variants_run_together(kind: str, tmp_path: Path) -> None:
    name, targets, options = SOME_KINDS[kind]
    cls = make_base(name, tmp_path / "base")
    base = tmp_path / "base"
    adapter = make_adapter(cls, base, tmp_path / "adapter", targets, **options)
    ids = token_ids(64)
    variants = make_variants(("shrink",), (0.5,), "all")
    together = streamed(base, adapter, variants, None, ids)
    for order in ((1,), (2,), (2, 1), (1, 0, 2, 0)):
        own = streamed(base, adapter, tuple(variants[v] for v in order), None, ids)
        np.testing.assert_allclose(own.loss, together.loss[list(order)], rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in SOME_KINDS if kind != "DoRA"])
def test_losses_are_those_of_the_merged_model(kind: str, tmp_path: Path) -> None:
    name, targets, options = SOME_KINDS[kind]
    cls = make_base(name, tmp_path / "base")
    base = tmp_path / "base"
    adapter = make_adapter(cls, base, tmp_path / "adapter", targets, **options)
    ids = token_ids(64)
    coefficients = [fitted.random_coefficients(base, adapter, keep) for keep in (0.95, 0.9)]
    variants = make_variants(("regmean",), (0.5,), "all", coefficients[0])
    variants += make_variants(("regmean",), (0.5,), "all", coefficients[1])[2:]
    ours = streamed(base, adapter, variants, None, ids)
    reference = answer(precisions(cls, base), ids)
    tokens = ours.tokens.sum()
    for v, factors in enumerate(coefficients, 2):
        keep = factors.keep
        merged = tmp_path / f"merged-{factors.keep}"
        streamer.merge_with_reduced_intruder_dimensions(base, adapter, merged, coefficients=factors)
        own = answer(precisions(cls, merged), ids)
        assert_sums(ours.loss[v].sum(), ours.kl[v].sum(), own, reference, ids, keep)
    assert (
        min(abs(ours.kl[a].sum() - ours.kl[b].sum()) for a, b in ((1, 2), (2, 3))) / tokens > 1e-4
    ), "variants differ"
