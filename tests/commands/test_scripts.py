"""What scripts and workflow systems rely on: times of files, outputs made beforehand, --overwrite, hints, records of other versions."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import WRITING, ok, target
from forks import KILL, server
from helpers import tree_digest

import streamer
import streamer.peft
from streamer.errors import OutputError, UsageError

OLD = 1_000_000_000  # seconds: the year 2001


def age(path: Path) -> None:
    """Make everything below a path old."""
    for p in [*path.rglob("*"), path]:
        os.utime(p, (OLD, OLD))


# Make ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", WRITING)
def test_a_finished_output_that_is_asked_for_again_gets_the_time_of_now(
    inputs: tuple[Path, Path], tmp_path: Path, command: str
) -> None:
    out = target(tmp_path, command)
    assert ok(command, *inputs, "-o", out)["state"] == "written"
    before = tree_digest(tmp_path)
    age(out)
    made = ok(command, *inputs, "-o", out)
    assert (made["state"], made["output"]) == ("present", str(out))
    assert tree_digest(tmp_path) == before
    assert all(p.stat().st_mtime > OLD for p in [*out.rglob("*"), out] if p.is_file() or p == out)


def test_of_several_outputs_those_that_stand_are_counted(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    for name in ("a", "b"):
        shutil.copytree(adapter, tmp_path / "adapters" / name)
    line = ("detect", base, tmp_path / "adapters", "-o", tmp_path / "out")
    assert f"wrote {tmp_path / 'out'}\n" in server().run(*line).out
    (tmp_path / "out" / "a.safetensors").unlink()
    some, all_ = (server().run(*line) for _ in range(2))
    assert f"wrote {tmp_path / 'out'}\n" in some.out
    assert ": 1 of 2 exist already, in " in some.last
    assert f"{tmp_path / 'out'} exists already\n" in all_.out
    assert ": 2 of 2 exist already, in " in all_.last


def test_what_does_not_stand_is_made_and_nothing_else_gets_a_time(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ok("merge", *inputs, "-o", out)
    (out / "notes.txt").write_text("mine")
    age(out)
    assert ok("merge", *inputs, "-o", out, "--dry-run")["state"] == "done"
    assert (out / "streamer.json").stat().st_mtime == OLD
    ok("merge", *inputs, "-o", out)
    assert (out / "notes.txt").stat().st_mtime == OLD


def test_a_time_that_cannot_be_set_is_told(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    before = "import errno\ndef refuse(*a, **k): raise OSError(errno.EROFS, 'Read-only file system', str(a[0]))\nos.utime = refuse"
    for command in WRITING:
        out = target(tmp_path / command, command)
        ok(command, *inputs, "-o", out)
        done = server().run(command, *inputs, "-o", out, before=before)
        assert done.code == 0
        assert "Read-only file system: its time stays; `make` may ask for it again" in done.err


# What is refused, with a hint ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["merge", "mitigate"])
@pytest.mark.parametrize("value", ["75", "1.01", "-0.5"])
def test_lambda_that_does_not_mitigate(
    inputs: tuple[Path, Path], tmp_path: Path, command: str, value: str
) -> None:
    line = (command, *inputs, "-o", tmp_path / "out", f"--lambda={value}")
    done = server().run(*line)
    assert (done.code, done.out, done.calls) == (2, "", [])
    assert done.err == (
        f"streamer: lambda must be between 0 (remove) and 1 (keep), got {value}; `--amplify` allows other values\n"
    )
    if value == "1.01":
        ok(*line, "--amplify")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            75,
            r"be between 0 \(remove\) and 1 \(keep\), got 75; `amplify=True` allows other values$",
        ),
        (np.float32(75), r"got 75; "),
        (-0.5, r"got -0.5; `amplify=True` allows other values$"),
        ("75%", r"be a finite number, got '75%'$"),
        ("0.5", r"be a finite number, got '0.5'$"),
    ],
)
def test_the_library_refuses_what_the_command_refuses(
    inputs: tuple[Path, Path], tmp_path: Path, value: object, words: str
) -> None:
    lam: dict[str, Any] = {"mitigation_lambda": value}
    texts = dict.fromkeys(("general", "task"), tmp_path / "none.txt")
    calls: list[Callable[[], object]] = [
        lambda: streamer.reduce_intruder_dimension(*inputs, tmp_path / "out", **lam),
        lambda: streamer.merge_with_reduced_intruder_dimensions(*inputs, tmp_path / "out", **lam),
        lambda: streamer.iter_merged(*inputs, **lam),
        lambda: streamer.evaluate_variants(*inputs, lambdas=[value], **texts),  # type: ignore[arg-type, list-item]
        lambda: streamer.peft.reduce_intruder_dimension(torch.nn.Linear(2, 2), **lam),
        lambda: streamer.peft.merge_and_unload_with_reduced_intruder_dimensions(
            torch.nn.Linear(2, 2), **lam
        ),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=f"^lambda must .*{words}"):
            call()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("-", "-: expected a path, found the sign for stdout"),
        ("s3://bucket/name.safetensors", "is an address, and outputs are written to disks"),
    ],
)
def test_outputs_that_are_no_paths(
    inputs: tuple[Path, Path],
    tmp_path: Path,
    output: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in WRITING:
        done = server().run(command, *inputs, "-o", output)
        assert (done.code, done.out, done.calls) == (2, "", [])
        assert words in done.err
        assert done.err.count("\n") == 1
    with pytest.raises(UsageError):
        streamer.reduce_intruder_dimension(*inputs, output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["findings", "findings.json", "findings.safetensors.bak", "findings.SAFETENSORS"]
)
def test_findings_have_a_name_that_says_what_they_are(
    inputs: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    done = server().run("detect", *inputs, "-o", tmp_path / name)
    assert (done.code, done.calls) == (2, [])
    assert (
        f"{name}: expected a name that ends in .safetensors, such as {tmp_path / name}.safetensors"
        in done.err
    )
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        streamer.detect_intruder_dimensions(*inputs, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        (
            "meta-llama/no-such-model",
            3,
            "no such path, nor is it in the hub's cache, and HF_HUB_OFFLINE is set",
        ),
        (
            "https://huggingface.co/user/model/tree/main",
            3,
            "nor is it in the hub's cache, and HF_HUB_OFFLINE is set",
        ),
        ("hf://user/model@main", 3, "nor is it in the hub's cache, and HF_HUB_OFFLINE is set"),
        (
            "http://127.0.0.1:9/model",
            6,
            "cannot read in 4 attempts: nothing answers; run the same command again",
        ),
        (
            "ftp://example.org/model",
            2,
            "a name on the hub, or an address that begins with one of hf://, https://, s3://, gs://, az://",
        ),
        ("here/missing", 3, "here/missing: no such directory; check the path of the "),
        ("missing", 3, "missing: no such directory; check the path of the "),
        ("./a/b", 3, "no such directory; check the path of the "),
    ],
)
def test_inputs_that_are_not_here(
    inputs: tuple[Path, Path], tmp_path: Path, name: str, code: int, words: str
) -> None:
    (tmp_path / "here").mkdir()
    at_once = (
        "import streamer.storage.remote_source as access; access._sleep = lambda seconds: None"
    )
    there = f"os.chdir({str(tmp_path)!r}); {at_once}"
    for base, adapter in ((name, inputs[1]), (inputs[0], name)):
        done = server().run("detect", base, adapter, "-o", tmp_path / "f.safetensors", before=there)
        assert (done.code, done.calls) == (code, [])
        assert words in done.err
        assert done.err.count("\n") == 1


def test_an_address_is_no_directory_of_that_name(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    """A directory that is really called so is taken."""
    (tmp_path / "s3:").mkdir()
    assert (
        server()
        .run("mitigate", *inputs, "-o", "s3:/out", before=f"os.chdir({str(tmp_path)!r})")
        .code
        == 0
    )


def test_findings_in_a_directory_that_is_a_link(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Of several adapters, -o must be no symlink, while findings may be read through one."""
    base, adapter = inputs
    other = shutil.copytree(adapter, tmp_path / "other")
    ok("detect", base, adapter, other, "-o", tmp_path / "found")
    (tmp_path / "link").symlink_to("found")
    ok(
        "merge",
        base,
        adapter,
        other,
        "-o",
        tmp_path / "models",
        "--findings",
        tmp_path / "link",
        "--dry-run",
    )
    done = server().run("detect", base, adapter, other, "-o", tmp_path / "link")
    assert (done.code, "is a symlink" in done.err) == (4, True)
    with pytest.raises(OutputError):
        streamer.detect_intruder_dimensions(base, [adapter, other], tmp_path / "link")


# Outputs made beforehand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", WRITING)
def test_an_empty_file_is_taken_like_nothing(
    inputs: tuple[Path, Path], tmp_path: Path, command: str
) -> None:
    out = target(tmp_path, command)
    out.touch()
    assert ok(command, *inputs, "-o", out, "--dry-run")["state"] == "new"
    assert out.stat().st_size == 0
    ok(command, *inputs, "-o", out)
    assert out.is_dir() == (command != "detect")


def test_empty_files_of_an_output_are_taken_like_none(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
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


def test_files_that_only_the_old_output_had_go(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """An adapter written over a model: its shards go, whole directories of its own too; an edited one stays, and what is not ours."""
    out = tmp_path / "out"
    adapter = tmp_path / "fresh"
    ok("merge", *inputs, "-o", out)
    (out / "config.json").write_text("edited")
    (out / "notes.txt").write_text("mine")
    ok("mitigate", *inputs, "-o", out, "--overwrite")
    ok("mitigate", *inputs, "-o", adapter)
    assert tree_digest(out).keys() == {*tree_digest(adapter), "config.json", "notes.txt"}
    assert not (out / "1_Pooling").exists()


@pytest.mark.parametrize(
    "name", ["../victim", "/{home}/victim", "link/victim", "sub/../../victim", "a\0b"]
)
def test_a_record_that_names_files_elsewhere_removes_none(
    inputs: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    import hashlib

    out = tmp_path / "out"
    victim = tmp_path / "victim"
    victim.write_text("x")
    out.mkdir()
    (out / "sub").mkdir()
    (out / "link").symlink_to(tmp_path)
    digest = hashlib.sha256(b"x").hexdigest()
    files = [{"file": name.format(home=str(tmp_path).lstrip("/")), "bytes": 1, "sha256": digest}]
    (out / "streamer.json").write_text(json.dumps({"schema": "streamer.output/1", "files": files}))
    ok("mitigate", *inputs, "-o", out, "--overwrite")
    assert victim.read_text() == "x"


OTHER = "import streamer.output.layout as j, streamer.detection.detect as w; j.__version__ = w.__version__ = '0.10.0-rc1'"
"""Run as another version, whose name has another length."""


def content(path: Path) -> dict[str, str] | bytes:
    return tree_digest(path) if path.is_dir() else path.read_bytes()


def test_a_run_of_another_version_is_not_finished_by_this_one(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    found = tmp_path / "f.safetensors"
    for line, made in ((("merge", *job), out), (("detect", *job), found)):
        whole = tmp_path / f"whole-{made.name}"
        calls = server().run(*line, "-o", whole).calls
        before = server().run(*line, "-o", made, at=len(calls) * 2 // 3, code=KILL, before=OTHER)
        assert before.code == -signal.SIGKILL
        left = tree_digest(out)
        done = server().run(*line, "-o", made)
        assert done.code == OutputError.exit_code
        assert "a run that version 0.10.0-rc1 began, and this is" in done.err.replace(
            "is of a run", "a run"
        )
        assert "pass --no-resume to start it over" in done.err
        assert tree_digest(out) == left
        assert server().run(*line, "-o", made, "--no-resume").code == 0
        assert content(made) == content(whole)


def test_a_finished_output_of_another_version_is_there_already(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    for command in ("merge", "mitigate"):
        out = tmp_path / command
        assert server().run(command, *job, "-o", out, before=OTHER).code == 0
        before = tree_digest(out)
        done = server().run(command, *job, "-o", out, "--json")
        assert (done.code, json.loads(done.out)["state"]) == (0, "present"), done.err
        assert json.loads(done.out)["version"] == "0.10.0-rc1"
        assert tree_digest(out) == before
