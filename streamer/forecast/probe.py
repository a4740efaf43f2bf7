"""Time a pass of a model from part of its work: one layer of each class and two blocks of the vocabulary, on some of the text's tokens.

The real pass' code runs, so attention, norms, deltas, reading and the softmax count at their actual cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from time import thread_time
from typing import Any

from torch import Tensor, nn

from streamer.linalg.torch_state import full_float32
from streamer.measuring.losses import measure
from streamer.measuring.pass_memory import ROWS
from streamer.measuring.progress import pass_cost
from streamer.measuring.sequences import TextSequences
from streamer.streaming.layer_runs import layer_modules
from streamer.streaming.model import StreamingModel, giving, vocabulary_block
from streamer.streaming.values import VariantSet

PRODUCTS = 5 * 10**10
"""Approximate largest number of multiplications of a timed run: one or two seconds on one core."""

RUNS = 2
"""Number of runs, of which the fastest counts: the first one reads files and fills caches."""


def measure_pace(job: VariantSet, texts: Iterable[TextSequences]) -> float:
    """Measure the main thread's processor seconds per multiplication of passes over texts, as counted by `pass_cost`."""
    ids = max((own for text in texts for own in text.ids), key=len)
    plain = tuple(variant for variant in job.variants if not variant.scales_intruders)[:2]
    with full_float32():
        model = TimedModel(replace(job, variants=plain, findings=None))
        text = TextSequences.of([ids[: max(2, PRODUCTS // (len(plain) * model.products_run))]])
        return min(model.seconds(text) for _ in range(RUNS)) / pass_cost(model.size, text, len(plain))


class TimedModel(StreamingModel):
    """A model that runs one layer of each class; the other layers return that layer's output."""

    def __init__(self, job: VariantSet) -> None:
        super().__init__(job)
        products = self.size.products
        alike: dict[type, list[tuple[nn.Module, int]]] = {}
        for path, layer in layer_modules(self._model).items():
            own = sum(products.get(t.name, 0) for t in self.inside(path))
            alike.setdefault(type(layer), []).append((layer, own))
        self._left_out = 0.0
        not_run = 0
        for (first, own), *others in alike.values():
            rest = sum(count for _, count in others)
            not_run += rest
            factor = rest / own if own else float(len(others))
            first.forward = partial(self._timed, first.forward, factor, [layer for layer, _ in others])
        self._block = vocabulary_block(ROWS)
        head = self.vocabulary * self.size.hidden
        not_run += max(0, head - 2 * self._block * self.size.hidden)
        self.products_run = max(1, sum(products.values()) - not_run)
        """Multiplications per token in the part that runs."""

    def seconds(self, text: TextSequences) -> float:
        """Time a run; return the seconds for the whole model."""
        self._left_out, began = 0.0, thread_time()
        measure(self, text, self._block)
        return thread_time() - began + self._left_out

    def logits(self, ids: Tensor, blocks: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, Tensor]]:
        """Compute the logits of two blocks, and count the second block's time once for each of the others."""
        every, begun = list(blocks), list[float]()
        for block in super().logits(ids, every[:2]):
            begun.append(thread_time())
            yield block
        # Between the first block's logits and the second's, one block is computed and one is summed.
        if len(begun) > 1:
            self._left_out += (len(every) - 2) * (begun[1] - begun[0])

    def _timed(
        self, forward: Callable[..., Any], factor: float, others: Sequence[nn.Module], *args: Any, **kwargs: Any
    ) -> Any:
        began = thread_time()
        out = forward(*args, **kwargs)
        self._left_out += factor * (thread_time() - began)
        for layer in others:
            layer.forward = giving(out)
        return out
