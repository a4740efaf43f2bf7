"""A sample of the generated matrix: every part, kind of adapter, layout and kind of fact of an architecture; `matrix.py` runs the whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import matrix
import pytest
import zoo
from matrix_cases import KINDS, LAYOUTS, PARTS, TAGS, case_of, cases_of, every_case_of, numbered_classes, tags
from matrix_inputs import make
from matrix_oracle import RIGHT, compare, judge

import streamer

SAMPLE = [
    "BartForConditionalGeneration/head/lora/default/file/current",
    "BertForMaskedLM/all-linear/saved/tied/file/current",
    "BertForMaskedLM/attention/biases/untied/shards/legacy",
    "BloomForCausalLM/mlp/tokens/tied/file/current",
    "CTRLLMHeadModel/head/biases/untied/shards/current",
    "CanaryForConditionalGeneration/all-linear/grown/untied/shards/current",
    "DeepseekV3ForCausalLM/experts/tuned/untied/shards/current",
    "DeepseekV3ForCausalLM/mlp/grown/tied/file/headed",
    "DistilBertForMaskedLM/head/dora/tied/file/bare",
    "EncoderDecoderModel/attention/tuned/default/file/legacy",
    "EncoderDecoderModel/mlp/saved/default/file/legacy/flag",
    "FalconMambaForCausalLM/embedding/biases/tied/file/headed",
    "FalconMambaForCausalLM/embedding/lora/tied/file/legacy",
    "GPT2LMHeadModel/all-linear/dora/default/file/current",
    "GPT2LMHeadModel/embedding/tuned/tied/file/current",
    "GPTNeoXForCausalLM/mlp/dora/tied/file/headed",
    "Gemma2ForCausalLM/head/tuned/tied/file/bare",
    "Gemma3ForConditionalGeneration/all-linear/grown/tied/file/current",
    "Glm4MoeForCausalLM/mlp/tuned/tied/file/runtime",
    "GlmForSequenceClassification/attention/biases/default/shards/headless",
    "GptOssForCausalLM/all-linear/tuned/untied/file/current",
    "GraniteMoeHybridForCausalLM/experts/biases/default/file/current",
    "Kimi_K25ForConditionalGeneration/experts/tokens/tied/shards/current",
    "LlamaForCausalLM/head/dora/tied/shards/bare",
    "LlamaForSequenceClassification/attention/grown/default/file/headless",
    "LlavaForConditionalGeneration/all-linear/tuned/default/shards/current",
    "LlavaForConditionalGeneration/head/grown/tied/file/current",
    "MambaForCausalLM/embedding/grown/tied/shards/headed",
    "MambaForCausalLM/head/biases/untied/file/current",
    "MarianMTModel/mlp/biases/tied/file/headed",
    "MiMoV2FlashForCausalLM/all-linear/lora/default/file/legacy/flag",
    "MixtralForCausalLM/embedding/tuned/tied/shards/current",
    "ModernBertForMaskedLM/attention/lora/untied/file/unnamed",
    "ModernBertForMaskedLM/head/saved/tied/file/current",
    "MoonshineForConditionalGeneration/head/saved/default/file/current",
    "OlmoeForCausalLM/experts/saved/default/file/headed",
    "OpenAIGPTLMHeadModel/attention/grown/untied/shards/unnamed",
    "OpenAIGPTLMHeadModel/head/biases/untied/file/current",
    "PaliGemmaForConditionalGeneration/attention/tokens/tied/shards/legacy",
    "PaliGemmaForConditionalGeneration/head/saved/tied/file/current",
    "Phi3ForCausalLM/attention/lora/default/file/legacy/flag",
    "Phi3ForCausalLM/embedding/tokens/tied/file/current",
    "Qwen2ForCausalLM/attention/dora/tied/file/unnamed",
    "Qwen2ForCausalLM/embedding/grown/untied/file/current",
    "Qwen2ForSequenceClassification/mlp/dora/default/file/headless",
    "Qwen2VLForConditionalGeneration/head/biases/tied/shards/current",
    "Qwen2_5_VLForConditionalGeneration/attention/tokens/untied/file/unnamed",
    "Qwen2_5_VLForConditionalGeneration/embedding/dora/tied/file/current",
    "Qwen3MoeForCausalLM/attention/tuned/untied/shards/current",
    "Qwen3MoeForCausalLM/experts/lora/tied/file/headed",
    "RobertaForMaskedLM/all-linear/biases/untied/file/current",
    "RobertaForMaskedLM/embedding/dora/untied/file/current",
    "SpeechT5ForSpeechToText/embedding/dora/default/file/current",
    "T5ForConditionalGeneration/mlp/tuned/default/file/unnamed",
    "TrOCRForCausalLM/attention/biases/default/file/current",
    "Wav2Vec2ForCTC/attention/biases/default/shards/current",
    "WhisperForConditionalGeneration/head/tokens/tied/file/bare",
    "XLMWithLMHeadModel/embedding/saved/untied/file/current",
    "XLNetLMHeadModel/head/grown/untied/file/current",
    "XLNetLMHeadModel/mlp/lora/default/file/current",
]

# Case → what is refused, in the words of the refusal.
REFUSALS = {
    "T5ForConditionalGeneration/embedding/lora/untied/file/current": "whatever its config says",
    "ApertusForCausalLM/head/grown/untied/file/current": "saved without one of the embeddings",
    "GteForMaskedLM/attention/lora/default/file/current": "Chunk 0.*not supported",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_case_is_right(name: str, tmp_path: Path) -> None:
    result = judge(case_of(name), tmp_path)
    assert (result.status, result.said) == (RIGHT, "")


@pytest.mark.parametrize("name", REFUSALS)
def test_case_is_refused(name: str, tmp_path: Path) -> None:
    result = judge(case_of(name), tmp_path)
    assert result.status == "refused"
    assert re.search(REFUSALS[name], result.said)


def test_the_sample_has_all_that_cases_are_made_of() -> None:
    sample = [case_of(name) for name in SAMPLE]
    assert {c.part for c in sample} == set(PARTS)
    assert {c.kind for c in sample} == set(KINDS)
    assert {c.layout for c in sample} == set(LAYOUTS)
    assert [c.name for c in sample] == SAMPLE
    models = {c.cls: zoo.build(c.cls) for c in sample}
    assert {tag for c in sample for tag in tags(c, models[c.cls])} == set(TAGS)


def test_cases_of_a_class_have_each_part_and_kind() -> None:
    model = zoo.build("Qwen3MoeForCausalLM")
    for number in range(14):
        cases = cases_of("Qwen3MoeForCausalLM", number, "causal", model)
        assert {c.part for c in cases} == set(PARTS) - {"mlp"}  # it has experts in its place
        assert {c.kind for c in cases} == set(KINDS) - {"biases"}
        assert cases == cases_of("Qwen3MoeForCausalLM", number, "causal", model)
    assert len(every_case_of("Qwen3MoeForCausalLM", "causal", model)) == 5 * 6 * 2


def test_the_oracle_finds_a_changed_tensor(tmp_path: Path) -> None:
    """A merge of half the delta is wrong by its logits and by its tensors."""
    case = case_of("LlamaForCausalLM/attention/lora/untied/file/current")
    made = make(case, tmp_path, 0)
    findings = streamer.detect_intruder_dimensions(made.base, made.adapter)
    streamer.merge_with_reduced_intruder_dimensions(
        made.base, made.adapter, tmp_path / "out", method="shrink", mitigation_lambda=0.5, model_card=False
    )
    result = compare(case, made, findings, tmp_path / "out")
    assert result.status == "wrong"
    assert "logits: off by" in result.said
    assert "tensor model.layers.0.self_attn" in result.said


@pytest.mark.slow
def test_the_whole_matrix_has_nothing_wrong() -> None:
    done = subprocess.run([sys.executable, matrix.__file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert len(numbered_classes()) > 500
