"""Run a pass in this process, or as a task of a worker, which builds the same model from the paths of the inputs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np

from streamer.detection.options import Run
from streamer.detection.workers import inputs_of
from streamer.errors import NumericError
from streamer.events import Monitor
from streamer.linalg.torch_state import full_float32
from streamer.measuring.losses import measure
from streamer.measuring.pass_memory import Pass
from streamer.measuring.sequences import TextSequences
from streamer.measuring.statistics import MEASURES, SequenceSums
from streamer.plan.batch import AdapterBatch
from streamer.plan.plan import Plan
from streamer.streaming.model import LoadedModel, StreamingModel, vocabulary_block
from streamer.streaming.run_time import RunTimeTensor
from streamer.streaming.values import VariantSet
from streamer.workers.task import Carried, Task, keep_last


def run_pass(
    model: StreamingModel, text: TextSequences, where: str, on_read: Callable[[RunTimeTensor], None]
) -> SequenceSums:
    """Measure all variants of a model on sequences that run together.

    Parameters
    ----------
    where
        Name of the text, for messages.

    Raises
    ------
    NumericError
        If a sum is not finite, or if the pass did not use everything that the adapter changes.
    InputChangedError
        If an input changed.
    """
    plan = model.job.plan
    model.batch.on_read = on_read
    sums = measure(model, text, vocabulary_block(model.batch.variants * sum(map(len, text.ids))))
    model.check_all_used()
    plan.check_unchanged()
    for name in MEASURES:
        if not np.isfinite(getattr(sums, name)).all():
            v = int(np.argwhere(~np.isfinite(getattr(sums, name)))[0][0])
            raise NumericError(
                f"{plan.base.path}: variant {model.job.variants[v].name!r} has a {name} of NaN or Inf on the {where} text; "
                "check the adapter's scale"
            )
    return sums


_computing = threading.Lock()
"""Lock that lets a process run one pass at a time, because torch's settings for matrix products apply to all threads."""

Model = TypeVar("Model", bound=LoadedModel)

_models: dict[Any, StreamingModel] = {}


@contextlib.contextmanager
def kept_model(models: dict[Any, Model], key: object, plan: Plan, make: Callable[[], Model]) -> Iterator[Model]:
    """Yield one of the models that a process keeps for later tasks, or make it; in full float32, and to one task at a time."""
    with _computing, full_float32():
        model = models.pop(key, None)
        if model is None or model.job.plan is not plan:
            model = make()
        yield model
        models[key] = model
        keep_last(models)


@dataclass(frozen=True)
class PassTask(Task[SequenceSums]):
    """A pass.

    Attributes
    ----------
    described
        The model's `VariantSet` without the plan, for all variants of a request.
    variants
        Numbers of the variants to run.
    text, where
        The sequences, and the name of their text.
    """

    described: Carried[Mapping[str, Any]]
    variants: tuple[int, ...]
    text: TextSequences
    where: str

    @property
    def name(self) -> str:
        """Return the name of the text."""
        return f"the {self.where} text"

    def do(self, batch: AdapterBatch, monitor: Monitor) -> SequenceSums:
        """Run the pass, on a model that the process keeps for later passes."""
        (plan,), key = batch.plans, (self.described.digest, self.variants)

        def make() -> StreamingModel:
            job = VariantSet(plan=plan, **self.described.value)
            return StreamingModel(replace(job, variants=tuple(job.variants[v] for v in self.variants)))

        with kept_model(_models, key, plan, make) as model:
            return run_pass(model, self.text, self.where, lambda _tensor: None)


def describe(job: VariantSet) -> Carried[Mapping[str, Any]]:
    """Describe a model for workers, which make the plan themselves."""
    return Carried({f.name: getattr(job, f.name) for f in fields(job) if f.name != "plan"})


def run_on_workers(job: VariantSet, passes: Mapping[int, tuple[Pass, TextSequences]], run: Run, threads: int,
                   begin: Callable[[str], None]) -> Generator[tuple[int, SequenceSums], None, None]:  # fmt: skip
    """Run passes on workers, and yield each pass's number and sums as they arrive.

    Parameters
    ----------
    job
        Model of all variants of the request.
    passes
        Passes with their sequences, by number.
    begin
        Called before each wait, with the name of the pass that has been running longest.
    """
    assert run.workers is not None
    inputs, described = inputs_of(AdapterBatch(job.plan.base, (job.plan,)), run), describe(job)
    tasks = {i: PassTask(inputs, threads, described, (0, *p.variants), own, p.text) for i, (p, own) in passes.items()}
    with contextlib.closing(run.workers.run(tasks, run.monitor, lambda i: begin(tasks[i].name))) as stream:
        for i, sums in stream:
            job.plan.check_unchanged()  # a worker that opened the inputs anew saw no earlier version
            yield i, sums
