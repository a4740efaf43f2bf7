"""A sample of the generated matrix: every part, kind of adapter and layout; `matrix.py` runs the whole."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matrix
import pytest
import zoo
from matrix_cases import (
    KINDS,
    LAYOUTS,
    PARTS,
    RIGHT,
    Case,
    Made,
    adapted,
    case_of,
    cases_of,
    compare,
    decisions,
    judge,
    made_by,
    make,
    merged_state,
)
from safetensors.torch import load_file, save_file

import streamer

SAMPLE = [
    "BartForConditionalGeneration/head/lora/default/file/current", "BertForMaskedLM/all-linear/saved/tied/file/current",
    "BertForMaskedLM/attention/biases/untied/shards/legacy", "BloomForCausalLM/mlp/tokens/tied/file/current",
    "CTRLLMHeadModel/head/biases/untied/shards/current", "CanaryForConditionalGeneration/all-linear/grown/untied/shards/current",
    "DeepseekV3ForCausalLM/all-linear/lora/untied/file/current", "DeepseekV3ForCausalLM/experts/tuned/untied/shards/current",
    "DeepseekV3ForCausalLM/mlp/grown/tied/file/headed",
    "DistilBertForMaskedLM/head/dora/tied/file/bare", "EncoderDecoderModel/attention/tuned/default/file/legacy",
    "EncoderDecoderModel/mlp/saved/default/file/legacy/flag", "FalconMambaForCausalLM/embedding/biases/tied/file/headed",
    "FalconMambaForCausalLM/embedding/lora/tied/file/legacy", "GPT2LMHeadModel/all-linear/dora/default/file/current",
    "GPT2LMHeadModel/embedding/tuned/tied/file/current", "GPTNeoXForCausalLM/mlp/dora/tied/file/headed",
    "Gemma2ForCausalLM/head/tuned/tied/file/bare", "Gemma3ForConditionalGeneration/all-linear/grown/tied/file/current",
    "Glm4MoeForCausalLM/all-linear/lora/untied/file/current", "Glm4MoeForCausalLM/mlp/tuned/tied/file/runtime",
    "GlmForSequenceClassification/attention/biases/default/shards/headless",
    "GptOssForCausalLM/all-linear/tuned/untied/file/current",
    "GraniteMoeHybridForCausalLM/experts/biases/default/file/current",
    "Kimi_K25ForConditionalGeneration/experts/tokens/tied/shards/current", "LlamaForCausalLM/head/dora/tied/shards/bare",
    "LlamaForSequenceClassification/attention/grown/default/file/headless",
    "LlavaForConditionalGeneration/all-linear/tuned/default/shards/current",
    "LlavaForConditionalGeneration/head/grown/tied/file/current", "MambaForCausalLM/embedding/grown/tied/shards/headed",
    "MambaForCausalLM/head/biases/untied/file/current", "MarianMTModel/mlp/biases/tied/file/headed",
    "MiMoV2FlashForCausalLM/all-linear/lora/default/file/legacy/flag", "MixtralForCausalLM/embedding/tuned/tied/shards/current",
    "ModernBertForMaskedLM/attention/lora/untied/file/unnamed", "ModernBertForMaskedLM/head/saved/tied/file/current",
    "MoonshineForConditionalGeneration/head/saved/default/file/current",
    "MvpForSequenceClassification/embedding/tokens/default/file/current", "OlmoeForCausalLM/experts/saved/default/file/headed",
    "OpenAIGPTLMHeadModel/attention/grown/untied/shards/unnamed", "OpenAIGPTLMHeadModel/head/biases/untied/file/current",
    "PaliGemmaForConditionalGeneration/attention/tokens/tied/shards/legacy",
    "PaliGemmaForConditionalGeneration/head/saved/tied/file/current", "Phi3ForCausalLM/attention/lora/default/file/legacy/flag",
    "Phi3ForCausalLM/embedding/tokens/tied/file/current", "Qwen2ForCausalLM/attention/dora/tied/file/unnamed",
    "Qwen2ForCausalLM/embedding/grown/untied/file/current", "Qwen2ForSequenceClassification/mlp/dora/default/file/headless",
    "Qwen2VLForConditionalGeneration/head/biases/tied/shards/current",
    "Qwen2_5_VLForConditionalGeneration/attention/tokens/untied/file/unnamed",
    "Qwen2_5_VLForConditionalGeneration/embedding/dora/tied/file/current", "Qwen3MoeForCausalLM/attention/tuned/untied/shards/current",
    "Qwen3MoeForCausalLM/experts/lora/tied/file/headed", "RobertaForMaskedLM/all-linear/biases/untied/file/current",
    "RobertaForMaskedLM/embedding/dora/untied/file/current", "SpeechT5ForSpeechToText/embedding/dora/default/file/current",
    "T5ForConditionalGeneration/mlp/tuned/default/file/unnamed", "TrOCRForCausalLM/attention/biases/default/file/current",
    "Wav2Vec2ForCTC/attention/biases/default/shards/current", "WhisperForConditionalGeneration/head/tokens/tied/file/bare",
    "XLMWithLMHeadModel/embedding/saved/untied/file/current", "XLNetLMHeadModel/head/grown/untied/file/current",
    "XLNetLMHeadModel/mlp/lora/default/file/current",
]  # fmt: skip

# Case → what of it is not compared, as transformers or PEFT cannot.
NOT_COMPARED = {
    "CanaryForConditionalGeneration/all-linear/grown/untied/shards/current": "names on disk: transformers, saving"
}

# Case → what is refused, in the words of the refusal.
REFUSALS = {
    "T5ForConditionalGeneration/embedding/lora/untied/file/current": "whatever its config says",
    "ApertusForCausalLM/head/grown/untied/file/current": "saved without one of the embeddings",
    "GteForMaskedLM/attention/lora/default/file/current": "has no tensor in the base",
    "DeepseekV4ForCausalLM/all-linear/grown/tied/shards/legacy": "tid2eid' has a value for each of 72 tokens",
    "LayoutLMForMaskedLM/embedding/grown/untied/shards/current": "bias' has a value for each of 72 tokens",
    "DoryForCausalLM/attention/grown/tied/file/current": "'lm_head.logit_scale' has a value for each of 72 tokens",
    "MvpForConditionalGeneration/mlp/grown/tied/file/current": "'final_logits_bias' has a value for each of 72 tokens",
    "PI0ForConditionalGeneration/mlp/grown/default/file/current": "saved without one of the embeddings",
    "T5ForSequenceClassification/mlp/tokens/default/file/current": r"changes .* separately, which .*; .*\(trainable_token_indices\)",
}


@pytest.mark.long
@pytest.mark.parametrize("name", SAMPLE)
def test_case_is_right(name: str, tmp_path: Path) -> None:
    result = judge(case_of(name), tmp_path)
    assert result.status == RIGHT, result.said
    assert result.said.startswith(NOT_COMPARED[name]) if name in NOT_COMPARED else not result.said


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


def test_cases_of_a_class_have_each_part_and_kind() -> None:
    model = zoo.build("Qwen3MoeForCausalLM")
    for number in range(14):
        cases = cases_of("Qwen3MoeForCausalLM", number, "causal", model)
        assert {c.part for c in cases} == set(PARTS) - {"mlp"}  # it has experts in its place
        assert {c.kind for c in cases} == set(KINDS) - {"biases"}
        assert cases == cases_of("Qwen3MoeForCausalLM", number, "causal", model)


def merged(name: str, directory: Path, **options: Any) -> tuple[Case, Made, Any, Path]:
    """A case, what is made for it, its findings and its merged directory."""
    case = case_of(name)
    out = directory / "out"
    made = make(case, directory, 0)
    findings = streamer.detect_intruder_dimensions(made.base, made.adapter)
    options = {"findings": findings, "mitigation_lambda": 1.0, "model_card": False} | options
    streamer.merge_with_reduced_intruder_dimensions(made.base, made.adapter, out, **options)
    return case, made, findings, out


def test_the_oracle_finds_a_changed_tensor(tmp_path: Path) -> None:
    """A merge of half the delta is wrong by its logits and by its tensors."""
    name = "LlamaForCausalLM/attention/lora/untied/file/current"
    result = compare(*merged(name, tmp_path, findings=None, method="shrink", mitigation_lambda=0.5))
    assert result.status == "wrong"
    assert "logits: off by" in result.said
    assert "tensor model.layers.0.self_attn" in result.said


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("LlamaForCausalLM/embedding/tuned/tied/file/current", "model.embed_tokens.weight"),
        ("BertForMaskedLM/all-linear/biases/tied/file/current", "cls.predictions.bias"),
        ("LlamaForCausalLM/head/dora/tied/file/current", "lm_head.weight"),
    ],
)
def test_the_oracle_finds_a_changed_tensor_of_a_tie(name: str, tensor: str, tmp_path: Path) -> None:
    case, made, findings, out = merged(name, tmp_path)
    tensors = load_file(out / "model.safetensors")
    tensors[tensor] += 5e-4
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    result = compare(case, made, findings, out)
    assert result.status == "wrong"
    assert f"tensor {tensor}: off by 0.0005" in result.said


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("LlamaForCausalLM/attention/lora/untied/file/current", "model.layers.1.self_attn.v_proj"),
        (
            "DeepseekV3ForCausalLM/experts/tuned/untied/file/current",
            "model.layers.1.mlp.experts.2.down_proj",
        ),
        (
            "GptOssForCausalLM/experts/lora/untied/file/current",
            "model.layers.1.mlp.experts.down_proj[3]",
        ),
        (
            "GptOssForCausalLM/experts/tuned/untied/file/current",
            "model.layers.1.mlp.experts.down_proj[3]",
        ),
    ],
)
def test_the_oracle_finds_wrong_and_lacking_decisions(
    name: str, module: str, tmp_path: Path
) -> None:
    case, made, findings, _ = merged(name, tmp_path)
    expected, (after, _) = adapted(made), merged_state(case, made)
    assert after is not None
    assert decisions(made, findings, made.before, after, expected)[2] == []
    index = next(i for i, m in enumerate(findings) if m.module == module)
    m = findings[index]
    others = tuple(
        j for j in range(len(m.detection.singular_values)) if j not in m.detection.intruders
    )
    opposite = replace(m, detection=replace(m.detection, intruders=others))
    turned = replace(m, shape=m.shape[::-1])
    for faulty, said in (([opposite], "for ["), ([turned], "shape"), ([], "none of")):
        listed = [*findings[:index], *faulty, *findings[index + 1 :]]
        _, _, wrong = decisions(made, listed, made.before, after, expected)
        assert [module in text and said in text for text in wrong] == [True], wrong


def test_the_limit_of_a_case_is_no_failure_of_another_library() -> None:
    with pytest.raises(TimeoutError), made_by("PEFT"):
        raise TimeoutError


@pytest.mark.slow
def test_the_whole_matrix_has_nothing_wrong(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    command = [sys.executable, matrix.__file__, "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    right = [r for r in map(json.loads, results.read_text().splitlines()) if r["status"] == "right"]
    assert len({r["cls"] for r in right}) >= 150
    assert len(right) >= 2500
    assert sum(not r["said"] for r in right) >= 0.92 * len(
        right
    )  # compared in all ways: 2,681 of 2,864
