"""Weights on their way to the device: the same values on every device present, so many ahead, and the CPU where a GPU has no room."""

import threading
from pathlib import Path

import pytest
import torch

import streamer
from streamer.detection.detect import detect_all, detect_matrix, read_ahead
from streamer.detection.findings import MatrixFinding
from streamer.detection.options import DetectionOptions
from streamer.detection.solvers import cost
from streamer.events import Event, Monitor
from streamer.plan.plan import AdapterBatch, Plan, make_plan
from streamer.run import Run
from streamer.weights.base import Plain

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NO_ROOM = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 448.00 MiB.")


@pytest.fixture
def plan(job: tuple[Path, Path]) -> Plan:
    return make_plan(*job)


def decisions(found: MatrixFinding) -> tuple[object, ...]:
    return found.tensor, found.detection.intruders, found.detection.certified


@pytest.mark.parametrize("depth", [1, 2])
def test_so_many_are_read_ahead_and_no_more(depth: int) -> None:
    begun: list[int] = []
    reached = threading.Condition()

    def load(item: int) -> int:
        with reached:
            begun.append(item)
            reached.notify()
        return 10 * item

    for i, (item, value) in enumerate(read_ahead(range(5), load, depth)):
        assert (item, value) == (i, 10 * i)
        with reached:
            assert reached.wait_for(lambda i=i: len(begun) == min(5, i + 1 + depth), timeout=300)
    assert begun == list(range(5))


def test_whoever_stops_early_waits_for_one_at_most() -> None:
    begun = []
    second = threading.Event()
    go_on = threading.Event()

    def load(item: int) -> int:
        begun.append(item)
        if item:
            second.set()
            assert go_on.wait(300)
        return item

    stream = read_ahead(range(9), load, 3)
    next(stream)
    assert second.wait(300)
    threading.Timer(0.2, go_on.set).start()
    stream.close()
    assert begun == [0, 1]


def test_what_cannot_be_read_is_raised_at_its_turn() -> None:
    stream = read_ahead([1, 0, 2], lambda item: 1 / item, 2)
    assert next(stream) == (1, 1.0)
    with pytest.raises(ZeroDivisionError):
        next(stream)


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_decides_the_same(plan: Plan, device: str) -> None:
    options = DetectionOptions()
    expected = [
        decisions(detect_matrix(plan, t, options, torch.device("cpu"), 0)) for t in plan.targets
    ]
    found = [
        decisions(f)
        for _, f in detect_all(
            AdapterBatch(plan.base, (plan,)), options, Run(torch.device(device)), 0
        )
    ]
    assert found == expected


@pytest.mark.parametrize(
    "error",
    [NO_ROOM, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), RuntimeError("misaligned")],
)
def test_a_matrix_without_room_on_the_device_is_computed_on_the_cpu_and_that_is_said(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    whole = Plain.whole

    def without_room(self: Plain, device: torch.device) -> torch.Tensor:
        if device.type != "cpu":
            raise error
        return whole(self, device)

    monkeypatch.setattr(Plain, "whole", without_room)
    target = plan.targets[0]
    options = DetectionOptions()
    events = list[Event]()
    if "misaligned" in str(error):  # another error is not hidden
        with pytest.raises(RuntimeError, match="misaligned"):
            detect_matrix(plan, target, options, torch.device("cuda"), 0)
        return
    found = detect_matrix(
        plan, target, options, torch.device("cuda"), 0, monitor=Monitor(events.append)
    )
    text = f"{target.tensor}: cuda has not enough memory for it; it is computed on the CPU"
    assert events == [Event("warning", text)]
    assert decisions(found) == decisions(
        detect_matrix(plan, target, options, torch.device("cpu"), 0)
    )


def test_without_room_on_the_cpu_there_is_nowhere_to_go(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_room(*_: object) -> torch.Tensor:
        raise NO_ROOM

    monkeypatch.setattr(Plain, "whole", without_room)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        detect_matrix(plan, plan.targets[0], DetectionOptions(), torch.device("cpu"), 0)


Job = tuple[Path, Path]


def test_progress_counts_the_solvers_cost(job: Job) -> None:
    base, adapter = job
    events = []
    findings = streamer.detect_intruder_dimensions(base, adapter, on_event=events.append)
    counts = [(e.done, e.total) for e in events if e.stage == "detect"]
    costs = [cost(m.shape, min(10, *m.shape)) for m in findings]
    assert counts == [(sum(costs[:i]), sum(costs)) for i in range(len(costs) + 1)]
