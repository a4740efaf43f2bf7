"""Files that say what they are: records and stamps, the same bytes after kills, and what becomes of a run of another version."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from forks import KILL, server
from helpers import intruding_factors, power_law, three_shards, tree_digest, write_adapter
from safetensors import safe_open
from safetensors.torch import save_file

import streamer
from streamer.errors import OutputError
from streamer.plan.sources import base_source
from streamer.weights.model_config import ModelConfig

OTHER = (
    "import streamer.output.output_spec as j, streamer.detection.findings_writer as w; "
    "j.__version__ = w.__version__ = '0.10.0-rc1'"
)
"""Run as another version, whose name has another length."""


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as f:
        return f.metadata()


def content(path: Path) -> dict[str, str] | bytes:
    return tree_digest(path) if path.is_dir() else path.read_bytes()


def stamp(path: Path) -> dict:
    return json.loads(metadata(path)["streamer"])


@pytest.fixture
def job(tmp_path: Path) -> tuple[Path, Path]:
    return three_shards(tmp_path)


@pytest.fixture
def single(tmp_path: Path) -> tuple[Path, Path]:
    """A base of one file, which is the commit point of what is merged from it."""
    tensors, factors = {}, {}
    for i in range(3):
        tensors[f"layers.{i}.weight"] = power_law(24, 20, seed=i).float()
        factors[f"layers.{i}"] = intruding_factors(24, 20, 3, seed=i)
    (tmp_path / "one").mkdir()
    save_file(tensors, tmp_path / "one" / "model.safetensors", metadata={"format": "pt", "note": "the base's own"})
    (tmp_path / "one" / "README.md").write_text("---\nlicense: mit\n---\n# One\n")
    return tmp_path / "one", write_adapter(tmp_path / "few", factors, r=3, base_model_name_or_path="some/one")


def test_every_file_is_stamped(single: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = single
    findings = streamer.detect_intruder_dimensions(base, adapter, tmp_path / "f.safetensors", top_k=3)
    streamer.reduce_intruder_dimension(base, adapter, tmp_path / "mit", findings=findings, top_k=3)
    streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "out", findings=findings, top_k=3)
    certified = sum(m.detection.certified for m in findings)
    sources = {"base": ("one", "some/one"), "adapter": ("few", None)}
    for path, command in (("f.safetensors", "detect"), ("mit/adapter_model.safetensors", "mitigate"),
                          ("out/model.safetensors", "merge")):  # fmt: skip
        said = stamp(tmp_path / path)
        assert (said["version"], said["command"]) == (streamer.__version__, command)
        for what, (name, model_id) in sources.items():
            assert (said[what]["name"], said[what].get("model_id")) == (name, model_id)
            assert len(said[what]["digest"]) == 16
        assert said["detection"] == {
            "top_k": 3, "threshold_epsilon": 0.5, "solver": "auto", "certified": certified, "matrices": 3,
        }  # fmt: skip
        if command != "detect":
            assert (said["method"], said["lambda"]) == ("paper", 0.75)
    assert metadata(tmp_path / "out" / "model.safetensors")["format"] == "pt"
    assert metadata(tmp_path / "out" / "model.safetensors")["note"] == "the base's own"
    assert metadata(tmp_path / "mit" / "adapter_model.safetensors")["format"] == "pt"


def test_a_record_names_inputs_and_holds_no_path(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    record = streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "out", mitigation_lambda=0.5)
    assert (record["output"], record["state"], record["lambda"]) == (str(tmp_path / "out"), "written", 0.5)
    assert (record["base"]["name"], record["adapter"]["name"]) == ("base", "adapter")
    assert record["detection"]["certified"] == record["detection"]["matrices"] == 9
    text = (tmp_path / "out" / "streamer.json").read_text() + (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in text
    again = streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "out", mitigation_lambda=0.5)
    assert again == {**record, "state": "present"}
    plain = streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "one", mitigation_lambda=1)
    assert plain["detection"] is None
    assert {m["certified"] for m in plain["matrices"]} == {None}


def test_what_a_base_is_called(tmp_path: Path) -> None:
    cached = tmp_path / "models--some--thing" / "snapshots" / "0123abc"
    cached.mkdir(parents=True)
    found = base_source(cached, ModelConfig(), "an/other", {})
    assert (found["name"], found["model_id"], found["revision"]) == ("thing", "some/thing", "0123abc")
    bnb = {"quantization_config": {"quant_method": "bitsandbytes"}}
    calls = [
        ("thing", {}, "some/thing", "some/thing"),
        ("thing", {}, str(tmp_path / "thing"), None),
        ("thing", {}, "./models/thing", None),
        ("thing-ft", {}, "models/thing", None),  # another model than the one that it was trained on
        ("own/thing", {}, "own/thing", None),  # where it lies, and so a path
        ("thing", {}, "models/thing", None),
        ("thing", {}, "some/thing-bnb-4bit", None),  # trained on its quantized copy, which this is not
        ("thing-bnb-4bit", bnb, "some/thing-bnb-4bit", "some/thing-bnb-4bit"),
        ("thing-bnb-4bit", {}, "some/thing-bnb-4bit", None),
        ("thing", {"_name_or_path": "some/thing"}, None, "some/thing"),
        ("thing", {"_name_or_path": "some/parent"}, None, None),  # what it was trained from, perhaps
    ]
    for directory, config, stated, expected in calls:
        path = tmp_path / directory
        path.mkdir(parents=True, exist_ok=True)
        found = base_source(path, ModelConfig(config), stated, {}).get("model_id")
        assert found == expected, (directory, stated)


def test_what_a_base_is_not_called_is_said(single: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = single
    config = json.loads((adapter / "adapter_config.json").read_text())
    said = {"models/llama": "models/llama", "llama": "llama", "some/one": None, "/data/llama": None, "../llama": None}
    for n, (stated, named) in enumerate(said.items()):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": stated}))
        record = streamer.merge_with_reduced_intruder_dimensions(
            base, adapter, tmp_path / f"out{n}", mitigation_lambda=1
        )
        card = (tmp_path / f"out{n}" / "README.md").read_text()
        assert (record["base"].get("model_id"), "base_model:" in card) == (
            ("some/one", True) if stated == "some/one" else (None, False)
        )
        line = f"| trained on | the adapter's config names `{named}` as its base |"
        assert (line in card) == (named is not None)
        assert ("as its base" in card) == (named is not None)
        assert "data/llama" not in card
        assert "data/llama" not in (tmp_path / f"out{n}" / "streamer.json").read_text()


@pytest.mark.parametrize("command", ["mitigate", "merge"])
def test_killed_anywhere_the_card_and_the_stamp_are_the_same_bytes(
    single: tuple[Path, Path], command: str, tmp_path: Path
) -> None:
    """Of a base of one file the card is written while the file, the commit point, has all its bytes and not yet its name."""
    line = (command, *single, "--top-k", 2)
    whole = server().run(*line, "-o", tmp_path / "whole")
    expected = tree_digest(tmp_path / "whole")
    assert "README.md" in expected
    for n in range(3, len(whole.calls), 2):
        out = tmp_path / str(n)
        assert server().run(*line, "-o", out, at=n, code=KILL).code == -signal.SIGKILL
        if command == "merge" and (out / "model.safetensors").exists():
            assert (out / "README.md").exists()
        done = server().run(*line, "-o", out)
        assert done.code == 0, done.err
        assert tree_digest(out) == expected, n


def test_a_run_of_another_version_is_not_finished_by_this_one(job: tuple[Path, Path], tmp_path: Path) -> None:
    out, found = tmp_path / "out", tmp_path / "f.safetensors"
    for line, target in ((("merge", *job), out), (("detect", *job), found)):
        whole = tmp_path / f"whole-{target.name}"
        calls = server().run(*line, "-o", whole).calls
        before = server().run(*line, "-o", target, at=len(calls) * 2 // 3, code=KILL, before=OTHER)
        assert before.code == -signal.SIGKILL
        left = tree_digest(out)
        done = server().run(*line, "-o", target)
        assert done.code == OutputError.exit_code
        assert "a run that version 0.10.0-rc1 began, and this is" in done.err.replace("is of a run", "a run")
        assert "pass --no-resume to start it over" in done.err
        assert tree_digest(out) == left
        assert server().run(*line, "-o", target, "--no-resume").code == 0
        assert content(target) == content(whole)


def test_a_finished_output_of_another_version_is_there_already(job: tuple[Path, Path], tmp_path: Path) -> None:
    for command in ("merge", "mitigate"):
        out = tmp_path / command
        assert server().run(command, *job, "-o", out, before=OTHER).code == 0
        before = tree_digest(out)
        done = server().run(command, *job, "-o", out, "--json")
        assert (done.code, json.loads(done.out)["state"]) == (0, "present"), done.err
        assert json.loads(done.out)["version"] == "0.10.0-rc1"
        assert tree_digest(out) == before


def test_what_drops_nothing_is_said_and_true(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    findings = streamer.detect_intruder_dimensions(base, adapter)
    events: list[str] = []
    record = streamer.reduce_intruder_dimension(base, adapter, tmp_path / "a", findings=findings, mitigation_lambda=0.25,
                                                on_event=lambda e: events.append(e.name))  # fmt: skip
    assert record["totals"]["dropped_max"] > 0.01
    q = max(len(m["intruders"]) for m in record["matrices"])
    (line,) = record["advice"]
    assert line in events
    assert line.endswith(f"nothing is dropped with `--method project` or with `--to-lora {4 + q}`")
    assert line in (tmp_path / "a" / "README.md").read_text()
    for n, options in enumerate(({"method": "project"}, {"to_lora": 4 + q})):
        better = streamer.reduce_intruder_dimension(
            base, adapter, tmp_path / f"b{n}", findings=findings, mitigation_lambda=0.25, **options
        )
        assert better["totals"]["dropped_max"] < 1e-6
        assert better["advice"] == []
    less = streamer.reduce_intruder_dimension(
        base, adapter, tmp_path / "c", findings=findings, mitigation_lambda=0.25, to_lora=4 + q - 1
    )
    assert less["totals"]["dropped_max"] > 1e-4


def test_findings_know_what_they_are_of(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    streamer.detect_intruder_dimensions(base, adapter, tmp_path / "f.safetensors")
    done = server().run("report", tmp_path / "f.safetensors", "--json")
    tree = json.loads(done.out)
    assert (tree["base"]["name"], tree["adapter"]["name"]) == ("base", "adapter")
    # Under another name they are the same inputs.
    base.rename(tmp_path / "moved")
    streamer.merge_with_reduced_intruder_dimensions(
        tmp_path / "moved", adapter, tmp_path / "out", findings=tmp_path / "f.safetensors"
    )
    assert stamp(tmp_path / "out" / "model-00001-of-00003.safetensors")["base"]["name"] == "moved"
