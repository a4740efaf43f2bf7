"""The plan of a merged model: for each tensor of each file, its dtype and shape, and what it is made of.

One plan serves the files that `merge` writes, the index, the sizes of a dry run, and the tensors of `iter_merged`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamer.bases.plain import Plain
from streamer.bases.weight import Part
from streamer.changes import edited_config
from streamer.encodings import SPELLINGS
from streamer.merging import Copied, Exchanged, Merged, Recipe, Rounded, Shifted
from streamer.plan import MODEL_CONFIG, Plan
from streamer.storage.checkpoint import INDEX_NAME
from streamer.storage.shards import ShardPlan, index_bytes, plan_shard


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


def plan_merged(plan: Plan) -> MergedModel:
    """What each tensor of the merged model is made of; from headers alone."""
    files = {
        name: [_output(plan, t.name, Part(file, t)) for t in file.header.tensors if t.name not in plan.changes.dropped]
        for name, file in plan.base.files.items()
    }
    last = next(reversed(files))
    files[last] += [_output(plan, name, None) for name in plan.changes.sources if name not in plan.base.weight_map]
    return MergedModel(
        {name: tuple(outputs) for name, outputs in files.items()},
        {name: file.header.metadata for name, file in plan.base.files.items()},
        _texts(plan),
        plan.base.index,
    )


def _output(plan: Plan, name: str, part: Part | None) -> Output:
    """A tensor of the merged model; `part` is the base's own, if it has one."""
    changes = plan.changes
    source = changes.sources.get(name, part)
    assert source is not None
    stands = part or source
    recipe: Recipe
    if name in plan.by_tensor:
        recipe = Merged(plan.weights[name], plan.by_tensor[name])
    elif name in changes.shifts:
        shift, scale = changes.shifts[name]
        recipe = Shifted(plan.weights[name], Plain.of(shift), scale)
    elif name in changes.rows:
        tokens, indices = changes.rows[name]
        recipe = Exchanged(plan.weights[name], Plain.of(tokens), indices)
    elif source.info.dtype != stands.info.dtype:
        recipe = Rounded(plan.weights[name])
    else:
        return Output(name, source.info.dtype, source.info.shape, Copied(source))
    encoding = plan.weights[name].encoding
    assert encoding is not None
    return Output(name, SPELLINGS[encoding.dtype], source.info.shape, recipe)


def _texts(plan: Plan) -> dict[str, bytes]:
    """The model's config, where the merge changes what it must say."""
    config = edited_config(plan.config, plan.changes)
    if config == plan.config:
        return {}
    return {MODEL_CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
