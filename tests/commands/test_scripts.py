"""What scripts and workflow systems rely on: times of files, outputs made beforehand, --overwrite, hints, JSON on failure, events."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forks import KILL, server
from helpers import ENV, tree_digest

import streamer
from streamer.errors import OutputError, UsageError

WRITING = ("detect", "merge", "mitigate")
OLD = 1_000_000_000  # seconds: the year 2001


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    import helpers

    return helpers.three_shards(tmp_path_factory.mktemp("inputs"))


def target(home: Path, command: str) -> Path:
    return home / ("f.safetensors" if command == "detect" else "out")


def age(path: Path) -> None:
    """Make everything below a path old."""
    for p in [*path.rglob("*"), path]:
        os.utime(p, (OLD, OLD))


def ok(*argv: object) -> dict:
    done = server().run(*argv, "--json")
    assert done.code == 0, done
    return json.loads(done.out)


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


@pytest.mark.parametrize("command", WRITING)
def test_an_output_that_stands_is_not_told_as_written(inputs: tuple[Path, Path], tmp_path: Path, command: str) -> None:
    """In the table, and in the last line, which a log has."""
    out = target(tmp_path, command)
    first, again = (server().run(command, *inputs, "-o", out) for _ in range(2))
    assert f"wrote {out}: " in first.out
    assert "already" not in first.out + first.last
    assert f"{out} stands already: " in again.out
    assert "wrote" not in again.out
    assert again.last.startswith(first.last.rpartition(", in ")[0] + ", stands already, in ")


def test_of_several_outputs_those_that_stand_are_counted(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    for name in ("a", "b"):
        shutil.copytree(adapter, tmp_path / "adapters" / name)
    line = ("detect", base, tmp_path / "adapters", "-o", tmp_path / "out")
    assert f"wrote {tmp_path / 'out'}\n" in server().run(*line).out
    (tmp_path / "out" / "a.safetensors").unlink()
    some, all_ = (server().run(*line) for _ in range(2))
    assert f"wrote {tmp_path / 'out'}\n" in some.out
    assert ", 1 of 2 stand already, in " in some.last
    assert f"{tmp_path / 'out'} stands already\n" in all_.out
    assert ", 2 of 2 stand already, in " in all_.last


def test_what_does_not_stand_is_made_and_nothing_else_gets_a_time(inputs: tuple[Path, Path], tmp_path: Path) -> None:
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


@pytest.mark.parametrize("command", WRITING)
def test_a_killed_run_is_resumed_and_says_so(inputs: tuple[Path, Path], tmp_path: Path, command: str) -> None:
    out = target(tmp_path, command)
    assert server().run(command, *inputs, "-o", out, at=12, code=KILL).code == -signal.SIGKILL
    assert ok(command, *inputs, "-o", out)["state"] == "resumed"


@pytest.mark.parametrize("command", WRITING)
def test_missing_parents_are_made(inputs: tuple[Path, Path], tmp_path: Path, command: str) -> None:
    out = target(tmp_path / "a" / "b", command)
    ok(command, *inputs, "-o", out)
    assert out.exists()


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


def test_a_large_file_that_was_edited_stays(tmp_path: Path) -> None:
    """At its size: only its digest tells it from the one that was written, however long that takes."""
    import hashlib

    from streamer.storage.old_output import OwnFile, remove_own_files

    data = bytes(70_000_000)
    files = [OwnFile(name, len(data), hashlib.sha256(data).hexdigest()) for name in ("edited", "own")]
    for file in files:
        (tmp_path / file.name).write_bytes(data)
    with (tmp_path / "edited").open("r+b") as f:
        f.seek(1_000_000)
        f.write(b"x")
    remove_own_files(tmp_path, files, ())
    assert [p.name for p in tmp_path.iterdir()] == ["edited"]


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


@pytest.mark.parametrize("n", range(1, 13))
def test_killed_while_it_removes_the_old_output(inputs: tuple[Path, Path], tmp_path: Path, n: int) -> None:
    out = tmp_path / "out"
    ok("merge", *inputs, "-o", out, "--method", "shrink")
    line = ("mitigate", *inputs, "-o", out, "--overwrite", "--method", "shrink")
    assert server().run(*line, at=n, code=KILL).code == -signal.SIGKILL
    ok(*line)
    ok("mitigate", *inputs, "-o", tmp_path / "fresh", "--method", "shrink")
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


# What is refused, with a hint ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["merge", "mitigate"])
@pytest.mark.parametrize("value", ["75", "1.01", "-0.5"])
def test_lambda_that_does_not_mitigate(inputs: tuple[Path, Path], tmp_path: Path, command: str, value: str) -> None:
    line = (command, *inputs, "-o", tmp_path / "out", f"--lambda={value}")
    done = server().run(*line)
    assert (done.code, done.out, done.calls) == (2, "", [])
    assert done.err == (
        f"streamer: --lambda: expected what is left of an intruder, in [0, 1], found {value}; "
        "--amplify permits others: above 1 intruders grow\n"
    )
    if value == "1.01":
        ok(*line, "--amplify")


def test_lambda_of_the_demo_and_of_the_library(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """The library takes any, as PEFT's function does."""
    done = server().run("demo", "--lambda", "2")
    assert (done.code, "in [0, 1], found 2" in done.err) == (2, True)
    streamer.reduce_intruder_dimension(*inputs, tmp_path / "out", mitigation_lambda=1.5)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("-", "-: expected a path, found the sign for stdout"),
        ("s3://bucket/name.safetensors", "is an address, and outputs are written to disks"),
    ],
)
def test_outputs_that_are_no_paths(
    inputs: tuple[Path, Path], tmp_path: Path, output: str, words: str, monkeypatch: pytest.MonkeyPatch
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


@pytest.mark.parametrize("name", ["findings", "findings.json", "findings.safetensors.bak", "findings.SAFETENSORS"])
def test_findings_have_a_name_that_says_what_they_are(inputs: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    done = server().run("detect", *inputs, "-o", tmp_path / name)
    assert (done.code, done.calls) == (2, [])
    assert (
        f"{name}: expected a name that ends in .safetensors, which the findings are; as {tmp_path / name}.safetensors"
        in done.err
    )
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        streamer.detect_intruder_dimensions(*inputs, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("meta-llama/Llama-3.2-1B", "download it: `hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B`"),
        ("https://huggingface.co/user/model/tree/main", "is to come; download it first: `hf download user/model --local-dir model`"),
        ("hf://user/model@main", "is to come; download it first: `hf download user/model --local-dir model`"),
        ("s3://bucket/model", "reading from addresses is to come; download it first, and name the directory"),
        ("https://example.org/model", "reading from addresses is to come; download it first, and name the directory"),
        ("here/missing", "here/missing: no such directory; check the path of the "),
        ("missing", "missing: no such directory; check the path of the "),
    ],
)  # fmt: skip
def test_inputs_that_are_not_here(inputs: tuple[Path, Path], tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "here").mkdir()
    code = f"os.chdir({str(tmp_path)!r})"
    for base, adapter in ((name, inputs[1]), (inputs[0], name)):
        done = server().run("detect", base, adapter, "-o", tmp_path / "f.safetensors", before=code)
        assert (done.code, done.calls) == (3, [])
        assert words in done.err
        assert ("hf download" in done.err) == ("hf download" in words)
        assert done.err.count("\n") == 1


# JSON of failures, and events ---------------------------------------------------------------------------------------


def test_a_failure_is_an_object_too(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    cases = [
        (("merge", tmp_path / "no", inputs[1], "-o", tmp_path / "o"), 3, "MissingInputError", str(tmp_path / "no")),
        (("merge", *inputs, "-o", inputs[0]), 4, "OutputError", str(inputs[0])),
        (("merge", *inputs, "-o", tmp_path / "o", "--lambda", "7"), 2, "UsageError", None),
        (("merge", *inputs, "-o", tmp_path / "o", "--threads", "0"), 2, "UsageError", None),
        (("detect", *inputs, "-o", "f.st"), 2, "UsageError", "f.st"),
        (("report", tmp_path / "no.safetensors"), 3, "MissingInputError", str(tmp_path / "no.safetensors")),
    ]
    for argv, code, kind, path in cases:
        done = server().run(*argv, "--json")
        tree = json.loads(done.out)
        assert tree["schema"] == "streamer.error/1"
        (error,) = tree["errors"]
        assert (done.code, error["exit_code"], error["kind"], error["path"]) == (code, code, kind, path)
        assert done.err == f"streamer: {error['message']}\n"


@pytest.mark.parametrize(
    "argv", [["--json"], ["merge", "--json"], ["detect", "b", "a", "-o", "x", "--top-k", "x", "--json"]]
)
def test_wrong_arguments_are_an_object_too(argv: list[str]) -> None:
    done = server().run(*argv)
    (error,) = json.loads(done.out)["errors"]
    assert (done.code, error["kind"], error["exit_code"], error["path"]) == (2, "UsageError", 2, None)
    assert done.err.splitlines()[-1].endswith(f"error: {error['message']}")


def test_a_fault_of_ours_is_an_object_and_a_traceback(inputs: tuple[Path, Path]) -> None:
    before = (
        "import streamer.cli.main as m\ndef broken(*_): raise RuntimeError('impossible')\nm.COMMANDS['report'] = broken"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {before}\nsys.argv = ['streamer', 'report', 'x', '--json']\nm.main()"],
        capture_output=True, text=True, env=ENV, check=False,
    )  # fmt: skip
    (error,) = json.loads(done.stdout)["errors"]
    assert (done.returncode, error["kind"], error["exit_code"], error["message"]) == (
        1,
        "RuntimeError",
        1,
        "impossible",
    )
    assert "Traceback" in done.stderr


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_events_are_lines_of_json(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    done = server().run("merge", *inputs, "-o", tmp_path / "out", "--json-events", "--json")
    assert json.loads(done.out)["command"] == "merge"
    events = lines(done.err)
    assert events[-1]["event"] == "done"
    assert {e["stage"] for e in events if e["event"] == "progress"} == {"detect", "write"}
    assert all(e["done"] <= e["total"] for e in events if e["event"] == "progress")
    seconds = [e["seconds"] for e in events]
    assert seconds == sorted(seconds)
    again = lines(server().run("merge", *inputs, "-o", tmp_path / "out", "--json-events").err)
    assert [e["event"] for e in again] == ["note", "done"]
    assert "holds this very output already" in again[0]["message"]


def test_events_of_what_goes_wrong(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = shutil.copytree(inputs[0], tmp_path / "base")
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": {"total_size": 1}}))
    out = tmp_path / "out"
    done = server().run("merge", base, inputs[1], "-o", out, "--json-events", "--lambda", "nan")
    (error,) = lines(done.err)
    assert (done.code, error["event"], error["kind"], error["exit_code"]) == (2, "error", "UsageError", 2)
    warned = lines(server().run("inspect", base, "--json-events").err)
    assert [e["event"] for e in warned] == ["warning", "done"]
    (usage,) = lines(server().run("merge", "--json-events").err)
    assert (usage["event"], usage["kind"]) == ("error", "UsageError")


def test_events_of_a_signal(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    code = "os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2)"
    done = server().run("merge", *inputs, "-o", tmp_path / "out", "--json-events", at=12, code=code)
    assert done.code == 128 + signal.SIGTERM
    said = [e for e in lines(done.err) if e["event"] != "progress"]
    assert [e["event"] for e in said] == ["note", "error"]
    assert said[0]["message"].startswith("signal 15: stopping at the next safe point")
    assert (said[1]["kind"], said[1]["exit_code"]) == ("Interrupted", 143)


def test_what_python_warns_of_is_an_event() -> None:
    code = (
        "import warnings; from streamer.cli.json_events import JsonEvents\n"
        "e = JsonEvents(); warnings.warn('odd', stacklevel=1); e.close(); warnings.warn('even', stacklevel=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=True)
    first, *rest = done.stderr.splitlines()
    assert json.loads(first)["message"] == "odd"
    assert "UserWarning: even" in rest[0]


# The parser -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_completion_script(shell: str, tmp_path: Path) -> None:
    done = server().run("--print-completion", shell)
    assert (done.code, done.err) == (0, "")
    assert "mitigate" in done.out
    assert "to-lora" in done.out
    if shell == "bash":
        script = tmp_path / "streamer.bash"
        script.write_text(done.out)
        (tmp_path / "adapter-dir").mkdir()
        ask = (
            f"source {script}; cd {tmp_path}; COMP_WORDS=({{words}}); COMP_CWORD={{at}}; "
            "$(complete -p streamer | sed 's/.*-F \\([^ ]*\\).*/\\1/') streamer; echo ${{COMPREPLY[@]}}"
        )

        def complete(*words: str) -> list[str]:
            text = ask.format(words=" ".join(words), at=len(words) - 1)
            return subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True).stdout.split()

        assert complete("streamer", "mit") == ["mitigate"]
        assert "--lambda" in complete("streamer", "merge", "--l")
        assert "adapter-dir" in complete("streamer", "mitigate", "adapter-")


def test_completion_without_its_library() -> None:
    code = "import sys; sys.modules['shtab'] = None; from streamer.cli.main import run; run(['--print-completion', 'bash'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=False)
    assert done.returncode == 2
    assert (
        "needs shtab, which is not installed: pip install 'intruder-streamer[completion]'"
        in done.stderr.splitlines()[-1]
    )


def test_abbreviations_are_not_taken() -> None:
    """A new option would make them mean something else."""
    assert server().run("merge", "b", "a", "-o", "x", "--lam", "0.5").code == 2


def test_the_examples_in_the_help_are_understood() -> None:
    import shlex

    from streamer.cli.parser import EXAMPLES, build_parser

    for command, text in EXAMPLES.items():
        given = [line.split("|")[0] for line in text.splitlines() if line.startswith("  streamer")]
        assert given, command
        for line in given:
            assert build_parser().parse_args(shlex.split(line)[1:]).command == command


def test_the_help_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    from streamer.cli.parser import EXAMPLES, build_parser

    monkeypatch.setenv("COLUMNS", "80")
    parser = build_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert commands.keys() == EXAMPLES.keys()
    for one in (parser, *commands.values()):
        long = [line for line in one.format_help().splitlines() if len(line) > 80]
        assert not long, long
        assert " _" not in one.format_help()


def test_a_man_page(tmp_path: Path) -> None:
    pytest.importorskip("argparse_manpage")
    tool = Path(__file__).parents[2] / "tools" / "make_man_page.py"
    page = tmp_path / "streamer.1"
    subprocess.run([sys.executable, tool, "-o", page], check=True, env=ENV)
    text = page.read_text()
    for words in ("streamer merge", r"\-\-to\-lora", "exit codes", r"streamer report findings.safetensors \-\-json"):
        assert words in text, words
    if shutil.which("groff"):
        done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", page], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert "what is left of an intruder" in done.stdout


def test_an_address_is_no_directory_of_that_name(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    """A directory that is really called so is taken."""
    (tmp_path / "s3:").mkdir()
    assert server().run("mitigate", *inputs, "-o", "s3:/out", before=f"os.chdir({str(tmp_path)!r})").code == 0


def test_findings_in_a_directory_that_is_a_link(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Of several adapters, -o must be no symlink, while findings may be read through one."""
    base, adapter = inputs
    other = shutil.copytree(adapter, tmp_path / "other")
    ok("detect", base, adapter, other, "-o", tmp_path / "found")
    (tmp_path / "link").symlink_to("found")
    ok("merge", base, adapter, other, "-o", tmp_path / "models", "--findings", tmp_path / "link", "--dry-run")
    done = server().run("detect", base, adapter, other, "-o", tmp_path / "link")
    assert (done.code, "is a symlink" in done.err) == (4, True)
    with pytest.raises(OutputError):
        streamer.detect_intruder_dimensions(base, [adapter, other], tmp_path / "link")
