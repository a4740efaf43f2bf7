"""Products stay in float32 where the process has asked for less, and what it asked for comes back."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from helpers import detect, intruding_factors, power_law

from streamer.detection.options import DetectionOptions
from streamer.linalg.operators import Dense, LowRank
from streamer.linalg.torch_state import (
    full_float32,
    task_threads,
)


@pytest.fixture
def reduced() -> Iterator[None]:
    """A process that multiplies in bf16 where the hardware can."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("reduced")
def test_full_float32_is_restored_afterwards() -> None:
    M = power_law(600, 600).float()
    X = power_law(600, 16).float()
    with full_float32():
        error = float((M @ X - M.double() @ X.double()).abs().max())
    assert error < 1e-5
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.usefixtures("reduced")
def test_full_float32_is_restored_after_an_error() -> None:
    with pytest.raises(ValueError, match="stop"), full_float32():
        raise ValueError("stop")
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.usefixtures("reduced")
@pytest.mark.parametrize("solver", ["certified", "dense"])
def test_detection_does_not_depend_on_the_float32_precision(solver: str) -> None:
    A, B = intruding_factors(300, 400, 4)
    base = Dense(power_law(300, 400).float())
    delta = LowRank(B.float(), A.T.float())
    found = detect(base, delta, DetectionOptions(solver=solver))
    torch.set_float32_matmul_precision("highest")
    again = detect(base, delta, DetectionOptions(solver=solver))
    assert found.similarity == again.similarity
    assert torch.equal(found.U, again.U)


def setting() -> str:
    """How float32 matrices are multiplied, as torch before 2.9 and since calls it."""
    since = hasattr(torch.backends, "fp32_precision")
    return (
        torch.backends.mkldnn.matmul.fp32_precision
        if since
        else torch.get_float32_matmul_precision()
    )


@pytest.mark.usefixtures("reduced")
def test_full_float32_is_restored_by_the_last_thread_that_leaves() -> None:
    """Whichever came first: else the one that stays would multiply in bf16, or its setting would stay after all are gone."""
    inside = Event()
    leave = Event()
    before = setting()

    def hold() -> str:
        with full_float32():
            inside.set()
            assert leave.wait(300)
            return setting()

    with ThreadPoolExecutor(1) as pool:
        with full_float32():
            other = pool.submit(hold)
            assert inside.wait(300)
        leave.set()
        assert other.result() in ("ieee", "highest")
    assert setting() == before not in ("ieee", "highest")


def test_tasks_of_another_number_of_threads_wait() -> None:
    before = torch.get_num_threads()
    order = []
    began = Event()

    def compute(count: int) -> None:
        with task_threads(count):
            order.append((count, torch.get_num_threads()))
            began.set()
            time.sleep(0.1)
            order.append((count, torch.get_num_threads()))

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(compute, 2)
        assert began.wait(300)
        others = [pool.submit(compute, 3), pool.submit(compute, 2)]
        for future in (first, *others):
            future.result()
    assert [count for count, _ in order] in ([2, 2, 2, 2, 3, 3], [2, 2, 3, 3, 2, 2])
    assert all(count == seen for count, seen in order)
    assert torch.get_num_threads() == before
