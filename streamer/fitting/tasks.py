"""Compute gradients on workers, who make the same model from the addresses of the inputs, and share the memory with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from streamer.detection.device import choose_device
from streamer.detection.workers import inputs_of
from streamer.events import Monitor
from streamer.fitting.costs import expected_requests
from streamer.fitting.options import WEIGHTS
from streamer.fitting.prepare import PreparedFit
from streamer.measuring.memory import TRANSFORMERS_BYTES
from streamer.measuring.sequences import TextSequences
from streamer.measuring.task import one_at_a_time
from streamer.methods.coefficient_set import Floats
from streamer.plan.batch import Batch
from streamer.streaming.gradients import Against, GradientModel, TextGradient
from streamer.workers.task import Carried, Task, keep_last

_models: dict[tuple[bool, str, Path | None], GradientModel] = {}


@dataclass(frozen=True)
class GradientTask(Task[TextGradient]):
    """A gradient on a chunk of a text.

    Attributes
    ----------
    rounds_products, device
        See `GradientModel`; the device by its name.
    directory
        For temporary files, if the worker has it.
    coefficients
        By `Target.tensor`: (p,).
    """

    rounds_products: bool
    device: str
    directory: Path | None
    coefficients: Carried[Mapping[str, Floats]]
    text: TextSequences
    against: Against

    @property
    def name(self) -> str:
        """Name the text."""
        return f"a gradient on {self.text.name or 'a text'}"

    def do(self, batch: Batch, monitor: Monitor) -> TextGradient:
        """Compute it, on a model that the process keeps for chunks to come."""
        (plan,), key = batch.plans, (self.rounds_products, self.device, self.directory)
        with one_at_a_time():
            model = _models.pop(key, None)
            if model is None or model.job.plan is not plan:
                directory = self.directory if self.directory is not None and self.directory.is_dir() else None
                model = GradientModel(plan, rounds_products=self.rounds_products, directory=directory,
                                      device=choose_device(self.device))  # fmt: skip
            found = model.gradient(self.text, self.coefficients.value, self.against)
            plan.check_unchanged()
            _models[key] = model
            keep_last(_models)
        return found


def gradients_on_workers(prepared: PreparedFit, directory: Path | None, coefficients: Mapping[str, Floats], against: Against,
                         chunks: Mapping[int, TextSequences], threads: int, begin: Callable[[str], None],
                         ) -> Generator[tuple[int, TextGradient], None, None]:  # fmt: skip
    """Compute gradients at one point on workers, and yield the number of each chunk with its own as they come.

    Parameters
    ----------
    begin
        Called with the name of the text, before each wait.
    """
    run, job, carried = prepared.run, prepared.model.job, Carried(coefficients)
    assert run.workers is not None
    inputs = inputs_of(Batch(job.plan.base, (job.plan,)), run)
    tasks = [
        GradientTask(inputs, threads, job.rounds_products, str(job.device), directory, carried, text, against)
        for text in chunks.values()
    ]
    numbers = [*chunks]
    with contextlib.closing(run.workers.run(tasks, run.monitor, lambda i: begin(tasks[i].name))) as stream:
        for i, found in stream:
            yield numbers[i], found


def shared(prepared: PreparedFit) -> PreparedFit:
    """Divide the memory allowed among this process and its workers, if there are any; see `Workers.share`.

    A fit by inputs has a share for this process as well, which collects and corrects.
    """
    workers, targets = prepared.run.workers, prepared.plan.targets
    if workers is None or prepared.max_memory is None:
        return prepared
    if prepared.by_inputs:
        values = sum(t.module.factor_rank * t.module.shape[1] for t in targets)
        carried = 4 * max(len(WEIGHTS), len(prepared.options.keep)) * values
    else:
        values = sum(t.module.factor_rank if t.module.low_rank else min(t.module.shape) for t in targets)
        asked = expected_requests(prepared.options, True, not prepared.unchanged)
        carried = 16 * max(one for one in asked if isinstance(one, int)) * values
    needs = [replace(prepared.least, nbytes=prepared.least.nbytes + 2 * carried)]
    own = prepared.resident + TRANSFORMERS_BYTES + (1 + workers.at_once) * carried
    return replace(prepared, max_memory=workers.share(prepared.max_memory, own, needs, prepared.by_inputs))
