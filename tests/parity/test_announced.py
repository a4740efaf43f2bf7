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
from kinds import KINDS, VOCAB, Kind, gpt2, llama, lora, tied
from kinds_cases import Made
from pairs import merge
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

from streamer.plan.plan import make_plan

LAYER = "base_model.model.model.layers"


Maker = Callable[[str | Kind], Made]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    def made(kind: str | Kind) -> Made:
        monkeypatch.setitem(KINDS, "made here", KINDS[kind] if isinstance(kind, str) else kind)
        return kinds_cases.make("made here", torch.float32, tmp_path)

    return made


def without(adapter: Path, gone: Callable[[str], bool]) -> None:
    """Take tensors out of an adapter's file: at least one."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        names = [name for name in tensors if gone(name)]
        assert names
        for name in names:
            del tensors[name]

    edit_adapter(adapter, change)


def announce(adapter: Path, **config: Any) -> None:
    values = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**values, **config}))


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
    "a saved head": ("modules_to_save", lambda n: "lm_head" in n, ["modules_to_save names 'lm_head', but 'lm_head.weight' is missing"]),
    "part of a saved layer": ("modules_to_save", lambda n: n == f"{LAYER}.1.mlp.up_proj.weight",
                              ["modules_to_save names 'layers.1.mlp', but 'model.layers.1.mlp.up_proj.weight' is missing"]),
    "all that was saved": ("modules_to_save", lambda n: "lora" not in n, ["'lm_head.weight' is missing; ", "and 2 more are missing"]),
    "a new head": ("modules_to_save, new", lambda n: "score" in n, ["modules_to_save names 'score', but 'score.weight' is missing"]),
    "a new head's bias": ("headless, new head", lambda n: "classifier" in n,
                          ["modules_to_save names 'classifier', but 'classifier.bias' and 1 more are missing"]),
    "part of a new head": ("headless, new head", lambda n: "classifier.bias" in n,
                           ["modules_to_save names 'classifier', but 'classifier.bias' is missing"]),
    "a layer of a new head": (Kind(roberta, lora("query", task_type="SEQ_CLS"), load=roberta_classifier), lambda n: "classifier.dense" in n,
                              ["but 'classifier.dense.bias' and 1 more are missing"]),
    "beside a head that is tied": (Kind(tied, lora("q_proj", modules_to_save=["embed_tokens", "lm_head"])), lambda n: "lm_head" in n,
                                   ["modules_to_save names 'lm_head', but 'lm_head.weight' is missing"]),
    "of another method": (Kind(llama(), lambda: peft.LoHaConfig(target_modules=["q_proj"], modules_to_save=["norm"])),
                          lambda n: ".norm." in n, ["modules_to_save names 'norm', but 'model.norm.weight' is missing"]),
    "tokens": ("trainable tokens", lambda n: "token" in n, ["the rows of its 3 trainable_token_indices are missing"]),
    "tokens by name": ("trainable tokens by name", lambda n: "trainable_tokens" in n,
                       ["trainable_token_indices names 'embed_tokens', but its rows are missing"]),
    "tokens of one of two": (Kind(llama(), lora("q_proj", trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [1, 3]})),
                             lambda n: "lm_head" in n, ["trainable_token_indices names 'lm_head', but its rows are missing"]),
    "a bias of LoRA": ("lora_bias", lambda n: n == f"{LAYER}.0.self_attn.q_proj.lora_B.bias",
                       ["lora_bias is true, but 'model.layers.0.self_attn.q_proj.lora_B.bias' is missing"]),
    "all biases of LoRA": ("conv2d, lora_bias", lambda n: n.endswith("lora_B.bias"),
                           ["lora_bias is true, but 'pointwise.lora_B.bias' and 1 more are missing"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_only_the_adapter_has_is_refused(case: str, tmp_path: Path, make: Maker) -> None:
    kind, gone, words = REFUSED[case]
    made = make(kind)
    assert make_plan(made.base, made.adapter).announced == ()
    without(made.adapter, gone)
    refuse_everywhere(
        made.base, made.adapter, tmp_path, 3, "lacks tensors that adapter_config.json announces: ", *words
    )


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed", "ignore:Found missing adapter keys")
def test_biases_of_lora_are_those_of_layers_that_have_one(tmp_path: Path) -> None:
    """As mergekit extracts them: PEFT takes the others as zero."""
    base, adapter, ids = tmp_path / "base", tmp_path / "adapter", torch.arange(12)[None]
    cls = make_base("qwen2", base)
    make_adapter(cls, base, adapter, ["q_proj", "o_proj"], lora_bias=True)
    without(adapter, lambda n: n.endswith("o_proj.lora_B.bias"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
    merge(base, adapter, tmp_path / "out", 1)
    expected = peft.PeftModel.from_pretrained(cls.from_pretrained(base), adapter).eval()(ids).logits
    torch.testing.assert_close(cls.from_pretrained(tmp_path / "out").eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("labels", [3, 12])
def test_a_head_of_either_form_is_whole(labels: int, tmp_path: Path) -> None:
    """By the number of labels it is one layer or two."""
    config = LayoutLMv3Config(**SMALL, coordinate_size=8, shape_size=8, input_size=32, max_2d_position_embeddings=16)
    LayoutLMv3Model(config).save_pretrained(tmp_path / "base")
    tuned = LayoutLMv3ForTokenClassification.from_pretrained(tmp_path / "base", num_labels=labels)
    peft.get_peft_model(tuned, lora("query", task_type="TOKEN_CLS")()).save_pretrained(tmp_path / "adapter")
    assert any("classifier.dense" in name for name in load_file(tmp_path / "adapter/adapter_model.safetensors")) == (
        labels > 10
    )
    assert make_plan(tmp_path / "base", tmp_path / "adapter").announced == ()


# Saved by PEFT with fewer tensors, or more entries, than a naive reading of the config expects.
WHOLE = {
    "tied tokens, saved once": Kind(tied, lora("q_proj", trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [3, 5]})),
    "saved as one": Kind(tied, lora("q_proj", modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True)),
    "an entry of no module": Kind(llama(), lora("q_proj", modules_to_save=["lm_head", "score", "no_such_module"])),
    "full paths": Kind(llama(), lora("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head")),
    "full paths, some excluded": Kind(llama(), lora("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj",
                                                    exclude_modules=["up_proj"])),
    "embeddings and a bias": Kind(llama(), lora("embed_tokens", "q_proj", bias="all")),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_what_peft_saves_is_whole(case: str, make: Maker) -> None:
    made = make(WHOLE[case])
    assert make_plan(made.base, made.adapter).announced == ()


def test_missing_biases_of_the_base_are_warned_of(make: Maker) -> None:
    made = make("bias=all")
    without(made.adapter, lambda n: n == f"{LAYER}.1.mlp.up_proj.base_layer.bias")
    (note,) = make_plan(made.base, made.adapter).announced
    assert (
        "lacks 1 of the base's 14 biases, 'model.layers.1.mlp.up_proj.bias' first: the base's values are kept" in note
    )
    without(made.adapter, lambda n: n.endswith(".bias"))
    plan = make_plan(made.base, made.adapter)
    assert "lacks 14 of the base's 14 biases, 'model.layers.0.mlp.down_proj.bias' first" in plan.announced[0]
    assert plan.announced[0] in plan.warnings


def test_missing_biases_of_adapted_modules_are_warned_of(make: Maker) -> None:
    """PEFT before 0.21 saved none of them."""
    made = make("bias=lora_only")
    assert make_plan(made.base, made.adapter).announced == ()
    without(made.adapter, lambda n: n.endswith("q_proj.base_layer.bias"))
    (note,) = make_plan(made.base, made.adapter).announced
    assert (
        "bias is 'lora_only', but its file lacks 2 of the base's 4 biases, 'model.layers.0.self_attn.q_proj.bias' first"
        in note
    )


def test_a_part_of_a_path_is_no_full_path_in_a_base_without_prefix(make: Maker) -> None:
    made = make(Kind(gpt2, lora("wte", "c_attn", fan_in_fan_out=True)))
    file = made.base / "model.safetensors"
    bare = {name.removeprefix("transformer."): values for name, values in load_file(file).items()}
    save_file(bare, file, metadata={"format": "pt"})
    assert make_plan(made.base, made.adapter).announced == ()


def test_a_missing_module_that_a_full_path_names_is_warned_of(make: Maker) -> None:
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"]
    made = make(Kind(llama(), lora(*paths)))
    without(made.adapter, lambda n: "lora" in n and "up_proj" in n)
    assert make_plan(made.base, made.adapter).announced == (
        "the adapter's target_modules names 'model.layers.1.mlp.up_proj', but its file has no factors of it: the base's values are kept",
    )
    without(made.adapter, lambda n: "lm_head" in n)
    (note,) = make_plan(made.base, made.adapter).announced
    assert "'lm_head'" in note
    assert "'model.layers.1.mlp.up_proj'" in note
    announce(made.adapter, exclude_modules=["lm_head", "up_proj"])
    assert make_plan(made.base, made.adapter).announced == ()


def test_a_full_path_is_a_target_in_every_layer(make: Maker) -> None:
    """PEFT compares layers_to_transform only with modules that it finds by the end of their names."""
    paths = ["model.layers.0.self_attn.q_proj", "v_proj", "lm_head"]
    made = make(Kind(llama(), lora(*paths, layers_to_transform=[1])))
    plan = make_plan(made.base, made.adapter)
    assert (len(plan.targets), plan.announced) == (3, ())


@pytest.mark.parametrize(
    "edit",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "model.layers.1.self_attn.v_proj"]},
        {"exclude_modules": ["v_proj"]},
        {"layers_to_transform": [1]},
    ],
)
def test_factors_that_the_config_does_not_target(edit: dict[str, list[Any]], make: Maker) -> None:
    made = make(Kind(llama(), lora("q_proj", "v_proj", layers_to_transform=[0])))
    assert make_plan(made.base, made.adapter).announced == ()
    announce(made.adapter, **edit)
    (note,) = make_plan(made.base, made.adapter).announced
    assert "'model.layers.0.self_attn.v_proj', but its config does not target" in note
    assert (".q_proj" in note) == ("layers_to_transform" in edit)


# Of a layer for multi-token prediction, which the class does not load.
DROPPED = {"embed_tokens.weight": (VOCAB, 48), "shared_head.head.weight": (VOCAB, 48), "input_layernorm.weight": (48,),
           "self_attn.q_proj.weight": (48, 48), "self_attn.q_proj.bias": (48,)}  # fmt: skip


def glm() -> Glm4MoeForCausalLM:
    return Glm4MoeForCausalLM(Glm4MoeConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=80, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1, attention_bias=True,
        pad_token_id=0,
    ))  # fmt: skip


def with_dropped_layer(saved: Sequence[str], make: Maker) -> Made:
    made = make(Kind(glm, lora("o_proj", bias="all", modules_to_save=list(saved))))
    file = made.base / "model.safetensors"
    extra = {f"model.layers.2.{name}": torch.ones(shape) for name, shape in DROPPED.items()}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    return made


def test_tensors_that_the_class_does_not_load_are_not_announced(tmp_path: Path, make: Maker) -> None:
    saved = ["embed_tokens", "lm_head", "head", "input_layernorm", "layers.2.input_layernorm", "layers.2.embed_tokens"]
    made = with_dropped_layer(saved, make)
    assert make_plan(made.base, made.adapter).announced == ()
    kinds_cases.compare_merge(made, tmp_path / "merged", kinds_cases.Figures())
    without(made.adapter, lambda n: "embed_tokens" in n)
    refuse_everywhere(made.base, made.adapter, tmp_path, 3,
                      "modules_to_save names 'embed_tokens', but 'model.embed_tokens.weight' is missing; save")  # fmt: skip


def test_biases_that_the_class_does_not_load_are_not_counted(tmp_path: Path, make: Maker) -> None:
    made = with_dropped_layer(["norm"], make)
    without(made.adapter, lambda n: n.endswith(".1.self_attn.q_proj.bias"))
    (note,) = make_plan(made.base, made.adapter).announced
    assert "lacks 1 of the base's 6 biases, 'model.layers.1.self_attn.q_proj.bias' first" in note
