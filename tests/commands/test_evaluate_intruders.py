"""`streamer evaluate` of an adapter without intruders, from outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forks import Server
from learned import evaluate as run
from learned import make_learned
from test_schemas import check

import streamer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_learned(tmp_path_factory.mktemp("evaluate"))


def test_without_intruders_nothing_that_scales_them_runs(server: Server, home: Path, tmp_path: Path) -> None:
    """Whether the findings are given or made: a line says so, the file has no such variant, and another run has nothing to do."""
    found = streamer.detect_intruder_dimensions(home / "base", home / "adapter", top_k=4, threshold_epsilon=1e-6)
    assert found.intruders == 0
    found.save(tmp_path / "none.safetensors")
    for name, options in (
        ("given", ["--findings", tmp_path / "none.safetensors"]),
        ("made", ["--top-k", 4, "--epsilon", 1e-6]),
    ):
        output = tmp_path / f"{name}.json"
        done = run(server, home, output, *options, "--lambda", "0.75,0.5")
        assert (done.code, done.err) == (0, ""), name
        assert "no intruder was found (epsilon 1e-06): paper and project change nothing, and were not run" in done.out
        tree = json.loads(output.read_text())
        assert {v["method"] for v in tree["variants"]} == {None, "shrink"}
        assert (tree["intruders"], tree["detection"]["threshold_epsilon"]) == (0, 1e-6)
        again = run(server, home, output, *options, "--lambda", "0.75,0.5", "--json-events")
        assert "exists already" in again.out
        assert not [e for e in map(json.loads, again.err.splitlines()) if e.get("stage") == "evaluate"]
        alone = check(
            run(server, home, tmp_path / f"p{name}.json", *options, "--method", "paper", "--json"),
            "streamer.evaluation/1",
        )
        assert [v["name"] for v in alone["variants"]] == ["base", "adapter"]
    given, made = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("given", "made"))
    assert given["variants"] == made["variants"]
