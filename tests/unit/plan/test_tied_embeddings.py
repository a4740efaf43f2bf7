"""An embedding and an lm_head that are one tensor: when they part, when they stay, and what the config says then."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from seeds import vary

import streamer
from streamer.errors import MismatchError, UnsupportedError
from streamer.plan.plan import make_plan

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
UNKNOWN = {"model_type": "test", "architectures": ["TestForCausalLM"]}
LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {"model_type": "llama", "tie_word_embeddings": True},
    "vision_config": {"model_type": "clip_vision_model"},
}


def base(
    home: Path, config: dict, extra: dict[str, torch.Tensor] | None = None, embed: str = EMBED
) -> Path:
    torch.manual_seed(vary(0))
    tensors = {
        embed: torch.randn(64, 32),
        "model.layers.0.q_proj.weight": torch.randn(32, 32),
        **(extra or {}),
    }
    return helpers.write_sharded(home / "base", [tensors], {**LLAMA, **config})


def adapter(
    home: Path,
    module: str = "lm_head",
    tensors: dict[str, torch.Tensor] | None = None,
    **config: object,
) -> Path:
    shape = (64, 32) if module in ("lm_head", "proj_out") else (32, 32)
    path = helpers.write_adapter(
        home / "adapter", {module: helpers.intruding_factors(*shape, 4)}, r=4, **config
    )
    file = path / "adapter_model.safetensors"
    save_file(
        {**load_file(file), **{f"base_model.model.{n}": t for n, t in (tensors or {}).items()}},
        file,
        metadata={"format": "pt"},
    )
    return path


def merge(home: Path, base: Path, adapter: Path) -> tuple[dict[str, torch.Tensor], dict]:
    streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, home / "out", mitigation_lambda=1.0
    )
    return load_file(home / "out" / "model-00001-of-00001.safetensors"), json.loads(
        (home / "out" / "config.json").read_text()
    )


TIES = {
    "stated": ({"tie_word_embeddings": True}, EMBED, HEAD),
    "stated for the text": (LLAVA, "model.language_model.embed_tokens.weight", HEAD),
    "stated for the text, old names": (
        LLAVA,
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
    ),
    "by default": ({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, EMBED, HEAD),
    "under another name": (
        {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]},
        "model.decoder.embed_tokens.weight",
        "proj_out.weight",
    ),
    "without the prefix": (
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        "wte.weight",
        HEAD,
    ),
}


@pytest.mark.parametrize("tie", TIES)
def test_a_delta_of_the_head_unties(tmp_path: Path, tie: str) -> None:
    stated, embed, head = TIES[tie]
    module = "proj_out" if head == "proj_out.weight" else "lm_head"
    b = base(tmp_path, stated, embed=embed)
    a = adapter(tmp_path, module)
    merged, config = merge(tmp_path, b, a)
    embedding = load_file(b / "model-00001-of-00001.safetensors")[embed]
    factors = load_file(a / "adapter_model.safetensors")
    B, A = (factors[f"base_model.model.{module}.lora_{x}.weight"] for x in "BA")
    assert torch.equal(merged[embed], embedding)
    torch.testing.assert_close(merged[head], embedding + B @ A)
    assert config["tie_word_embeddings"] is False
    assert config.get("text_config", {"tie_word_embeddings": False})["tie_word_embeddings"] is False
    before = json.loads((b / "config.json").read_text())
    assert {k: v for k, v in config.items() if k not in ("tie_word_embeddings", "text_config")} == {
        k: v for k, v in before.items() if k not in ("tie_word_embeddings", "text_config")
    }
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"][head] == "model-00001-of-00001.safetensors"
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in merged.values())
    # What is written is a plain untied model: detected on once more, it finds the head by its name.
    assert make_plan(tmp_path / "out", a).by_weight[head][0][0].module.name == module


T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}


@pytest.mark.parametrize(
    "config", [{}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}]
)
def test_a_tie_that_no_config_undoes(tmp_path: Path, config: dict) -> None:
    b = base(tmp_path, T5 | config, embed="shared.weight")
    with pytest.raises(
        UnsupportedError,
        match=r"changes 'shared.weight', .* which T5ForConditionalGeneration ties whatever its config says",
    ):
        make_plan(b, adapter(tmp_path))


def test_a_head_of_t5s_own_is_apart_where_the_config_says_so(tmp_path: Path) -> None:
    b = base(
        tmp_path, T5 | {"tie_word_embeddings": False}, {HEAD: torch.randn(64, 32)}, "shared.weight"
    )
    merged, config = merge(tmp_path, b, adapter(tmp_path))
    assert set(merged) == {"shared.weight", HEAD, "model.layers.0.q_proj.weight"}
    assert config["tie_word_embeddings"] is False
    b = base(
        tmp_path, T5 | {"tie_word_embeddings": True}, {HEAD: torch.randn(64, 32)}, "shared.weight"
    )
    with pytest.raises(UnsupportedError, match="loaders disagree"):
        make_plan(b, adapter(tmp_path))


def test_a_copy_on_disk_becomes_the_tensor_that_is_written(tmp_path: Path) -> None:
    b = base(tmp_path, {"tie_word_embeddings": True}, {HEAD: torch.zeros(64, 32)})
    with pytest.raises(
        UnsupportedError,
        match=r"differs from 'model.embed_tokens.weight', to which the config ties it, and loaders disagree",
    ):
        make_plan(b, adapter(tmp_path))
    embedding = load_file(b / "model-00001-of-00001.safetensors")[EMBED]
    b = base(tmp_path, {"tie_word_embeddings": True}, {HEAD: embedding})
    merged, config = merge(tmp_path, b, adapter(tmp_path))
    assert torch.equal(merged[EMBED], embedding)
    assert not torch.equal(merged[HEAD], embedding)
    assert config["tie_word_embeddings"] is False


def test_tokens_of_both_leave_the_tie_and_a_stale_copy_goes(tmp_path: Path) -> None:
    b = base(tmp_path, {"tie_word_embeddings": True})
    embedding = load_file(b / "model-00001-of-00001.safetensors")[EMBED]
    b = base(tmp_path, {"tie_word_embeddings": True}, {HEAD: embedding})
    rows = torch.randn(2, 32)
    a = adapter(
        tmp_path,
        "model.layers.0.q_proj",
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": rows},
        trainable_token_indices=[5, 1],
    )
    merged, config = merge(tmp_path, b, a)
    assert HEAD not in merged
    assert torch.equal(merged[EMBED][[5, 1]], rows)
    assert config["tie_word_embeddings"] is True
    assert "dropped" in [
        c["change"] for c in make_plan(b, a).edits.listed(make_plan(b, a).base, False)
    ]


REFUSED = {
    "tokens beside a delta": (
        {"tie_word_embeddings": True},
        EMBED,
        "lm_head",
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 32)},
        {"trainable_token_indices": [5]},
        "trains tokens of 'model.embed_tokens.weight', which is tied to 'lm_head.weight', and also changes one of them otherwise",
    ),
    "an unknown class": (
        UNKNOWN,
        "encoder.word_embeddings.weight",
        "model.layers.0.q_proj",
        {"encoder.word_embeddings.weight": torch.ones(64, 32)},
        {},
        "whether 'encoder.word_embeddings.weight' is tied",
    ),
    "an unknown class, tied": (
        {**UNKNOWN, "tie_word_embeddings": True, "vocab_size": 64},
        EMBED,
        "model.layers.0.q_proj",
        {EMBED: torch.ones(64, 32)},
        {},
        "the config names 'TestForCausalLM', which is not known here; name the class, or a similar one, with --architecture",
    ),
    "a new head in an unknown class": (
        {**UNKNOWN, "vocab_size": 64},
        EMBED,
        "model.layers.0.q_proj",
        {"out.weight": torch.ones(64, 32)},
        {"modules_to_save": ["out"]},
        "is tied to another tensor depends on the model's class",
    ),
    "grown apart": (
        {"tie_word_embeddings": True},
        EMBED,
        "model.layers.0.q_proj",
        {EMBED: torch.ones(70, 32)},
        {"modules_to_save": ["embed_tokens"]},
        "gives 'model.embed_tokens.weight' 70 rows, but 'lm_head.weight', which is tied to it, has 64",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_the_model_that_was_trained(tmp_path: Path, case: str) -> None:
    config, embed, module, tensors, options, words = REFUSED[case]
    b = base(tmp_path, config, embed=embed)
    a = adapter(tmp_path, module, tensors, **options)
    with pytest.raises(UnsupportedError) as e:
        make_plan(b, a)
    assert words in str(e.value)


@pytest.mark.parametrize(
    ("module", "allowed"), [("pooler", True), ("projector", True), ("out", False)]
)
def test_widths_of_layers_are_no_vocabulary(tmp_path: Path, module: str, allowed: bool) -> None:
    """Of an unknown class without a stated vocabulary: what has as many rows as a layer is wide is tied to no embedding."""
    shapes = {"pooler": (32, 32), "projector": (32, 24), "out": (80, 32)}
    b = base(
        tmp_path, UNKNOWN, {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    )
    (m, n), rank = shapes[module], 2
    a = helpers.write_adapter(
        tmp_path / "a", {module: (torch.randn(rank, n), torch.randn(m, rank))}, r=rank
    )
    if allowed:
        assert [t.tensor for t in make_plan(b, a).targets] == [f"{module}.weight"]
    else:
        with pytest.raises(
            UnsupportedError, match="is tied to another tensor depends on the model's class"
        ):
            make_plan(b, a)


@pytest.mark.parametrize("config", [None, {"model_type": "test"}])
def test_a_vocabulary_of_bytes_as_wide_as_layers(tmp_path: Path, config: dict | None) -> None:
    """The head and the embedding of an unknown class have the same bytes: they are one."""
    torch.manual_seed(vary(0))
    embedding = torch.randn(64, 32)
    wide = {
        EMBED: embedding,
        HEAD: embedding.clone(),
        "model.layers.0.up_proj.weight": torch.randn(64, 32),
    }
    b = helpers.write_sharded(tmp_path / "base", [wide], config or {})
    if config is None:
        (b / "config.json").unlink()
    with pytest.raises(
        UnsupportedError, match="is tied to another tensor depends on the model's class"
    ):
        make_plan(b, adapter(tmp_path))


def test_a_head_that_an_unknown_class_may_tie(tmp_path: Path) -> None:
    with pytest.raises(
        MismatchError,
        match=r"'lm_head' has no tensor in the base .* name the model's class with --architecture",
    ):
        make_plan(base(tmp_path, UNKNOWN), adapter(tmp_path))


def test_a_tie_that_no_config_can_say_is_undone(tmp_path: Path) -> None:
    b = base(tmp_path, {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]})
    a = adapter(tmp_path, task_type="CAUSAL_LM")
    (b / "config.json").unlink()
    with pytest.raises(MismatchError, match="name the model's class with --architecture"):
        make_plan(b, a)


@pytest.mark.parametrize("config", [{"tie_word_embeddings": False}, {}])
def test_a_head_that_stands_apart_in_an_unknown_class(tmp_path: Path, config: dict) -> None:
    b = base(tmp_path, {**UNKNOWN, **config}, {HEAD: torch.randn(64, 32)})
    merged, written = merge(tmp_path, b, adapter(tmp_path))
    assert set(merged) == {EMBED, HEAD, "model.layers.0.q_proj.weight"}
    assert written == json.loads((b / "config.json").read_text())


def test_factors_that_are_said_to_be_one(tmp_path: Path) -> None:
    b = base(tmp_path, {"tie_word_embeddings": True})
    a = adapter(
        tmp_path,
        "lm_head",
        {
            "model.embed_tokens.lora_embedding_A": torch.ones(2, 64),
            "model.embed_tokens.lora_embedding_B": torch.ones(32, 2),
        },
        ensure_weight_tying=True,
        rank_pattern={"embed_tokens": 2},
    )
    with pytest.raises(UnsupportedError, match="says ensure_weight_tying, but the factors of"):
        make_plan(b, a)
