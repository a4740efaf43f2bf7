"""Run layers on workers, which make the same model from the inputs' addresses; share the memory with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from streamer.detection.device import choose_device
from streamer.detection.options import Run
from streamer.detection.workers import inputs_of
from streamer.events import Monitor
from streamer.fitting.fit_memory import ROWS
from streamer.fitting.options import WEIGHTS
from streamer.fitting.prepare import PreparedFit
from streamer.measuring.pass_memory import TRANSFORMERS_BYTES
from streamer.measuring.task import kept_model
from streamer.plan.batch import AdapterBatch
from streamer.plan.memory_estimate import MemoryEstimate
from streamer.streaming.base_inputs import BaseInputModel
from streamer.streaming.corrected import CorrectedModel
from streamer.streaming.inputs import CollectingModel
from streamer.streaming.layer_runs import Elsewhere, LayerResult, LayerRun
from streamer.streaming.model import ModelSize
from streamer.streaming.values import VariantSet
from streamer.workers.task import Packed, Task

_models: dict[Any, CollectingModel] = {}


@dataclass(frozen=True)
class LayerTask(Task[Packed[LayerResult | None]]):
    """A layer of a model, with an adapter or of the base alone, on some sequences.

    Attributes
    ----------
    rounds_products, device
        See `VariantSet`; the device is given by name.
    """

    rounds_products: bool
    device: str
    layer: str
    run: Packed[LayerRun]

    @property
    def name(self) -> str:
        """Name the layer."""
        return self.layer

    def do(self, batch: AdapterBatch, monitor: Monitor) -> Packed[LayerResult | None]:
        """Run the layer on a model that the process keeps for later layers; check that no input changed."""
        (plan,) = batch.plans
        kind = CorrectedModel if plan.targets else BaseInputModel

        def make() -> CollectingModel:
            return kind(plan, rounds_products=self.rounds_products, device=choose_device(self.device))

        with kept_model(_models, (kind, self.rounds_products, self.device), plan, make) as model:
            result = Packed(model.run_layer(self.run.value))
            plan.check_unchanged()
        return result


def layers_on_workers(job: VariantSet, run: Run, threads: int) -> Elsewhere | None:
    """Return a function that runs layers on workers; None if there are no workers."""
    workers = run.workers
    if workers is None:
        return None
    inputs = inputs_of(AdapterBatch(job.plan.base, (job.plan,)), run)
    common = inputs, threads, job.rounds_products, str(job.device)

    def elsewhere(runs: Mapping[int, LayerRun]) -> Iterator[tuple[int, LayerResult | None]]:
        tasks = {number: LayerTask(*common, one.layer, Packed(one)) for number, one in runs.items()}
        with contextlib.closing(workers.run(tasks, run.monitor, lambda _number: None)) as stream:
            for number, found in stream:
                yield number, found.value

    return elsewhere


def shared_memory(
    run: Run, max_memory: int | None, size: ModelSize, tokens: int, need: MemoryEstimate, carried: int = 0
) -> int | None:
    """Divide the allowed memory among this process, which solves, and workers that run layers, if any; see `Workers.budget`.

    Parameters
    ----------
    tokens
        Tokens of all texts that run: a layer's inputs exist once more while they are sent to workers.
    need
        The largest indivisible step.
    carried
        Additional bytes sent with a task.
    """
    if run.workers is None:
        return max_memory
    carried += 4 * ROWS * size.layer_width
    own = TRANSFORMERS_BYTES + 4 * tokens * size.hidden + (1 + run.workers.at_once) * carried
    return run.workers.budget(max_memory, own, [replace(need, nbytes=need.nbytes + 2 * carried)], computes=True)


def shared(prepared: PreparedFit) -> PreparedFit:
    """Divide the allowed memory among this process and its workers, if any; see `Workers.budget`."""
    carried = 4 * max(len(WEIGHTS), len(prepared.options.keep)) * prepared.right_values
    size, tokens = prepared.model.size, 2 * prepared.fitted_tokens
    budget = shared_memory(prepared.run, prepared.max_memory, size, tokens, prepared.least, carried)
    return replace(prepared, max_memory=budget)
