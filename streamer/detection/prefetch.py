"""Read weights ahead: a thread brings the next ones from the disk while the current one is in use.

For a GPU bytes are copied as they are stored into pinned memory, and copied to the device on a stream of their own while it computes; they
become float32 on the device, exactly. Quantized values, and weights in several tensors, are decoded on the CPU when its turn comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from streamer.storage.remote_access import in_context
from streamer.weights.base import Weight

T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True)
class PrefetchedWeight:
    """A weight that has been read.

    Attributes
    ----------
    weight
        With its bytes at hand.
    values
        The same on a GPU, as they are stored; None where there are none yet.
    arrived
        The event after which they are there.
    """

    weight: Weight
    values: Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def whole(self, device: torch.device) -> Tensor:
        """Return all values in the computing dtype, as `Weight.whole` has them; not to be written to.

        Raises
        ------
        torch.cuda.OutOfMemoryError
            If a GPU has no room for them.
        """
        if self.values is None or self.arrived is None or self.values.device.type != device.type:
            return self.weight.whole(device)
        stream = torch.cuda.current_stream(self.values.device)
        stream.wait_event(self.arrived)
        self.values.record_stream(stream)  # its memory is not given away before this stream is done with it
        return self.values.to(self.weight.compute)


class Prefetcher:
    """Reader of weights; a GPU copies them while it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]  # in torch's stubs

    def stage(self, weight: Weight) -> PrefetchedWeight:
        """Read a weight and begin its copy, in whatever thread this is called."""
        weight = weight.load()
        values = weight.stored() if self._stream is not None else None
        if values is None or self._stream is None:
            return PrefetchedWeight(weight)
        try:
            with torch.cuda.stream(self._stream):
                there = values.pin_memory().to(self._device, non_blocking=True)
            return PrefetchedWeight(weight, there, self._stream.record_event())
        except RuntimeError:
            # No room there, or for pinned memory. There may be some when its turn comes; if not, that says so.
            return PrefetchedWeight(weight)


def read_ahead(items: Sequence[T], load: Callable[[T], V], depth: int = 1) -> Generator[tuple[T, V], None, None]:
    """Yield each item with what `load` gives for it; a thread loads `depth` of the next ones while the current one is in use."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        load = in_context(load)
        coming = deque(pool.submit(load, item) for item in items[:depth])
        for i, item in enumerate(items):
            value = coming.popleft().result()
            coming.extend(pool.submit(load, following) for following in items[i + depth : i + depth + 1])
            yield item, value
            del value  # before the next one arrives: never more than `depth` beside the current one
    finally:
        pool.shutdown(cancel_futures=True)
