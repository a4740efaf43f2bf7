"""Match an adapter's carried tensors, those that are no factors, to the model's tensors that they edit.

Weights and biases replace the base's, or are new; LoRA's biases are added; trained tokens replace rows. Names are matched as those of
the factors were (`targets`): where the module ``model.layers.0.mlp.up_proj`` was found as ``layers.0.mlp.up_proj.weight``, the saved
``model.norm.weight`` is ``norm.weight``. So `plan` knows every tensor of the merged model before anything is written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, NamedTuple, TypedDict

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.adapter_config import CONFIG_NAME
from streamer.adapters.tensor_names import Carried
from streamer.errors import MismatchError, UnsupportedError
from streamer.plan.name_matching import prefix_exchange
from streamer.plan.task_heads import LABEL_HEAD
from streamer.plan.transformers_renames import Renames
from streamer.storage.checkpoint import Checkpoint
from streamer.storage.header import TensorInfo
from streamer.units import listed
from streamer.weights.base import StoredTensor, equal
from streamer.weights.dtypes import encoding_of
from streamer.weights.model_config import ModelConfig


class CarriedRecord(TypedDict):
    """A carried tensor."""

    tensor: Annotated[str, "The tensor of the base that changes."]
    change: Annotated[str, "What happens to the tensor: replaced, new, rows replaced, …"]
    by: Annotated[str, "The adapter's tensor."]


class VocabularyTensor(NamedTuple):
    """A tensor whose rows are a vocabulary.

    Attributes
    ----------
    names
        All names that are one with it.
    keys
        Where the config states the number of rows: encoder and decoder may have vocabularies of their own.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class TensorEdits:
    """Edits of the base besides deltas, by the name of the merged model's tensor.

    Attributes
    ----------
    sources
        Tensors that take the place of the base's, before any delta; a name that the base does not have is a new tensor.
    shifts
        Tensors that are added, and the factor of each.
    rows
        Tensors that take the place of some rows, and the rows' indices.
    trained
        Those of the sources that the adapter trained. The others are the base as the adapter knows it.
    vocabularies
        Where the config states the size of a vocabulary → its new size, where a replaced embedding has another.
    dropped
        Tensors of the base that the merged model does without, each with the reason.
    untied
        Paths of keys that state ties that are undone (see `tied_embeddings`); for the config.
    notes
        Notes on the merged model, one line each.
    """

    sources: Mapping[str, StoredTensor] = field(default_factory=dict)
    shifts: Mapping[str, tuple[StoredTensor, float]] = field(default_factory=dict)
    rows: Mapping[str, tuple[StoredTensor, tuple[int, ...]]] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()
    vocabularies: Mapping[tuple[str, ...], int] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    untied: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def vocabulary(self) -> int | None:
        """The vocabulary's new size, where it has another: of several the first."""
        return next(iter(self.vocabularies.values()), None)

    def listed(self, base: Checkpoint, of_model: bool) -> list[CarriedRecord]:
        """List the edits as JSON values; those `of_model`, a fine-tuned one, only where they differ from the base."""
        lines = [(name, "replaced" if name in base.weight_map else "new", part) for name, part in self.sources.items()
                 if not (of_model and name in base.weight_map and equal(part, StoredTensor(*base.locate(name))))]  # fmt: skip
        lines += [(name, f"plus {scaling:g} times", part) for name, (part, scaling) in self.shifts.items()]
        lines += [(name, f"{len(indices)} rows replaced", part) for name, (part, indices) in self.rows.items()]
        listed: list[CarriedRecord] = [
            {"tensor": name, "change": change, "by": part.info.name} for name, change, part in lines
        ]
        return listed + [
            {"tensor": name, "change": "dropped", "by": reason} for name, reason in sorted(self.dropped.items())
        ]

    def config(self, config: ModelConfig) -> ModelConfig:
        """Set a model's config right where the edits make it untrue; the one given where they do not."""
        for keys, rows in self.vocabularies.items():
            config = config.with_vocabulary(rows, keys)
        return config.untied(self.untied)


def match_carried(
    base: Checkpoint,
    adapter: DeltaSource,
    matched: Mapping[str, str],
    renames: Renames,
    aliases: Mapping[str, StoredTensor] | None = None,
    quantized: Collection[str] = (),
    vocabulary: Mapping[str, VocabularyTensor] = MappingProxyType({}),
) -> TensorEdits:
    """Match every carried tensor of an adapter to its tensor in the merged model.

    Parameters
    ----------
    matched
        Module → base tensor of the factors: the same exchange of prefixes holds for the rest.
    renames
        Those of the base's model.
    aliases
        Further names that the model has for tensors of the base.
    quantized
        Quantized weights, whose tensors on disk are not to be compared with: a merge refuses to replace them.
    vocabulary
        Tensors whose rows are a vocabulary, which may grow or shrink.

    Raises
    ------
    MismatchError
        If a tensor has no match, or does not fit it.
    UnsupportedError
        If the merged model could not be loaded, or a dtype is not one of values.
    """
    known = {**{name: StoredTensor(*base.locate(name)) for name in base.weight_map}, **(aliases or {})}
    matcher = CarriedMatcher(base, adapter, known, matched, renames)
    problems = matcher.problems
    trained: set[str] = set()
    sources: dict[str, StoredTensor] = {}
    shifts: dict[str, tuple[StoredTensor, float]] = {}
    rows: dict[str, tuple[StoredTensor, tuple[int, ...]]] = {}
    # What replaces comes first: the rest must fit it.
    for c in sorted(adapter.carried, key=lambda c: c.role != "saved"):
        name = None if c.role == "original" else matcher.find(c)
        if name is None:
            continue
        mine = adapter.tensors[c.source]
        if name in known and name not in quantized:
            theirs = sources.get(name) or known[name]
            problem = _misfit(c, mine.info, theirs.info, name in vocabulary, bool(vocabulary))
            if c.role != "saved" or mine.info.dtype != theirs.info.dtype:
                for part in (mine, theirs):
                    encoding_of(part.info, str(part.file.path))
            if problem:
                problems.append(problem)
        if c.role == "saved":
            sources[name] = mine
            # A head's bias is saved with a vocabulary that has grown, trained or not.
            if (c.parameter == "bias" and adapter.config.get("bias", "all") != "none") or adapter.trains(c.module):
                trained.add(name)
        elif c.role == "lora_bias":
            shifts[name] = (mine, c.scaling)
        else:
            rows[name] = (mine, c.indices)
    if problems:
        raise MismatchError(
            f"{adapter.file.path}: {listed(problems, separator='; ')}; is {base.path} the base that the adapter was trained on?"
        )
    plain = {name: part for name, part in sources.items() if name not in quantized}
    resized, notes = _vocabularies(known, plain, adapter, vocabulary), tuple(matcher.notes.values())
    return TensorEdits(sources, shifts, rows, frozenset(trained), resized, notes=notes)


class CarriedMatcher:
    """Finds the tensors of the merged model that an adapter's carried tensors edit.

    Parameters
    ----------
    known
        Names of the model's tensors that exist.
    matched
        Module → base tensor of the factors.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapter: DeltaSource,
        known: Collection[str],
        matched: Mapping[str, str],
        renames: Renames,
    ) -> None:
        self.base, self.adapter, self.known = base, adapter, known
        loaded = renames.loaded(known)
        self.by_run_time = {now: name for name, now, by, _, _ in loaded if by is None}
        self.built = {now: name for name, now, by, _, _ in loaded if by is not None}
        self.exchanges = sorted({prefix_exchange(m, tensor.removesuffix(".weight")) for m, tensor in matched.items()})
        self.problems: list[str] = []
        self.notes: dict[str, str] = {}

    def find(self, c: Carried) -> str | None:
        """Return the tensor's name; None where it has none, which is noted as a problem."""
        exchanged = [add + c.name[len(strip) :] for strip, add in self.exchanges if c.name.startswith(strip)]
        found = dict.fromkeys(n for n in (c.name, self.by_run_time.get(c.name), *exchanged) if n in self.known)
        if len(found) > 1:
            self.problems.append(f"{c.source!r} is ambiguous: it could be {listed(map(repr, found))}")
            return None
        if found:
            return next(iter(found))
        if c.role != "saved" or not self.adapter.trains(c.module):
            self.problems.append(_unmatched(c))
            return None
        for name in (c.name, *exchanged):
            if name in self.built:
                raise UnsupportedError(
                    f"{self.adapter.file.path}: {c.source!r} takes the place of {name!r}, which transformers builds on loading from "
                    f"{self.built[name]!r} and its like in {self.base.path}; a merge beside them is not supported"
                )
        stripped = next((strip for strip, add in self.exchanges if strip and not add), None)
        if stripped:
            self.notes[stripped] = (
                f"{c.name!r} is new, beside names that lack the prefix {stripped!r}: transformers 5 loads them together, and earlier "
                "versions refuse to"
            )
        return exchanged[0] if len(set(exchanged)) == 1 else c.name


def _unmatched(c: Carried) -> str:
    if c.role == "lora_bias":
        return f"{c.source!r} would be added to a bias that the base does not have ({c.name!r}), as PEFT cannot merge it either"
    return f"{c.source!r} has no tensor in the base (looked for {c.name!r}), and no modules_to_save in {CONFIG_NAME} names it"


def _misfit(c: Carried, mine: TensorInfo, base: TensorInfo, is_vocabulary: bool, has_vocabulary: bool) -> str:
    if c.role == "tokens":
        expected = (len(c.indices), *base.shape[1:])
        if mine.shape != expected:
            return f"{c.source!r}: expected shape {list(expected)}, found {list(mine.shape)}"
        if c.indices and max(c.indices) >= base.shape[0]:
            return f"{c.source!r}: row {max(c.indices)} of trainable_token_indices is beyond the {base.shape[0]} rows of {base.name!r}"
        return ""
    may_grow = is_vocabulary or LABEL_HEAD.search(base.name)
    resized = c.role == "saved" and mine.shape[1:] == base.shape[1:] and mine.shape and mine.shape[0]
    if mine.shape != base.shape and not (resized and may_grow):
        unnamed = resized and not has_vocabulary
        ask = " (if its rows are the vocabulary, name the base's class with --architecture NAME)" if unnamed else ""
        return f"{c.source!r}: expected shape {list(base.shape)} of {base.name!r}, found {list(mine.shape)}{ask}"
    return ""


def _vocabularies(
    known: Mapping[str, StoredTensor],
    sources: Mapping[str, StoredTensor],
    adapter: DeltaSource,
    vocabulary: Mapping[str, VocabularyTensor],
) -> dict[tuple[str, ...], int]:
    """Return the new number of rows of each vocabulary, if some embedding has another than the base's; then all of it must."""
    resized = {
        name: (known[name].info.shape[0], part.info.shape[0])
        for name, part in sources.items()
        if name in known and part.info.shape != known[name].info.shape and not LABEL_HEAD.search(name)
    }
    follow = {other for changed in resized for other in vocabulary[changed].names}
    found: dict[tuple[str, ...], int] = {}
    for name, (before, after) in resized.items():
        found.setdefault(vocabulary[name].keys, after)
        for other in vocabulary.keys() & known.keys() - follow:
            # Values of a token each, as a head's bias, are no embedding (see `tied_names.without_stale_values`).
            info, rows = known[other].info, sources.get(other, known[other]).info.shape[0]
            embedding = other.endswith(".weight") and len(info.shape) == 2 and info.shape[0] == before
            if embedding and vocabulary[other].keys == vocabulary[name].keys and rows != after:
                raise MismatchError(
                    f"{adapter.file.path}: gives {name!r} {after} rows, but {other!r} keeps {rows}: the vocabulary grew, and the adapter "
                    "was saved without one of the embeddings; save it again with save_embedding_layers=True and both, or neither, targeted"
                )
    return found
