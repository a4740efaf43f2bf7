"""Runs of several adapters that are killed, locked out, or find outputs begun."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from forks import KILL, server
from helpers import tree_digest
from several import WAYS, Several, run

from streamer.storage.lock import locked


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Several:
    return Several(tmp_path_factory.mktemp("several"))


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_a_run_killed_anywhere_is_finished_by_the_same_command(several: Several, way: str, tmp_path: Path) -> None:
    expected = tree_digest(several.alone(way))
    calls = len(server().run(*several.line(way, tmp_path / "whole")).calls)
    for n in range(3, calls, calls // 7):
        out = tmp_path / str(n)
        assert server().run(*several.line(way, out), at=n, code=KILL).code == -signal.SIGKILL
        standing = {k: v for k, v in tree_digest(out).items() if not Path(k).name.startswith(".")}
        assert standing.items() <= expected.items()
        run(*several.line(way, out))
        assert tree_digest(out) == expected


def test_shards_that_one_output_has_already_are_kept(several: Several, tmp_path: Path) -> None:
    """A killed merge of one adapter is taken up by a merge of all, which are then at different shards."""
    way, out = WAYS[2], tmp_path / "out"
    alone = several.line(way, out / "lora", several.adapters / "lora")
    alone[alone.index(several.findings)] = several.findings / "lora.safetensors"
    shards = sorted(n for n in tree_digest(several.alone(way) / "lora") if n.startswith("model-"))
    for n in range(20, 500, 3):
        assert server().run(*alone, at=n, code=KILL).code == -signal.SIGKILL
        if (out / "lora" / shards[1]).exists():
            break
        shutil.rmtree(out)
    kept = (out / "lora" / shards[0]).stat().st_ino
    assert not (out / "lora" / shards[2]).exists()
    run(*several.line(way, out))
    assert tree_digest(out) == tree_digest(several.alone(way))
    assert (out / "lora" / shards[0]).stat().st_ino == kept


def test_each_output_is_locked(several: Several, tmp_path: Path) -> None:
    for way, lock in ((WAYS[1], "saved/.streamer.lock"), ("detect", ".saved.safetensors.lock")):
        out = tmp_path / way.split()[0]
        (out / lock).parent.mkdir(parents=True)
        with locked(out / lock):
            assert "another run is writing here" in run(*several.line(way, out), code=5)
        run(*several.line(way, out))
        assert tree_digest(out) == tree_digest(several.alone(way))


def test_one_that_is_locked_leaves_the_others_as_they_were(several: Several, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(*several.line(WAYS[1], out))
    before = tree_digest(out)
    with locked(out / "saved" / ".streamer.lock"):
        error = run(*several.line("merge --lambda 0.25 --overwrite", out), code=5)
    assert "saved: another run is writing here" in error
    assert tree_digest(out) == before
