"""`report` with a page, figures, evaluations and outputs, and `diff`, from outside."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from evaluations import of_findings
from forks import server
from test_schemas import check

import streamer
from streamer.cli.parser import build_parser

Inputs = tuple[Path, Path]


@pytest.fixture(scope="module")
def files(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Findings, an evaluation, a mitigated adapter, and findings on that one."""
    home = tmp_path_factory.mktemp("files")
    found = streamer.detect_intruder_dimensions(*inputs)
    found.save(home / "f.safetensors")
    (home / "e.json").write_text(of_findings(found).to_json())
    streamer.reduce_intruder_dimension(*inputs, home / "half", findings=found, mitigation_lambda=0.5, method="project")
    streamer.detect_intruder_dimensions(inputs[0], home / "half").save(home / "after.safetensors")
    return home


def test_a_page_of_findings_and_an_evaluation(files: Path, tmp_path: Path) -> None:
    line = ("report", files / "f.safetensors", files / "e.json")
    tree = check(server().run(*line, "--json"), "streamer.report/1")
    assert tree["record"] is None
    assert tree["findings"] == json.loads(server().run("report", files / "f.safetensors", "--json").out)
    assert tree["evaluation"]["suggestion"]["name"]
    out = tmp_path / "report.html"
    written = check(server().run(*line, "-o", out, "--json"), "streamer.report/1")
    assert (written.pop("output"), written.pop("state")) == (str(out), "written")
    assert written.pop("files") == [{"file": "report.html", "bytes": out.stat().st_size}]
    assert written == tree
    done = server().run(*line, "-o", out)
    assert done.code == 0
    assert done.out.endswith(f"{out} exists already: 1 file, {out.stat().st_size / 1000:.1f} kB\n")
    assert "variant" in done.out
    refused = server().run("report", files / "f.safetensors", "-o", out)
    assert (refused.code, refused.out) == (4, "")
    assert "holds another report; choose another output, or pass --overwrite" in refused.err
    assert server().run("report", files / "f.safetensors", "-o", out, "--overwrite", "-q").code == 0


def test_the_last_lines_are_the_commands_to_run_next(files: Path, inputs: Inputs, tmp_path: Path) -> None:
    base, adapter = map(str, inputs)
    found = files / "f.safetensors"
    for line, expected in (
        (
            ("detect", base, adapter, "-o", tmp_path / "it's.safetensors"),
            (base, adapter, str(tmp_path / "it's.safetensors")),
        ),
        (("report", found), ("BASE", "ADAPTER", str(found))),
        (("report", found, "-o", tmp_path / "page.html"), ("BASE", "ADAPTER", str(found))),
    ):
        *_, empty, repair, shrink = server().run(*line).out.splitlines()
        assert empty == ""
        args = build_parser().parse_args(shlex.split(repair.removeprefix("next: streamer ")))
        assert (args.command, args.base, args.adapter, args.findings) == ("repair", *expected)
        args = build_parser().parse_args(shlex.split(shrink.removeprefix("or, without text: streamer ")))
        assert (args.command, args.base, *args.adapter, args.method) == ("mitigate", *expected[:2], "shrink")
    for line in (("report", found, files / "e.json"), ("report", files / "half")):
        assert f"--findings {found}" not in server().run(*line).out.splitlines()[-1]


def test_an_evaluation_needs_no_findings(files: Path, tmp_path: Path) -> None:
    e, page = files / "e.json", tmp_path / "page.html"
    evaluation = streamer.load_evaluation(e)
    shown = server().run("report", e)
    assert (shown.code, shown.out.startswith(evaluation.to_dict()["verdict"])) == (0, True)
    tree = check(server().run("report", e, "-o", page, "--json"), "streamer.report/1")
    assert (tree["findings"], tree["record"], tree["evaluation"]) == (None, None, evaluation.to_dict())
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


def test_an_output(files: Path, tmp_path: Path) -> None:
    record = json.loads((files / "half" / "streamer.json").read_text())
    assert check(server().run("report", files / "half", "--json"), "streamer.output/2") == record
    done = server().run("report", files / "half")
    assert "method project, select all, lambda 0.5: 9 of 9 matrices mitigated" in done.out
    tree = check(server().run("report", files / "half", "-o", tmp_path / "r.html", "--json"), "streamer.report/1")
    assert (tree["record"], tree["findings"], tree["lambdas"]) == (record, None, [])


def test_one_page_of_several_adapters(files: Path, inputs: Inputs, tmp_path: Path) -> None:
    """Of the directory that `detect` of several adapters leaves."""
    done = server().run("detect", inputs[0], inputs[1], files / "half", "-o", tmp_path / "found")
    assert done.code == 0, done
    names = sorted(path.stem for path in (tmp_path / "found").glob("*.safetensors"))
    tree = check(server().run("report", tmp_path / "found", "--json"), "streamer.several/1")
    assert [*tree["adapters"]] == names
    out = tmp_path / "report.html"
    done = server().run("report", tmp_path / "found", "-o", out)
    lines = done.out.splitlines()
    assert lines[0].split()[:3] == ["adapter", "matrices", "intruders"]
    assert [line.split()[0] for line in lines[2:4]] == names
    norms = [sum(m["delta_norm"] ** 2 for m in tree["adapters"][name]["matrices"]) ** 0.5 for name in names]
    assert [line.split()[4] for line in lines[2:4]] == [f"{norm:#.4g}" for norm in norms]
    assert lines[-1] == f"wrote {out}: 1 file, {out.stat().st_size / 1000:.1f} kB"
    written = check(server().run("report", tmp_path / "found", "-o", out, "--json"), "streamer.several/1")
    assert (written["state"], written["files"]) == ("present", [{"file": "report.html", "bytes": out.stat().st_size}])


def test_refusals(files: Path, inputs: Inputs, tmp_path: Path) -> None:
    f, e = files / "f.safetensors", files / "e.json"
    for line, code, words in [
        (("report", f, f), 3, "expected an evaluation"),
        (
            ("report", e, f),
            2,
            f"{e}: is an evaluation, as is the second argument; give its findings first, or one evaluation alone",
        ),
        (
            ("report", files, e),
            2,
            f"{files}: holds findings on 2 adapters, but an evaluation covers one; name its findings, such as ",
        ),
        (
            ("report", files, "-o", tmp_path / "figures"),
            2,
            "expected a page, whose name ends in .html; figures for a paper were removed",
        ),
        (("report", f, tmp_path / "no.json"), 3, "no such file"),
        (("report", files / "half", e), 2, "an evaluation is shown with findings"),
        (("report", files / "half", "-o", files / "half" / "r.html"), 4, "lies inside the output"),
        (("report", f, "-o", f), 2, "expected a page, whose name ends in .html"),
        (("report", f, "-o", tmp_path / "r.pdf"), 2, "expected a page, whose name ends in .html"),
        (("report", f, "-o", "s3://b/r.html"), 2, "is an address"),
        (("report", files / "after.safetensors", e), 3, "the evaluation is of another adapter"),
        (("report", inputs[0]), 3, "expected a findings file, found a directory"),
        (("diff", f, e), 3, "safetensors"),
        (("diff", f), 2, "required"),
    ]:
        done = server().run(*line)
        assert (done.code, done.out) == (code, ""), done
        assert words in done.err, done.err
    assert list(tmp_path.iterdir()) == []


def test_diff(files: Path) -> None:
    line = ("diff", files / "f.safetensors", files / "after.safetensors")
    tree = check(server().run(*line, "--json"), "streamer.diff/1")
    assert tree["totals"]["kept"] + tree["totals"]["gone"] == 9
    assert tree["totals"]["kept"] > 0
    assert all(
        one["after"]["singular_value"] < one["before"]["singular_value"] for one in tree["intruders"] if one["after"]
    )
    done = server().run(*line)
    assert done.code == 0
    assert f"9 intruders before, {tree['second']['intruders']} after, in 9 matrices of both" in done.out
    assert done.out.count("model.layers.") == len(tree["intruders"])
    assert f"streamer: diff: {tree['totals']['kept']} remain, " in done.last
