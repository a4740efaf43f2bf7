"""Computations in step: their products are made together, one thread runs at a time, and errors and stops leave none behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest
import torch
from helpers import power_law
from seeds import vary
from torch import Tensor

from streamer.linalg.golub_kahan import GolubKahan
from streamer.linalg.operators import Dense, RowBlocks, all_finite
from streamer.linalg.shared_products import NotSharedError, SharedMatrix, run_in_step
from streamer.linalg.torch_state import threads

M, N = 60, 45


@dataclass(frozen=True)
class Counted(Dense):
    """A matrix that notes the columns of its products."""

    made: list[tuple[str, int]] = field(default_factory=list)

    def matmat(self, X: Tensor) -> Tensor:
        self.made.append(("M", X.shape[1]))
        return super().matmat(X)

    def rmatmat(self, Y: Tensor) -> Tensor:
        self.made.append(("Mᵀ", Y.shape[1]))
        return super().rmatmat(Y)


@pytest.fixture
def matrix() -> Counted:
    return Counted(power_law(M, N))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "shared-products"]


def block(seed: int, rows: int = N, columns: int = 4) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(vary(seed)), dtype=torch.float64)


def nothing() -> None:
    pass


def results(futures: list[Future]) -> list:
    return [future.result() for future in futures]


def test_each_gets_its_own_products(matrix: Counted) -> None:
    def compute(i: int) -> Callable[[SharedMatrix], tuple[Tensor, ...]]:
        def work(W: SharedMatrix) -> tuple[Tensor, ...]:
            X, Y = block(i), block(i, M, 3)
            half = W.scaled(0.5).T
            return W.matmat(X), W.rmatmat(Y), half.matmat(Y), half.rmatmat(X), W.T.T.scaled(2).matmat(X)

        return work

    for i, found in enumerate(results(run_in_step(matrix, [compute(i) for i in range(3)], nothing))):
        W, X, Y = matrix.matrix, block(i), block(i, M, 3)
        for product, expected in zip(found, (W @ X, W.T @ Y, W.T @ Y / 2, W @ X / 2, 2 * W @ X), strict=True):
            torch.testing.assert_close(product, expected)
    assert matrix.made == [(name, 48) for name in ("M", "Mᵀ", "Mᵀ", "M", "M")]  # each padded to 16


def test_processes_in_step_cost_the_products_of_the_longest(matrix: Counted) -> None:
    def process(steps: int) -> Callable[[SharedMatrix], Tensor]:
        def work(W: SharedMatrix) -> Tensor:
            gk = GolubKahan(W, block(steps))
            for _ in range(steps):
                gk.step()
            return gk.B

        return work

    found = results(run_in_step(matrix, [process(steps) for steps in (2, 4, 3)], nothing))
    assert matrix.made == [(name, c) for c in (48, 48, 32, 16) for name in ("M", "Mᵀ")]
    for steps, B in zip((2, 4, 3), found, strict=True):
        torch.testing.assert_close(B, process(steps)(matrix))
    again = results(run_in_step(matrix, [process(steps) for steps in (2, 4, 3)], nothing))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_who_fell_out_of_step_is_in_step_again(matrix: Counted) -> None:
    def work(W: SharedMatrix, twice: bool) -> None:
        Y = W.matmat(block(0))
        if twice:
            Y = W.matmat(block(0))
        for _ in range(3):
            Y = W.matmat(W.rmatmat(Y))

    run_in_step(matrix, [lambda W, i=i: work(W, i == 1) for i in range(3)], nothing)
    again = [("M", 48), ("Mᵀ", 48)]
    assert matrix.made == [("M", 48), ("Mᵀ", 32), *again, *again, ("M", 48), ("Mᵀ", 16), ("M", 16)]


def test_rows_on_disk_are_read_once_for_all() -> None:
    values, read = power_law(M, N), []

    def rows(i: int, j: int) -> Tensor:
        read.append((i, j))
        return values[i:j]

    blocks = RowBlocks((M, N), rows, torch.empty(0, dtype=torch.float64))

    def work(W: SharedMatrix) -> tuple[bool, Tensor]:
        return all(map(all_finite, W.pieces())), W.rmatmat(W.matmat(block(0)))

    for finite, product in results(run_in_step(blocks, [work] * 5, nothing)):
        assert finite
        torch.testing.assert_close(product, values.T @ (values @ block(0)))
    assert read == [(0, M)] * 3  # the extreme values, and two products


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_seen(value: float) -> None:
    values = power_law(M, N)
    values[7, 3] = value
    finite = run_in_step(Dense(values), [lambda W: all(map(all_finite, W.pieces()))] * 2, nothing)
    assert results(finite) == [False, False]


def test_extreme_values_are_those_of_the_matrix() -> None:
    (pieces,) = results(run_in_step(Dense(power_law(M, N)), [lambda W: list(W.pieces())], nothing))
    assert [t.tolist() for t in pieces] == [torch.stack(torch.aminmax(power_law(M, N))).tolist()]


def test_an_error_of_one_is_its_own(matrix: Counted) -> None:
    held = []

    class Large:
        def __del__(self) -> None:
            held.append("freed")

    def bad(W: SharedMatrix) -> None:
        large = Large()
        W.matmat(block(0))
        raise ValueError(f"bad {type(large).__name__}")

    def good(W: SharedMatrix) -> Tensor:
        return W.rmatmat(W.matmat(block(0)))

    first, second, third = run_in_step(matrix, [good, bad, good], nothing)
    assert held == ["freed"]
    with pytest.raises(ValueError, match="bad Large"):
        second.result()
    assert torch.equal(first.result(), third.result())
    assert matrix.made == [("M", 48), ("Mᵀ", 32)]


def test_one_that_needs_the_matrix_itself_is_told_so(matrix: Counted) -> None:
    (future,) = run_in_step(matrix, [lambda W: W.dense()], nothing)
    assert isinstance(future.exception(), NotSharedError)


def test_a_stop_ends_all(matrix: Counted) -> None:
    ended, calls = [], []

    def endless(W: SharedMatrix) -> None:
        try:
            while True:
                W.matmat(block(0))
        finally:
            ended.append(W)

    def stop() -> None:
        calls.append(None)
        if len(calls) == 3:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        run_in_step(matrix, [endless] * 4, stop)
    assert len(ended) == 4
    assert len(matrix.made) == 2


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, even where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_comes_out_of_a_wait_and_ends_all(matrix: Counted) -> None:
    begun = []

    def interrupted(W: SharedMatrix) -> None:
        begun.append(W)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        while True:
            W.matmat(block(0))

    with pytest.raises(KeyboardInterrupt):
        run_in_step(matrix, [interrupted] * 3, nothing)
    assert len(begun) == 2


def test_one_thread_runs_at_a_time_in_the_callers_state(matrix: Counted) -> None:
    running, most, seen = [], [], set()

    def work(W: SharedMatrix) -> None:
        for _ in range(5):
            running.append(None)
            time.sleep(0.001)
            most.append(len(running))
            seen.add((torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            running.pop()
            W.matmat(block(0))

    for count in (1, 2):
        with threads(count), torch.inference_mode():
            run_in_step(matrix, [work] * 4, nothing)
        with threads(count), torch.no_grad():
            run_in_step(matrix, [work] * 4, nothing)
    assert set(most) == {1}
    assert seen == {(1, True, False), (2, True, False), (1, False, False), (2, False, False)}
