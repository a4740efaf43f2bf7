"""The plan of a merged model: for each tensor of each file, its dtype and shape, and what it is made of.

One plan serves the files that `merge` writes, the index, the sizes of a dry run, and the tensors of `iter_merged`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamer.bases.dequantize import belongs_to_codes, plain_config, plain_weights
from streamer.bases.fp8 import FP8
from streamer.bases.plain import Plain
from streamer.bases.registry import Weights
from streamer.bases.weight import Part
from streamer.changes import edited_config
from streamer.encodings import SPELLINGS
from streamer.errors import UnsupportedError
from streamer.merging import Copied, Exchanged, Merged, Recipe, Recoded, Rounded, Shifted
from streamer.plan import MODEL_CONFIG, Plan
from streamer.storage.checkpoint import INDEX_NAME
from streamer.storage.shards import ShardPlan, index_bytes, plan_shard
from streamer.targets import CONV1D_MODELS


@dataclass(frozen=True)
class Output:
    """One tensor of the merged model, in the format's spelling, and how it is made."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    recipe: Recipe


@dataclass(frozen=True)
class MergedModel:
    """What a merge writes.

    Attributes
    ----------
    files
        Output tensors by file name, in file order: the base's files and order, new tensors at the end of the last file.
    metadata
        Each file's metadata.
    texts
        Small files with contents of their own: configs that the merge makes untrue as they stand.
    index
        The base's index, or None for a single file.
    """

    files: Mapping[str, tuple[Output, ...]]
    metadata: Mapping[str, Mapping[str, str]]
    texts: Mapping[str, bytes]
    index: Mapping[str, Any] | None

    def shards(self) -> dict[str, ShardPlan]:
        """The planned files, their headers exact."""
        return {
            name: plan_shard(name, [(o.name, o.dtype, o.shape) for o in outputs], dict(self.metadata[name]))
            for name, outputs in self.files.items()
        }

    def finals(self, shards: Mapping[str, ShardPlan]) -> dict[str, bytes]:
        """The index, with the tensors as they are."""
        if self.index is None:
            return {}
        stated: Mapping[str, str] = self.index["weight_map"]
        where = {o.name: name for name, outputs in self.files.items() for o in outputs}
        # The base's own order: new names come last.
        weight_map = {t: where[t] for t in stated if t in where} | where
        total = sum(shard.header.data_bytes for shard in shards.values())
        return {INDEX_NAME: index_bytes({**self.index, "weight_map": weight_map}, total)}


def plan_merged(plan: Plan, dequantize: bool = False) -> MergedModel:
    """What each tensor of the merged model is made of; from headers alone.

    Parameters
    ----------
    dequantize
        Write everything that stands as codes in the dtype of the model's config, and leave out what belongs to codes.

    Raises
    ------
    UnsupportedError
        If merged values would have to be written in an encoding that is not written.
    """
    _refuse_codes(plan, dequantize)
    weights = plain_weights(plan.weights, plan.config) if dequantize else plan.weights
    files = {
        name: [o for t in file.header.tensors if (o := _of_file(plan, weights, t.name, Part(file, t), dequantize))]
        for name, file in plan.base.files.items()
    }
    last = next(reversed(files))
    files[last] += [
        _output(plan, weights, name, None) for name in plan.changes.sources if name not in plan.base.weight_map
    ]
    return MergedModel(
        {name: tuple(outputs) for name, outputs in files.items() if outputs},
        {name: file.header.metadata for name, file in plan.base.files.items()},
        _texts(plan, dequantize),
        plan.base.index,
    )


def _of_file(plan: Plan, weights: Weights, name: str, part: Part, dequantize: bool) -> Output | None:
    """What a tensor of the base becomes; None if it is left out."""
    if name in plan.changes.dropped or (dequantize and belongs_to_codes(name, weights)):
        return None
    if name not in weights.owners:
        return _output(plan, weights, name, part)
    logical, role = weights.owners[name]
    target = plan.by_tensor.get(logical)
    if dequantize:
        if role != "weight":
            return None
        weight = weights[logical]
        assert weight.encoding is not None
        recipe: Recipe = Rounded(weight) if target is None else Merged(weight, target)
        return Output(logical, SPELLINGS[weight.encoding.dtype], weight.shape, recipe)
    if target is None or role not in ("weight", "scale"):
        return Output(name, part.info.dtype, part.info.shape, Copied(part))
    weight = weights[logical]
    assert isinstance(weight, FP8)
    return Output(name, part.info.dtype, part.info.shape, Recoded(weight, target, role))


def _refuse_codes(plan: Plan, dequantize: bool) -> None:
    """Refuse what does not fit the codes of the weights that it changes; one line for all."""
    coded = plan.weights.coded
    replaced = [name for name in plan.changes.sources if name in coded]
    if replaced:
        raise UnsupportedError(
            f"{plan.adapter.file.path}: saves {replaced[0]!r} (modules_to_save), which stands quantized in {plan.base.path}; merge into "
            "the 16-bit base"
        )
    refused = [t.tensor for t in plan.targets if t.tensor in coded and not plan.weights.recodes(t.tensor)]
    if dequantize and coded and plan.config.get("model_type") in CONV1D_MODELS:
        raise UnsupportedError(
            f"{plan.base.path}: a quantized {plan.config['model_type']} stores its layers as (out, in) and a plain one as (in, out), which "
            "is not supported; merge into the 16-bit base"
        )
    if refused and not dequantize:
        raise UnsupportedError(
            f"{plan.base.path}: {len(refused)} of the weights to merge into are quantized, {refused[0]!r} first "
            f"({plan.weights[refused[0]].label}), and merged weights do not fit their codes; --dequantize writes a plain model, "
            "or merge into the 16-bit base"
        )


def _output(plan: Plan, weights: Weights, name: str, part: Part | None) -> Output:
    """A tensor of the merged model; `part` is the base's own, if it has one."""
    changes = plan.changes
    source = changes.sources.get(name, part)
    assert source is not None
    stands = part or source
    recipe: Recipe
    if name in plan.by_tensor:
        recipe = Merged(weights[name], plan.by_tensor[name])
    elif name in changes.shifts:
        shift, scale = changes.shifts[name]
        recipe = Shifted(weights[name], Plain.of(shift), scale)
    elif name in changes.rows:
        tokens, indices = changes.rows[name]
        recipe = Exchanged(weights[name], Plain.of(tokens), indices)
    elif source.info.dtype != stands.info.dtype:
        recipe = Rounded(weights[name])
    else:
        return Output(name, source.info.dtype, source.info.shape, Copied(source))
    encoding = weights[name].encoding
    assert encoding is not None
    return Output(name, SPELLINGS[encoding.dtype], source.info.shape, recipe)


def _texts(plan: Plan, dequantize: bool) -> dict[str, bytes]:
    """The model's config, where the merge changes what it must say."""
    config = edited_config(plan.config, plan.changes)
    if dequantize:
        config = plain_config(config)
    if config == plan.config:
        return {}
    return {MODEL_CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
