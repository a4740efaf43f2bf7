"""Warnings of an adapter that was trained on another base, or is mitigated already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import streamer
from streamer.adapters.adapter_config import mitigated_before
from streamer.cli.main import run
from streamer.errors import NumericError
from streamer.plan.side_files import other_base
from streamer.weights.model_config import ModelConfig


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
        (
            "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit",
            ["meta-llama/Llama-3.2-1B-Instruct"],
            False,
        ),
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
def test_a_base_of_another_name_is_told(
    trained_on: object, names: list[object], differ: bool, tmp_path: Path
) -> None:
    directory, name = names if len(names) == 2 else ("base", names[0])
    assert (
        len(other_base(trained_on, tmp_path / str(directory), ModelConfig({"_name_or_path": name})))
        == differ
    )


def test_a_base_in_the_hubs_cache_has_its_id(tmp_path: Path) -> None:
    path = tmp_path / "models--org--one" / "snapshots" / "0123"
    assert other_base("org/one", path, ModelConfig({"_name_or_path": "org/other"})) == []
    assert "the base given here is 'org/one'" in other_base("org/other", path, ModelConfig())[0]


def test_both_names_are_said(
    job: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = job
    for path, values in (
        (
            adapter / "adapter_config.json",
            {"base_model_name_or_path": "/models/meta-llama/Llama-3.1-8B"},
        ),
        (base / "config.json", {"_name_or_path": "org/Qwen2.5-7B"}),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    assert run(["inspect", str(base), str(adapter), "--json"]) == 0
    shown = capsys.readouterr()
    (note,) = json.loads(shown.out)["warnings"]
    assert (
        "names 'Llama-3.1-8B' as its base, but the base given here is 'org/Qwen2.5-7B'; check"
        in note
    )
    assert f"streamer: warning: {note}" in shown.err
    with pytest.warns(streamer.StreamerWarning, match="given here is 'org/Qwen2.5-7B'"):
        record = streamer.merge_with_reduced_intruder_dimensions(
            base, adapter, tmp_path / "out", mitigation_lambda=1.0
        )
    assert record["warnings"] == [note]


def test_an_adapter_that_is_mitigated_already_is_told(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    """Mitigating and then merging the result is what one would try first, and scales intruders twice."""
    base, adapter = job
    says = (
        "the adapter is mitigated already, by `streamer mitigate` with method project: lambda 1 leaves it unchanged, any other is applied "
        "in addition"
    )
    merge = streamer.merge_with_reduced_intruder_dimensions
    once = streamer.reduce_intruder_dimension(
        base, adapter, tmp_path / "once", mitigation_lambda=0.5, method="project"
    )
    assert once["warnings"] == []
    with pytest.warns(streamer.StreamerWarning, match="mitigated already"):
        assert merge(base, tmp_path / "once", tmp_path / "twice", mitigation_lambda=0.5)[
            "warnings"
        ] == [says]
    assert says in (tmp_path / "twice" / "README.md").read_text()
    assert (
        merge(base, tmp_path / "once", tmp_path / "as it is", mitigation_lambda=1)["warnings"] == []
    )
    streamer.reduce_intruder_dimension(base, adapter, tmp_path / "same", mitigation_lambda=1)
    assert merge(base, tmp_path / "same", tmp_path / "merged")["warnings"] == []


@pytest.mark.parametrize(
    "stamp", [None, "", "{", "[]", "1", '{"command": "mitigate"}', '{"method": "map", "lambda": 0}']
)
def test_a_stamp_of_another_program_says_nothing(stamp: str | None) -> None:
    assert mitigated_before({} if stamp is None else {"streamer": stamp}) == []


def test_merging_a_mitigated_adapter_without_a_method_leaves_it_as_it_is(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = job
    merge = streamer.merge_with_reduced_intruder_dimensions
    streamer.reduce_intruder_dimension(
        base, adapter, tmp_path / "once", mitigation_lambda=0.5, method="shrink"
    )
    notes: list[str] = []
    plain = merge(
        base, tmp_path / "once", tmp_path / "plain", on_event=lambda event: notes.append(event.name)
    )
    assert (plain["method"], plain["lambda"], plain["detection"], plain["warnings"]) == (
        "shrink",
        1.0,
        None,
        [],
    )
    assert any("mitigated already, and is merged as it is" in note for note in notes)
    stated = merge(
        base, tmp_path / "once", tmp_path / "stated", mitigation_lambda=1, method="shrink"
    )
    assert plain["files"] == stated["files"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "options", [{"mitigation_lambda": 1.0}, {"mitigation_lambda": 0.5}, {"mitigation_lambda": 0.0}]
)
def test_a_base_that_holds_nan_where_the_adapter_changes_it_is_refused(
    job: tuple[Path, Path], tmp_path: Path, value: float, options: dict[str, float]
) -> None:
    base = tmp_path / "holed"
    adapter = job[1]
    shutil.copytree(job[0], base)
    changed = next(iter(streamer.detect_intruder_dimensions(*job)))
    file = next(path for path in base.glob("*.safetensors") if changed.tensor in load_file(path))
    tensors = load_file(file)
    tensors[changed.tensor].view(-1)[3] = value
    save_file(tensors, file)
    with pytest.raises(NumericError, match=rf"{changed.tensor}.* hold NaN or Inf; check the file"):
        streamer.merge_with_reduced_intruder_dimensions(
            base, adapter, tmp_path / "out", method="shrink", **options
        )
    assert not (tmp_path / "out" / "streamer.json").exists()
    with pytest.raises(NumericError, match="hold NaN or Inf"):
        list(streamer.iter_merged(base, adapter, method="shrink", **options))
