"""Fully fine-tuned models of many classes as LoRA adapters of full rank: PEFT opens them, and its model answers as the fine-tuned one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from peft import PeftModel
from seeds import vary

import streamer
from streamer.errors import UnsupportedError
from streamer.plan.architectures import architecture_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CLASSES = [
    "LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration", "BartForConditionalGeneration", "BertForSequenceClassification",
    "ElectraForCausalLM", "XLMWithLMHeadModel", "CTRLLMHeadModel", "GemmaForCausalLM", "BloomForCausalLM", "DeepseekV2ForCausalLM",
    "ChameleonForConditionalGeneration", "DebertaV2ForSequenceClassification",
]  # fmt: skip

OPTIONS: dict[str, dict[str, Any]] = {
    "DebertaV2ForSequenceClassification": {
        "relative_attention": True,
        "position_buckets": 16,
        "pos_att_type": ["c2p", "p2c"],
        "type_vocab_size": 2,
        "norm_rel_ebd": "layer_norm",
    },
    "DeepseekV2ForCausalLM": {"first_k_dense_replace": 2},  # no experts
}

REFUSED = {
    "MixtralForCausalLM": r"which loading turns into 'model\.layers\.0\.mlp\.experts\.gate_up_proj'",
    "Qwen3MoeForCausalLM": r"which loading turns into 'model\.layers\.\d\.mlp\.experts\.\w+'",
    "BertGenerationDecoder": r"'lm_head\.bias' has changed",
    "GraniteSpeech5ForCTC": "ties weights and has no input embedding: PEFT opens no adapter for it",
}


def pair(name: str, home: Path) -> None:
    """A random model and the same with every parameter changed."""
    cls = getattr(transformers, name)
    torch.manual_seed(vary(0))
    model = cls(zoo.tiny_config(cls.config_class, **OPTIONS.get(name, {})))
    for directory in ("base", "tuned"):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape))
        model.save_pretrained(home / directory)


@pytest.mark.long
@pytest.mark.parametrize("name", CLASSES)
def test_peft_s_model_answers_as_the_fine_tuned_one(name: str, tmp_path: Path) -> None:
    pair(name, tmp_path)
    cls = getattr(transformers, name)
    streamer.reduce_intruder_dimension(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", to_lora=300, mitigation_lambda=1.0
    )
    tuned = cls.from_pretrained(tmp_path / "tuned").eval()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    assert not [str(w.message) for w in said if "missing" in str(w.message)]
    inputs = zoo.example(tuned)
    torch.testing.assert_close(zoo.answer(model, inputs), zoo.answer(tuned, inputs), rtol=1e-3, atol=2e-4)

    record = json.loads((tmp_path / "lora" / "streamer.json").read_text())
    assert all(matrix["dropped"] < 1e-5 for matrix in record["matrices"])
    architecture = architecture_of(json.loads((tmp_path / "base" / "config.json").read_text()))
    assert architecture is not None
    tied = any(t.tied and t.name.endswith(".weight") for t in architecture.ties)
    assert tied == any("merge_and_unload adds the delta" in line for line in record["notes"])
    merged, wanted = model.merge_and_unload().state_dict(), tuned.state_dict()
    shared = {n for n, p in wanted.items() if sum(p.data_ptr() == q.data_ptr() for q in wanted.values()) > 1}
    for key, tensor in wanted.items():
        if key not in shared:
            torch.testing.assert_close(merged[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_in_an_adapter_is_refused(name: str, tmp_path: Path) -> None:
    pair(name, tmp_path)
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        streamer.reduce_intruder_dimension(
            tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", to_lora=4, mitigation_lambda=1.0
        )
    assert not (tmp_path / "lora").exists()
