"""Failures and progress as JSON, and what a log shows while a command runs."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ENV
from forks import server
from test_schemas import check, faults

# JSON of failures, and events ---------------------------------------------------------------------------------------


def test_a_failure_is_an_object_too(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    cases = [
        (
            ("merge", tmp_path / "no", inputs[1], "-o", tmp_path / "o"),
            3,
            "MissingInputError",
            str(tmp_path / "no"),
        ),
        (("merge", *inputs, "-o", inputs[0]), 4, "OutputError", str(inputs[0])),
        (("merge", *inputs, "-o", tmp_path / "o", "--lambda", "7"), 2, "UsageError", None),
        (("merge", *inputs, "-o", tmp_path / "o", "--threads", "0"), 2, "UsageError", None),
        (("detect", *inputs, "-o", "f.st"), 2, "UsageError", "f.st"),
        (
            ("inspect", inputs[1], inputs[0]),
            3,
            "MissingInputError",
            str(inputs[1] / "model.safetensors"),
        ),
        (
            ("mitigate", *inputs, "-o", tmp_path / "o", "--max-memory", "201M"),
            2,
            "UsageError",
            None,
        ),
        (("detect", *inputs, "-o", "s3://b/o.safetensors"), 2, "UsageError", "s3:/b/o.safetensors"),
        (
            ("report", tmp_path / "no.safetensors"),
            3,
            "MissingInputError",
            str(tmp_path / "no.safetensors"),
        ),
    ]
    for argv, code, kind, path in cases:
        done = server().run(*argv, "--json")
        (error,) = check(done, "streamer.error/1", code)["errors"]
        assert (error["exit_code"], error["kind"], error["path"]) == (code, kind, path)
        assert done.err == f"streamer: {error['message']}\n"


@pytest.mark.parametrize(
    "argv",
    [["--json"], ["merge", "--json"], ["detect", "b", "a", "-o", "x", "--top-k", "x", "--json"]],
)
def test_wrong_arguments_are_an_object_too(argv: list[str]) -> None:
    done = server().run(*argv)
    (error,) = check(done, "streamer.error/1", 2)["errors"]
    assert (error["kind"], error["exit_code"], error["path"]) == ("UsageError", 2, None)
    assert done.err == f"streamer: {error['message']}\n"


def test_a_fault_of_ours_is_an_object_and_a_traceback(inputs: tuple[Path, Path]) -> None:
    before = "import streamer.cli.main as m\ndef broken(*_): raise RuntimeError('impossible')\nm.run_command = broken"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; {before}\nsys.argv = ['streamer', 'verify', 'x', '--json']\nm.main()",
        ],
        capture_output=True,
        text=True,
        env=ENV,
        check=False,
    )
    (error,) = json.loads(done.stdout)["errors"]
    assert (done.returncode, error["kind"], error["exit_code"], error["message"]) == (
        1,
        "RuntimeError",
        1,
        "impossible",
    )
    assert "Traceback" in done.stderr


def lines(text: str) -> list[dict]:
    events = [json.loads(line) for line in text.splitlines()]
    assert [fault for event in events for fault in faults(event)] == []
    return events


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
    assert (done.code, error["event"], error["kind"], error["exit_code"]) == (
        2,
        "error",
        "UsageError",
        2,
    )
    warned = lines(server().run("inspect", base, inputs[1], "--json-events").err)
    assert [e["event"] for e in warned if e["event"] != "progress"] == ["warning", "done"]
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
        "import warnings; from streamer.cli.main import JsonEvents\n"
        "e = JsonEvents(); warnings.warn('odd', stacklevel=1); e.close(); warnings.warn('even', stacklevel=1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=True
    )
    first, *rest = done.stderr.splitlines()
    assert json.loads(first)["message"] == "odd"
    assert "UserWarning: even" in rest[0]


def test_a_log_shows_life() -> None:
    """While one matrix takes long and no event comes: the time since the start, the stage, count, share and time left."""
    code = """
import time
from streamer.cli.terminal import ProgressLines
from streamer.events import Event
progress = ProgressLines("plain", 0, "detect", logged=0.2)
progress(Event("detect", "a.weight", 0, 100, 0, 4, "poems"))
time.sleep(0.3)
progress(Event("detect", "b.weight", 50, 100, 2, 4, "poems"))
time.sleep(0.4)
progress(Event("detect", "", 100, 100, 4, 4))
progress.close()
progress.finish("4 matrices")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=True
    )
    first, *between, last = done.stderr.splitlines()
    assert re.fullmatch(r"streamer: detect: after 00:\d\d, 0 of 4 matrices, 0%, poems", first)
    halfway = [line for line in between if ", 2 of 4 matrices, 50%, poems, 00:" in line]
    assert len(halfway) >= 2  # one when an event came, and one when none did
    assert all(
        re.fullmatch(r"streamer: detect: after 00:\d\d, .* 00:\d\d left", line) for line in halfway
    )
    assert re.fullmatch(r"streamer: detect: 4 matrices, in [\d.]+ s", last)
