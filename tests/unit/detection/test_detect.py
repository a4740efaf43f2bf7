"""A detection's run: its device and its progress."""

from __future__ import annotations

from pathlib import Path

import pytest

import streamer
from streamer.detection.cost import cost
from streamer.detection.device import choose_device
from streamer.errors import UsageError

Job = tuple[Path, Path]


@pytest.mark.parametrize("name", ["meta", "mps", "gpu", "cuda:99"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(UsageError, match="device: "):
        choose_device(name)


def test_progress_counts_the_solvers_cost(job: Job) -> None:
    base, adapter = job
    events = []
    findings = streamer.detect_intruder_dimensions(base, adapter, on_event=events.append)
    counts = [(e.done, e.total) for e in events if e.stage == "detect"]
    costs = [cost(m.shape, min(10, *m.shape)) for m in findings]
    assert counts == [(sum(costs[:i]), sum(costs)) for i in range(len(costs) + 1)]
