"""Read weights ahead: a thread reads the next ones from disk while the current one is in use.

For a GPU, the stored bytes are copied into pinned memory and then, on a separate stream, to the device while it computes; the device
converts them to float32 exactly. Quantized values, and weights in several tensors, are decoded on the CPU when they are needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from streamer.weights.base import Weight

T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True)
class PrefetchedWeight:
    """A weight that has been read.

    Attributes
    ----------
    weight
        The weight, with its bytes in memory.
    values
        Its stored values on a GPU; None if not copied yet.
    arrived
        Event that marks the end of the copy.
    """

    weight: Weight
    values: Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def whole(self, device: torch.device) -> Tensor:
        """Return all values in the computing dtype, as `Weight.whole` does; do not write to them.

        Raises
        ------
        torch.cuda.OutOfMemoryError
            If the GPU has too little memory.
        """
        if self.values is None or self.arrived is None or self.values.device.type != device.type:
            return self.weight.whole(device)
        stream = torch.cuda.current_stream(self.values.device)
        stream.wait_event(self.arrived)
        self.values.record_stream(stream)  # the memory is not reused before this stream is done with it
        return self.values.to(self.weight.compute)


class Prefetcher:
    """Reader of weights; a GPU receives copies while it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]  # in torch's stubs

    def stage(self, weight: Weight) -> PrefetchedWeight:
        """Read a weight and start its copy, in the calling thread."""
        weight = weight.load()
        values = weight.stored() if self._stream is not None else None
        if values is None or self._stream is None:
            return PrefetchedWeight(weight)
        try:
            with torch.cuda.stream(self._stream):
                there = values.pin_memory().to(self._device, non_blocking=True)
            return PrefetchedWeight(weight, there, self._stream.record_event())
        except RuntimeError:
            # There is no memory on the device, or no pinned memory. There may be when the weight is needed; if not, that step fails.
            return PrefetchedWeight(weight)


def read_ahead(items: Sequence[T], load: Callable[[T], V], depth: int = 1) -> Generator[tuple[T, V], None, None]:
    """Yield each item with its result of `load`; a thread loads the next `depth` items while the current one is in use."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="streamer prefetch")
    try:
        context = copy_context()  # with the monitor that waits for servers heed
        coming = deque(pool.submit(context.run, load, item) for item in items[:depth])
        for i, item in enumerate(items):
            value = coming.popleft().result()
            coming.extend(pool.submit(context.run, load, following) for following in items[i + depth : i + depth + 1])
            yield item, value
            del value  # before the next one arrives: keep at most `depth` beside the current one
    finally:
        pool.shutdown(cancel_futures=True)
