"""Plan a merged model: for each tensor of each file its dtype, its shape, and how it is made.

One plan serves the files written by `merge`, the index, the sizes of a dry run, and the tensors of `iter_merged`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from streamer.errors import UnsupportedError
from streamer.output.merged_tensors import (
    AddBias,
    AddDelta,
    Cast,
    CopyBytes,
    Recipe,
    ReplaceRows,
    Requantize,
    RowSlice,
    Stack,
)
from streamer.plan.architectures import architectures_for, pattern_of
from streamer.plan.plan import Plan
from streamer.plan.targets import Target, TensorSlice
from streamer.plan.task_heads import Head, implied_head
from streamer.storage.checkpoint import INDEX_NAME
from streamer.storage.shard_writer import ShardPlan, component_prefix, index_bytes, plan_shard
from streamer.weights.base import StoredTensor, Weight
from streamer.weights.dequantize import is_activation_scale, plain_metadata, plain_weights
from streamer.weights.dtypes import SPELLINGS
from streamer.weights.logical import WeightView
from streamer.weights.model_config import MODEL_CONFIG
from streamer.weights.plain import Plain
from streamer.weights.quantization.fp8 import FP8
from streamer.weights.quantization.gptq import GPTQ


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
        Output tensors by file name, in file order: the base's files and order, with new tensors at the end of the last file.
    metadata
        Metadata of each file.
    texts
        Small files with new contents: configs that the merge would make wrong.
    index
        The base's index, or None for a single file.
    head
        Consequences of a head that the adapter saves.
    """

    files: Mapping[str, tuple[OutputTensor, ...]]
    metadata: Mapping[str, Mapping[str, str]]
    texts: Mapping[str, bytes]
    index: Mapping[str, Any] | None
    head: Head

    @property
    def tensor_count(self) -> int:
        """Return the number of output tensors in all files."""
        return sum(map(len, self.files.values()))

    def changed_components(self) -> MergedModel:
        """Leave out the components of a pipeline in which nothing changes: their files are copied."""
        names = {n for n in self.files if any(not isinstance(o.recipe, CopyBytes) for o in self.files[n])}
        changed = {"", *map(component_prefix, names)}
        return replace(self, files={n: made for n, made in self.files.items() if component_prefix(n) in changed})

    def shards(self, metadata: Mapping[str, str] | None = None) -> dict[str, ShardPlan]:
        """Lay out the files with exact headers; their metadata is the base's plus the given metadata."""
        return {
            name: plan_shard(
                name, [(o.name, o.dtype, o.shape) for o in outputs], {**self.metadata[name], **(metadata or {})}
            )
            for name, outputs in self.files.items()
        }

    def finals(self, shards: Mapping[str, ShardPlan]) -> dict[str, bytes]:
        """Make the index of the output's tensors."""
        if self.index is None:
            return {}
        stated: Mapping[str, str] = self.index["weight_map"]
        where = {o.name: name for name, outputs in self.files.items() for o in outputs}
        # Keep the base's order; new names come last.
        weight_map = {t: where[t] for t in stated if t in where} | where
        total = sum(shard.header.data_bytes for shard in shards.values())
        return {INDEX_NAME: index_bytes({**self.index, "weight_map": weight_map}, total)}


def plan_merged(plan: Plan, dequantize: bool = False) -> MergedModel:
    """Plan each tensor of the merged model from headers alone.

    Parameters
    ----------
    dequantize
        Write quantized weights plain, in the dtype of the model's config, and omit tensors that only quantized values need.

    Raises
    ------
    UnsupportedError
        If merged values would have to be written in an encoding that streamer cannot write.
    """
    _refuse_quantized(plan, dequantize)
    weights = plain_weights(plan.weights, plan.config) if dequantize else plan.weights
    files: dict[str, list[OutputTensor]] = {}
    for name, file in plan.base.files.items():
        made = (_of_file(plan, weights, t.name, StoredTensor(file, t), dequantize) for t in file.header.tensors)
        files[name] = [output for output in made if output is not None]
    new = (name for name in plan.edits.sources if name not in plan.base.weight_map)
    files[next(reversed(files))] += [_output(plan, weights, name, None) for name in new]
    head = _head(plan, [o.name for outputs in files.values() for o in outputs])
    metadata: dict[str, Mapping[str, str]] = {name: file.header.metadata for name, file in plan.base.files.items()}
    if dequantize:
        metadata = {name: plain_metadata(values, weights) for name, values in metadata.items()}
    written = {name: tuple(outputs) for name, outputs in files.items() if outputs}
    return MergedModel(written, metadata, _texts(plan, head, dequantize), plan.base.index, head)


def _of_file(plan: Plan, weights: WeightView, name: str, stored: StoredTensor, dequantize: bool) -> OutputTensor | None:
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
        assert weight.encoding is not None
        recipe = _merged(plan, weight) if logical in plan.by_weight else _unmerged(plan, weight)
        return OutputTensor(logical, SPELLINGS[weight.encoding.dtype], weight.shape, recipe)
    if logical not in plan.by_weight or role not in ("weight", "quant_scale"):
        return OutputTensor(name, stored.info.dtype, stored.info.shape, CopyBytes(stored))
    return OutputTensor(name, stored.info.dtype, stored.info.shape, _merged(plan, weights[logical], role))


def _merged(plan: Plan, weight: Weight, role: str | None = None, stands: StoredTensor | None = None) -> Recipe:
    """Make the recipe of a weight that the adapter changes.

    Parameters
    ----------
    role
        If the weight is quantized, the role of the tensor to make.
    stands
        If it is not, the tensor whose dtype is written.
    """
    recipes = [
        _piece(weight, target, slice_, role, None if stands is None else _tuned(plan, target, stands))
        for target, slice_ in plan.by_weight[weight.name]
    ]
    return recipes[0] if plan.by_weight[weight.name][0][1].index is None else Stack(tuple(recipes))


def _piece(weight: Weight, target: Target, slice_: TensorSlice, role: str | None, tuned: StoredTensor | None) -> Recipe:
    if slice_.index is not None:
        weight = weight.slice(slice_.index)
    if role is None:
        recipe: AddDelta | Requantize = AddDelta(weight, target, tuned)
    else:
        assert isinstance(weight, FP8)
        recipe = Requantize(weight, target, role)
    return recipe if slice_.rows is None else RowSlice(recipe, slice_.rows)


def _refuse_quantized(plan: Plan, dequantize: bool) -> None:
    """Refuse changes that do not fit quantized weights; one line for all."""
    quantized = plan.weights.quantized_names
    replaced = [name for name in plan.edits.sources if name in quantized]
    if replaced:
        raise UnsupportedError(
            f"{plan.adapter.file.path}: saves {replaced[0]!r} (modules_to_save), which stands quantized in {plan.base.path}; merge into "
            "the 16-bit base"
        )
    refused = [name for name in plan.by_weight if name in quantized and not plan.weights.requantizes(name)]
    refused += [name for name in plan.edits.rows if name in quantized]
    if dequantize and quantized and any(a.conv1d for a in architectures_for(plan.config)):
        raise UnsupportedError(
            f"{plan.base.path}: a quantized {plan.config.model_type} stores its layers as (out, in) and a plain one as (in, out), which "
            "is not supported; merge into the 16-bit base"
        )
    embeddings = {(a.input_embedding or "").rpartition(".")[2] for a in architectures_for(plan.config)}
    outer = [plan.weights[name] for name in sorted(quantized) if dequantize and "*" not in pattern_of(name)]
    if turned := [
        w.name
        for w in outer
        if isinstance(w, GPTQ) and (w.name.split(".")[-2] in embeddings or w.shape[1] == plan.config.vocab_size)
    ]:
        raise UnsupportedError(
            f"{plan.base.path}: {turned[0]!r} is an embedding in GPTQ, whose values are stored transposed, which is not supported; merge "
            "into the 16-bit base"
        )
    if refused and not dequantize:
        raise UnsupportedError(
            f"{plan.base.path}: {len(refused)} of the weights to merge into are quantized, {refused[0]!r} first "
            f"({plan.weights[refused[0]].label}), and merged weights do not fit their codes; --dequantize writes a plain model, "
            "or merge into the 16-bit base"
        )


def _output(plan: Plan, weights: WeightView, name: str, stored: StoredTensor | None) -> OutputTensor:
    """Plan a tensor of the merged model; `stored` is the base's own tensor, if it has one."""
    edits = plan.edits
    source = edits.sources.get(name, stored)
    assert source is not None
    stands = stored or source
    recipe: Recipe
    if name in plan.by_weight:
        recipe = _merged(plan, weights[name], stands=stands)
    elif name in edits.shifts:
        shift, scaling = edits.shifts[name]
        recipe = AddBias(weights[name], Plain.of(shift), scaling)
    elif name in edits.rows or source.info.dtype != stands.info.dtype:
        recipe = _unmerged(plan, weights[name])
    else:
        return OutputTensor(name, source.info.dtype, source.info.shape, CopyBytes(source))
    encoding = weights[name].encoding
    assert encoding is not None
    return OutputTensor(name, SPELLINGS[encoding.dtype], source.info.shape, recipe)


def _unmerged(plan: Plan, weight: Weight) -> Recipe:
    """Make the recipe of a weight without a delta, with trained tokens if the adapter has some for it."""
    if weight.name not in plan.edits.rows:
        return Cast(weight)
    tokens, indices = plan.edits.rows[weight.name]
    return ReplaceRows(weight, Plain.of(tokens), indices)


def _tuned(plan: Plan, target: Target, stands: StoredTensor) -> StoredTensor | None:
    """Return the fine-tuned model's own matrix, if one is used as the adapter and has the dtype that is written."""
    tuned = plan.adapter.stored_sum(target.module)
    return tuned if tuned is not None and tuned.info.dtype == stands.info.dtype else None


def _head(plan: Plan, names: list[str]) -> Head:
    """Derive the head from the adapter's task and saved head; a fine-tuned model's own config describes its head."""
    if plan.adapter.describes_model:
        return Head(plan.config)
    trained = {name: stored.info.shape for name, stored in plan.edits.sources.items() if name in plan.edits.trained}
    head = implied_head(plan.config, plan.adapter.config.get("task_type"), trained, names)
    implied = {} if plan.config.values else plan.edits.config(plan.config).values
    if implied:
        says = ", ".join(f"{key}={value}" for key, value in implied.items())
        advice = f"the base has no config.json: load the merged model with a config that says {says}"
        head = replace(head, advice=(*head.advice, advice))
    return head


def _texts(plan: Plan, head: Head, dequantize: bool) -> dict[str, bytes]:
    """Write the model's config if the merge changes what it must state."""
    # A fine-tuned model's own config describes it; without a base config, a config of a few keys could not be loaded.
    if plan.adapter.describes_model or not plan.config.values:
        return {}
    config = plan.edits.config(head.config)
    if dequantize:
        config = config.unquantized()
    if config == plan.config:
        return {}
    return {MODEL_CONFIG: (json.dumps(config.values, indent=2, ensure_ascii=False) + "\n").encode()}
