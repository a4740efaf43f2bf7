"""Set torch's process-wide state while streamer computes, and restore it: number of threads, and how float32 matrices are multiplied."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping

import torch


class _Shared:
    """Share a state of the process among its threads: the first to come sets it, the last to go restores it; who needs another waits."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._state: object = None
        self._holders = 0
        self._restored = contextlib.ExitStack()

    @contextlib.contextmanager
    def hold(self, state: object, setting: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
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


_PRECISION, _THREADS = _Shared(), _Shared()


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices in full float32 inside the context; restore the setting after it.

    With TF32 a product has an error of 5e-4 of its size in place of 6e-8: every bound would be that much wider, and most matrices
    would go to the dense solver.
    """
    with _PRECISION.hold("ieee", lambda: _float32_products({"cuda": "ieee", "mkldnn": "ieee"}, "highest")):
        yield


@contextlib.contextmanager
def bfloat16_products() -> Iterator[None]:
    """Multiply float32 matrices on the CPU with their factors rounded to bfloat16 inside the context; sums and results are float32.

    A product has an error of 2e-3 of its size. Where `has_fast_bfloat16` is false, torch may multiply in full float32 all the same.
    """
    with _float32_products({"mkldnn": "bf16"}, "medium"):
        yield


@functools.cache
def has_fast_bfloat16() -> bool:
    """Test whether torch multiplies in bfloat16 here, by a product: of 1 + 2⁻¹², which bfloat16 rounds to 1.

    The processor's flags do not tell. Of two that have AVX512-BF16 (oneDNN 3.12) one multiplies float32 matrices by it, with AMX, and
    the other stays in full float32, where asking for bfloat16 would save nothing; products of bfloat16 matrices take longer there.
    """
    with bfloat16_products():
        product = torch.full((64, 256), 1 + 2**-12) @ torch.ones(256, 64)
    return bool((product == 256).all())


@contextlib.contextmanager
def _float32_products(precision: Mapping[str, str], older: str) -> Iterator[None]:
    """Set how float32 matrices are multiplied inside the context, by backend, and as torch before 2.9 calls it."""
    if hasattr(torch.backends, "fp32_precision"):  # torch 2.9, where reading the older setting fails if both were used
        backends = {name: getattr(torch.backends, name).matmul for name in precision}
        before = {name: backend.fp32_precision for name, backend in backends.items()}
        try:
            for name, backend in backends.items():
                backend.fp32_precision = precision[name]
            yield
        finally:
            for name, backend in backends.items():
                backend.fp32_precision = before[name]
    else:
        found = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision(older)
            yield
        finally:
            torch.set_float32_matmul_precision(found)


@contextlib.contextmanager
def threads(count: int = 1) -> Iterator[None]:
    """Compute on `count` of torch's threads inside the context: on one while rows are merged and written.

    With more threads each small step ends at a barrier, and where other processes want the cores the wait there is many times the work
    (docs/benchmarks.md). On one thread a sum's last bit does not depend on the number of cores; on several it may.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def task_threads(count: int) -> Iterator[None]:
    """Compute a task on `count` of torch's threads inside the context, beside tasks of the same number in other threads of this process.

    One of another number waits until these are done: a part of torch's setting is the whole process', and last bits depend on it.
    """
    with _THREADS.hold(count, lambda: threads(count)):
        torch.set_num_threads(count)  # the other part is the thread's own
        yield
