"""Merged models with saved heads: the auto class of the task loads them without an argument, and they answer as PEFT's do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import minilm
import pytest
import torch
import transformers
from forks import server
from paths import TOOLS
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from seeds import vary
from transformers import AutoConfig

from streamer.plan.architectures import packaged
from streamer.plan.carried_tensors import AUTO_CLASSES, auto_class, implied_head
from streamer.weights.model_config import ModelConfig

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 64,
}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 60,
    "n_positions": 64,
    "pad_token_id": 0,
}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 60}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 60,
    "decoder_start_token_id": 0,
}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 60, "max_position_embeddings": 64}  # fmt: skip
LLAMA = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
MODERN = {
    **SMALL,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


class Case(NamedTuple):
    """A base of a class, and an adapter of a task on it, with what it saves whole."""

    model_type: str
    config: dict[str, Any]
    base: str
    task: str
    targets: list[str]
    labels: int | None = None
    saved: list[str] | None = None


CASES = {
    "bert seq": Case("bert", SMALL, "AutoModelForPreTraining", "SEQ_CLS", ["query", "value"], 3),
    "bert seq on a bare base": Case("bert", SMALL, "AutoModel", "SEQ_CLS", ["query", "value"], 3),
    "bert seq on a classifier": Case("bert", SMALL, "AutoModelForSequenceClassification", "SEQ_CLS", ["query"], 5),
    "bert seq of two labels": Case("bert", SMALL, "AutoModelForPreTraining", "SEQ_CLS", ["query", "value"], 2),
    "bert regression": Case("bert", SMALL, "AutoModelForPreTraining", "SEQ_CLS", ["query", "value"], 1),
    "roberta seq": Case("roberta", SMALL, "AutoModelForMaskedLM", "SEQ_CLS", ["query", "value"], 4),
    "distilbert seq": Case("distilbert", DISTIL, "AutoModelForMaskedLM", "SEQ_CLS", ["q_lin", "v_lin"], 3,
                           ["pre_classifier", "classifier"]),
    "modernbert seq": Case("modernbert", MODERN, "AutoModelForMaskedLM", "SEQ_CLS", ["Wqkv", "Wo"], 3),
    "llama seq": Case("llama", LLAMA, "AutoModelForCausalLM", "SEQ_CLS", ["q_proj", "v_proj"], 3),
    "gpt2 seq": Case("gpt2", GPT2, "AutoModelForCausalLM", "SEQ_CLS", ["c_attn"], 3),
    "t5 seq": Case("t5", T5, "AutoModelForSeq2SeqLM", "SEQ_CLS", ["q", "v"], 3, ["classification_head"]),
    "bert token": Case("bert", SMALL, "AutoModelForMaskedLM", "TOKEN_CLS", ["query", "value"], 7),
    "llama token": Case("llama", LLAMA, "AutoModelForCausalLM", "TOKEN_CLS", ["q_proj"], 7),
    "distilbert token": Case("distilbert", DISTIL, "AutoModel", "TOKEN_CLS", ["q_lin"], 7),
    "roberta qa": Case("roberta", SMALL, "AutoModelForMaskedLM", "QUESTION_ANS", ["query", "value"]),
    "bert qa on a classifier": Case("bert", {**SMALL, "num_labels": 5}, "AutoModelForSequenceClassification", "QUESTION_ANS", ["query"]),
    "llama causal on a bare base": Case("llama", LLAMA, "AutoModel", "CAUSAL_LM", ["q_proj"], None, ["lm_head"]),
    "gpt2 causal, untied": Case("gpt2", GPT2, "AutoModelForCausalLM", "CAUSAL_LM", ["c_attn"], None, ["lm_head"]),
    "t5 seq2seq": Case("t5", T5, "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", ["q", "v"]),
    "bart seq2seq, untied": Case("bart", {**BART, "tie_word_embeddings": False}, "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM",
                                 ["q_proj", "v_proj"], None, ["lm_head"]),
    "bart seq": Case("bart", BART, "AutoModelForSeq2SeqLM", "SEQ_CLS", ["q_proj"], 3, ["classification_head"]),
    "deberta seq": Case("deberta-v2", SMALL, "AutoModelForMaskedLM", "SEQ_CLS", ["query_proj"], 3, ["pooler", "classifier"]),
    "electra seq": Case("electra", SMALL, "AutoModelForPreTraining", "SEQ_CLS", ["query"], 3),
    "bert features, bare": Case("bert", SMALL, "AutoModel", "FEATURE_EXTRACTION", ["query"], None, ["pooler"]),
}  # fmt: skip

# Of each task one that is like the others, and what differs in more than its names.
QUICK = {"bert seq on a classifier", "bert regression", "distilbert seq", "gpt2 seq", "t5 seq", "llama token", "roberta qa",
         "llama causal on a bare base", "gpt2 causal, untied", "t5 seq2seq", "bart seq2seq, untied", "bert features, bare"}  # fmt: skip


def answer(model: torch.nn.Module, task: str) -> torch.Tensor:
    """What a model says to a few tokens: its first outputs, side by side."""
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(vary(1)))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = ids[:, :4]
    if task == "SEQ_CLS" and model.config.model_type in ("t5", "bart"):
        inputs["input_ids"][:, -1] = model.config.eos_token_id
    with torch.no_grad():
        found = model.eval()(**inputs)
    names = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
    return torch.cat([found[name].flatten() for name in names if name in found])


def trained(model: torch.nn.Module, case: Case, directory: Path) -> PeftModel:
    """An adapter with all its tensors changed, saved by PEFT."""
    lora = LoraConfig(
        task_type=case.task,
        r=2,
        lora_alpha=4,
        target_modules=case.targets,
        modules_to_save=case.saved,
    )
    peft = get_peft_model(model, lora)
    g = torch.Generator().manual_seed(vary(2))
    for p in peft.parameters():
        if p.requires_grad:
            p.data = 0.2 * torch.randn(p.shape, generator=g)
    peft.save_pretrained(directory)
    return peft


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.long) for n in CASES]
)
def test_the_auto_class_loads_it_and_it_answers_as_pefts_does(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    torch.manual_seed(vary(0))
    config = AutoConfig.for_model(case.model_type, **case.config)
    getattr(transformers, case.base).from_config(config).save_pretrained(tmp_path / "base")
    auto = getattr(transformers, AUTO[case.task])
    labels = (
        {} if case.labels is None else {"num_labels": case.labels, "ignore_mismatched_sizes": True}
    )
    if case.task == "QUESTION_ANS":
        labels = {"num_labels": 2, "ignore_mismatched_sizes": True}
    peft = trained(auto.from_pretrained(tmp_path / "base", **labels), case, tmp_path / "adapter")
    expected = answer(peft.merge_and_unload(), case.task)

    done = server().run(
        "merge",
        tmp_path / "base",
        tmp_path / "adapter",
        "-o",
        tmp_path / "out",
        "--lambda",
        1,
        "--json",
    )
    assert done.code == 0, done.err
    record = json.loads(done.out)
    model, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    torch.testing.assert_close(answer(model, case.task), expected, rtol=1e-4, atol=1e-5)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == [auto_class(case.model_type, case.task)]
    assert case.labels in (None, model.config.num_labels)
    assert record["advice"] == []


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_pretrained_base(tmp_path: Path) -> None:
    """MiniLM's names have no prefix, and its config no labels."""
    auto = transformers.AutoModelForSequenceClassification
    case = Case("bert", {}, "", "SEQ_CLS", ["query", "value"], 8)
    peft = trained(auto.from_pretrained(minilm.BASE, num_labels=8), case, tmp_path / "adapter")
    batch = minilm.tokens(minilm.SENTENCES[::50])
    with torch.no_grad():
        expected = peft.merge_and_unload().eval()(**batch).logits
    done = server().run(
        "merge", minilm.BASE, tmp_path / "adapter", "-o", tmp_path / "out", "--lambda", 1, "--quiet"
    )
    assert done.code == 0, done.err
    with torch.no_grad():
        found = auto.from_pretrained(tmp_path / "out").eval()(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        loaded("a")["input_ids"]
        == transformers.AutoTokenizer.from_pretrained(minilm.BASE)("a")["input_ids"]
    )


def test_a_head_that_nobody_has_is_not_promised(tmp_path: Path) -> None:
    """A causal adapter on a classifier: its class would be loaded with an lm_head of random values."""
    torch.manual_seed(vary(0))
    case = Case(
        "llama",
        {**LLAMA, "num_labels": 3},
        "AutoModelForSequenceClassification",
        "CAUSAL_LM",
        ["q_proj"],
    )
    config = AutoConfig.for_model(case.model_type, **case.config)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(
        tmp_path / "base"
    )
    auto = transformers.AutoModelForCausalLM
    trained(auto.from_pretrained(tmp_path / "base"), case, tmp_path / "adapter")
    done = server().run(
        "merge",
        tmp_path / "base",
        tmp_path / "adapter",
        "-o",
        tmp_path / "out",
        "--lambda",
        1,
        "--json",
    )
    assert done.code == 0, done.err
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"]
    (line,) = json.loads(done.out)["advice"]
    assert line.startswith(
        "the adapter is for CAUSAL_LM, but neither it nor the base has the head of LlamaForCausalLM, which"
    )
    assert len(line) <= 300


@pytest.mark.parametrize(
    ("model_type", "task", "more", "names", "is_there"),
    [
        ("llama", "CAUSAL_LM", {}, ("embed_tokens.weight",), False),
        ("llama", "CAUSAL_LM", {"tie_word_embeddings": True}, ("embed_tokens.weight",), True),
        ("llama", "CAUSAL_LM", {}, ("model.embed_tokens.weight", "lm_head.weight"), True),
        ("gpt2", "CAUSAL_LM", {}, ("wte.weight",), True),
        ("gpt2", "CAUSAL_LM", {"tie_word_embeddings": False}, ("wte.weight",), False),
        ("bart", "SEQ_2_SEQ_LM", {}, ("shared.weight",), True),
        ("t5", "SEQ_2_SEQ_LM", {}, ("shared.weight",), True),
        # Of BERT's head a tie makes the last layer only.
        ("bert", "CAUSAL_LM", {}, ("embeddings.word_embeddings.weight",), False),
        ("bert", "CAUSAL_LM", {}, ("cls.predictions.transform.dense.weight",), True),
    ],
)
def test_a_tie_makes_a_head(
    model_type: str, task: str, more: dict, names: tuple, is_there: bool
) -> None:
    bare = auto_class(model_type, "FEATURE_EXTRACTION")
    head = implied_head(
        ModelConfig({"model_type": model_type, "architectures": [bare], **more}), task, {}, names
    )
    assert head.config.values["architectures"] == [
        auto_class(model_type, task) if is_there else bare
    ]
    assert len(head.advice) == (not is_there)


BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
CLASSIFIER = ("bert.pooler.dense.weight", "classifier.weight")


@pytest.mark.parametrize(
    ("config", "task", "saved", "words"),
    [
        (
            BERT,
            None,
            {"classifier.weight": (3, 8)},
            "no class for 'bert' and the task None is known: load the model with the",
        ),
        (
            {**BERT, "model_type": "its own"},
            "SEQ_CLS",
            {"classifier.weight": (3, 8)},
            "no class for 'its own' and the task SEQ_CLS is",
        ),
        (
            BERT,
            "SEQ_CLS",
            {"my_head.weight": (3, 8)},
            "neither it nor the base has a known head: load the model with the class and the",
        ),
        (
            BERT,
            "TOKEN_CLS",
            {},
            "neither it nor the base has a known head: load the model with the class and the num_labels of its",
        ),
        (
            {},
            "SEQ_CLS",
            {"classifier.weight": (3, 8)},
            "the base has no config.json: load the model with a config of num_labels=3",
        ),
    ],
)
def test_what_cannot_be_known_is_said(
    config: dict, task: str | None, saved: dict, words: str
) -> None:
    head = implied_head(ModelConfig(config), task, saved, [*saved])
    (line,) = head.advice
    assert words in line


@pytest.mark.parametrize(
    ("config", "task", "saved", "names", "changed"),
    [
        (
            {**BERT, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}},
            "SEQ_CLS",
            {"classifier.weight": (2, 8)},
            CLASSIFIER,
            {"architectures": ["BertForSequenceClassification"]},
        ),
        (
            {
                "model_type": "bert",
                "architectures": ["BertForSequenceClassification"],
                "id2label": {"0": "a"},
                "num_labels": 1,
                "problem_type": "regression",
            },
            "SEQ_CLS",
            {"classifier.weight": (2, 8)},
            CLASSIFIER,
            {
                "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
                "label2id": {"LABEL_0": 0, "LABEL_1": 1},
            },
        ),
        # What is meant for several inputs is a class of its own, whatever the adapter's task.
        (
            {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]},
            "CAUSAL_LM",
            {},
            (),
            {},
        ),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "CAUSAL_LM",
            {"lm_head.weight": (9, 8)},
            (),
            {},
        ),
        (
            {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
            "FEATURE_EXTRACTION",
            {},
            ("lm_head.weight",),
            {},
        ),
    ],
)
def test_what_a_config_says(
    config: dict, task: str, saved: dict, names: tuple, changed: dict
) -> None:
    head = implied_head(ModelConfig(config), task, saved, names)
    gone = {"num_labels", "problem_type"} if "id2label" in changed else set()
    assert head.config.values == {k: v for k, v in config.items() if k not in gone} | changed
    assert head.advice == ()


def test_names_of_labels_that_stay_are_said() -> None:
    """As many labels are not the same labels: the adapter may have been trained for another task."""
    config = {**BERT, "id2label": {"0": "NEGATIVE", "1": "POSITIVE"}}
    head = implied_head(ModelConfig(config), "SEQ_CLS", {"classifier.weight": (2, 8)}, CLASSIFIER)
    assert head.config.values["id2label"] == config["id2label"]
    (line,) = head.advice
    assert line.startswith(
        "config.json keeps the base's names of labels, because there are as many as rows in the saved head"
    )
    # Not retrained, the base's head has the base's names.
    assert implied_head(ModelConfig(config), "SEQ_CLS", {}, CLASSIFIER).advice == ()


def test_every_task_of_peft_is_known() -> None:
    assert (
        {task.value for task in TaskType} == packaged(AUTO_CLASSES)["tasks"].keys() == AUTO.keys()
    )


@pytest.mark.long
def test_the_classes_are_the_installed_version_s() -> None:
    if f"transformers {transformers.__version__} " not in packaged(AUTO_CLASSES)["source"]:
        pytest.skip(
            f"the table is of {packaged(AUTO_CLASSES)['source']}; tools/make_auto_classes.py renews it"
        )
    tool = TOOLS / "make_auto_classes.py"
    assert subprocess.run([sys.executable, tool, "--check"], check=False).returncode == 0
