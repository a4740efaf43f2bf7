"""Write a merged model: the base's shard names, tensor order, dtypes and metadata, its index and other files.

Iterate over the tensors of a merged model, one at a time in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from streamer.adapters.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from streamer.detection.intruders import Detection
from streamer.detection.matrices import detect_matrix, detection_estimates
from streamer.events import Event, Monitor
from streamer.linalg.operators import Delta
from streamer.linalg.torch_state import threads
from streamer.output.job import Job, MitigatedMatrix, matrix_metrics
from streamer.output.merge_plan import MergedModel, Recipe, Requantize, Rows, RowSlice, Stack, plan_merged, rows_bytes
from streamer.output.output_spec import OutputSpec, Writer
from streamer.plan.plan import AdapterBatch, MemoryEstimate, check_budget, resident_bytes
from streamer.plan.side_files import other_files, skipped_files, stale_weights, with_modules
from streamer.plan.targets import Target
from streamer.plan.tokenizer import with_tokenizer
from streamer.storage.atomic_file import Piece, gather
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME, component_files
from streamer.storage.header import TensorInfo
from streamer.storage.transaction import RECORD_NAME
from streamer.weights.base import as_tensor, in_memory
from streamer.weights.logical import STALE


class ModelWriter(Writer):
    """Writer of the base with the mitigated deltas merged in."""

    def __init__(self, job: Job, path: Path) -> None:
        self._model = model = plan_merged(job.plan, job.dequantize).changed_components()
        self._outputs = {output.name: output for outputs in model.files.values() for output in outputs}
        plan, base = job.plan, job.plan.base
        shards = model.shards(job.stamp("merge"))
        finals = model.finals(shards)
        apart = {CONFIG_NAME, WEIGHTS_NAME, *model.texts, *shards}
        # An adapter inside the base's directory is not part of the merged model; a fine-tuned model used as the adapter describes it.
        source, adapter = (
            (plan.adapter.path, None) if plan.adapter.describes_model else (base.directory, plan.adapter.path)
        )
        copies = [] if source is None else [c for c in other_files(source, adapter) if c[0] not in apart]
        stale = [name for name, _ in copies if job.dequantize and name in STALE]
        components = dict.fromkeys(name.partition("/")[0] for name in shards) if plan.config.pipeline else {}
        stale += stale_weights((name for name, _ in copies), components)
        copies = [c for c in copies if c[0] not in stale]
        copies, lacks = with_modules(copies, plan.adapter.path)
        copies, tokenizer, lost, says = with_tokenizer(plan, copies)
        written = {*base.files, INDEX_NAME, RECORD_NAME, *apart}
        skipped = [] if source is None else [name for name in skipped_files(source, adapter) if name not in written]
        # A loader would apply an adapter beside the model again.
        conflicting_names: tuple[str, ...] = (SINGLE_NAME, INDEX_NAME, CONFIG_NAME, WEIGHTS_NAME, "adapter_model.bin")
        conflicting_names += tuple(name for component in components for name in component_files(component))
        # With `variant=`, diffusers would load an old file that an output already holds beside the new weights.
        present = (f"{component}/{p.name}" for component in components for p in (path / component).glob("[!.]*"))
        conflicting_names += tuple(stale_weights(present, components))
        ours = {*finals, *shards, *(name for name, _ in copies)}
        conflicting = tuple(name for name in conflicting_names if name not in ours)
        base_bytes = sum(base.files[name].header.data_bytes for name in shards) if components else base.data_bytes
        self.spec = OutputSpec(
            job, path, "merge", shards, finals, copies, stale + skipped, conflicting, base_bytes, model.texts, tokenizer,
            warnings=[*job.warnings, *lacks, *lost], notes=[*model.head.notes, *says], advice=list(model.head.advice),
            model_tensors=model.tensor_count,
        ).with_card(model.head.pipeline)  # fmt: skip

    def estimates(self, resident: int) -> Iterator[MemoryEstimate]:
        """Estimate the peak memory for each matrix, and for each other tensor that is computed."""
        return merge_estimates(self.spec.job, self._model, resident)

    def tensor_bytes(self, info: TensorInfo, job: Job, metrics: list[MitigatedMatrix]) -> Iterable[Piece]:
        """Yield the bytes of a tensor by its recipe; the first tensor that uses a matrix's delta adds its metrics.

        Values that rounding leaves unchanged are counted while the bytes are made, and are in the metrics after the last piece.
        """
        recipe = self._outputs[info.name].recipe
        repeats = _repeats(recipe)

        def mitigated(target: Target) -> tuple[Delta, Delta]:
            delta, after, found = job.mitigated(target)
            if not repeats:
                metrics.append(matrix_metrics(target, delta, after, found, job.method))
            return delta, after

        def kept(target: Target, values: int, count: int) -> None:
            metrics[-1]["values"], metrics[-1]["rounded_away"] = values, count

        return recipe.pieces(mitigated, kept)


def merge_estimates(job: Job, model: MergedModel, resident: int) -> Iterator[MemoryEstimate]:
    """Estimate the peak memory for each tensor of a merged model, including `resident` bytes already in use."""
    for target in job.plan.targets:
        size = job.mitigation_bytes(target) + rows_bytes(job.plan.weights[target.tensor])
        yield MemoryEstimate(target.tensor, target.module.shape, resident + size)
    for output in (o for outputs in model.files.values() for o in outputs):
        rows = rows_bytes(output.recipe.weight) if isinstance(output.recipe, Rows) else 0
        yield MemoryEstimate(output.name, output.shape, resident + rows)


def _repeats(recipe: Recipe) -> bool:
    """Test whether another tensor's recipe uses the same delta and counts it: the first rows', or the quantized values'."""
    if isinstance(recipe, Stack):
        recipe = recipe.recipes[0]
    if isinstance(recipe, RowSlice):
        return recipe.rows[0] > 0 or _repeats(recipe.recipe)
    return isinstance(recipe, Requantize) and recipe.role != "weight"


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
