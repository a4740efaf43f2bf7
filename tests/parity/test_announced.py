"""What an adapter's config announces and its file lacks: adapters that PEFT saved, with tensors taken out of their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kinds_cases
import peft
import pytest
import torch
from causal_models import make_adapter, make_base
from commands import edit_adapter, refuse_everywhere
from kinds import KINDS, VOCAB, Kind, llama, lora, tied
from kinds_cases import Made
from safetensors.torch import load_file, save_file
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LayoutLMv3Config,
    LayoutLMv3ForTokenClassification,
    LayoutLMv3Model,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

import streamer
from streamer.plan.plan import make_plan

LAYER = "base_model.model.model.layers"


def make(kind: str | Kind, home: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    if isinstance(kind, Kind):
        monkeypatch.setitem(KINDS, "made here", kind)
    return kinds_cases.make(kind if isinstance(kind, str) else "made here", torch.float32, home)


def without(adapter: Path, gone: Callable[[str], bool]) -> None:
    """Take tensors out of an adapter's file: at least one."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        names = [name for name in tensors if gone(name)]
        assert names
        for name in names:
            del tensors[name]

    edit_adapter(adapter, change)


SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
}


def roberta() -> RobertaModel:
    return RobertaModel(RobertaConfig(**SMALL))


def roberta_classifier(base: Path, dtype: torch.dtype) -> RobertaForSequenceClassification:
    return RobertaForSequenceClassification.from_pretrained(base, dtype=dtype, num_labels=3)


REFUSED: dict[str, tuple[str | Kind, Callable[[str], bool], Sequence[str]]] = {
    "a saved head": ("modules_to_save", lambda n: "lm_head" in n, ["'lm_head.weight' of 'lm_head' in modules_to_save"]),
    "part of a saved layer": ("modules_to_save", lambda n: n == f"{LAYER}.1.mlp.up_proj.weight",
                              ["'model.layers.1.mlp.up_proj.weight' of 'layers.1.mlp' in modules_to_save"]),
    "all that was saved": ("modules_to_save", lambda n: "lora" not in n, ["'lm_head.weight' of", "and 2 more of 'layers.1.mlp' in"]),
    "a new head": ("modules_to_save, new", lambda n: "score" in n, ["'score.weight' of 'score' in modules_to_save"]),
    "a new head's bias": ("headless, new head", lambda n: "classifier" in n, ["'classifier.bias' and 1 more of 'classifier' in"]),
    "the last layer of a new head": (Kind(roberta, lora("query", task_type="SEQ_CLS"), load=roberta_classifier),
                                     lambda n: "classifier.out_proj" in n, ["'classifier.out_proj.bias' and 1 more of 'classifier' in"]),
    "part of a new head": ("headless, new head", lambda n: "classifier.bias" in n, ["'classifier.bias' of 'classifier' in modules_to"]),
    "a layer of a new head": (Kind(roberta, lora("query", task_type="SEQ_CLS"), load=roberta_classifier), lambda n: "classifier.dense" in n,
                              ["'classifier.dense.bias' and 1 more of 'classifier' in modules_to_save"]),
    "beside a head that is tied": (Kind(tied, lora("q_proj", modules_to_save=["embed_tokens", "lm_head"])), lambda n: "lm_head" in n,
                                   ["'lm_head.weight' of 'lm_head' in modules_to_save"]),
    "of another method": (Kind(llama(), lambda: peft.LoHaConfig(target_modules=["q_proj"], modules_to_save=["norm"])),
                          lambda n: ".norm." in n, ["'model.norm.weight' of 'norm' in modules_to_save"]),
    "tokens": ("trainable tokens", lambda n: "token" in n, ["the rows of 'the embedding' in trainable_token_indices"]),
    "tokens by name": ("trainable tokens by name", lambda n: "trainable_tokens" in n,
                       ["the rows of 'embed_tokens' in trainable_token_indices"]),
    "tokens of one of two": (Kind(llama(), lora("q_proj", trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [1, 3]})),
                             lambda n: "lm_head" in n, ["the rows of 'lm_head' in trainable_token_indices"]),
    "a bias of LoRA": ("lora_bias", lambda n: n == f"{LAYER}.0.self_attn.q_proj.lora_B.bias",
                       ["'model.layers.0.self_attn.q_proj.lora_B.bias' of lora_bias"]),
    "all biases of LoRA": ("conv2d, lora_bias", lambda n: n.endswith("lora_B.bias"), ["'pointwise.lora_B.bias' and 1 more of lora_bias"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_only_the_adapter_has_is_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, gone, words = REFUSED[case]
    made = make(kind, tmp_path, monkeypatch)
    assert make_plan(made.base, made.adapter).announced == ()
    without(made.adapter, gone)
    refuse_everywhere(
        made.base,
        made.adapter,
        tmp_path,
        3,
        "lacks tensors that adapter_config.json announces: ",
        *words,
    )


@pytest.mark.filterwarnings(
    "ignore:.lora_bias=True. was passed", "ignore:Found missing adapter keys"
)
def test_biases_of_lora_are_those_of_layers_that_have_one(tmp_path: Path) -> None:
    """As mergekit extracts them: PEFT takes the others as zero."""
    base = tmp_path / "base"
    adapter = tmp_path / "adapter"
    ids = torch.arange(12)[None]
    cls = make_base("qwen2", base)
    make_adapter(cls, base, adapter, ["q_proj", "o_proj"], lora_bias=True)
    without(adapter, lambda n: n.endswith("o_proj.lora_B.bias"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
    streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, tmp_path / "out", mitigation_lambda=1
    )
    expected = peft.PeftModel.from_pretrained(cls.from_pretrained(base), adapter).eval()(ids).logits
    torch.testing.assert_close(
        cls.from_pretrained(tmp_path / "out").eval()(ids).logits, expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("labels", [3, 12])
def test_a_head_of_either_form_is_whole(labels: int, tmp_path: Path) -> None:
    """By the number of labels it is one layer or two."""
    config = LayoutLMv3Config(
        **SMALL, coordinate_size=8, shape_size=8, input_size=32, max_2d_position_embeddings=16
    )
    LayoutLMv3Model(config).save_pretrained(tmp_path / "base")
    tuned = LayoutLMv3ForTokenClassification.from_pretrained(tmp_path / "base", num_labels=labels)
    peft.get_peft_model(tuned, lora("query", task_type="TOKEN_CLS")()).save_pretrained(
        tmp_path / "adapter"
    )
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("classifier.dense" in name for name in names) == (labels > 10)
    assert make_plan(tmp_path / "base", tmp_path / "adapter").announced == ()


# Saved by PEFT with fewer tensors, or more entries, than a naive reading of the config expects.
WHOLE = {
    "tied tokens, saved once": Kind(
        tied, lora("q_proj", trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [3, 5]})
    ),
    "saved as one": Kind(
        tied, lora("q_proj", modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    ),
    "an entry of no module": Kind(
        llama(), lora("q_proj", modules_to_save=["lm_head", "score", "no_such_module"])
    ),
    "embeddings and a bias": Kind(llama(), lora("embed_tokens", "q_proj", bias="all")),
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_peft_saves_is_whole(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(WHOLE[case], tmp_path, monkeypatch)
    assert make_plan(made.base, made.adapter).announced == ()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_missing_biases_are_warned_of(
    bias: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT before 0.21 saved none for ``lora_only``."""
    made = make(f"bias={bias}", tmp_path, monkeypatch)
    for gone, left in (
        (lambda n: n.endswith("layers.1.self_attn.q_proj.base_layer.bias"), -1),
        (lambda n: n.endswith(".bias"), 0),
    ):
        without(made.adapter, gone)
        plan = make_plan(made.base, made.adapter)
        (note,) = plan.announced
        count = {"all": 14, "lora_only": 4}[bias]
        words = f"the adapter's bias is '{bias}', but its file has {left % count} of {count} biases: the base's values are kept"
        assert note == words
        assert note in plan.warnings


@pytest.mark.parametrize(
    "edit",
    [{"target_modules": ["q_proj"]}, {"exclude_modules": ["v_proj"]}, {"layers_to_transform": [1]}],
)
def test_factors_that_the_config_does_not_target(
    edit: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(
        Kind(llama(), lora("q_proj", "v_proj", layers_to_transform=[0])), tmp_path, monkeypatch
    )
    assert make_plan(made.base, made.adapter).announced == ()
    config = made.adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **edit}))
    (note,) = make_plan(made.base, made.adapter).announced
    assert note.startswith("PEFT ignores the factors of ")
    assert "'model.layers.0.self_attn.v_proj', which" in note
    assert (".q_proj" in note) == ("layers_to_transform" in edit)


# Of a layer for multi-token prediction, which the class does not load.
DROPPED = {
    "embed_tokens.weight": (VOCAB, 48),
    "shared_head.head.weight": (VOCAB, 48),
    "input_layernorm.weight": (48,),
    "self_attn.q_proj.weight": (48, 48),
    "self_attn.q_proj.bias": (48,),
}


def glm() -> Glm4MoeForCausalLM:
    return Glm4MoeForCausalLM(
        Glm4MoeConfig(
            vocab_size=VOCAB,
            hidden_size=48,
            intermediate_size=80,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            n_routed_experts=4,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            attention_bias=True,
            pad_token_id=0,
        )
    )


def with_dropped_layer(saved: Sequence[str], home: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    made = make(
        Kind(glm, lora("o_proj", bias="all", modules_to_save=list(saved))), home, monkeypatch
    )
    file = made.base / "model.safetensors"
    extra = {f"model.layers.2.{name}": torch.ones(shape) for name, shape in DROPPED.items()}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    return made


def test_tensors_that_the_class_does_not_load_are_not_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = [
        "embed_tokens",
        "lm_head",
        "head",
        "input_layernorm",
        "layers.2.input_layernorm",
        "layers.2.embed_tokens",
    ]
    made = with_dropped_layer(saved, tmp_path, monkeypatch)
    assert make_plan(made.base, made.adapter).announced == ()
    kinds_cases.compare_merge(made, tmp_path / "merged")
    without(made.adapter, lambda n: "embed_tokens" in n)
    refuse_everywhere(
        made.base,
        made.adapter,
        tmp_path,
        3,
        "'model.embed_tokens.weight' of 'embed_tokens' in modules_to_save; save",
    )
