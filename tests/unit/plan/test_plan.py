"""The plan: what an output takes along, what inputs are, however they are spelled."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

import streamer
from streamer.detection.cost import cost
from streamer.detection.device import choose_device
from streamer.errors import InputChangedError, OutputError, UsageError
from streamer.events import Event
from streamer.plan.plan import make_plan
from streamer.plan.side_files import other_files, skipped_files

Job = tuple[Path, Path]


def touch(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_weights_of_modules_of_their_own_are_taken_along(job: Job, tmp_path: Path) -> None:
    base, adapter = job
    (base / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2, 2)}, base / "2_Dense" / "model.safetensors")
    touch(base / "pytorch_model.bin")
    touch(base / "pytorch_model.bin.index.json")
    touch(base / "onnx" / "model.onnx")
    touch(tmp_path / "code" / "model.py")
    (base / "code").symlink_to(tmp_path / "code")
    (base / "loop").symlink_to(base)
    record = streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "out", mitigation_lambda=1.0)
    out = tmp_path / "out"
    assert torch.equal(load_file(out / "2_Dense" / "model.safetensors")["linear.weight"], torch.ones(2, 2))
    assert (out / "code" / "model.py").read_text() == "x"
    assert not (out / "code").is_symlink()
    assert record["left_out"] == ["onnx", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    assert not any((out / name).exists() for name in record["left_out"])
    assert {name for name, _ in other_files(base)} | set(skipped_files(base)) > {
        "config.json",
        "tokenizer.json",
        "1_Pooling/config.json",
    }


def test_an_adapter_inside_the_base_stays_behind_however_it_is_spelled(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = job
    inside = base / "ad"
    adapter.rename(inside)
    monkeypatch.chdir(tmp_path)
    streamer.merge_with_reduced_intruder_dimensions(
        base, os.path.relpath(inside), tmp_path / "out", mitigation_lambda=1.0
    )
    assert not (tmp_path / "out" / "ad").exists()


def test_an_adapter_where_the_model_goes_is_refused(job: Job, tmp_path: Path) -> None:
    """A loader would apply it on top of the merged weights."""
    base, adapter = job
    out = tmp_path / "out"
    streamer.reduce_intruder_dimension(base, adapter, out, mitigation_lambda=0.5, model_card=False)
    (out / "streamer.json").unlink()
    (out / "adapter_model.safetensors").rename(tmp_path / "kept")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"adapter_config.json: exists and is not ours"):
            streamer.merge_with_reduced_intruder_dimensions(
                base, adapter, out, mitigation_lambda=1.0, overwrite=overwrite
            )
    (out / "adapter_config.json").unlink()
    streamer.merge_with_reduced_intruder_dimensions(base, adapter, out, mitigation_lambda=1.0, overwrite=True)
    assert (out / "model.safetensors.index.json").exists()


def test_a_config_as_transformers_writes_it_is_read(job: Job, tmp_path: Path) -> None:
    base, adapter = job
    text = json.dumps({"model_type": "x", "time_step_limit": [0.0, float("inf")]})
    (base / "config.json").write_text(text)
    assert make_plan(base, adapter).config.model_type == "x"
    streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "out", mitigation_lambda=1.0)
    assert (tmp_path / "out" / "config.json").read_text() == text


def test_stamps_do_not_depend_on_the_spelling(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = job
    absolute = make_plan(base, adapter).stamps()
    monkeypatch.chdir(tmp_path)
    assert make_plan(os.path.relpath(base), os.path.relpath(adapter)).stamps() == absolute
    assert not any(path.endswith("tokenizer.json") for path in make_plan(base, adapter).detection_stamps())


def test_iter_merged_tells_of_each_tensor(job: Job) -> None:
    base, adapter = job
    events: list[Event] = []
    sizes = {
        name: t.nbytes for name, t in streamer.iter_merged(base, adapter, mitigation_lambda=1.0, on_event=events.append)
    }
    assert [e.name for e in events if e.stage == "write"] == [*sizes, ""]
    assert [e.done for e in events if e.stage == "write"] == [0, *itertools.accumulate(sizes.values())]
    assert {e.total for e in events} == {sum(sizes.values())}


def test_iter_merged_stops_when_the_adapter_changes(job: Job) -> None:
    base, adapter = job
    tensors = streamer.iter_merged(base, adapter, mitigation_lambda=1.0)
    next(tensors)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(InputChangedError, match=r"adapter_model.safetensors: changed since the run began"):
        list(tensors)


def test_the_norm_reported_is_that_of_the_adapter_written(job: Job, tmp_path: Path) -> None:
    base, adapter = job
    record = streamer.reduce_intruder_dimension(base, adapter, tmp_path / "out", mitigation_lambda=0.2)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert record["totals"]["dropped_max"] > 0
    for m in record["matrices"]:
        name = f"base_model.model.{m['module']}.lora_"
        delta = written[f"{name}B.weight"].double() @ written[f"{name}A.weight"].double()
        assert m["delta_norm_after"] == pytest.approx(float(torch.linalg.matrix_norm(delta)), rel=1e-9)


@pytest.mark.parametrize("name", ["meta", "mps", "gpu", "cuda:99"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(UsageError, match="device: "):
        choose_device(name)


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
    streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "out", findings=findings)
    import dataclasses

    first = findings.matrices[0]
    d = first.detection
    none = dataclasses.replace(
        first, detection=dataclasses.replace(d, intruders=(), U=d.U[:, :0], S=d.S[:0], Vh=d.Vh[:0])
    )
    edited = dataclasses.replace(findings, matrices=(none, *findings.matrices[1:]))
    with pytest.raises(OutputError, match="holds another output"):
        streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "out", findings=edited)


def test_helpers_make_what_they_say(job: Job) -> None:
    assert helpers.tree_digest(job[0]).keys() >= {"config.json", "model.safetensors.index.json"}


def test_progress_counts_the_solvers_cost(job: Job) -> None:
    base, adapter = job
    events = []
    findings = streamer.detect_intruder_dimensions(base, adapter, on_event=events.append)
    counts = [(e.done, e.total) for e in events if e.stage == "detect"]
    costs = [cost(m.shape, min(10, *m.shape)) for m in findings]
    assert counts == [(sum(costs[:i]), sum(costs)) for i in range(len(costs) + 1)]
