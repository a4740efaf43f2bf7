"""What commands say: JSON, tables, warnings, silence, bars; `report` with a page, evaluations and outputs, and `diff`."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
from evaluations import of_findings
from forks import Outcome, server
from helpers import tree_digest
from test_schemas import check, faults

import streamer
from streamer.cli.parser import build_parser

# What is said ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, dict[str, Outcome]]:
    """Every command with --json, on one job: base, adapter, findings, and how each ended."""
    home = tmp_path_factory.mktemp("said")
    base, adapter = helpers.three_shards(home)
    findings = home / "findings.safetensors"
    runs = {
        "inspect": server().run("inspect", base, adapter, "--json"),
        "detect": server().run("detect", base, adapter, "-o", findings, "--json"),
        "report": server().run("report", findings, "--json"),
    }
    for command in ("merge", "mitigate"):
        runs[command] = server().run(
            command,
            base,
            adapter,
            "-o",
            home / command,
            "--findings",
            findings,
            "--lambda",
            "0.5",
            "--json",
        )
    return base, adapter, findings, runs


def test_json_is_one_object_on_a_silent_terminal(
    said: tuple[Path, Path, Path, dict[str, Outcome]],
) -> None:
    for name, done in said[3].items():
        assert (done.code, done.told) == (0, ""), name
        assert faults(json.loads(done.out)) == []
    (lost,) = json.loads(said[3]["mitigate"].out)["warnings"]
    assert lost.startswith("lost in projection: ")
    assert f"streamer: warning: {lost}\n" in said[3]["mitigate"].err + said[3]["mitigate"].last


def test_json_of_findings(said: tuple[Path, Path, Path, dict[str, Outcome]]) -> None:
    base, _, _, runs = said
    detected = json.loads(runs["detect"].out)
    reported = json.loads(runs["report"].out)
    for tree in (detected, reported):
        assert tree["schema"] == "streamer.findings/1"
        assert tree["options"] == {
            "top_k": 10,
            "threshold_epsilon": 0.5,
            "solver": "auto",
            "max_memory": None,
        }
        assert tree["totals"]["matrices"] == len(tree["matrices"]) == 9
        assert (
            tree["totals"]["intruders"] == sum(len(m["intruders"]) for m in tree["matrices"]) >= 9
        )
        assert [m["tensor"] for m in tree["matrices"]] == [
            name
            for shard in sorted(base.glob("*.safetensors"))
            for name in tensors_in_order(shard)
            if not name.endswith(("layernorm.weight", "counter"))
        ]
    assert all(m["seconds"] > 0 for m in detected["matrices"])
    assert all(m["seconds"] is None for m in reported["matrices"])  # a file holds no times
    assert (detected.pop("output"), detected.pop("state")) == (str(said[2]), "written")
    for tree in (detected, reported):
        tree["totals"].pop("seconds")
        for m in tree["matrices"]:
            m.pop("seconds")
    assert detected == reported


def tensors_in_order(file: Path) -> list[str]:
    with file.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    header.pop("__metadata__", None)
    return sorted(header, key=lambda name: header[name]["data_offsets"])


@pytest.mark.parametrize("command", ["merge", "mitigate"])
def test_json_of_what_was_written(
    said: tuple[Path, Path, Path, dict[str, Outcome]], command: str
) -> None:
    tree = json.loads(said[3][command].out)
    out = Path(tree["output"])
    assert (tree["schema"], tree["command"], tree["lambda"]) == ("streamer.output/2", command, 0.5)
    assert tree["state"] == "written"
    assert (tree["method"], tree["scale"]) == ("paper", "all")
    digests = tree_digest(out)
    assert {f["file"]: f["sha256"] for f in tree["files"]} == {
        k: v for k, v in digests.items() if k != "streamer.json"
    }
    assert all(f["bytes"] == (out / f["file"]).stat().st_size for f in tree["files"])
    assert tree["totals"]["bytes"] == sum(f["bytes"] for f in tree["files"])
    assert len(tree["matrices"]) == tree["totals"]["matrices"] == tree["totals"]["changed"] == 9
    for m in tree["matrices"]:
        assert 0 < m["delta_norm_after"] < m["delta_norm"]
        assert 0 <= m["dropped"] < 1
    assert (tree["totals"]["dropped_max"] > 0) == (command == "mitigate")
    assert 0 < tree["totals"]["equal_norm_shrink"] < 1
    stands = json.loads((out / "streamer.json").read_text())
    assert tree == {**stands, "output": str(out), "state": "written"}


def test_json_of_a_plan(said: tuple[Path, Path, Path, dict[str, Outcome]]) -> None:
    tree = json.loads(said[3]["inspect"].out)
    assert tree["totals"]["matrices"] == 9
    assert tree["totals"]["largest_matrix_bytes"] == 2 * 48 * 96
    assert {m["matched"] for m in tree["matrices"]} == {"exact"}
    (rule,) = tree["names"]
    assert (rule["rule"], rule["modules"], rule["why"]) == ("exact", 9, "the module's own name")
    assert rule["tensor"] == f"{rule['module']}.weight"
    assert tree["totals"]["tensors"] == 15


def test_a_shrunk_adapter_has_no_intruders_to_count(job: tuple[Path, Path], tmp_path: Path) -> None:
    """What is scaled is each matrix as a whole: a table that said how many intruders were would say 0 of each."""
    several = tmp_path / "several"
    several.mkdir()
    for name in ("one", "two"):
        shutil.copytree(job[1], several / name)
    for command, adapter in (("merge", job[1]), ("mitigate", job[1]), ("merge", several)):
        options = ("--method", "shrink", "--lambda", "0.5")
        done = server().run(
            command, job[0], adapter, "-o", tmp_path / f"{command}-{adapter.name}", *options
        )
        assert done.code == 0, done.err
        assert "scaled" not in done.out
        assert "9 of 9 matrices mitigated, each as a whole" in done.out or adapter == several


def test_quiet_leaves_warnings_and_twice_says_nothing(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = job
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": {"total_size": 1}}))
    findings = tmp_path / "f.safetensors"
    runs = [
        ("inspect", base, adapter),
        ("detect", base, adapter, "-o", findings),
        ("report", findings),
        ("merge", base, adapter, "-o", tmp_path / "m"),
        ("merge", base, adapter, "-o", tmp_path / "m"),
        ("mitigate", base, adapter, "-o", tmp_path / "a", "--method", "project"),
        ("merge", base, adapter, "-o", tmp_path / "d", "--dry-run"),
    ]
    for argv in runs:
        done = server().run(*argv, "-q")
        assert (done.code, done.out, done.last) == (0, "", ""), argv
        assert (
            re.fullmatch(r"streamer: warning: [^\n]*total_size says 1, [^\n]*\n", done.err)
            or argv[0] == "report"
        )
        done = server().run(*argv, *(["-qq"] if argv[0] == "merge" else ["--quiet", "-q"]))
        assert (done.code, done.out, done.err, done.last) == (0, "", "", ""), argv
    lossy = ("mitigate", base, adapter, "-o", tmp_path / "lossy", "--lambda", "0")
    assert (
        server()
        .run(*lossy, "-q")
        .last.startswith("streamer: warning: lost in projection: more than 1 %")
    )
    assert server().run(*lossy, "-qq").err == ""
    refused = server().run("merge", base, adapter, "-o", base, "-qq")
    assert refused.code == 4
    assert refused.err.count("\n") == 1  # an error is told all the same


def test_a_reader_that_leaves_is_no_fault(
    said: tuple[Path, Path, Path, dict[str, Outcome]],
) -> None:
    closed = "r, w = os.pipe(); os.close(r); os.dup2(w, 1)"
    done = server().run("report", said[2], "--json", before=closed)
    assert (done.code, done.told) == (0, "")


Inputs = tuple[Path, Path]


@pytest.fixture(scope="module")
def files(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Findings, an evaluation, a mitigated adapter, and findings on that one."""
    home = tmp_path_factory.mktemp("files")
    found = streamer.detect_intruder_dimensions(*inputs)
    found.save(home / "f.safetensors")
    (home / "e.json").write_text(of_findings(found).to_json())
    streamer.reduce_intruder_dimension(
        *inputs, home / "half", findings=found, mitigation_lambda=0.5, method="project"
    )
    streamer.detect_intruder_dimensions(inputs[0], home / "half").save(home / "after.safetensors")
    return home


def test_a_page_of_findings(files: Path, tmp_path: Path) -> None:
    line = ("report", files / "f.safetensors")
    tree = check(server().run(*line, "--json"), "streamer.findings/1")
    out = tmp_path / "report.html"
    written = check(server().run(*line, "-o", out, "--json"), "streamer.findings/1")
    assert written == {**tree, "output": str(out), "state": "written"}
    done = server().run(*line, "-o", out)
    assert done.code == 0
    assert f"{out} exists already: {out.stat().st_size / 1000:.1f} kB\n" in done.out
    refused = server().run("report", files / "e.json", "-o", out)
    assert (refused.code, refused.out) == (4, "")
    assert "holds another report; choose another output, or pass --overwrite" in refused.err
    assert server().run("report", files / "e.json", "-o", out, "--overwrite", "-q").code == 0


def test_the_last_lines_are_the_commands_to_run_next(
    files: Path, inputs: Inputs, tmp_path: Path
) -> None:
    base, adapter = map(str, inputs)
    found = files / "f.safetensors"
    for line, expected in (
        (("detect", base, adapter, "-o", tmp_path / "it's.safetensors"), (base, adapter)),
        (("report", found), ("BASE", "ADAPTER")),
        (("report", found, "-o", tmp_path / "page.html"), ("BASE", "ADAPTER")),
    ):
        *_, empty, repair = server().run(*line).out.splitlines()
        assert empty == ""
        args = build_parser().parse_args(shlex.split(repair.removeprefix("next: streamer ")))
        assert (args.command, args.base, args.adapter) == ("repair", *expected)


def test_an_evaluation_needs_no_findings(files: Path, tmp_path: Path) -> None:
    e = files / "e.json"
    page = tmp_path / "page.html"
    evaluation = streamer.load_evaluation(e)
    shown = server().run("report", e)
    assert (shown.code, shown.out.startswith(evaluation.to_dict()["verdict"])) == (0, True)
    tree = check(server().run("report", e, "-o", page, "--json"), "streamer.evaluation/1")
    assert tree == {**evaluation.to_dict(), "output": str(page), "state": "written"}
    assert "<h1>Evaluation of " in page.read_text()
    same = tmp_path / "same.html"
    streamer.write_report(evaluation, same)
    assert same.read_bytes() == page.read_bytes()


def test_a_legend_is_shown_once(files: Path, tmp_path: Path) -> None:
    """Not with `--no-legend`, and not beside a page, which explains its figures."""
    findings = files / "f.safetensors"
    words = "the intruders' share of |delta|^2"
    with_it = server().run("report", findings).out
    assert with_it.count(words) == 1
    for options in (["--no-legend"], ["-o", tmp_path / "page.html"]):
        done = server().run("report", findings, *options)
        assert done.code == 0, done.err
        assert words not in done.out
        assert done.out.startswith(with_it.split("\n\n")[0])


def test_a_report_shows_an_output(files: Path, tmp_path: Path) -> None:
    record = json.loads((files / "half" / "streamer.json").read_text())
    assert check(server().run("report", files / "half", "--json"), "streamer.output/2") == record
    done = server().run("report", files / "half")
    assert "method project, select all, lambda 0.5: 9 of 9 matrices mitigated" in done.out
    tree = check(
        server().run("report", files / "half", "-o", tmp_path / "r.html", "--json"),
        "streamer.output/2",
    )
    assert tree == {**record, "output": str(tmp_path / "r.html"), "state": "written"}


def test_refusals(files: Path, inputs: Inputs, tmp_path: Path) -> None:
    f = files / "f.safetensors"
    e = files / "e.json"
    for line, code, words in [
        (("report", f, e), 2, f"unexpected argument '{e}'"),
        (("report", files), 3, f"{files}: expected a findings file, found a directory"),
        (
            ("report", f, "-o", tmp_path / "figures"),
            2,
            f"expected a name that ends in .html, such as {tmp_path}/figures.html",
        ),
        (("report", tmp_path / "no.json"), 3, "no such file"),
        (("report", inputs[0]), 3, "expected a findings file, found a directory"),
    ]:
        done = server().run(*line)
        assert (done.code, done.out) == (code, ""), done
        assert words in done.err, done.err
    assert list(tmp_path.iterdir()) == []


def test_findings_that_live_until_the_process_ends_say_nothing(
    said: tuple[Path, Path, Path, dict[str, Outcome]],
) -> None:
    """Under a global name, they outlive the modules that close their file."""
    code = f"import streamer; findings = streamer.load_findings({str(said[2])!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
