"""Records of runs as commands print them and know them again."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from forks import KILL, server
from helpers import stamp, tree_digest

import streamer
from streamer.detection.findings import load_findings
from streamer.errors import OutputError


def test_the_record_is_what_report_prints(job: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "findings.safetensors"
    streamer.detect_intruder_dimensions(*job, path, top_k=6)
    done = server().run("report", path, "--json")
    assert json.loads(done.out) == load_findings(path).record()


OTHER = (
    "import streamer.output.output_spec as j, streamer.detection.findings_writer as w; "
    "j.__version__ = w.__version__ = '0.10.0-rc1'"
)
"""Run as another version, whose name has another length."""


def content(path: Path) -> dict[str, str] | bytes:
    return tree_digest(path) if path.is_dir() else path.read_bytes()


def test_a_run_of_another_version_is_not_finished_by_this_one(job: tuple[Path, Path], tmp_path: Path) -> None:
    out, found = tmp_path / "out", tmp_path / "f.safetensors"
    for line, target in ((("merge", *job), out), (("detect", *job), found)):
        whole = tmp_path / f"whole-{target.name}"
        calls = server().run(*line, "-o", whole).calls
        before = server().run(*line, "-o", target, at=len(calls) * 2 // 3, code=KILL, before=OTHER)
        assert before.code == -signal.SIGKILL
        left = tree_digest(out)
        done = server().run(*line, "-o", target)
        assert done.code == OutputError.exit_code
        assert "a run that version 0.10.0-rc1 began, and this is" in done.err.replace("is of a run", "a run")
        assert "pass --no-resume to start it over" in done.err
        assert tree_digest(out) == left
        assert server().run(*line, "-o", target, "--no-resume").code == 0
        assert content(target) == content(whole)


def test_a_finished_output_of_another_version_is_there_already(job: tuple[Path, Path], tmp_path: Path) -> None:
    for command in ("merge", "mitigate"):
        out = tmp_path / command
        assert server().run(command, *job, "-o", out, before=OTHER).code == 0
        before = tree_digest(out)
        done = server().run(command, *job, "-o", out, "--json")
        assert (done.code, json.loads(done.out)["state"]) == (0, "present"), done.err
        assert json.loads(done.out)["version"] == "0.10.0-rc1"
        assert tree_digest(out) == before


def test_findings_know_what_they_are_of(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    streamer.detect_intruder_dimensions(base, adapter, tmp_path / "f.safetensors")
    done = server().run("report", tmp_path / "f.safetensors", "--json")
    tree = json.loads(done.out)
    assert (tree["base"]["name"], tree["adapter"]["name"]) == ("base", "adapter")
    # Under another name they are the same inputs.
    base.rename(tmp_path / "moved")
    streamer.merge_with_reduced_intruder_dimensions(
        tmp_path / "moved", adapter, tmp_path / "out", findings=tmp_path / "f.safetensors"
    )
    assert stamp(tmp_path / "out" / "model-00001-of-00003.safetensors")["base"]["name"] == "moved"
