"""Servers that fail: the same command finishes with the same bytes, or one line says why."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import remote_jobs
from command_line import ENV
from range_server import FAULTS, Handler, serving
from remote_jobs import argv, contents, run, run_all
from survival_servers import COMMANDS, KINDS, NOT_THERE, Service, killed_at_random, services

from streamer.storage.checkpoint import TensorFile

SLICE = 40
"""One request of so many is disturbed."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Service]]:
    with services(tmp_path_factory.mktemp("services"), SLICE, "0", [*COMMANDS]) as made:
        yield dict(made)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_server_faults_is_survived(found: dict[str, Service], kind: str) -> None:
    """The table's kinds of fault, at a few requests of one command; `survival.py` tries all."""
    commands = [command for command in COMMANDS if kind not in NOT_THERE.get(command, ())]
    command = commands[list(KINDS).index(kind) % len(commands)]
    tally = KINDS[kind](found[command])
    assert tally.problems == []
    assert tally.injected > 0
    assert tally.passed


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_server_fault_is_survived(found: dict[str, Service], command: str, kind: str) -> None:
    if kind not in NOT_THERE.get(command, ()):
        tally = KINDS[kind](replace(found[command], every=1))
        assert tally.problems == []
        assert tally.passed


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_random_moments(found: dict[str, Service], command: str) -> None:
    tally = killed_at_random(found[command], 100)
    assert tally.problems == []
    assert tally.passed


def test_every_fault_of_the_server_is_tried() -> None:
    assert {fault for fault in FAULTS if not any(fault in kind for kind in KINDS)} == {
        "changed"
    }  # as "other ETag"


@pytest.mark.long
def test_ctrl_c_ends_the_wait_that_a_server_asks_for(served: Path, tmp_path: Path) -> None:
    asked = Event()

    def busy(path: str, before: int) -> str | None:
        if path.startswith("base/model-") and before > 5:
            asked.set()
            return "429"
        return None

    with serving(served, fault=busy, retry_after=100) as site:
        line = argv("detect", f"{site.address}/base", f"{site.address}/adapter", tmp_path)
        with subprocess.Popen(
            [sys.executable, "-m", "streamer", *map(str, line)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENV | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        ) as process:
            assert asked.wait(300)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert stderr.endswith("streamer: stopped by signal 2; the same command resumes\n")


def test_another_version_of_the_base_is_another_input(served: Path, tmp_path: Path) -> None:
    """An interrupted run does not go on with it."""
    root = remote_jobs.world(tmp_path / "w")
    with serving(root) as site:
        base = f"{site.address}/base"
        adapter = f"{site.address}/adapter"
        home = tmp_path / "out"
        assert run("detect", base, adapter, home).code == 0
        shard = root / "base" / "model-00001-of-00003.safetensors"
        data = bytearray(shard.read_bytes())
        data[-4000:-2000] = bytes(2000)
        shard.write_bytes(data)
        done = run("detect", base, adapter, home)
    assert (done.code, done.err.count("\n")) == (4, 1), done


class Unlisted(Handler):
    """Refuses what is not there, as a bucket does that may not be listed."""

    def plain(self, status: int, headers: dict[str, str] | None = None) -> None:
        super().plain(403 if status == 404 else status, headers)


def test_what_is_refused_beside_files_that_are_absent_is_not_left_out(
    served: Path, local: dict[str, str], tmp_path: Path
) -> None:
    """Its tokenizer would be missing in a merged model."""

    def refuse(path: str, before: int) -> str | None:
        return "403" if path == "base/tokenizer.json" else None

    with serving(served, peek_fault=refuse) as site:
        done = run("detect", f"{site.address}/base", f"{site.address}/adapter", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (3, 1), done
    assert "base/tokenizer.json: the server refuses to give it (status 403)" in done.err
    with serving(served, Unlisted) as site:
        assert (
            contents(
                run_all(f"{site.address}/base", f"{site.address}/adapter", tmp_path / "unlisted")
            )
            == local
        )


def test_code_of_a_model_that_is_refused_is_not_left_out(served: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(served, tmp_path / "served"))
    config = json.loads((root / "base" / "config.json").read_text())
    (root / "base" / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModel": "modeling_own.Own"}})
    )
    (root / "base" / "modeling_own.py").write_text("")

    def refuse(path: str, before: int) -> str | None:
        return "403" if path == "base/modeling_own.py" else None

    with serving(root, peek_fault=refuse) as site:
        done = run("detect", f"{site.address}/base", f"{site.address}/adapter", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (3, 1), done
    assert "base/modeling_own.py: the server refuses to give it (status 403)" in done.err


@pytest.mark.parametrize("sampled", [True, False])
def test_other_bytes_of_the_same_version_are_seen_by_samples_alone(
    tmp_path: Path, sampled: bool
) -> None:
    """The middle 4096 bytes of each tensor are looked at; what is before them is merged as it comes."""
    root = remote_jobs.world(tmp_path / "w")
    with serving(root) as site:
        base = f"{site.address}/base"
        adapter = f"{site.address}/adapter"
        assert run("detect", base, adapter, tmp_path / "out").code == 0
        name = "base/model-00001-of-00003.safetensors"
        site.tags[name] = site.tag(root / name, name)
        header = TensorFile(root / name).header
        tensor = header.by_name["model.layers.0.mlp.up_proj.weight"]
        at = header.data_start + tensor.start + (tensor.nbytes // 2 if sampled else 0)
        with (root / name).open("r+b") as f:
            f.seek(at)
            f.write(bytes(64))
        done = run("merge", base, adapter, tmp_path / "out")
    assert done.code == (3 if sampled else 0), done
    assert done.told.count("\n") == (1 if sampled else 0)
