"""Write a merged model: the base's tensor order and metadata, its shard names and dtypes unless others are wanted, and its other files.

One plan serves the files written by `merge`, the index, the sizes of a dry run, and the tensors of `iter_merged`: for each tensor of each
file its dtype, its shape, and its recipe. A recipe yields bytes in the output's dtype, a few rows at a time; it computes in the computing
dtype and rounds once.
"""

from __future__ import annotations

import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from streamer.adapters.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from streamer.adapters.finetuned import FinetunedModel
from streamer.detection.detect import detect_matrix, detection_estimates
from streamer.detection.intruders import Detection
from streamer.errors import MismatchError, NumericError, UnsupportedError
from streamer.events import Monitor, Progress
from streamer.linalg.operators import Delta, all_finite
from streamer.linalg.rounding import Feedback, round_rows
from streamer.linalg.torch_state import threads
from streamer.methods.files import InputMap, MappedInput
from streamer.output.job import Job, Writer, refuse_other_base
from streamer.output.record import MergedDtype, MitigatedMatrix
from streamer.plan.architectures import architectures_for, pattern_of
from streamer.plan.carried_tensors import Head, implied_head
from streamer.plan.plan import AdapterBatch, MemoryEstimate, Plan, check_budget, resident_bytes
from streamer.plan.side_files import (
    other_files,
    skipped_files,
    stale_weights,
    with_modules,
    with_tokenizer,
)
from streamer.plan.targets import Target
from streamer.storage.atomic_file import (
    BufferRing,
    Piece,
    ShardPlan,
    component_prefix,
    gather,
    index_bytes,
    plan_shard,
)
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME, component_files, shard_names
from streamer.storage.header import TensorInfo, tensor_nbytes
from streamer.storage.transaction import RECORD_NAME
from streamer.units import counted, listed
from streamer.weights.base import (
    FLOATS,
    SPELLINGS,
    Plain,
    StoredTensor,
    Weight,
    as_bytes,
    as_tensor,
    encode,
    in_memory,
)
from streamer.weights.codes import FP8, GPTQ, NOT_FINITE, Recodable
from streamer.weights.logical import (
    STALE,
    WeightView,
    cast_weights,
    is_activation_scale,
    plain_metadata,
    plain_weights,
)
from streamer.weights.model_config import MODEL_CONFIG

BLOCK_BYTES = 4 << 20
"""Rows of this many float32 bytes are merged at a time, so that memory does not depend on the matrix; measured in docs/benchmarks.md."""

DECODED = 8
"""Most copies of rows in float32 while a few rows are decoded, including the result: quantized values and scales expand to int32."""

Mitigated = Callable[[Target], tuple[Delta, Delta]]
"""Returns Δ and Δ' of one matrix; Δ' is Δ itself if nothing changes."""

MERGED_DTYPES: dict[MergedDtype, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}

RECODED_BYTES = 32 << 20
"""Rows of this many float32 bytes are coded at a time: a column takes as long for a few rows as for many."""

RECODED = 12
"""Most copies of these rows in float32: stored, merged, rounded and transposed values, scales and codes."""

FEEDBACK = 48
"""Bytes for each value of an input's vectors while they are prepared, in float64 and float32."""

Report = Callable[..., None]
"""Receives keys of `MitigatedMatrix`: what rounding did to the matrix."""


class Recipe(ABC):
    """Way to make one tensor of a merged model."""

    __slots__ = ()

    @abstractmethod
    def pieces(self, mitigated: Mitigated, report: Report | None = None) -> Iterator[Piece]:
        """Yield its bytes in order, in pieces that the caller releases.

        Parameters
        ----------
        report
            Called at the end of each matrix that is added whole and whose Δ' is not zero; None counts nothing.
        """


@dataclass(frozen=True, slots=True)
class CopyBytes(Recipe):
    """Copies the stored bytes of a tensor of any dtype."""

    stored: StoredTensor

    def pieces(self, mitigated: Mitigated, report: Report | None = None) -> Iterator[Piece]:
        """Yield the file's own bytes."""
        return self.stored.file.chunks(self.stored.info)


@dataclass(frozen=True)
class Rows(Recipe):
    """Makes a weight's tensor by rows, without a delta."""

    weight: Weight

    def pieces(self, mitigated: Mitigated, report: Report | None = None) -> Iterator[Piece]:
        """Yield the rows."""
        for i, j, raw, values, out, piece in _rows(self.weight):
            self.fill(i, j, raw, values, out)
            yield piece

    @abstractmethod
    def fill(self, i: int, j: int, raw: Tensor, values: Tensor, out: Tensor) -> None:
        """Make rows i to j, given as stored and in the computing dtype, in the written dtype."""


class Cast(Rows):
    """Rounds a weight's values once to the written dtype: the adapter's own values, or decoded ones. They must be finite."""

    def fill(self, i: int, j: int, raw: Tensor, values: Tensor, out: Tensor) -> None:
        """Round rows."""
        _round(self.weight, raw, values, out)


@dataclass(frozen=True)
class AddDelta(Recipe):
    """Makes ``W0 + Δ'``; a zero delta leaves W0's bytes, because adding it would turn −0 into +0.

    `tuned` is the stored ``W0 + Δ``, whose bytes are the result if Δ' is Δ.
    """

    weight: Weight
    target: Target
    tuned: StoredTensor | None = None

    def pieces(self, mitigated: Mitigated, report: Report | None = None) -> Iterator[Piece]:
        """Yield the rows of the sum."""
        delta, after = mitigated(self.target)
        if after is delta and self.tuned is not None:
            yield from self.tuned.file.chunks(self.tuned.info)
            return
        change = (after.T if self.target.transposed else after).to(self.weight.compute)
        nothing = change.is_zero()
        count = 0
        for i, j, raw, values, out, piece in _rows(self.weight):
            if not nothing:
                change.add_rows(values, i, j)
            _round(self.weight, raw, values, out)
            if report is not None and not nothing:
                bits = (
                    f"i{out.itemsize}"  # numpy compares integers faster than torch compares floats
                )
                same = np.frombuffer(as_bytes(raw.to(out.dtype)), bits) == np.frombuffer(
                    as_bytes(out), bits
                )
                count += int(np.count_nonzero(same))
            yield piece
        if report is not None and not nothing and self.tuned is None and not self.weight.quantized:
            report(values=math.prod(self.weight.shape), rounded_away=count)


@dataclass(frozen=True)
class Requantize(Recipe):
    """Makes one of the tensors that store ``W0 + Δ'`` quantized, with new scales; a zero delta leaves W0's bytes."""

    weight: FP8
    target: Target
    role: str

    def pieces(self, mitigated: Mitigated, report: Report | None = None) -> Iterator[Piece]:
        """Yield the quantized values or their scales. Each pass computes the sum again, so that it is never in memory whole."""
        (_, delta), weight = mitigated(self.target), self.weight.at_hand()
        change = (delta.T if self.target.transposed else delta).to(weight.compute)
        stored = weight.tensors[self.role]
        if change.is_zero():
            yield from stored.file.chunks(stored.info)
            return

        def merged(i: int, j: int) -> Tensor:
            values = weight.decode(i, j)
            change.add_rows(values, i, j)
            return values

        for values in weight.requantized(self.role, merged, weight.new_scales(merged)):
            yield Piece(as_bytes(values))


@dataclass(frozen=True)
class Recode(Recipe):
    """Makes the codes of ``W0 + Δ'`` with the base's own scales, by the inputs of a map; a zero delta leaves W0's bytes."""

    weight: Recodable
    target: Target
    entry: MappedInput

    def pieces(self, mitigated: Mitigated, report: Report | None = None) -> Iterator[Piece]:
        """Yield the codes, and report what is left of the response to the map's inputs."""
        (_, change), weight = mitigated(self.target), self.weight.at_hand()
        stored = weight.tensors["weight"]
        if change.is_zero():
            yield from stored.file.chunks(stored.info)
            return
        change, feedback = change.to(weight.compute), _feedback(self.entry)
        m, n = weight.shape[::-1] if weight.turned else weight.shape
        wanted = got = error = 0.0
        step = max(2, RECODED_BYTES // (8 * n) * 2)  # two rows of four bits always fill their bytes
        for i in range(0, m, step):
            j = min(m, i + step)
            before = weight.coded_rows(i, j)
            change.add_rows(values := before.clone(), i, j)
            if not all_finite(values):
                raise NumericError(f"tensor {weight.name!r}: {NOT_FINITE}")
            indices, rounded = round_rows(values, weight.grid(i, j), feedback)
            update, made = values.sub_(before), rounded - before
            wanted += feedback.energy(update, update)
            got += feedback.energy(update, made)
            error += feedback.energy(made.sub_(update), made)
            yield Piece(as_bytes(weight.packed(indices)))
        if not math.isfinite(error):
            raise NumericError(
                f"{weight.where}: the map has no finite inputs of {self.target.tensor!r}; make it again with `streamer map`"
            )
        if report is not None and wanted:
            report(survives=got / wanted, rounding_error=math.sqrt(error / wanted))


@lru_cache(maxsize=1)  # matrices with the same inputs, such as gate and up, often follow each other
def _feedback(entry: MappedInput) -> Feedback:
    return Feedback.of(entry.spectrum)


@dataclass(frozen=True)
class RowSlice(Recipe):
    """Makes a tensor that holds some rows of a matrix, by a recipe with these rows of the delta."""

    recipe: AddDelta | Requantize | Recode
    rows: tuple[int, int]

    def pieces(self, mitigated: Mitigated, report: Report | None = None) -> Iterator[Piece]:
        """Yield the recipe's pieces; for part of a matrix, values that rounding leaves unchanged are not counted."""

        def sliced(target: Target) -> tuple[Delta, Delta]:
            delta, after = mitigated(target)
            return delta.row_slice(*self.rows), after.row_slice(*self.rows)

        return self.recipe.pieces(sliced)


@dataclass(frozen=True)
class Stack(Recipe):
    """Makes a tensor that holds several matrices one after the other, all made in the same way."""

    recipes: tuple[Recipe, ...]

    def pieces(self, mitigated: Mitigated, report: Report | None = None) -> Iterator[Piece]:
        """Yield the pieces of each recipe, one after the other."""
        return itertools.chain.from_iterable(
            recipe.pieces(mitigated, report) for recipe in self.recipes
        )


@dataclass(frozen=True)
class AddBias(Rows):
    """Adds `scaling` times a tensor of the same shape to a weight: LoRA's bias to a layer's bias."""

    shift: Weight
    scaling: float

    def fill(self, i: int, j: int, raw: Tensor, values: Tensor, out: Tensor) -> None:
        """Add rows."""
        values.add_(self.shift.rows(i, j).to(values.dtype), alpha=self.scaling)
        _round(self.weight, raw, values, out)


@dataclass(frozen=True)
class ReplaceRows(Cast):
    """Replaces some rows of a weight: an embedding gets trained tokens. All other rows keep their bytes, or are decoded."""

    tokens: Weight
    indices: tuple[int, ...]

    def fill(self, i: int, j: int, raw: Tensor, values: Tensor, out: Tensor) -> None:
        """Make rows, with the trained ones rounded once."""
        if self.weight.quantized or raw.dtype != out.dtype:
            super().fill(i, j, raw, values, out)
        else:
            out.copy_(raw)
        for at, row in enumerate(self.indices):
            if i <= row < j:
                new = self.tokens.rows(at, at + 1).to(values.dtype)
                out[row - i] = encode(new, _written(self.weight), self.tokens.name)[0]


def rows_bytes(weight: Weight) -> int:
    """Estimate the memory to make a weight a few rows at a time: rows read or decoded, added, and rounded into alternating buffers."""
    m, n = weight.matrix
    row = max(1, n * weight.compute.itemsize)
    block = max(
        row, min(m * row, BLOCK_BYTES)
    )  # as many bytes as a quantized weight decodes at a time
    return (3 + (DECODED if weight.quantized else 1)) * block + weight.load_bytes


def _written(weight: Weight) -> torch.dtype:
    assert weight.written is not None, f"{weight.name} is not written back"
    return weight.written


def _round(weight: Weight, raw: Tensor, values: Tensor, out: Tensor) -> None:
    """Round rows once to the written dtype, into `out`; refuse a file whose stored rows hold NaN or Inf."""
    try:
        encode(values, out.dtype, weight.name, out)
    except NumericError:
        if all_finite(raw):
            raise
        what = f"the values for {weight.name!r} hold NaN or Inf"
        raise NumericError(f"{weight.where}: {what}; check the file") from None


def _rows(weight: Weight) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor, Piece]]:
    """Iterate over a weight a few rows at a time.

    Yields
    ------
    First row, end row, stored values, values in the computing dtype for the computation, values in the written dtype for the result, and
    the result's bytes. All memory is reused, the bytes once they are released: the system zeroes new memory first, which costs as much
    as a sum.
    """
    dtype = _written(weight)
    m, n = weight.matrix
    rows = max(1, BLOCK_BYTES // max(1, n * weight.compute.itemsize))
    values = torch.empty((min(rows, m), n), dtype=weight.compute)
    ring = BufferRing(min(rows, m) * n * dtype.itemsize)
    for i, j, raw in weight.blocks(rows):
        piece = ring.lease((j - i) * n * dtype.itemsize)
        out = torch.from_numpy(np.frombuffer(piece.view, np.uint8)).view(dtype).view(j - i, n)
        yield i, j, raw, values[: j - i].copy_(raw), out, piece


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the merged model, with its dtype spelled as in the format, and its recipe."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    recipe: Recipe


@dataclass(frozen=True)
class MergedModel:
    """Tensors and files that a merge writes.

    Attributes
    ----------
    files
        Output tensors by file name, in file order: the base's, with new tensors at the end; in the base's files unless a size is wanted.
    metadata
        Metadata of each file.
    texts
        Small files with new contents: configs that the merge would make wrong.
    head
        Consequences of a head that the adapter saves.
    """

    files: Mapping[str, tuple[OutputTensor, ...]]
    metadata: Mapping[str, Mapping[str, str]]
    texts: Mapping[str, bytes]
    head: Head

    @property
    def tensor_count(self) -> int:
        """Return the number of output tensors in all files."""
        return sum(map(len, self.files.values()))

    def shards(self, metadata: Mapping[str, str] | None = None) -> dict[str, ShardPlan]:
        """Lay out the files with exact headers; their metadata is the base's plus the given metadata."""
        shards = {}
        for name, outputs in self.files.items():
            entries = ((output.name, output.dtype, output.shape) for output in outputs)
            shards[name] = plan_shard(name, entries, {**self.metadata[name], **(metadata or {})})
        return shards


def plan_merged(
    plan: Plan,
    dequantize: bool = False,
    dtype: MergedDtype | None = None,
    shard_bytes: int | None = None,
    requantize: InputMap | None = None,
) -> MergedModel:
    """Plan each tensor of the merged model from headers alone.

    Parameters
    ----------
    dequantize
        Write quantized weights plain, in the dtype of the model's config, and omit tensors that only quantized values need.
    dtype
        Write plain weights, and dequantized ones, in this dtype; see `cast_weights`.
    shard_bytes
        Divide the tensors among files as transformers does; see `_divided`.
    requantize
        Write merged 4-bit weights as codes again, by this map of the base's inputs; see `Recode`.

    Raises
    ------
    UnsupportedError
        If merged values would have to be written in an encoding that streamer cannot write, or if a pipeline should get another form.
    """
    if plan.config.pipeline and (dtype or shard_bytes):
        what = "dtype" if dtype else "max_shard_size"
        raise UnsupportedError(
            f"{plan.base.path}: {what}: a diffusers pipeline keeps its files and dtypes; leave it out"
        )
    _refuse_quantized(plan, dequantize, requantize)
    weights = plain_weights(plan.weights, plan.config) if dequantize else plan.weights
    if dtype is not None:
        weights = cast_weights(weights, MERGED_DTYPES[dtype])
    files: dict[str, list[OutputTensor]] = {}
    for name, file in plan.base.files.items():
        tensors = ((t.name, StoredTensor(file, t)) for t in file.header.tensors)
        outputs = (_of_file(plan, weights, *tensor, dequantize, requantize) for tensor in tensors)
        files[name] = [output for output in outputs if output is not None]
    new = (name for name in plan.edits.sources if name not in plan.base.weight_map)
    files[next(reversed(files))] += [_output(plan, weights, name, None) for name in new]
    head = _head(plan, [o.name for outputs in files.values() for o in outputs])
    metadata: dict[str, Mapping[str, str]] = {
        name: file.header.metadata for name, file in plan.base.files.items()
    }
    if dequantize:
        metadata = {name: plain_metadata(values, weights) for name, values in metadata.items()}
    written = {name: tuple(outputs) for name, outputs in files.items() if outputs}
    if shard_bytes is not None:
        written = _divided(itertools.chain.from_iterable(written.values()), shard_bytes)
        joined = {key: text for texts in metadata.values() for key, text in texts.items()}
        metadata = dict.fromkeys(written, joined)
    return MergedModel(written, metadata, _texts(plan, head, dequantize, dtype), head)


def _divided(
    outputs: Iterable[OutputTensor], shard_bytes: int
) -> dict[str, tuple[OutputTensor, ...]]:
    """Divide tensors among files of at most so many bytes, with transformers' names; a larger tensor has a file of its own.

    The last file that is begun takes further tensors after a larger one, as in ``huggingface_hub.split_torch_state_dict_into_shards``.
    """
    shards, current, room = list[list[OutputTensor]](), list[OutputTensor](), shard_bytes
    for output in outputs:
        nbytes = tensor_nbytes(output.dtype, output.shape)
        if nbytes > shard_bytes:
            shards.append([output])
            continue
        if nbytes > room:
            shards.append(current)
            current, room = [], shard_bytes
        current.append(output)
        room -= nbytes
    shards += [current] if current else []
    return dict(zip(shard_names(len(shards)), map(tuple, shards), strict=True))


def _of_file(
    plan: Plan,
    weights: WeightView,
    name: str,
    stored: StoredTensor,
    dequantize: bool,
    requantize: InputMap | None,
) -> OutputTensor | None:
    """Plan the output of a base's tensor; None if it is omitted."""
    if name in plan.edits.dropped or (dequantize and is_activation_scale(name, weights)):
        return None
    if name not in weights.owners:
        return _output(plan, weights, name, stored)
    logical, role = weights.owners[name]
    if dequantize:
        if role != "weight":
            return None
        weight = weights[logical]
        recipe = _merged(plan, weight) if logical in plan.by_weight else _unmerged(plan, weight)
        return OutputTensor(logical, SPELLINGS[_written(weight)], weight.shape, recipe)
    if logical not in plan.by_weight or role not in ("weight", "quant_scale"):
        return OutputTensor(name, stored.info.dtype, stored.info.shape, CopyBytes(stored))
    recipe = _merged(plan, weights[logical], role, requantize=requantize)
    return OutputTensor(name, stored.info.dtype, stored.info.shape, recipe)


def _merged(
    plan: Plan, weight: Weight, role: str = "", requantize: InputMap | None = None
) -> Recipe:
    """Make the recipe of a weight that the adapter changes, or, if it stays quantized, of its tensor with this role."""
    recipes = list[Recipe]()
    for target, slice_ in plan.by_weight[weight.name]:
        own = weight if slice_.index is None else weight.slice(slice_.index)
        recipe: AddDelta | Requantize | Recode
        if not role:
            tuned = plan.adapter.stored_sum(target.module)
            same = tuned is not None and tuned.info.dtype == SPELLINGS[_written(weight)]
            recipe = AddDelta(own, target, tuned if same else None)
        elif isinstance(own, FP8):
            recipe = Requantize(own, target, role)
        else:
            entry = _entry(requantize, target)
            assert isinstance(own, Recodable)
            assert entry is not None
            recipe = Recode(own, target, entry)
        recipes.append(recipe if slice_.rows is None else RowSlice(recipe, slice_.rows))
    return recipes[0] if plan.by_weight[weight.name][0][1].index is None else Stack(tuple(recipes))


def _entry(requantize: InputMap | None, target: Target) -> MappedInput | None:
    """Find a matrix's inputs in the map; None if it lacks them, or if all were zero."""
    entry = None if requantize is None else requantize.find(target.tensor, target.module.shape[1])
    return entry if entry is not None and entry.vectors is not None and entry.trace > 0 else None


def _refuse_quantized(plan: Plan, dequantize: bool, requantize: InputMap | None) -> None:
    """Refuse changes that do not fit quantized weights; a message names the first weight, and counts them."""
    quantized, base, instead = (
        plan.weights.quantized_names,
        plan.base.path,
        "merge into the 16-bit base",
    )
    replaced = [name for name in plan.edits.sources if name in quantized]
    if replaced:
        saves = f"{plan.adapter.file.path}: saves {replaced[0]!r} (modules_to_save)"
        raise UnsupportedError(f"{saves}, which stands quantized in {base}; {instead}")
    refused = [
        name for name in plan.by_weight if name in quantized and not plan.weights.requantizes(name)
    ]
    if requantize is not None:
        refuse_other_base(requantize, requantize.facts["base"], {**plan.base_identity})
        kinds = {
            name: weight for name in refused if isinstance(weight := plan.weights[name], Recodable)
        }
        coded = {
            n
            for n, w in kinds.items()
            if all(t.transposed == w.turned for t, _ in plan.by_weight[n])
        }
        lacks = [
            t.tensor
            for name in coded
            for t, _ in plan.by_weight[name]
            if _entry(requantize, t) is None
        ]
        if lacks:
            what = f"has no inputs of {counted(len(lacks), 'matrix')}, {listed(map(repr, lacks))}"
            raise MismatchError(
                f"{requantize.name}: {what}; make a map with more text, or use --dequantize"
            )
        if not coded:
            what = "requantize: the adapter changes no weight that is stored in 4 bits with a scale for each group"
            raise UnsupportedError(f"{base}: {what}; leave it out")
        refused = [name for name in refused if name not in coded]
    refused += [name for name in plan.edits.rows if name in quantized]
    architectures = architectures_for(plan.config)
    if dequantize and quantized and any(a.conv1d for a in architectures):
        what = f"a quantized {plan.config.model_type} stores its layers as (out, in) and a plain one as (in, out)"
        raise UnsupportedError(f"{base}: {what}, which is not supported; {instead}")
    outer = [
        plan.weights[name]
        for name in sorted(quantized)
        if dequantize and "*" not in pattern_of(name)
    ]
    embeddings = {(a.input_embedding or "").rpartition(".")[2] for a in architectures}
    sizes: set[object] = {*embeddings, plan.config.vocab_size}
    if turned := [
        w.name for w in outer if isinstance(w, GPTQ) and {w.name.split(".")[-2], w.shape[1]} & sizes
    ]:
        what = f"{turned[0]!r} is an embedding in GPTQ, whose values are stored transposed"
        raise UnsupportedError(f"{base}: {what}, which is not supported; {instead}")
    if refused and not dequantize:
        what = f"{len(refused)} of the weights to merge into are quantized, {refused[0]!r} first ({plan.weights[refused[0]].label})"
        codes = any(isinstance(plan.weights[name], Recodable) for name in refused)
        do = f"--dequantize writes a plain model, {'`merge --requantize` new codes, ' * codes}or {instead}"
        raise UnsupportedError(f"{base}: {what}; {do}")


def _output(
    plan: Plan, weights: WeightView, name: str, stored: StoredTensor | None
) -> OutputTensor:
    """Plan a tensor of the merged model; `stored` is the base's own tensor, if it has one."""
    edits = plan.edits
    source = edits.sources.get(name, stored)
    assert source is not None
    recipe: Recipe
    if name in plan.by_weight:
        recipe = _merged(plan, weights[name])
    elif name in edits.shifts:
        shift, scaling = edits.shifts[name]
        recipe = AddBias(weights[name], Plain.of(shift), scaling)
    elif (
        name in edits.rows
        or (stored or source).info.dtype != source.info.dtype
        or name in weights.casts
    ):
        recipe = _unmerged(plan, weights[name])
    else:
        return OutputTensor(name, source.info.dtype, source.info.shape, CopyBytes(source))
    return OutputTensor(name, SPELLINGS[_written(weights[name])], source.info.shape, recipe)


def _unmerged(plan: Plan, weight: Weight) -> Recipe:
    """Make the recipe of a weight without a delta, with trained tokens if the adapter has some for it."""
    if weight.name not in plan.edits.rows:
        return Cast(weight)
    tokens, indices = plan.edits.rows[weight.name]
    return ReplaceRows(weight, Plain.of(tokens), indices)


def _head(plan: Plan, names: list[str]) -> Head:
    """Derive the head from the adapter's task and saved head; a fine-tuned model's own config describes its head."""
    if plan.adapter.describes_model:
        return Head(plan.config)
    trained = {
        name: stored.info.shape
        for name, stored in plan.edits.sources.items()
        if name in plan.edits.trained
    }
    head = implied_head(plan.config, plan.adapter.config.get("task_type"), trained, names)
    implied = {} if plan.config.values else plan.edits.config(plan.config).values
    if implied:
        says = ", ".join(f"{key}={value}" for key, value in implied.items())
        advice = (
            f"the base has no config.json: load the merged model with a config that says {says}"
        )
        head = replace(head, advice=(*head.advice, advice))
    return head


def _texts(plan: Plan, head: Head, dequantize: bool, dtype: MergedDtype | None) -> dict[str, bytes]:
    """Write the model's config if the merge changes what it must state."""
    # A fine-tuned model's own config describes it; without a base config, a config of a few keys could not be loaded.
    stated = plan.adapter.model_config if isinstance(plan.adapter, FinetunedModel) else plan.config
    if not stated.values:
        return {}
    config = stated if plan.adapter.describes_model else plan.edits.config(head.config)
    if dequantize:
        config = config.unquantized()
    if dtype is not None:
        config = config.with_dtype(str(MERGED_DTYPES[dtype]).removeprefix("torch."))
    if config == stated:
        return {}
    return {MODEL_CONFIG: (json.dumps(config.values, indent=2, ensure_ascii=False) + "\n").encode()}


def _uncast(model: MergedModel, dtype: MergedDtype) -> list[str]:
    """Note the floating-point tensors that do not get the requested dtype."""
    dtypes = {o.name: o.dtype for outputs in model.files.values() for o in outputs}
    stay = [
        name
        for name, own in dtypes.items()
        if own in FLOATS and own != SPELLINGS[MERGED_DTYPES[dtype]]
    ]
    what = f"{counted(len(stay), 'tensor')} of quantized weights or stored wider than most"
    return [f"not written in {dtype}: {what}, {stay[0]!r} first"] if stay else []


class ModelWriter(Writer):
    """Writer of the base with the mitigated deltas merged in."""

    def __init__(self, job: Job, path: Path) -> None:
        model = plan_merged(job.plan, job.dequantize, job.dtype, job.shard_bytes, job.requantize)
        # The files of a pipeline's components in which nothing changes are copied.
        names = [
            n
            for n, outputs in model.files.items()
            if any(not isinstance(o.recipe, CopyBytes) for o in outputs)
        ]
        changed = {"", *map(component_prefix, names)}
        files = {
            name: outputs
            for name, outputs in model.files.items()
            if component_prefix(name) in changed
        }
        self._model = model = replace(model, files=files)
        self._outputs = {output.name: output for outputs in files.values() for output in outputs}
        plan, base = job.plan, job.plan.base
        shards = model.shards(job.stamp("merge"))
        finals = {}
        needs_index = base.index is not None if job.shard_bytes is None else len(files) > 1
        if needs_index:
            base_index = base.index or {"weight_map": {}}
            stated, where = (
                base_index["weight_map"],
                {o.name: name for name, made in files.items() for o in made},
            )
            # Keep the base's order; new names come last.
            index = {
                **base_index,
                "weight_map": {t: where[t] for t in stated if t in where} | where,
            }
            finals[INDEX_NAME] = index_bytes(
                index, sum(shard.header.data_bytes for shard in shards.values())
            )
        apart = {CONFIG_NAME, WEIGHTS_NAME, *model.texts, *shards}
        # An adapter inside the base's directory is not part of the merged model; a fine-tuned model used as the adapter describes it.
        model_paths, base_paths = (plan.adapter.path, None), (base.directory, plan.adapter.path)
        source, adapter = model_paths if plan.adapter.describes_model else base_paths
        copies = (
            [] if source is None else [c for c in other_files(source, adapter) if c[0] not in apart]
        )
        stale = [name for name, _ in copies if job.dequantize and name in STALE]
        components = (
            dict.fromkeys(name.partition("/")[0] for name in shards) if plan.config.pipeline else {}
        )
        stale += stale_weights((name for name, _ in copies), components)
        copies = [c for c in copies if c[0] not in stale]
        copies, lacks = with_modules(copies, plan.adapter.path)
        chosen = with_tokenizer(
            copies, plan.adapter, plan.base.directory, plan.config, plan.edits.vocabulary
        )
        copies = chosen.copies
        written = {*base.files, INDEX_NAME, RECORD_NAME, *apart}
        skipped = (
            []
            if source is None
            else [name for name in skipped_files(source, adapter) if name not in written]
        )
        # A loader would apply an adapter beside the model again.
        conflicting_names: tuple[str, ...] = (
            SINGLE_NAME,
            INDEX_NAME,
            CONFIG_NAME,
            WEIGHTS_NAME,
            "adapter_model.bin",
        )
        conflicting_names += tuple(
            name for component in components for name in component_files(component)
        )
        # With `variant=`, diffusers would load an old file that an output already holds beside the new weights.
        present = (
            f"{component}/{p.name}"
            for component in components
            for p in (path / component).glob("[!.]*")
        )
        conflicting_names += tuple(stale_weights(present, components))
        ours = {*finals, *shards, *(name for name, _ in copies)}
        conflicting = tuple(name for name in conflicting_names if name not in ours)
        base_bytes = (
            sum(base.files[name].header.data_bytes for name in shards)
            if components
            else base.data_bytes
        )
        notes = [
            *model.head.notes,
            *chosen.notes,
            *(_uncast(model, job.dtype) if job.dtype else ()),
        ]
        super().__init__(
            job,
            path,
            "merge",
            shards,
            finals,
            copies,
            stale + skipped,
            conflicting,
            base_bytes,
            model.texts,
            chosen.tokenizer,
            warnings=[*job.warnings, *lacks, *chosen.warnings],
            notes=notes,
            advice=list(model.head.advice),
            model_tensors=model.tensor_count,
            pipeline=model.head.pipeline,
        )

    def estimates(self, resident: int) -> Iterator[MemoryEstimate]:
        """Estimate the peak memory for each matrix, and for each other tensor that is computed."""
        return merge_estimates(self.job, self._model, resident)

    def tensor_bytes(
        self, info: TensorInfo, job: Job, metrics: list[MitigatedMatrix]
    ) -> Iterable[Piece]:
        """Yield the bytes of a tensor by its recipe; the first tensor that uses a matrix's delta adds its metrics.

        Values that rounding leaves unchanged are counted while the bytes are made, and are in the metrics after the last piece.
        """
        recipe = self._outputs[info.name].recipe

        def mitigated(target: Target) -> tuple[Delta, Delta]:
            delta, after = job.mitigated(target)
            if not _repeats(recipe):
                metrics.append(job.metrics(target, delta, after))
            return delta, after

        def report(**found: Any) -> None:
            metrics[-1] = cast(MitigatedMatrix, {**metrics[-1], **found})

        return recipe.pieces(mitigated, report)


def merge_estimates(job: Job, model: MergedModel, resident: int) -> Iterator[MemoryEstimate]:
    """Estimate the peak memory for each tensor of a merged model, including `resident` bytes already in use."""
    for target in job.plan.targets:
        size = job.mitigation_bytes(target) + rows_bytes(job.plan.weights[target.tensor])
        if (entry := _entry(job.requantize, target)) is not None:
            size += RECODED * min(
                RECODED_BYTES, 4 * math.prod(target.module.shape)
            ) + FEEDBACK * entry.size * len(entry.values)
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


def merged_tensors(
    job: Job, monitor: Monitor, wanted: Callable[[str], bool] | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the merged model's tensors, or those wanted, in file order and one at a time in memory; the call itself raises any refusal."""
    model = plan_merged(job.plan, job.dequantize)
    recipes = {output.name: output.recipe for outputs in model.files.values() for output in outputs}
    infos = (info for shard in model.shards().values() for info in shard.header.tensors)
    made = [(info, recipes[info.name]) for info in infos if wanted is None or wanted(info.name)]
    most = max((info.nbytes for info, _ in made), default=0)
    resident = resident_bytes(AdapterBatch(job.plan.base, (job.plan,)), model.tensor_count)
    detecting = (
        detection_estimates([job.plan], job.detection, resident + most) if job.detects else ()
    )
    check_budget(
        itertools.chain(detecting, merge_estimates(job, model, resident + most)),
        job.detection.max_memory,
    )
    if job.detects:
        own, targets = (
            torch.get_num_threads(),
            {target.tensor: target for target in job.plan.targets},
        )

        @lru_cache(maxsize=1)  # quantized values and their scales follow each other
        def detected(tensor: str) -> Detection:
            with threads(own):  # the last bits depend on them; merging rows in between uses one
                args = job.plan, targets[tensor], job.detection, job.device, resident
                return detect_matrix(*args, monitor=monitor).detection

        return _tensors(replace(job, detect=lambda target: detected(target.tensor)), made, monitor)
    return _tensors(job, made, monitor)


def _tensors(
    job: Job, made: list[tuple[TensorInfo, Recipe]], monitor: Monitor
) -> Iterator[tuple[str, Tensor]]:
    progress = Progress(monitor, "write", sum(info.nbytes for info, _ in made), len(made))
    for info, recipe in made:
        progress.begin(info.name)
        job.plan.check_unchanged()
        with threads():
            data = gather(recipe.pieces(job.mitigated), info.nbytes)
        yield info.name, as_tensor(data, *in_memory(info))
        progress.add(info.nbytes)
    progress.end()
