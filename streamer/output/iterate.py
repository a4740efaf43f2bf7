"""Iterate over the tensors of a merged model, one at a time in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from streamer.detection.detection_memory import detection_estimates
from streamer.detection.intruders import Detection
from streamer.detection.matrices import detect_matrix
from streamer.events import Event, Monitor
from streamer.linalg.torch_state import threads
from streamer.output.job import Job
from streamer.output.merge_plan import MergedModel, plan_merged
from streamer.output.model_writer import merge_estimates
from streamer.plan.batch import AdapterBatch
from streamer.plan.memory_estimate import check_budget, resident_bytes
from streamer.plan.targets import Target
from streamer.storage.buffers import gather
from streamer.weights.dtypes import as_tensor, in_memory


def merged_tensors(job: Job, monitor: Monitor) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the merged model, in file order and one at a time in memory; the call itself raises any refusal."""
    model = plan_merged(job.plan, job.dequantize)
    most = max(info.nbytes for shard in model.shards().values() for info in shard.header.tensors)
    resident = resident_bytes(AdapterBatch(job.plan.base, (job.plan,)), model.tensor_count)
    detecting = detection_estimates(job.plan, job.detection, resident + most) if job.detects else ()
    check_budget(itertools.chain(detecting, merge_estimates(job, model, resident + most)), job.detection.max_memory)
    if job.detects:
        job = replace(job, detect=_one_at_a_time(job, resident, monitor))
    return _tensors(job, model, monitor)


def _one_at_a_time(job: Job, resident: int, monitor: Monitor) -> Callable[[Target], Detection]:
    """Make a function that detects in one matrix, unless it is the last one again: quantized values and their scales follow each other."""
    own = torch.get_num_threads()  # the last bits depend on them; merging rows in between uses one
    last: dict[str, Detection] = {}

    def detect(target: Target) -> Detection:
        if target.tensor not in last:
            with threads(own):
                found = detect_matrix(job.plan, target, job.detection, job.device, resident, monitor=monitor)
            last.clear()
            last[target.tensor] = found.detection
        return last[target.tensor]

    return detect


def _tensors(job: Job, model: MergedModel, monitor: Monitor) -> Iterator[tuple[str, Tensor]]:
    shards = model.shards()
    done, total = 0, sum(shard.header.data_bytes for shard in shards.values())
    items, of = 0, model.tensor_count
    for shard in shards.values():
        for info, output in zip(shard.header.tensors, model.files[shard.name], strict=True):
            monitor.checkpoint()
            monitor.emit(Event("write", info.name, done, total, items, of))
            job.plan.check_unchanged()
            with threads():
                data = gather(output.recipe.pieces(lambda target: job.mitigated(target)[:2]), info.nbytes)
            yield info.name, as_tensor(data, *in_memory(info))
            done, items = done + info.nbytes, items + 1
    monitor.emit(Event("write", "", total, total, of, of))
