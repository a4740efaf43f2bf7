"""An adapter trained on a quantized base and used with another, or the reverse: it is said, on stderr and in JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import streamer
from streamer.cli.main import run
from streamer.plan.provenance import (
    base_names,
    mitigated_before,
    named_encoding,
    other_base_notes,
    provenance_notes,
    stored_encoding,
)
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
        ("mobiuslabsgmbh/Llama-3.1-8B-Instruct-4bit-hqq", "hqq"),
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
        ("org/m-bnb-4bit", {}, "m", "trained on 'org/m-bnb-4bit', a quantized model by its name (bitsandbytes), but the base given"),
        ("org/m", FP8, "m-FP8", "was trained on 'org/m', by its name not quantized, but the base given here is in fp8"),
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


@pytest.mark.parametrize(
    ("trained_on", "names", "differ"),
    [
        ("meta-llama/Llama-3.1-8B", ["Qwen/Qwen2.5-7B"], True),
        ("meta-llama/Llama-3.1-8B", ["Llama-3.1-8B-Instruct"], True),
        ("google/gemma-2-9b-it", ["gemma-2-9b"], True),
        ("Qwen/Qwen3-8B", ["Qwen/Qwen3-8B-Base"], True),
        ("mistralai/Mistral-7B-v0.1", ["Mistral-7B-v0.3"], True),
        ("meta-llama/Llama-3-8B", ["base", "meta-llama/Llama-3.1-8B"], True),
        ("/home/me/models/Qwen2.5-7B", ["llama-3-8b"], True),
        ("/home/me/.cache/huggingface/hub/models--org--one/snapshots/0123", ["org/two"], True),
        ("huggyllama/llama-7b", ["codellama/CodeLlama-7b-hf"], True),
        ("facebook/opt-1.3b", ["facebook/opt-13b"], True),
        ("Qwen/Qwen2.5-7B-Instruct-1M", ["Qwen/Qwen2.5-7B-Instruct"], True),
        # The same model, or what cannot be known.
        ("google/gemma-3-4b-pt", ["gemma-3-4b"], False),
        ("unsloth/tinyllama-chat-bnb-4bit", ["TinyLlama/TinyLlama-1.1B-Chat-v1.0"], False),
        ("meta-llama/Meta-Llama-3-8B", ["Llama3-8B"], False),
        ("saves/qwen7b", ["Qwen/Qwen2.5-7B"], False),
        ("pretrained/llama-8b", ["meta-llama/Llama-3.1-8B"], False),
        ("meta-llama/Llama-3.1-8B", ["llama-3.1-8b"], False),
        ("meta-llama/Llama-3.1-8B", ["unsloth/Meta-Llama-3.1-8B"], False),
        ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", ["meta-llama/Llama-3.2-1B-Instruct"], False),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", ["Qwen2.5-7B-Instruct"], False),
        ("casperhansen/llama-3-8b-awq", ["Meta-Llama-3-8B"], False),
        ("org/Llama-2-7b-hf", ["Llama-2-7b-merged"], False),
        ("org/llama-7b@main", ["llama-7b"], False),
        ("meta-llama/Llama-3.1-8B", ["base"], False),
        ("meta-llama/Llama-3.1-8B", ["my-llama", "final"], False),
        ("meta-llama/Llama-3.1-8B", ["llama31"], False),
        ("meta-llama/Llama-3.1-8B", ["Llama-3.1-8B-mine", "/fsx/runs/tmp-7b"], False),
        ("/data/runs/base", ["meta-llama/Llama-3.1-8B"], False),
        ("./out/checkpoint-500", ["meta-llama/Llama-3.1-8B"], False),
        ("models/llama", ["org/other"], False),
        ("/models/llama-3-8b/", ["Llama-3-8B"], False),
        ("C:\\models\\llama-3-8b", ["Llama-3-8B"], False),
        ("/home/me/.cache/huggingface/hub/models--org--one/snapshots/0123", ["org/One"], False),
        (None, ["org/two"], False),
        (7, ["org/two"], False),
        ("org/one-1b", [None, 7], False),
    ],
)
def test_a_base_of_another_name_is_told(trained_on: object, names: list[object], differ: bool) -> None:
    assert len(other_base_notes(trained_on, names)) == differ


def test_both_names_are_said(job: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = job
    write(adapter / "adapter_config.json", base_model_name_or_path="/models/meta-llama/Llama-3.1-8B")
    write(base / "config.json", _name_or_path="org/Qwen2.5-7B")
    assert run(["detect", str(base), str(adapter), "-o", str(tmp_path / "f.safetensors"), "-q"]) == 0
    assert (
        "names 'Llama-3.1-8B' as its base, but the base given here is 'org/Qwen2.5-7B'; check"
        in capsys.readouterr().err
    )
    with pytest.warns(streamer.StreamerWarning, match="given here is 'org/Qwen2.5-7B'"):
        record = streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "out", mitigation_lambda=1.0)
    assert len(record["warnings"]) == 1
    # A merged model is named by its base too.
    write(tmp_path / "out" / "config.json", _name_or_path="")
    write(adapter / "adapter_config.json", base_model_name_or_path="org/base-7b")
    assert run(["inspect", str(tmp_path / "out"), str(adapter)]) == 0
    assert "given here is" not in capsys.readouterr().err


def test_names_of_a_base(tmp_path: Path) -> None:
    stamp = {"streamer": json.dumps({"base": {"name": "llama", "model_id": "org/llama"}})}
    config = ModelConfig({"_name_or_path": "org/x"})
    assert base_names(tmp_path / "here", config, stamp) == ["here", "org/x", "llama", "org/llama"]
    assert base_names(tmp_path / "models--a--b" / "snapshots" / "0", config, stamp) == ["a/b"]
    for other in ({}, {"streamer": "{"}, {"streamer": "[]"}, {"streamer": '{"base": 3}'}):
        assert base_names(tmp_path / "here", ModelConfig(), other) == ["here", None]


def write(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


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
        "the adapter is mitigated already, by `streamer mitigate` from 'adapter', with lambda 0.5 and method project: lambda 1 leaves it "
        "unchanged, any other is applied in addition"
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
