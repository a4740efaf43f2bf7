"""--overwrite, and outputs that were made beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import WRITING, ok, target
from forks import KILL, server
from helpers import tree_digest

# Outputs made beforehand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", WRITING)
def test_an_empty_file_is_taken_like_nothing(inputs: tuple[Path, Path], tmp_path: Path, command: str) -> None:
    out = target(tmp_path, command)
    out.touch()
    assert ok(command, *inputs, "-o", out, "--dry-run")["state"] == "new"
    assert out.stat().st_size == 0
    ok(command, *inputs, "-o", out)
    assert out.is_dir() == (command != "detect")


def test_a_refused_run_leaves_the_empty_file(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.touch()
    done = server().run("merge", *inputs, "-o", out, "--max-memory", "201M")
    assert done.code == 2
    assert out.is_file()


def test_empty_files_of_an_output_are_taken_like_none(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """As a workflow system touches targets; a loader would still read an empty file of another kind of model."""
    ok("merge", *inputs, "-o", tmp_path / "whole")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "streamer.json", "model.safetensors.index.json"):
        (out / name).touch()
    ok("merge", *inputs, "-o", out)
    assert tree_digest(out) == tree_digest(tmp_path / "whole")
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").touch()
    done = server().run("merge", *inputs, "-o", other)
    assert (done.code, "adapter_config.json: exists and is not ours" in done.err) == (4, True)


# --overwrite --------------------------------------------------------------------------------------------------------


def test_another_lambda_replaces_the_outputs_own_files_and_no_others(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ok("merge", *inputs, "-o", out, "--lambda", "0.5")
    foreign = {"notes.txt": "mine", "eval/results.json": "{}"}
    (out / "eval").mkdir()
    for name, text in foreign.items():
        (out / name).write_text(text)
    done = server().run("merge", *inputs, "-o", out, "--lambda", "0.25")
    assert (done.code, "holds another output" in done.err) == (4, True)
    ok("merge", *inputs, "-o", out, "--lambda", "0.25", "--overwrite")
    ok("merge", *inputs, "-o", tmp_path / "fresh", "--lambda", "0.25")
    assert {name: (out / name).read_text() for name in foreign} == foreign
    assert {k: v for k, v in tree_digest(out).items() if k not in foreign} == tree_digest(tmp_path / "fresh")


def test_files_that_only_the_old_output_had_go(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """An adapter written over a model: its shards go, whole directories of its own too; an edited one stays, and what is not ours."""
    out, adapter = tmp_path / "out", tmp_path / "fresh"
    ok("merge", *inputs, "-o", out)
    (out / "config.json").write_text("edited")
    (out / "notes.txt").write_text("mine")
    ok("mitigate", *inputs, "-o", out, "--overwrite")
    ok("mitigate", *inputs, "-o", adapter)
    assert tree_digest(out).keys() == {*tree_digest(adapter), "config.json", "notes.txt"}
    assert not (out / "1_Pooling").exists()


def test_an_interrupted_run_is_overwritten_whole(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = server().run("merge", *inputs, "-o", tmp_path / "merged", "--method", "shrink")
    assert server().run("merge", *inputs, "-o", out, "--method", "shrink", at=len(whole.calls) - 6, code=KILL).code < 0
    assert list(out.glob("model-*"))
    ok("mitigate", *inputs, "-o", out, "--overwrite")
    ok("mitigate", *inputs, "-o", tmp_path / "fresh")
    assert tree_digest(out) == tree_digest(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["../victim", "/{home}/victim", "link/victim", "sub/../../victim", "a\0b"])
def test_a_record_that_names_files_elsewhere_removes_none(inputs: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    import hashlib

    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_text("x")
    out.mkdir()
    (out / "sub").mkdir()
    (out / "link").symlink_to(tmp_path)
    digest = hashlib.sha256(b"x").hexdigest()
    files = [{"file": name.format(home=str(tmp_path).lstrip("/")), "bytes": 1, "sha256": digest}]
    (out / "streamer.json").write_text(json.dumps({"schema": "streamer.output/1", "files": files}))
    ok("mitigate", *inputs, "-o", out, "--overwrite")
    assert victim.read_text() == "x"
