"""Outputs that are resumed or replaced by a run that is killed."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from commands import WRITING, ok, target
from forks import KILL, server
from helpers import tree_digest


@pytest.mark.parametrize("command", WRITING)
def test_a_killed_run_is_resumed_and_says_so(inputs: tuple[Path, Path], tmp_path: Path, command: str) -> None:
    out = target(tmp_path, command)
    assert server().run(command, *inputs, "-o", out, at=12, code=KILL).code == -signal.SIGKILL
    assert ok(command, *inputs, "-o", out)["state"] == "resumed"


@pytest.mark.parametrize("option", ["--overwrite", "--no-resume"])
def test_files_from_before_a_killed_overwrite_go_as_well(
    inputs: tuple[Path, Path], tmp_path: Path, option: str
) -> None:
    """A model, over it another that was killed before it had replaced all shards (and begun anew), over that an adapter."""
    out = tmp_path / "out"
    ok("merge", *inputs, "-o", out, "--method", "shrink")
    copy = shutil.copytree(out, tmp_path / "copy")
    other = ("--method", "shrink", "--lambda", "0.3", "--overwrite")
    calls = server().run("merge", *inputs, "-o", copy, *other).calls
    at = next(i for i in range(len(calls)) if calls[i : i + 6] == ["write"] * 6) + 3  # amid the first shard
    assert server().run("merge", *inputs, "-o", out, *other, at=at, code=KILL).code == -signal.SIGKILL
    if option == "--no-resume":
        assert server().run("merge", *inputs, "-o", out, *other, option, at=at, code=KILL).code == -signal.SIGKILL
    assert len(list(out.glob("model-*.safetensors"))) == 3
    ok("mitigate", *inputs, "-o", out, "--overwrite")
    ok("mitigate", *inputs, "-o", tmp_path / "fresh")
    assert tree_digest(out) == tree_digest(tmp_path / "fresh")


@pytest.fixture(scope="module")
def shrunk(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and an adapter."""
    home = tmp_path_factory.mktemp("shrunk")
    for command in ("merge", "mitigate"):
        ok(command, *inputs, "-o", home / command, "--method", "shrink")
    return home


@pytest.mark.long
@pytest.mark.parametrize("back", range(0, 36, 3))
def test_killed_while_it_replaces_the_old_output(
    inputs: tuple[Path, Path], shrunk: Path, tmp_path: Path, back: int
) -> None:
    """A model by an adapter: until nothing but renames is left, the model is whole."""
    out = shutil.copytree(shrunk / "merge", tmp_path / "out")
    line = ("mitigate", *inputs, "-o", out, "--overwrite", "--method", "shrink")
    calls = server().run(*line[:-4], shutil.copytree(out, tmp_path / "copy"), *line[-3:]).calls
    assert server().run(*line, at=len(calls) - back, code=KILL).code == -signal.SIGKILL
    found, model = tree_digest(out), tree_digest(shrunk / "merge")
    whole = found.items() >= model.items()
    assert whole or "model.safetensors.index.json" not in found
    assert whole or "write" not in calls[len(calls) - back - 1 :]
    ok(*line)
    assert tree_digest(out) == tree_digest(shrunk / "mitigate")
