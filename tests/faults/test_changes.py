"""Two runs at once, inputs that change, disks that are full."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import helpers
import pytest
from forks import KILL, STOP, partials, server
from helpers import tree_digest
from jobs import COMMANDS, Bench

from streamer.units import format_size

# Two runs, changing inputs, full disks --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_two_runs_at_once(bench: Bench, command: str, tmp_path: Path) -> None:
    case = bench.case(command)
    out = tmp_path / "out"
    first = case.run(out, at=len(case.calls) // 2, code=STOP)
    assert first.stopped
    before = tree_digest(out)
    second = case.run(out)  # if it waited for the first, it would never end
    assert second.code == 5
    assert second.err.count("\n") == 1
    target = out / "findings.safetensors" if case.argv[0] == "detect" else out
    assert f"{target}: another run is writing here; wait for it, or choose another output" in second.err
    assert tree_digest(out) == before
    assert server().resume(first.pid).code == 0
    assert tree_digest(out) == case.whole


def own_job(home: Path) -> tuple[Path, Path]:
    base, adapter = helpers.three_shards(home / "inputs")
    return base, adapter


CHANGES = {
    "shard touched": ("base/model-00003-of-00003.safetensors", "os.utime({0!r})"),
    "shard replaced": (
        "base/model-00003-of-00003.safetensors",
        "import shutil; shutil.copy({0!r}, {0!r} + '.new'); os.replace({0!r} + '.new', {0!r})",
    ),
    "shard gone": ("base/model-00003-of-00003.safetensors", "os.remove({0!r})"),
    "adapter weights touched": ("adapter/adapter_model.safetensors", "os.utime({0!r})"),
    "adapter config gone": ("adapter/adapter_config.json", "os.remove({0!r})"),
    "adapter config longer": ("adapter/adapter_config.json", "open({0!r}, 'a').write(' ')"),
    "tokenizer longer": ("base/tokenizer.json", "open({0!r}, 'a').write(' ')"),
}


@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("command", ["detect", "merge", "mitigate"])
def test_an_input_changes_in_mid_run(command: str, change: str, tmp_path: Path) -> None:
    """Exit 8 names the input; no output is committed, and nothing half-written stays."""
    base, adapter = own_job(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    target = out / "f.safetensors" if command == "detect" else out
    name, code = CHANGES[change]
    path = str(tmp_path / "inputs" / name)
    changed = server().run(command, base, adapter, "-o", target, at=12, code=code.format(path))
    assert changed.code == 8
    assert changed.err.count("\n") == 1
    assert path in changed.err
    assert "start again" in changed.err
    assert partials(out) == []
    assert not {"f.safetensors", "model.safetensors.index.json", "adapter_config.json"} & tree_digest(out).keys()


@pytest.mark.parametrize("command", ["detect", "merge", "mitigate"])
def test_an_input_changes_between_kill_and_resume(command: str, tmp_path: Path) -> None:
    base, adapter = own_job(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    target = out / "f.safetensors" if command == "detect" else out
    argv = (command, base, adapter, "-o", target)
    assert server().run(*argv, at=40, code=KILL).code == -signal.SIGKILL
    before = tree_digest(out)
    os.utime(base / "model-00001-of-00003.safetensors")
    changed = server().run(*argv)
    assert changed.code == 8
    assert changed.err.count("\n") == 1
    assert "an input was modified since this run was interrupted; --no-resume starts it over" in changed.err
    assert tree_digest(out).keys() <= before.keys()
    fresh = server().run(*argv, "--no-resume")
    assert (fresh.code, fresh.told) == (0, "")


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("limit", [500, 4000, 15_000])
def test_no_room_for_a_file(bench: Bench, command: str, limit: int, tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the system refuses in mid-run, exit 6, and more room lets it finish."""
    case = bench.case(command)
    out = tmp_path / "out"
    full = case.run(out, before=f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))")
    assert full.code == 6
    assert full.err.count("\n") == 1
    assert str(out) in full.err
    assert "free some space, then run the same command again" in full.err
    assert partials(out) == []
    case.check_whole_files(out)
    case.check_finishes(out)


def test_no_room_is_known_before_anything_is_written(bench: Bench, tmp_path: Path) -> None:
    case = bench.case("merge --findings")
    full = case.run(
        tmp_path / "out", before="import shutil; shutil.disk_usage = lambda p: shutil._ntuple_diskusage(9, 9, 9)"
    )
    assert full.code == 6
    needed = json.loads(case.run(tmp_path / "out", "--dry-run", "--json").out)["bytes"]
    assert needed > sum(p.stat().st_size for p in bench.base.glob("*.safetensors"))
    assert f"{tmp_path / 'out'}: needs {format_size(needed)}, the disk has 9 B free; free some space" in full.err
    assert not (tmp_path / "out").exists()


FREE = "import shutil; shutil.disk_usage = lambda p: shutil._ntuple_diskusage(9, 9, {})"


@pytest.mark.parametrize("command", ["detect", "merge", "mitigate"])
def test_no_room_for_findings_is_known_before_anything_is_written(bench: Bench, command: str, tmp_path: Path) -> None:
    """Their size is not known yet: room is asked for as if every direction were an intruder, for the journal beside them too."""
    case, out = bench.case(command), tmp_path / "out"
    full = case.run(out, before=FREE.format(9))
    assert full.code == 6
    words = re.search(
        r"needs up to ([\d.]+) kB, the disk has 9 B free; free some space, or choose another disk\n", full.err
    )
    assert words, full.err
    assert not out.exists() or list(out.iterdir()) == []
    # Two sizes that would look the same are given in bytes.
    close = case.run(out, before=FREE.format(int(1000 * float(words[1])) - 49))
    exact = re.search(r"needs up to (\d+) B, the disk has (\d+) B free", close.err)
    assert exact, close.err
    needed = int(exact[1])
    assert case.run(out, before=FREE.format(needed - 1)).code == 6
    killed = case.run(out, at=len(case.calls) // 3, code=KILL, before=FREE.format(needed))
    assert killed.code == -signal.SIGKILL
    there = sum(p.stat().st_blocks * 512 for p in out.rglob("*.journal") if "findings" in p.name)
    assert there > 0
    assert case.run(out, "--dry-run", before=FREE.format(needed - there)).code == 0
    case.check_finishes(out)
