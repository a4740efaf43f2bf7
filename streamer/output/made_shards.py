"""Make shards of outputs: iterators of tensors and their pieces, which the writer pulls, one shard or several in step.

A worker writes a shard to a file under a temporary name, which the caller journals and renames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from streamer.events import Monitor
from streamer.linalg.torch_state import threads
from streamer.output.job import Job
from streamer.output.model_writer import ModelWriter
from streamer.output.output_spec import Writer
from streamer.output.records import MitigatedMatrix
from streamer.plan.batch import AdapterBatch
from streamer.storage.buffers import Piece
from streamer.storage.header import TensorInfo
from streamer.storage.shard_writer import write_shard
from streamer.workers.task import Carried, Task, keep_last


class MadeShard:
    """Tensors of an output's file, in file order; the pieces of each are made as they are pulled.

    Attributes
    ----------
    plan
        The file's plan, with complete metadata.
    metrics
        Metrics of each matrix mitigated so far.
    """

    def __init__(self, writer: Writer, job: Job, name: str, monitor: Monitor) -> None:
        ((key, value),) = job.stamp(writer.spec.command, writer.written).items()
        self.plan = writer.spec.shards[name].with_metadata(key, value)
        self.metrics: list[MitigatedMatrix] = []
        self._writer, self._job, self._monitor = writer, job, monitor

    def __iter__(self) -> Iterator[tuple[TensorInfo, Iterator[Piece]]]:
        return ((info, self._pieces(info)) for info in self.plan.header.tensors)

    def _pieces(self, info: TensorInfo) -> Iterator[Piece]:
        for piece in self._writer.tensor_bytes(info, self._job, self.metrics):
            self._monitor.checkpoint()
            yield piece


def in_step(shards: list[MadeShard], starts: dict[str, int]) -> Iterator[tuple[int, int, TensorInfo, Iterator[Piece]]]:
    """Zip shards by position, so that all pull a tensor before any pulls the next.

    Parameters
    ----------
    starts
        Positions in a file of the base: each tensor's first byte.

    Returns
    -------
    For each tensor
        The position, the index of the shard, the tensor, and its pieces.
    """
    order: list[tuple[int, int, int]] = []
    for number, shard in enumerate(shards):
        start = 0
        for nth, info in enumerate(shard.plan.header.tensors):
            start = starts.get(info.name, start)  # a new tensor, or one under another name, follows the previous one
            order.append((start, nth, number))
    tensors = [*map(iter, shards)]
    return ((start, number, *next(tensors[number])) for start, _, number in sorted(order))


@dataclass(frozen=True)
class PartialShard:
    """A complete, durable shard under the name of a partial file, and the metrics of its matrices."""

    partial: str
    nbytes: int
    sha256: str
    matrices: list[MitigatedMatrix]


_writers: dict[tuple[str, int], ModelWriter] = {}


@dataclass(frozen=True)
class ShardTask(Task[PartialShard]):
    """A shard of a merged model.

    Attributes
    ----------
    described
        The output's `Job` without the plan.
    number
        The plan's index.
    path, shard
        The output's directory and the file's name.
    """

    described: Carried[Mapping[str, Any]]
    number: int
    path: str
    shard: str

    @property
    def name(self) -> str:
        """Return the file's name."""
        return self.shard

    def do(self, batch: AdapterBatch, monitor: Monitor) -> PartialShard:
        """Write the shard."""
        key, plan = (self.described.digest, self.number), batch.plans[self.number]
        writer = _writers.get(key)
        if writer is None or writer.spec.job.plan is not plan:
            writer = _writers[key] = ModelWriter(Job(plan=plan, **self.described.value), Path(self.path))
            keep_last(_writers)
        shard = MadeShard(writer, writer.spec.job, self.shard, monitor)
        with threads():
            file = write_shard(Path(self.path), shard.plan, shard, renames=False)
        plan.check_unchanged()
        return PartialShard(file.partial.name, file.written, file.sha256, shard.metrics)


def describe(job: Job) -> Carried[Mapping[str, Any]]:
    """Describe a job for workers, which have their own plan."""
    return Carried({f.name: getattr(job, f.name) for f in fields(job) if f.name != "plan"})
