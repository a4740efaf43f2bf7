"""The benchmark of detection: every figure is there, the solvers agree on what was planted, and mistakes are explained."""

from __future__ import annotations

import json

import pytest
from tool_calls import call_tool

TINY = ("--rank", "6", "--top-k", "5", "--repeats", "1", "--threads", "1")


def measured(*args: str) -> dict:
    done = call_tool("bench_detect", *TINY, "--json", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.long
def test_every_solver_finds_what_was_planted_in_one_table() -> None:
    tree = measured("--shapes", "160x200,200x160", "--solvers", "certified,dense,peft", "--dtype", "bf16")
    assert [tuple(row["shape"]) for row in tree["rows"]] == [(160, 200)] * 3 + [(200, 160)] * 3
    for row in tree["rows"]:
        assert row["agrees"], row
        assert row["intruders"] >= 2, row
        assert row["runs"] == 1, row
        assert min(row["seconds"], row["ratio"]) > 0, row
        assert row["memory"] >= 0, row
        if row["solver"] == "certified":
            assert row["ratio"] == 1, row
            assert row["certified"], row
            assert min(row["steps"], row["products"]) > 0, row


def test_the_top_k_stage_is_compared_with_its_residuals() -> None:
    rows = {row["solver"]: row for row in measured("--shapes", "200x160", "--topk-peers")["topk"]}
    assert {"krylov", "torch.svd_lowrank"} <= set(rows)
    assert rows["krylov"]["residual"] < 1e-4


def test_the_table_for_people_and_the_help() -> None:
    done = call_tool("bench_detect", *TINY, "--shapes", "120x100", "--spectrum", "flat", "--solvers", "certified")
    assert done.returncode == 0, done.stderr
    assert "120x100" in done.stdout
    assert "certified" in done.stdout
    text = call_tool("bench_detect", "--help").stdout
    for option in ("--shapes", "--spectrum", "--solvers", "--topk-peers", "--block", "--repeats", "--json"):
        assert option in text
    assert "python tools/bench_detect.py" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--shapes", "12"), "ROWSxCOLUMNS"),
        (("--solvers", "magic"), "expected certified, blocks, dense, peft"),
        (("--repeats", "0"), "at least 1"),
    ],
)
def test_a_wrong_option_is_explained(args: tuple[str, ...], words: str) -> None:
    done = call_tool("bench_detect", *args)
    assert done.returncode != 0
    assert words in done.stderr
