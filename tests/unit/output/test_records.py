"""Files that say what they are; tensors one by one, norms, and outputs that stand already."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import metadata, stamp
from safetensors.torch import load_file

import streamer
from streamer.errors import InputChangedError, OutputError, UsageError
from streamer.events import Event
from streamer.plan.side_files import base_source
from streamer.units import format_size
from streamer.weights.model_config import ModelConfig


def test_every_file_is_stamped(single: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = single
    findings = streamer.detect_intruder_dimensions(
        base, adapter, tmp_path / "f.safetensors", top_k=3
    )
    streamer.reduce_intruder_dimension(base, adapter, tmp_path / "mit", findings=findings, top_k=3)
    streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, tmp_path / "out", findings=findings, top_k=3
    )
    certified = sum(m.detection.certified for m in findings)
    sources = {"base": ("one", "some/one"), "adapter": ("few", None)}
    for path, command in (
        ("f.safetensors", "detect"),
        ("mit/adapter_model.safetensors", "mitigate"),
        ("out/model.safetensors", "merge"),
    ):
        said = stamp(tmp_path / path)
        assert (said["version"], said["command"]) == (streamer.__version__, command)
        for what, (name, model_id) in sources.items():
            assert (said[what]["name"], said[what].get("model_id")) == (name, model_id)
            assert len(said[what]["digest"]) == 16
        assert said["detection"] == {
            "top_k": 3,
            "threshold_epsilon": 0.5,
            "solver": "auto",
            "certified": certified,
            "matrices": 3,
        }
        if command != "detect":
            assert (said["method"], said["lambda"]) == ("paper", 0.75)
    assert metadata(tmp_path / "out" / "model.safetensors")["format"] == "pt"
    assert metadata(tmp_path / "out" / "model.safetensors")["note"] == "the base's own"
    assert metadata(tmp_path / "mit" / "adapter_model.safetensors")["format"] == "pt"


def test_a_record_names_inputs_and_holds_no_path(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(base)})
    )
    record = streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, tmp_path / "out", mitigation_lambda=0.5
    )
    assert (record["output"], record["state"], record["lambda"]) == (
        str(tmp_path / "out"),
        "written",
        0.5,
    )
    assert (record["base"]["name"], record["adapter"]["name"]) == ("base", "adapter")
    assert record["detection"]["certified"] == record["detection"]["matrices"] == 9
    text = (tmp_path / "out" / "streamer.json").read_text() + (
        tmp_path / "out" / "README.md"
    ).read_text()
    assert str(tmp_path) not in text
    again = streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, tmp_path / "out", mitigation_lambda=0.5
    )
    assert again == {**record, "state": "present"}
    plain = streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, tmp_path / "one", mitigation_lambda=1
    )
    assert plain["detection"] is None
    assert {m["certified"] for m in plain["matrices"]} == {None}


def test_what_a_base_is_called(tmp_path: Path) -> None:
    cached = tmp_path / "models--some--thing" / "snapshots" / "0123abc"
    cached.mkdir(parents=True)
    found = base_source(cached, ModelConfig(), "an/other", {})
    assert (found["name"], found["model_id"], found["revision"]) == (
        "thing",
        "some/thing",
        "0123abc",
    )
    calls = [
        ("thing", {}, "some/thing", "some/thing"),
        ("thing", {}, str(tmp_path / "thing"), None),
        ("thing", {}, "./models/thing", None),
        ("thing-ft", {}, "models/thing", None),  # another model than the one that it was trained on
        ("own/thing", {}, "own/thing", None),  # where it lies, and so a path
        ("thing", {}, "models/thing", None),
        (
            "thing",
            {},
            "some/thing-bnb-4bit",
            None,
        ),  # trained on its quantized copy, which this is not
        ("thing", {"_name_or_path": "some/thing"}, None, "some/thing"),
        (
            "thing",
            {"_name_or_path": "some/parent"},
            None,
            None,
        ),  # what it was trained from, perhaps
    ]
    for directory, config, stated, expected in calls:
        path = tmp_path / directory
        path.mkdir(parents=True, exist_ok=True)
        found = base_source(path, ModelConfig(config), stated, {}).get("model_id")
        assert found == expected, (directory, stated)


def test_what_a_base_is_not_called_is_said(single: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = single
    config = json.loads((adapter / "adapter_config.json").read_text())
    said = {
        "models/llama": "models/llama",
        "llama": "llama",
        "some/one": None,
        "/data/llama": None,
        "../llama": None,
    }
    for n, (stated, named) in enumerate(said.items()):
        (adapter / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": stated})
        )
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


def test_a_result_is_shown_in_a_few_lines(job: tuple[Path, Path], tmp_path: Path) -> None:
    record = streamer.reduce_intruder_dimension(*job, tmp_path / "out", mitigation_lambda=0.5)
    t = record["totals"]
    assert repr(record).splitlines()[:3] == [
        f"<Written: {tmp_path / 'out'} (mitigate, written): {len(record['files'])} files, {format_size(t['bytes'])}",
        f" method paper, select all, lambda 0.5: 9 of 9 matrices mitigated, {t['intruders']} intruders scaled",
        f" |delta| {t['delta_norm']:.4g} -> {t['delta_norm_after']:.4g}; baseline of equal norm: --method shrink --lambda "
        f"{t['equal_norm_shrink']:.4f}",
    ]
    assert repr(record).count("\n") == 3
    assert json.loads(json.dumps(record)) == record
    grown = streamer.reduce_intruder_dimension(
        *job, tmp_path / "grown", mitigation_lambda=1.5, amplify=True
    )
    assert grown["totals"]["delta_norm_after"] > grown["totals"]["delta_norm"]
    assert "equal norm" not in repr(grown)  # a shrink cannot be given such a lambda
    assert "equal norm" not in (tmp_path / "grown" / "README.md").read_text()
    merged = streamer.merge_with_reduced_intruder_dimensions(
        *job, tmp_path / "merged", mitigation_lambda=1
    )
    assert "\n lambda 1: the unchanged adapter, nothing mitigated\n |delta| " in repr(merged)
    assert "(merge, written): 8 files" in repr({"llama": merged})


def test_what_is_lost_in_projection_is_a_warning_with_a_remedy_that_works(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = job
    findings = streamer.detect_intruder_dimensions(base, adapter)
    events: list[tuple[str, str]] = []
    record = streamer.reduce_intruder_dimension(
        base,
        adapter,
        tmp_path / "a",
        findings=findings,
        mitigation_lambda=0.25,
        on_event=lambda e: events.append((e.stage, e.name)),
    )
    assert record["totals"]["dropped_max"] > 0.01
    q = max(len(m["intruders"]) for m in record["matrices"])
    (line,) = record["warnings"]
    assert events.count(("warning", line)) == 1
    lossy = [m for m in record["matrices"] if m["dropped"] > 0.01]
    worst = max(lossy, key=lambda m: m["dropped"])
    assert line.startswith(
        f"lost in projection: more than 1 % of the delta in {len(lossy)} of {len(record['matrices'])} matrices, most in "
        f"{worst['tensor']!r} ({100 * worst['dropped']:.2f} %); "
    )
    assert line.endswith(
        f"; `--method project`, `--to-lora {4 + q}` or `streamer merge` loses nothing"
    )
    with pytest.warns(
        streamer.StreamerWarning, match="^lost in projection: more than 1 %"
    ):  # a finished output says so again
        streamer.reduce_intruder_dimension(
            base, adapter, tmp_path / "a", findings=findings, mitigation_lambda=0.25
        )
    assert line in (tmp_path / "a" / "README.md").read_text()
    for n, options in enumerate(({"method": "project"}, {"to_lora": 4 + q})):
        better = streamer.reduce_intruder_dimension(
            base, adapter, tmp_path / f"b{n}", findings=findings, mitigation_lambda=0.25, **options
        )
        assert better["totals"]["dropped_max"] < 1e-6
        assert better["warnings"] == []
    less = streamer.reduce_intruder_dimension(
        base, adapter, tmp_path / "c", findings=findings, mitigation_lambda=0.25, to_lora=4 + q - 1
    )
    assert less["totals"]["dropped_max"] > 1e-4


Job = tuple[Path, Path]


def test_iter_merged_tells_of_each_tensor(job: Job) -> None:
    base, adapter = job
    events: list[Event] = []
    sizes = {
        name: t.nbytes
        for name, t in streamer.iter_merged(
            base, adapter, mitigation_lambda=1.0, on_event=events.append
        )
    }
    assert [e.name for e in events if e.stage == "write"] == [*sizes, ""]
    assert [e.done for e in events if e.stage == "write"] == [
        0,
        *itertools.accumulate(sizes.values()),
    ]
    assert {e.total for e in events} == {sum(sizes.values())}


def test_iter_merged_makes_only_the_tensors_that_are_wanted(job: Job) -> None:
    base, adapter = job
    every = dict(streamer.iter_merged(base, adapter, mitigation_lambda=0.5))
    events = list[Event]()
    *_, last = (name for name in every if name.endswith("proj.weight"))
    found = streamer.iter_merged(
        base, adapter, mitigation_lambda=0.5, tensors=last.__eq__, on_event=events.append
    )
    ((name, tensor),) = found
    assert name == last
    assert torch.equal(tensor, every[last])
    assert [e.total for e in events if e.stage == "write"] == [tensor.nbytes] * 2
    assert (
        list(
            streamer.iter_merged(
                base, adapter, max_memory="4G", tensors=lambda name: name not in every
            )
        )
        == []
    )
    with pytest.raises(
        UsageError, match=r"^tensors: expected a function that takes a name, found \['a'\]$"
    ):
        streamer.iter_merged(base, adapter, tensors=["a"])  # type: ignore[arg-type]


def test_progress_of_several_outputs_counts_each_tensor_once_it_is_written(
    job: Job, tmp_path: Path
) -> None:
    base, adapter = job
    for name in ("one", "two"):
        shutil.copytree(adapter, tmp_path / "adapters" / name)
    events: list[Event] = []
    merge = streamer.merge_with_reduced_intruder_dimensions
    merge(base, tmp_path / "adapters", tmp_path / "out", method="shrink", on_event=events.append)
    sizes = {
        n: t.nbytes
        for f in (tmp_path / "out" / "one").glob("*.safetensors")
        for n, t in load_file(f).items()
    }
    steps = [event for event in events if event.name in sizes]
    pairs = [(a, b) for a, b in itertools.pairwise(steps) if a.name == b.name]
    assert [(a.adapter, b.adapter) for a, b in pairs] == [("one", "two")] * len(sizes)
    assert [b.done - a.done for a, b in pairs] == [sizes[a.name] for a, _ in pairs]
    assert (events[-1].done, events[-1].items) == (events[-1].total, events[-1].of)


def test_iter_merged_stops_when_the_adapter_changes(job: Job) -> None:
    base, adapter = job
    tensors = streamer.iter_merged(base, adapter, mitigation_lambda=1.0)
    next(tensors)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(
        InputChangedError, match=r"adapter_model.safetensors: changed since the run began"
    ):
        list(tensors)


def test_the_norm_reported_is_that_of_the_adapter_written(job: Job, tmp_path: Path) -> None:
    base, adapter = job
    record = streamer.reduce_intruder_dimension(
        base, adapter, tmp_path / "out", mitigation_lambda=0.2
    )
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert record["totals"]["dropped_max"] > 0
    for m in record["matrices"]:
        name = f"base_model.model.{m['module']}.lora_"
        delta = written[f"{name}B.weight"].double() @ written[f"{name}A.weight"].double()
        assert m["delta_norm_after"] == pytest.approx(
            float(torch.linalg.matrix_norm(delta)), rel=1e-9
        )


def test_output_of_findings_with_other_last_bits_is_there_already(job: Job, tmp_path: Path) -> None:
    """As of those that were made anew on another number of threads."""
    import dataclasses

    base, adapter = job
    findings = streamer.detect_intruder_dimensions(base, adapter)
    merge = streamer.merge_with_reduced_intruder_dimensions
    merge(base, adapter, tmp_path / "out", findings=findings)
    first = findings.matrices[0]
    S = first.detection.S.nextafter(first.detection.S + 1)
    other = dataclasses.replace(first, detection=dataclasses.replace(first.detection, S=S))
    again = dataclasses.replace(findings, matrices=(other, *findings.matrices[1:]))
    assert again.digest() != findings.digest()
    assert merge(base, adapter, tmp_path / "out", findings=again)["state"] == "present"


def test_output_of_other_findings_is_not_taken_for_done(job: Job, tmp_path: Path) -> None:
    base, adapter = job
    findings = streamer.detect_intruder_dimensions(base, adapter)
    streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, tmp_path / "out", findings=findings
    )
    import dataclasses

    first = findings.matrices[0]
    d = first.detection
    none = dataclasses.replace(
        first, detection=dataclasses.replace(d, intruders=(), U=d.U[:, :0], S=d.S[:0], Vh=d.Vh[:0])
    )
    edited = dataclasses.replace(findings, matrices=(none, *findings.matrices[1:]))
    with pytest.raises(OutputError, match="holds another output"):
        streamer.merge_with_reduced_intruder_dimensions(
            base, adapter, tmp_path / "out", findings=edited
        )
