"""What a plan takes along, leaves behind and refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamer
from streamer.errors import OutputError
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
    (base / "itself").symlink_to(base / "itself")
    record = streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, tmp_path / "out", mitigation_lambda=1.0
    )
    out = tmp_path / "out"
    assert torch.equal(
        load_file(out / "2_Dense" / "model.safetensors")["linear.weight"], torch.ones(2, 2)
    )
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
    streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, out, mitigation_lambda=1.0, overwrite=True
    )
    assert (out / "model.safetensors.index.json").exists()


def test_a_config_as_transformers_writes_it_is_read(job: Job, tmp_path: Path) -> None:
    base, adapter = job
    text = json.dumps({"model_type": "x", "time_step_limit": [0.0, float("inf")]})
    (base / "config.json").write_text(text)
    assert make_plan(base, adapter).config.model_type == "x"
    streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, tmp_path / "out", mitigation_lambda=1.0
    )
    assert (tmp_path / "out" / "config.json").read_text() == text


def test_stamps_do_not_depend_on_the_spelling(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = job
    absolute = make_plan(base, adapter).stamps()
    monkeypatch.chdir(tmp_path)
    assert make_plan(os.path.relpath(base), os.path.relpath(adapter)).stamps() == absolute
    assert not any(
        path.endswith("tokenizer.json") for path in make_plan(base, adapter).detection_stamps()
    )


def test_a_config_that_appears_during_a_run_was_not_read(job: Job, tmp_path: Path) -> None:
    base, adapter = job
    tuned = tmp_path / "tuned"
    streamer.merge_with_reduced_intruder_dimensions(base, adapter, tuned, mitigation_lambda=1.0)
    (tuned / "config.json").unlink()
    plan = make_plan(base, tuned)
    stamps = plan.detection_stamps()
    touch(tuned / "config.json", "{}")
    assert plan.detection_stamps() == stamps
