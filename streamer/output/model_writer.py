"""Write a merged model: the base's shard names, tensor order, dtypes and metadata, its index and other files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from streamer.adapters.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from streamer.linalg.operators import Delta
from streamer.output.job import Job
from streamer.output.merge_plan import MergedModel, plan_merged
from streamer.output.merged_tensors import (
    Recipe,
    Requantize,
    Rows,
    RowSlice,
    Stack,
    rows_bytes,
)
from streamer.output.metrics import matrix_metrics
from streamer.output.output_spec import OutputSpec, Writer
from streamer.output.records import MitigatedMatrix
from streamer.plan.memory_estimate import MemoryEstimate
from streamer.plan.side_files import other_files, skipped_files, stale_weights, with_modules
from streamer.plan.targets import Target
from streamer.plan.tokenizer import with_tokenizer
from streamer.storage.buffers import Piece
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME, component_files
from streamer.storage.header import TensorInfo
from streamer.storage.output_plan import RECORD_NAME
from streamer.weights.dequantize import STALE


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
