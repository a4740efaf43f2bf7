"""The memory of detections that share products: within the budget, and no more than is forecast."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import measure
import pytest
import torch
from command_line import run_cli
from helpers import write_adapter, write_sharded
from seeds import vary

import streamer
from streamer.detection.options import DetectionOptions
from streamer.detection.sharing import sharing_memory
from streamer.plan.batch import Batch
from streamer.plan.memory import resident_bytes
from streamer.plan.plan import make_batch

MODULE, SHAPE, RANK, COUNT = "a.0", (4096, 1024), 32, 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tall matrix with a slowly falling spectrum, and adapters on it."""
    home, (m, n) = tmp_path_factory.mktemp("inputs"), SHAPE
    g = torch.Generator().manual_seed(vary(0))
    left, right = torch.randn(m, 256, generator=g) / m**0.5, torch.randn(256, n, generator=g) / n**0.5
    bulk = torch.randn(m, n, generator=g) / 2000
    W0 = (left * torch.arange(1, 257).pow(-0.4)) @ right + bulk
    base = write_sharded(home / "base", [{f"{MODULE}.weight": W0.bfloat16()}])
    adapters = []
    for i in range(COUNT):
        A, B = torch.randn(RANK, n, generator=g) / n**0.5, torch.randn(m, RANK, generator=g) / m**0.5
        adapters.append(write_adapter(home / f"n{i}", {MODULE: (A, B)}, RANK))
    return [base, *adapters]


def peak(inputs: list[Path], out: Path, *options: str) -> int:
    line = [sys.executable, "-m", "streamer", "detect", *map(str, inputs), "-o", str(out), "--quiet", *options]
    found = measure.watched(line).anonymous
    assert len(list(out.glob("*.safetensors"))) == COUNT
    return found


def shares(batch: Batch, budget: int | None) -> list[int]:
    """The peaks of the groups in a budget."""
    resident = resident_bytes(batch)
    found = [
        memory
        for plan in sharing_memory(batch, DetectionOptions(max_memory=budget), torch.device("cpu"), resident)
        for memory in plan.values()
    ]
    return [memory.peak for memory in found]


@pytest.mark.long
def test_groups_are_as_large_as_the_budget_holds(inputs: list[Path], tmp_path: Path) -> None:
    base, *adapters = inputs
    batch = make_batch(base, adapters)
    (whole,) = set(shares(batch, None))
    (half,) = set(shares(batch, whole - 1))
    assert shares(batch, whole) == [whole] * COUNT
    assert len(shares(batch, whole - 1)) == COUNT
    decisions = set()
    for budget in (whole, half):
        out = tmp_path / str(budget)
        assert 0.6 * budget < peak(inputs, out, "--max-memory", str(budget)) <= budget
        found = [streamer.load_findings(out / f"{adapter.name}.safetensors") for adapter in adapters]
        decisions.add(tuple(m.detection.intruders for findings in found for m in findings))
    assert len(decisions) == 1


@pytest.mark.long
@pytest.mark.parametrize("command", ["detect", "merge"])
def test_a_forecast_counts_all_that_share(inputs: list[Path], command: str, tmp_path: Path) -> None:
    line = [command, *map(str, inputs), "-o", str(tmp_path / "out"), "--dry-run", "--json"]
    tree = json.loads(run_cli(*line).stdout)
    total = tree["forecast"]
    assert total["peak_memory_bytes"] == max(
        tree["adapters"][a.name]["forecast"]["peak_memory_bytes"] for a in inputs[1:]
    )
    alone = json.loads(run_cli(*line[:3], "-o", str(tmp_path / "one.safetensors"), *line[-2:]).stdout)["forecast"]
    assert total["peak_memory_bytes"] > alone["peak_memory_bytes"]
    assert total["escalated_memory_bytes"] >= total["peak_memory_bytes"]
    if command == "detect":
        assert 0.6 * total["peak_memory_bytes"] < peak(inputs, tmp_path / "out") <= total["peak_memory_bytes"]
