"""The benchmark of many adapters: every figure is there, and the decisions are those of each alone."""

from __future__ import annotations

import json

import pytest
import torch
from tool_calls import call_tool

from streamer.linalg.torch_state import threads


@pytest.mark.long
def test_small_matrices_give_every_figure() -> None:
    with threads(torch.get_num_threads()):
        done = call_tool(
            "bench_adapters", "--shape", "640x700", "--matrices", 1, "--adapters", 3, "--rounds", 2, "--json"
        )
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    assert len(tree["rounds"]) == 2
    for row in tree["rounds"]:
        assert row["equal"] == row["decided"] == 3
        assert row["in_one_pass_share"] == pytest.approx(row["in_one_pass"] / row["in_turn"])
        assert min(row.values()) > 0
    assert set(tree["spread"]) == set(tree["rounds"][0])


def test_it_says_how_it_is_used() -> None:
    assert (
        "2 of 2 decisions equal"
        in call_tool("bench_adapters", "--shape", "96x64", "--matrices", 1, "--adapters", 2, "--rounds", 1).stdout
    )
