"""Run computations on one matrix in step: the products with it that they ask for at the same time are made as one.

A product with 16 columns is bound by memory: each column of one with 128 costs about half as much (docs/benchmarks.md), and a matrix that
is read by rows is read once for all.

Each computation has a thread of its own, and exactly one thread runs at a time: the caller's gives each in turn the product that it asked
for, and waits until that one asks for the next. So processors are shared with nobody, and the same computations give the same bits.
"""

from __future__ import annotations

import contextvars
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch
from torch import Tensor

from streamer.linalg.operators import Matrix
from streamer.linalg.torch_state import full_float32, thread_state

T = TypeVar("T")


class NotSharedError(Exception):
    """A computation needs the matrix itself, and is to run alone."""


class _Stopped(BaseException):  # no `except Exception` of a computation takes it
    """The caller waits for no more products."""


@dataclass(frozen=True)
class _Asked:
    """A product: of the matrix, or of its transpose, with a factor."""

    transposed: bool
    X: Tensor


@dataclass(frozen=True)
class SharedMatrix:
    """``scale · M`` for one of the computations of `run_in_step`, which makes its products.

    Attributes
    ----------
    matrix
        M, transposed if `transposed`; it makes no product here.
    ask
        Asks for a product and waits for it.
    extremes
        Gives the least and the largest value of M, NaN where it holds one, in one pass for all computations.
    """

    matrix: Matrix
    ask: Callable[[_Asked], Tensor]
    extremes: Callable[[], Tensor]
    transposed: bool = False
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.matrix.shape

    @property
    def like(self) -> Tensor:
        """An empty tensor of the dtype and device of the products."""
        return self.matrix.like

    @property
    def T(self) -> SharedMatrix:
        """Transpose, sharing products with the others all the same."""
        return replace(self, matrix=self.matrix.T, transposed=not self.transposed)

    def matmat(self, X: Tensor) -> Tensor:
        """``M @ X``."""
        return self.ask(_Asked(self.transposed, X * self.scale))

    def rmatmat(self, Y: Tensor) -> Tensor:
        """``M.T @ Y``."""
        return self.ask(_Asked(not self.transposed, Y * self.scale))

    def dense(self) -> Tensor:
        """Raise `NotSharedError`: full decompositions, each with memory of its own, are for computations that run alone."""
        raise NotSharedError

    def scaled(self, factor: float) -> SharedMatrix:
        """``factor · scale · M``."""
        return replace(self, scale=self.scale * factor)

    def pieces(self) -> Iterator[Tensor]:
        """Iterate over the extreme values, for whoever looks for them or for one that is not finite."""
        yield self.extremes()

    def rows(self) -> Iterator[Tensor] | None:
        """Iterate over the rows of M in order, unscaled, a few at a time; None where that takes all of them."""
        return self.matrix.rows()


def run_in_step(
    matrix: Matrix, computations: Sequence[Callable[[SharedMatrix], T]], before_product: Callable[[], None]
) -> list[Future[T]]:
    """Run computations on a matrix, each in a thread, one at a time, and make the products that they wait for together.

    When all that run wait for a product, those with the matrix or those with its transpose are made, whichever more wait for: who has
    fallen out of step waits for one product, and is in step again.

    Parameters
    ----------
    matrix
        Unscaled, on the CPU.
    computations
        Each takes the matrix. Between two products it may hold memory of its own, beside that of the others.
    before_product
        Called in the caller's thread before each product; what it raises ends all computations.

    Returns
    -------
    list of Future
        All done, in the order of the computations: what each returned or raised. The frames of one that raised hold no memory.
    """
    extremes: list[Tensor] = []

    def found_extremes() -> Tensor:
        if not extremes:
            ends = [torch.stack(torch.aminmax(piece)) for piece in matrix.pieces()]
            extremes.append(torch.stack(torch.aminmax(torch.cat(ends))))
        return extremes[0]

    state = thread_state()
    started: list[_Computation[T]] = []
    try:
        with full_float32():
            for compute in computations:
                started.append(_Computation(matrix, compute, found_extremes, state))
                started[-1].start()
            while waiting := [computation for computation in started if computation.asked is not None]:
                before_product()
                for computation, product in _products(matrix, waiting):
                    computation.go_on(product)
    finally:
        for computation in started:
            computation.stop()
        for computation in started:  # an interrupt here leaves threads that end by themselves
            computation.join()
    return [computation.future for computation in started]


def _clear_frames(e: BaseException | None) -> None:
    """Let go of what the frames of an error hold, and of those that led to it."""
    while e is not None:
        traceback.clear_frames(e.__traceback__)
        e = e.__cause__ or e.__context__


class _Computation(Generic[T]):
    """A computation in a thread that runs while the caller waits in `start` and `go_on`, and waits while the caller runs.

    Attributes
    ----------
    asked
        The product that it waits for; None once it has ended.
    future
        What it returned or raised.
    """

    def __init__(self, matrix: Matrix, compute: Callable[[SharedMatrix], T], extremes: Callable[[], Tensor],
                 state: Callable[[], AbstractContextManager[None]]) -> None:  # fmt: skip
        self.asked: _Asked | None = None
        self.future: Future[T] = Future()
        self._asking: SimpleQueue[_Asked | None] = SimpleQueue()
        self._answers: SimpleQueue[Tensor | None] = SimpleQueue()

        def run() -> None:
            try:
                with state():
                    self.future.set_result(compute(SharedMatrix(matrix, self._ask, extremes)))
            except _Stopped:
                self.future.cancel()
            except BaseException as e:  # whatever it is, the caller raises it
                _clear_frames(e)
                self.future.set_exception(e)
            finally:
                self._asking.put(None)

        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="shared-products")

    def _ask(self, asked: _Asked) -> Tensor:
        """Wait for a product, in the computation's own thread."""
        self._asking.put(asked)
        if (product := self._answers.get()) is None:
            raise _Stopped
        return product

    def start(self) -> None:
        """Run it until it asks for its first product, or ends."""
        self._thread.start()
        self.asked = self._asking.get()

    def go_on(self, product: Tensor) -> None:
        """Give it the product that it waits for, and run it until it asks for the next one, or ends."""
        self._answers.put(product)
        self.asked = self._asking.get()

    def stop(self) -> None:
        """End it, where it has not ended, at the product that it asks for next."""
        self._answers.put(None)

    def join(self) -> None:
        """Wait until its thread has ended."""
        if self._thread.ident is not None:
            self._thread.join()


def _products(matrix: Matrix, waiting: Sequence[_Computation[T]]) -> list[tuple[_Computation[T], Tensor]]:
    """Make the products with the matrix, or with its transpose if more wait for these, as one; each gets a copy of its columns."""
    asked = [(computation, c) for computation in waiting if (c := computation.asked) is not None]
    transposed = 2 * sum(c.transposed for _, c in asked) > len(asked)
    served = [(computation, c.X) for computation, c in asked if c.transposed == transposed]
    # Padded as each would be alone (see `skinny_product`): so most kernels give a column the same bits, whoever is beside it.
    padded = [torch.nn.functional.pad(X, (0, -X.shape[1] % 16)) for _, X in served]
    wide = torch.cat(padded, 1)
    product = matrix.rmatmat(wide) if transposed else matrix.matmat(wide)
    parts = torch.split(product, [X.shape[1] for X in padded], 1)
    return [(computation, part[:, : X.shape[1]].clone()) for (computation, X), part in zip(served, parts, strict=True)]
