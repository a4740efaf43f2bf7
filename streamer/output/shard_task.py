"""Write shards on workers: each writes a file that has no final name yet, which the caller journals and renames."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from streamer.events import Monitor
from streamer.linalg.torch_state import threads
from streamer.output.job import Job
from streamer.output.model_writer import ModelWriter
from streamer.output.output_spec import Writer
from streamer.output.records import MitigatedMatrix
from streamer.plan.batch import Batch
from streamer.storage.atomic_file import Buffer
from streamer.storage.header import TensorInfo
from streamer.storage.shard_writer import ShardPlan, Source, write_partial
from streamer.workers.task import Carried, Task, keep_last


@dataclass(frozen=True)
class PartialShard:
    """A shard that is complete and durable under the name of a partial file, and the metrics of the matrices in it."""

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
        All of the output's `Job` but the plan.
    number
        Of the plan.
    path, shard
        The output's directory, and the name of the file.
    """

    described: Carried[Mapping[str, Any]]
    number: int
    path: str
    shard: str

    @property
    def name(self) -> str:
        """Name the file."""
        return self.shard

    def do(self, batch: Batch, monitor: Monitor) -> PartialShard:
        """Write it."""
        key, plan = (self.described.digest, self.number), batch.plans[self.number]
        writer = _writers.get(key)
        if writer is None or writer.spec.job.plan is not plan:
            writer = _writers[key] = ModelWriter(Job(plan=plan, **self.described.value), Path(self.path))
            keep_last(_writers)
        metrics: list[MitigatedMatrix] = []
        shard, source = shard_source(writer, writer.spec.job, self.shard, metrics, monitor)
        with threads():
            partial, nbytes, sha256 = write_partial(Path(self.path), shard, source)
        plan.check_unchanged()
        return PartialShard(partial, nbytes, sha256, metrics)


def describe(job: Job) -> Carried[Mapping[str, Any]]:
    """Describe a job to workers, who have the plan of their own."""
    return Carried({f.name: getattr(job, f.name) for f in fields(job) if f.name != "plan"})


def shard_source(
    writer: Writer, job: Job, name: str, metrics: list[MitigatedMatrix], monitor: Monitor
) -> tuple[ShardPlan, Source]:
    """Plan a shard with all that its metadata says, and give what makes its bytes, which appends metrics as it goes."""
    ((key, value),) = job.stamp(writer.spec.command, writer.written).items()

    def source(info: TensorInfo) -> Generator[Buffer, None, None]:
        pieces: Iterable[Buffer] = writer.tensor_bytes(info, job, metrics)
        for piece in pieces:
            monitor.checkpoint()
            yield piece

    return writer.spec.shards[name].with_metadata(key, value), source
