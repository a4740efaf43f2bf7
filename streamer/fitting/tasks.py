"""Compute gradients and run layers on workers, which make the same model from the inputs' addresses; share the memory with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamer.detection.device import choose_device
from streamer.detection.options import Run
from streamer.detection.workers import inputs_of
from streamer.events import Monitor
from streamer.fitting.costs import expected_requests
from streamer.fitting.fit_memory import ROWS
from streamer.fitting.options import WEIGHTS
from streamer.fitting.prepare import PreparedFit
from streamer.measuring.pass_memory import TRANSFORMERS_BYTES
from streamer.measuring.sequences import TextSequences
from streamer.measuring.task import Model, kept_model
from streamer.methods.coefficient_set import Floats
from streamer.plan.batch import AdapterBatch
from streamer.plan.memory_estimate import MemoryEstimate
from streamer.plan.plan import Plan
from streamer.streaming.base_inputs import BaseInputModel
from streamer.streaming.corrected import CorrectedModel
from streamer.streaming.gradients import Against, GradientModel, TextGradient
from streamer.streaming.inputs import CollectingModel
from streamer.streaming.layer_runs import Elsewhere, LayerResult, LayerRun
from streamer.streaming.model import ModelSize
from streamer.streaming.values import VariantSet
from streamer.workers.task import Carried, Found, Packed, Task

_models: dict[Any, Any] = {}


@dataclass(frozen=True)
class ModelTask(Task[Found]):
    """A task on a model.

    Attributes
    ----------
    rounds_products, device
        See `VariantSet`; the device is given by name.
    directory
        Directory for temporary files, if it exists on the worker.
    """

    rounds_products: bool
    device: str
    directory: Path | None

    @contextlib.contextmanager
    def model(self, kind: type[Model], plan: Plan) -> Iterator[Model]:
        """Yield a model that the process keeps for later tasks; check that no input changed while it was used."""

        def make() -> Model:
            made: Callable[..., Model] = kind
            directory = self.directory if self.directory is not None and self.directory.is_dir() else None
            return made(
                plan, rounds_products=self.rounds_products, directory=directory, device=choose_device(self.device)
            )

        with kept_model(_models, (kind, self.rounds_products, self.device, self.directory), plan, make) as model:
            yield model
            plan.check_unchanged()


@dataclass(frozen=True)
class GradientTask(ModelTask[TextGradient]):
    """A gradient on one chunk of a text.

    Attributes
    ----------
    coefficients
        Coefficients by `Target.tensor`, (p,).
    """

    coefficients: Carried[Mapping[str, Floats]]
    text: TextSequences
    against: Against

    @property
    def name(self) -> str:
        """Name the text."""
        return f"a gradient on {self.text.name or 'a text'}"

    def do(self, batch: AdapterBatch, monitor: Monitor) -> TextGradient:
        """Compute the gradient."""
        with self.model(GradientModel, batch.plans[0]) as model:
            return model.gradient(self.text, self.coefficients.value, self.against)


@dataclass(frozen=True)
class LayerTask(ModelTask[Packed[LayerResult | None]]):
    """A layer of a model, with an adapter or of the base alone, on some sequences."""

    layer: str
    run: Packed[LayerRun]

    @property
    def name(self) -> str:
        """Name the layer."""
        return self.layer

    def do(self, batch: AdapterBatch, monitor: Monitor) -> Packed[LayerResult | None]:
        """Run the layer."""
        (plan,) = batch.plans
        kind: type[CollectingModel] = CorrectedModel if plan.targets else BaseInputModel
        with self.model(kind, plan) as model:
            return Packed(model.run_layer(self.run.value))


def layers_on_workers(job: VariantSet, run: Run, threads: int) -> Elsewhere | None:
    """Return a function that runs layers on workers; None if there are no workers."""
    workers = run.workers
    if workers is None:
        return None
    common = (
        inputs_of(AdapterBatch(job.plan.base, (job.plan,)), run.options),
        threads,
        job.rounds_products,
        str(job.device),
        None,
    )

    def elsewhere(runs: Mapping[int, LayerRun]) -> Iterator[tuple[int, LayerResult | None]]:
        tasks = {number: LayerTask(*common, one.layer, Packed(one)) for number, one in runs.items()}
        with contextlib.closing(workers.run(tasks, run.monitor, lambda _number: None)) as stream:
            for number, found in stream:
                yield number, found.value

    return elsewhere


def gradients_on_workers(prepared: PreparedFit, directory: Path | None, coefficients: Mapping[str, Floats], against: Against,
                         chunks: Mapping[int, TextSequences], threads: int, begin: Callable[[str], None],
                         ) -> Generator[tuple[int, TextGradient], None, None]:  # fmt: skip
    """Compute gradients at one point on workers; yield each chunk's index and gradient as they arrive.

    Parameters
    ----------
    begin
        Called with the text's name before each wait.
    """
    run, job, carried = prepared.run, prepared.model.job, Carried(coefficients)
    assert run.workers is not None
    inputs = inputs_of(AdapterBatch(job.plan.base, (job.plan,)), run.options)
    tasks = {
        number: GradientTask(inputs, threads, job.rounds_products, str(job.device), directory, carried, text, against)
        for number, text in chunks.items()
    }
    return run.workers.run(tasks, run.monitor, lambda number: begin(tasks[number].name))


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
    workers, targets = prepared.run.workers, prepared.plan.targets
    if workers is None or prepared.max_memory is None:
        return prepared
    need, budget = prepared.least, prepared.max_memory
    if prepared.by_inputs:
        values = sum(t.module.factor_rank * t.module.shape[1] for t in targets)
        carried = 4 * max(len(WEIGHTS), len(prepared.options.keep)) * values
        size, tokens = prepared.model.size, 2 * prepared.fitted_tokens
        return replace(prepared, max_memory=shared_memory(prepared.run, budget, size, tokens, need, carried))
    values = sum(t.module.factor_rank if t.module.low_rank else min(t.module.shape) for t in targets)
    asked = expected_requests(prepared.options, True, not prepared.unchanged)
    carried = 16 * max(one for one in asked if isinstance(one, int)) * values
    own = prepared.resident + TRANSFORMERS_BYTES + (1 + workers.at_once) * carried
    needs = [replace(need, nbytes=need.nbytes + 2 * carried)]
    return replace(prepared, max_memory=workers.budget(budget, own, needs))
