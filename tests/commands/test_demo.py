"""`streamer demo` on the trained model that the package carries: what it runs, prints, keeps and leaves."""

import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import terminal
from command_line import run_cli
from forks import Server
from paths import ROOT
from test_schemas import check

import streamer

PACKAGE = Path(streamer.__file__).parent
WITHOUT_TRANSFORMERS = "sys.modules['transformers'] = None"


def commands(tree: dict[str, Any]) -> list[str]:
    return [step["command"].split()[1] for step in tree["steps"]]


@pytest.mark.long
def test_the_demo_repairs_an_adapter_that_forgets(tmp_path: Path) -> None:
    """Its figures, and that PEFT and transformers load what it keeps."""
    import peft
    import torch
    import transformers

    kept = tmp_path / "kept"
    done = run_cli("demo", "-o", kept, "--json")
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    assert commands(tree) == ["inspect", "detect", "repair", "merge", "verify", "report"]
    assert tree["missing"] is None
    for step, schema in zip(
        tree["steps"],
        ("plan", "findings", "repair", "output", "verification", "output"),
        strict=True,
    ):
        assert step["record"]["schema"].split("/")[0] == f"streamer.{schema}"
    repair = tree["steps"][2]["record"]
    *others, repaired = repair["rows"]
    shrinks = [row for row in others if row["what"] == "shrink"]
    equal = min(shrinks, key=lambda row: abs(row["kept"] - repaired["kept"]))
    assert (repair["chosen"], repaired["what"]) == ("repair", "repair")
    assert repaired["kept"] > 0.85
    assert repaired["divergence"] < 0.8 * equal["divergence"]
    base, merged = (
        transformers.AutoModelForCausalLM.from_pretrained(kept / name)
        for name in ("base", "merged")
    )
    adapted = peft.PeftModel.from_pretrained(base, kept / "repaired")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=0.1, rtol=0.05)
    assert (kept / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.long
def test_the_demo_fits_a_screen_and_leaves_nothing(tmp_path: Path) -> None:
    """Each command is shown with its result; the table follows."""
    shown = terminal.show(80, "demo", env={"TMPDIR": str(tmp_path)})
    assert shown.code == 0, shown.last
    assert list(tmp_path.iterdir()) == []
    assert len(shown.last) < 40
    assert all(len(line) <= 80 for line in shown.last)
    text = "\n".join(shown.last)
    assert text.count("$ streamer ") == 6
    assert "KL left" in text
    assert "next: streamer repair BASE ADAPTER" in text


def test_without_transformers_the_demo_shrinks(server: Server, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    tree = check(
        server.run("demo", "-o", kept, "--json", before=WITHOUT_TRANSFORMERS), "streamer.demo/2"
    )
    assert commands(tree) == ["inspect", "detect", "mitigate", "merge", "verify", "report"]
    assert tree["missing"].endswith("pip install 'intruder-streamer[evaluate]'")
    assert tree["directory"] == str(kept)
    for name in ("shrunk", "merged", "report.html"):
        assert (kept / name).exists()
    done = server.run("demo", before=WITHOUT_TRANSFORMERS)
    assert done.code == 0, done.err
    assert tree["missing"] in done.out
    assert (kept / "report.html").resolve().as_uri() not in done.out


def test_the_demos_commands_can_be_typed(server: Server, tmp_path: Path) -> None:
    """In the directory that it keeps, each finds its own output there."""
    kept = tmp_path / "kept"
    done = server.run("demo", "-o", kept, before=WITHOUT_TRANSFORMERS)
    assert done.code == 0, done.err
    assert (kept / "report.html").as_uri() in done.out
    lines = [
        line.removeprefix("$ ") for line in done.out.splitlines() if line.startswith("$ streamer")
    ]
    assert len(lines) == 6
    for line in lines:
        again = server.run(*shlex.split(line)[1:], before=f"os.chdir({str(kept)!r})")
        assert again.code == 0, again.err


def test_the_demo_refuses_a_directory_that_exists(server: Server, tmp_path: Path) -> None:
    done = server.run("demo", "-o", tmp_path)
    assert (done.code, done.err) == (
        4,
        f"streamer: {tmp_path}: exists; name a directory that does not\n",
    )


def test_the_wheel_has_the_demos_data() -> None:
    """Every file of the package that is no module is package data; the demo's are small."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["streamer"]
    declared = {path for pattern in patterns for path in PACKAGE.glob(pattern) if path.is_file()}
    left_out = {".py", ".pyc"}
    assert {
        path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in left_out
    } == declared
    files = [path for path in declared if path.relative_to(PACKAGE).parts[0] == "demo"]
    assert len(files) > 8
    assert sum(path.stat().st_size for path in files) < 3e6
