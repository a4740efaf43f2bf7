"""A detection that is interrupted goes on with the threads that it began with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import intruding_factors, power_law, write_adapter, write_sharded

import streamer
from streamer.events import Event, Monitor


@pytest.fixture
def events() -> Iterator[list[Event]]:
    """What a monitor is told; torch has its threads again when the test ends."""
    before = torch.get_num_threads()
    yield []
    torch.set_num_threads(before)


@pytest.mark.parametrize("second", [1, 3])
def test_an_interrupted_detection_goes_on_with_its_threads(events: list[Event], tmp_path: Path, second: int) -> None:
    """The last bits of findings depend on them, and what is resumed is to be what an uninterrupted run writes."""
    base, adapter = wide(tmp_path)
    torch.set_num_threads(2)
    whole = tmp_path / "whole.safetensors"
    streamer.detect_intruder_dimensions(base, adapter, whole, solver="certified")

    def stop(event: Event) -> None:
        if event.stage == "detect" and event.done:
            monitor.request_stop(2)

    path, monitor = tmp_path / "f.safetensors", Monitor(stop)
    with pytest.raises(streamer.StreamerError, match="stopped"):
        streamer.detect_intruder_dimensions(base, adapter, path, solver="certified", monitor=monitor)
    torch.set_num_threads(second)
    streamer.detect_intruder_dimensions(base, adapter, path, solver="certified", on_event=events.append)
    assert path.read_bytes() == whole.read_bytes()
    assert torch.get_num_threads() == second
    assert [e.name for e in events if e.stage == "note"] == [
        "resuming: 2 of 3 matrices are done",
        f"goes on with 2 threads, as it began; --no-resume starts over with {second}",
    ]


def wide(directory: Path) -> tuple[Path, Path]:
    """Matrices that are large enough for more than one thread."""
    shape, tensors, factors = (600, 700), {}, {}
    for i in range(3):
        tensors[f"a.{i}.weight"] = power_law(*shape, seed=i).float()
        factors[f"a.{i}"] = intruding_factors(*shape, 4, seed=i)
    return write_sharded(directory / "base", [tensors]), write_adapter(directory / "adapter", factors, 4)
