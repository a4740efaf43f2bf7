"""Set torch's process-wide state for a computation and restore it; allocate large matrices in large pages."""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from streamer.units import MOST_THREADS

CPU = torch.device("cpu")

LARGE_BYTES = 32 << 20
"""Size in bytes above which Linux maps new pages for every matrix; the C library reuses memory for smaller ones."""


def empty_matrix(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate an uninitialised matrix (m, n), with large ones in 2 MB pages if Linux has any.

    With large pages the system clears and maps fewer of them: an upcast takes a third of the time, and products are 5 % faster
    (docs/benchmarks.md).
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and size > LARGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(pages, dtype=dtype).view(shape)
        except OSError:
            pass  # no large pages, or no memory: in the second case torch raises its own error
    return torch.empty(shape, dtype=dtype, device=device)


class _Shared:
    """Share a process-wide state among threads: the first sets it, the last restores it, and threads that need another state wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._state: object = None
        self._holders = 0
        self._restored = contextlib.ExitStack()

    @contextlib.contextmanager
    def hold(
        self, state: object, setting: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._holders == 0 or self._state == state)
            if self._holders == 0:
                self._restored.enter_context(setting())
                self._state = state
            self._holders += 1
        try:
            yield
        finally:
            with self._changed:
                self._holders -= 1
                if self._holders == 0:
                    self._restored.close()
                    self._changed.notify_all()


_PRECISION = _Shared()
_THREADS = _Shared()


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices in full float32 inside the context, and restore the setting afterwards.

    With TF32 a product's relative error is 5e-4 instead of 6e-8. Every bound would widen accordingly, and most matrices would need the
    dense solver.
    """
    with _PRECISION.hold("ieee", _ieee_products):
        yield


@functools.cache
def has_fast_bfloat16() -> bool:
    """Test whether the processor has instructions for products of bfloat16, by its flags in /proc/cpuinfo.

    With AVX512-BF16 alone (EPYC, oneDNN 3.12), products are 1.8 to 2.1 times as fast as in float32; with AMX 2.9 times. Without either
    they take longer.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


@contextlib.contextmanager
def _ieee_products() -> Iterator[None]:
    with contextlib.ExitStack() as restored:
        if hasattr(
            torch.backends, "fp32_precision"
        ):  # torch 2.9; reading the older setting fails after both were used
            for backend in (getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn")):
                restored.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = "ieee"
        else:
            restored.callback(
                torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()
            )
            torch.set_float32_matmul_precision("highest")
        yield


def thread_count(recorded: object) -> int:
    """Return the number of threads that a journal records, or torch's if the record has none that is possible."""
    if type(recorded) is int and 0 < recorded <= MOST_THREADS:
        return recorded
    return torch.get_num_threads()


@contextlib.contextmanager
def threads(count: int = 1) -> Iterator[None]:
    """Compute on `count` torch threads inside the context; one thread is used to merge and write rows.

    With more threads, each small step ends at a barrier. If other processes compete for the cores, waiting there takes many times as long
    as the work (docs/benchmarks.md). On one thread the last bit of a sum does not depend on the number of cores; on several it may.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def task_threads(count: int) -> Iterator[None]:
    """Compute a task on `count` torch threads inside the context, concurrently with tasks of the same count in other threads.

    A task with another count waits until these are done, because part of torch's setting is process-wide and affects last bits.
    """
    with _THREADS.hold(count, lambda: threads(count)):
        torch.set_num_threads(count)  # the other part of the setting belongs to the thread
        yield
