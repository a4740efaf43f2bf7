"""The benchmark of whole models: every figure is there and adds up, what was planted is found, and mistakes are explained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_model import forecasts, halves, layer_of
from command_line import ENV
from helpers import tree_digest
from measure import cold, resident, warm
from paths import TOOLS
from tool_calls import call_tool

SMALL = ("--hidden", "192", "--layers", "2")


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOLS / "bench_model.py", "--threads", "1", *map(str, args)],
        capture_output=True,
        text=True,
        env=ENV,
        check=False,
    )


@pytest.mark.long
def test_a_tiny_model_gives_every_figure(tmp_path: Path) -> None:
    done = run(*SMALL, "--kv-heads", 4, "--like", "llama-3-70b", "--work", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    assert tree["matrices"] == tree["certified"] == sum(row["matrices"] for row in tree["shapes"]) == 14
    assert len(tree["layers"]) == 2
    assert 0 < tree["before"] < tree["seconds"]
    assert tree["seconds"] == pytest.approx(tree["before"] + sum(tree["layers"]), rel=0.2)
    rest = tree["seconds"] - sum(tree["layers"])
    assert tree["projected"]["layers"] == 80
    assert tree["projected"]["seconds"] == pytest.approx(rest + 80 * tree["seconds_per_layer"])
    assert tree["planted"] == {"matrices": 6, "intruders": 8, "missed": [], "others": []}
    assert tree["reading"]["waited"] >= tree["reading"]["first"] > 0
    assert 50e6 < tree["anonymous"] < 2e9
    assert [row["done"] >= (i + 1) / 10 for i, row in enumerate(tree["forecasts"])] == [True] * 9
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.long
def test_a_given_model_is_measured_and_left_alone(tmp_path: Path) -> None:
    assert call_tool("make_checkpoint", tmp_path, *SMALL).returncode == 0
    before = tree_digest(tmp_path)
    done = run(tmp_path / "base", tmp_path / "adapter", "--project", 80, "--warm")
    assert done.returncode == 0, done.stderr
    for word in ("projected to 80 layers", "promised", "was hidden", "peak anonymous memory", "672x192"):
        assert word in done.stdout
    assert "planted" not in done.stdout  # of this model it knows nothing
    assert tree_digest(tmp_path) == before


def test_the_forecast_is_compared_with_what_it_came_to() -> None:
    """Ten units, the first half of which takes 1 s each and the second 3 s: halfway through, 10 s are promised of 20."""
    events = [[float(i if i <= 5 else 5 + 3 * (i - 5)), "", i, 10] for i in range(11)]
    rows = forecasts(events)
    assert [row["error"] for row in rows[:5]] == [-0.5] * 5
    assert rows[-1]["promised"] == pytest.approx(17 / 0.9)


def test_layers_are_told_by_name_and_compared_by_halves() -> None:
    assert [
        layer_of(n) for n in ("model.layers.12.mlp.up_proj.weight", "h.3.attn.c_attn.weight", "lm_head.weight")
    ] == [
        12,
        3,
        None,
    ]
    assert halves([1.0, 1.0, 9.0, 1.5, 1.5]) == pytest.approx(0.5)
    assert halves([1.0]) is None


def test_the_page_cache_is_filled_and_seen(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(3 << 20))
    warm(tmp_path)
    assert resident([path]) == 1
    assert 0 <= cold(tmp_path) <= 1  # the system may keep them


@pytest.mark.parametrize(
    ("args", "words"),
    [(("base",), "come together"), (("--project", "0"), "at least 1"), (("--threads", "0"), "at least 1")],
)
def test_a_wrong_option_is_explained(args: tuple[str, ...], words: str) -> None:
    done = call_tool("bench_model", *args)
    assert done.returncode == 2
    assert words in done.stderr


def test_help_teaches() -> None:
    done = call_tool("bench_model", "--help")
    assert done.returncode == 0, done.stderr
    assert "python tools/bench_model.py --like llama-3-70b" in done.stdout
