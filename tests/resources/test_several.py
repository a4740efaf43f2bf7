"""What runs of several adapters read, and what is forecast and asked of the disk."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import safetensors
from command_line import ENV
from several import NAMES, WAYS, Several, run

import streamer
from streamer.cli.main import run as streamer_command
from streamer.detection.detect import findings_bytes
from streamer.detection.options import DetectionOptions
from streamer.errors import StorageError
from streamer.plan.plan import make_batch
from streamer.units import format_size


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Several:
    return Several(tmp_path_factory.mktemp("several"))


def bytes_of_matrices(base: Path) -> int:
    found = 0
    for path in base.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as f:
            tensors = [f.get_tensor(name) for name in f.keys()]  # noqa: SIM118
        found += sum(t.nbytes for t in tensors if t.dim() == 2)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_the_forecast_of_all_has_the_base_once(several: Several, way: str, tmp_path: Path) -> None:
    names = ["first", "second", "third"]
    out = tmp_path / "out"
    findings = tmp_path / "findings"
    findings.mkdir()
    for name in names:
        shutil.copytree(several.adapters / "lora", tmp_path / name)
        shutil.copy(several.findings / "lora.safetensors", findings / f"{name}.safetensors")
    verb, base, *rest = several.line(way, out, *(tmp_path / name for name in names))
    line = [verb, base, *(findings if a == several.findings else a for a in rest)]
    tree = json.loads(run(*line, "--dry-run", "--json"))
    each = [tree["adapters"][name]["forecast"] for name in names]
    shared = (
        0 if verb == "detect" else sum(p.stat().st_size for p in several.base.glob("*.safetensors"))
    )
    if not way.endswith("--findings"):  # detection reads the matrices
        shared += bytes_of_matrices(several.base)
    total = tree["forecast"]
    assert total["read_bytes"] == sum(f["read_bytes"] for f in each) - 2 * shared
    assert total["write_bytes"] == sum(f["write_bytes"] for f in each)
    assert total["temporary_bytes"] == sum(f["temporary_bytes"] for f in each)
    assert total["peak_memory_bytes"] == max(f["peak_memory_bytes"] for f in each)
    assert total["escalated_memory_bytes"] == max(f["escalated_memory_bytes"] for f in each)
    assert total["seconds"] == pytest.approx(sum(f["seconds"] for f in each))
    assert tree["free_bytes"] > 0
    text = run(*line, "--dry-run")
    assert text.count("forecast: ") == text.count(" free") == 1
    # What stands already takes nothing.
    given = [several.findings / "lora.safetensors"] if way.endswith("--findings") else []
    run(
        verb, base, tmp_path / "first", *way.split()[1:], *given, "-o", tmp_path / "one.safetensors"
    )
    out.mkdir()
    (tmp_path / "one.safetensors").rename(
        out / ("first.safetensors" if verb == "detect" else "first")
    )
    tree = json.loads(run(*line, "--dry-run", "--json"))
    assert tree["adapters"]["first"]["forecast"] is None
    others = [tree["adapters"][name]["forecast"] for name in names[1:]]
    assert tree["forecast"]["read_bytes"] == sum(f["read_bytes"] for f in others) - shared


def test_all_outputs_must_fit_on_the_disk(
    several: Several, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [several.adapters / name for name in NAMES]
    sizes = [
        sum(
            p.stat().st_size
            for p in (several.alone(WAYS[1]) / name).rglob("*")
            if p.is_file() and p.name != "README.md"
        )
        for name in NAMES
    ]
    free = sum(sizes) - max(sizes) // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    merge = functools.partial(
        streamer.merge_with_reduced_intruder_dimensions, mitigation_lambda=1, model_card=False
    )
    with pytest.raises(
        StorageError,
        match=rf"out: needs [\d.]+ kB, the disk has {re.escape(format_size(free))} free",
    ):
        merge(several.base, paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # What stands need not fit once more.
    merge(several.base, [paths[0]], tmp_path / "out")
    merge(several.base, paths, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == NAMES


def test_all_findings_must_fit_on_the_disk(
    several: Several,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plans = make_batch(several.base, [several.adapters / name for name in NAMES]).plans
    needed = [2 * findings_bytes(plan, DetectionOptions()) for plan in plans]
    free = sum(needed) - 1
    assert free > max(needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    out = tmp_path / "out"
    for more in [], ["--dry-run"]:
        assert (
            streamer_command(
                ["detect", str(several.base), str(several.adapters), "-o", str(out), *more]
            )
            == 6
        )
        assert (
            f"{out}: needs up to {free + 1} B, the disk has {free} B free"
            in capsys.readouterr().err
        )
        assert not out.exists()


READ = """
import sys, torch
torch.set_num_threads(1)
import streamer.cli.main, streamer.api.intruders, streamer.cli.tables
def rchar(): return int(open("/proc/self/io").read().split()[1])
before = rchar()
assert streamer.cli.main.run(sys.argv[1:]) == 0
print(rchar() - before)
"""


def read_by(*argv: object) -> int:
    """Bytes that a command reads by system calls, as the kernel counts them."""
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, argv)],
        env=ENV,
        text=True,
        capture_output=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


@pytest.mark.long
def test_detection_reads_the_base_once(tmp_path: Path) -> None:
    base, adapter = helpers.three_shards(tmp_path, hidden=256)
    size = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    adapters = [
        adapter,
        *(Path(shutil.copytree(adapter, tmp_path / name)) for name in ("second", "third")),
    ]
    options = ("--io", "pread", "--quiet", "--solver", "certified", "--top-k", "1")
    one = read_by("detect", base, adapter, "-o", tmp_path / "one.safetensors", *options)
    three = read_by("detect", base, *adapters, "-o", tmp_path / "three", *options)
    assert one > size
    assert three - one < size / 4 + 2 * 3 * sum(p.stat().st_size for p in adapter.iterdir())


@pytest.mark.long
def test_a_forecast_counts_what_is_read(tmp_path: Path) -> None:
    """Samples, headers and digests included; what a process reads besides, of its own modules, is an eighth of this base at most."""
    base, adapter = helpers.three_shards(tmp_path, hidden=320)
    size = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    line = ["merge", base, adapter, "-o", tmp_path / "out", "--lambda", "1", "--io", "pread"]
    forecast = json.loads(run(*line, "--dry-run", "--json"))["forecast"]["read_bytes"]
    assert forecast <= read_by(*line, "--quiet") < forecast + size / 8


class Cache:
    """The system's page cache, as it is told to drop: which pages come from the disk, and how often."""

    PAGE = 1 << 12

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = {p.stat().st_ino: p.stat().st_size for p in files}
        self.held: dict[int, set[int]] = {ino: set() for ino in self.files}
        self.from_disk = 0

    def read(self, fd: int, at: int, length: int) -> None:
        ino = os.fstat(fd).st_ino
        if ino in self.files:
            pages = set(range(at // self.PAGE, -(-min(at + length, self.files[ino]) // self.PAGE)))
            self.from_disk += len(pages - self.held[ino]) * self.PAGE
            self.held[ino] |= pages

    def advise(self, fd: int, at: int, length: int, what: int) -> None:
        assert what == os.POSIX_FADV_DONTNEED
        if (ino := os.fstat(fd).st_ino) in self.files:
            self.held[ino] -= set(range(-(-at // self.PAGE), (at + length) // self.PAGE))


@pytest.mark.long
def test_merging_reads_the_base_once_and_lets_it_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = helpers.three_shards(tmp_path, hidden=1024)
    second = Path(shutil.copytree(adapter, tmp_path / "second"))
    files = sorted(base.glob("*.safetensors"))
    size = sum(p.stat().st_size for p in files)
    cache = Cache(files)
    preadv = os.preadv
    fadvise = os.posix_fadvise

    def watched_preadv(fd: int, buffers: Sequence[memoryview], at: int) -> int:
        cache.read(fd, at, sum(map(len, buffers)))
        return preadv(fd, buffers, at)

    def watched_fadvise(fd: int, at: int, length: int, what: int) -> None:
        cache.advise(fd, at, length, what)
        fadvise(fd, at, length, what)

    monkeypatch.setattr(os, "preadv", watched_preadv)
    monkeypatch.setattr(os, "posix_fadvise", watched_fadvise)

    def merged(*adapters: Path) -> float:
        """Bytes from the disk, over the base's size."""
        cache.from_disk = 0
        out = tmp_path / f"out of {len(adapters)}"
        streamer.merge_with_reduced_intruder_dimensions(
            base, list(adapters), out, mitigation_lambda=1
        )
        return cache.from_disk / size

    alone = merged(adapter)
    assert alone < 1.1
    assert merged(adapter, second) < alone + 0.1
    # Of each file the last pages stay, which are fewer than one step.
    assert all(len(pages) * cache.PAGE < (1 << 20) + (2 << 12) for pages in cache.held.values())
    # One after the other, they read it twice.
    shutil.rmtree(tmp_path / "out of 1")
    assert merged(second) > 0.9
