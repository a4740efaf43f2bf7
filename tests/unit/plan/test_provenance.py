"""An adapter trained on a quantized base and used with another, or the reverse: it is said, on stderr and in JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import streamer
from streamer.cli.main import run
from streamer.plan.provenance import mitigated_before, named_encoding, provenance_notes, stored_encoding
from streamer.weights.model_config import ModelConfig


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", "bitsandbytes"),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "bitsandbytes"),
        ("TheBloke/Llama-2-7B-GPTQ", "gptq"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "gptq"),
        ("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4", "awq"),
        ("casperhansen/mistral-7b-awq", "awq"),
        ("neuralmagic/Meta-Llama-3-8B-Instruct-FP8", "fp8"),
        ("nvidia/Llama-3.1-8B-Instruct-NVFP4", "nvfp4"),
        ("unsloth/gpt-oss-20b-mxfp4", "mxfp4"),
        ("RedHatAI/Llama-3.2-1B-Instruct-quantized.w8a8", "integers of few bits"),
        ("C:\\models\\llama-nf4", "bitsandbytes"),
        ("meta-llama/Llama-3.1-8B", ""),
        ("my-fp8-runs/llama", ""),
        ("Qwen/Qwen2.5-14B", ""),
        ("org/habitbit", ""),
    ],
)
def test_what_a_name_says(name: str, encoding: str) -> None:
    assert named_encoding(name) == encoding


def test_what_a_config_says() -> None:
    assert stored_encoding(ModelConfig({"quantization_config": {"quant_method": "fp8"}})) == "fp8"
    assert stored_encoding(ModelConfig({"text_config": {"quantization_config": {"quant_method": "awq"}}})) == "awq"
    assert stored_encoding(ModelConfig({"quantization_config": {}})) == ""
    assert stored_encoding(ModelConfig({"quantization_config": {"bits": 4}})) == "quantization of an unnamed kind"
    assert stored_encoding(ModelConfig({})) == ""


FP8 = {"quantization_config": {"quant_method": "fp8"}}


@pytest.mark.parametrize(
    ("trained_on", "config", "base", "says"),
    [
        ("org/m-bnb-4bit", {}, "m", "was trained on 'org/m-bnb-4bit', a quantized model by its name (bitsandbytes); used here"),
        ("org/m", FP8, "m-FP8", "was trained on 'org/m', by its name not quantized; used here is a base in fp8"),
        ("org/m", {}, "m", None),
        ("org/m-FP8", FP8, "copy", None),
        ("deepseek-ai/DeepSeek-V3", FP8, "DeepSeek-V3", None),  # as it was published
        (None, FP8, "m", None),
        (7, FP8, "m", None),
    ],
)  # fmt: skip
def test_what_is_said(trained_on: object, config: dict[str, object], base: str, says: str | None) -> None:
    notes = provenance_notes(trained_on, ModelConfig(config), base)
    assert len(notes) == (says is not None)
    assert says is None or says in notes[0]


def test_it_is_said_on_stderr_and_in_json(
    job: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = job
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "unsloth/tiny-bnb-4bit"}))
    assert run(["inspect", str(base), str(adapter), "--json"]) == 0
    shown = capsys.readouterr()
    (note,) = json.loads(shown.out)["warnings"]
    assert note.startswith("the adapter was trained on 'unsloth/tiny-bnb-4bit', a quantized model")
    assert f"streamer: warning: {note}" in shown.err
    with pytest.warns(streamer.StreamerWarning, match="a quantized model by its name"):
        record = streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "out", mitigation_lambda=1.0)
    assert record["warnings"] == [note]


def test_an_adapter_that_is_mitigated_already_is_told(job: tuple[Path, Path], tmp_path: Path) -> None:
    """Mitigating and then merging the result is what one would try first, and scales intruders twice."""
    base, adapter = job
    says = (
        "the adapter is mitigated already, by `streamer mitigate` from 'adapter', with lambda 0.5 and method project: lambda 1 takes it as "
        "it is, any other comes on top"
    )
    once = tmp_path / "once"
    first = streamer.reduce_intruder_dimension(base, adapter, once, mitigation_lambda=0.5, method="project")
    assert first["warnings"] == []
    with pytest.warns(streamer.StreamerWarning, match="mitigated already"):
        record = streamer.merge_with_reduced_intruder_dimensions(base, once, tmp_path / "twice")
    assert record["warnings"] == [says]
    assert says in (tmp_path / "twice" / "README.md").read_text()
    assert (
        streamer.merge_with_reduced_intruder_dimensions(base, once, tmp_path / "as it is", mitigation_lambda=1)[
            "warnings"
        ]
        == []
    )
    assert streamer.detect_intruder_dimensions(base, once).intruders >= 0  # finding them is no scaling
    same = tmp_path / "same"
    streamer.reduce_intruder_dimension(base, adapter, same, mitigation_lambda=1)
    assert streamer.merge_with_reduced_intruder_dimensions(base, same, tmp_path / "merged")["warnings"] == []


@pytest.mark.parametrize(
    "stamp", ["", "{", "[]", "1", '{"command": "mitigate"}', '{"command": "mitigate", "lambda": 0.5, "adapter": 3}']
)
def test_a_stamp_of_another_program_says_nothing(stamp: str) -> None:
    assert mitigated_before({"streamer": stamp}) == []
    assert mitigated_before({}) == []
