"""What an adapter's other tensors do to the base: weights and biases that replace, biases and rows that are added or exchanged.

LoRA factors are matched in `targets`. Everything else that an adapter carries is given its tensor here, by the names that the
factors were matched by, so that `plan` knows every tensor of the merged model before anything is written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from streamer.adapters.adapter import CONFIG_NAME, Adapter
from streamer.adapters.layer_names import HEADS, VOCABULARY
from streamer.adapters.modules import Carried
from streamer.errors import MismatchError, UnsupportedError
from streamer.plan.task_heads import LABEL_HEAD
from streamer.plan.transformers_renames import Renames
from streamer.storage.checkpoint import Checkpoint
from streamer.storage.header import TensorInfo
from streamer.units import listed
from streamer.weights.base import StoredTensor
from streamer.weights.dtypes import encoding_of


class CarriedRecord(TypedDict):
    """What an adapter's tensor that is no factor does to a tensor of the base."""

    tensor: str
    change: str
    by: str


@dataclass(frozen=True)
class TensorEdits:
    """By name of the merged model's tensor.

    Attributes
    ----------
    sources
        What takes the place of the base's tensor, before any delta; a name that the base does not have is a new tensor.
    shifts
        What is added to it, and times what.
    rows
        What takes the place of some of its rows, and of which.
    trained
        Those of the sources that the adapter trained. The others are the base as the adapter knows it.
    vocabulary
        The vocabulary's new size, where a replaced embedding has another; for the config.
    dropped
        Tensors of the base that the merged model does without.
    untied
        Whether the lm_head parts from the embedding that it was tied to (see `tied`); for the config.
    notes
        What is to be said of a merged model, one line each.
    """

    sources: Mapping[str, StoredTensor] = field(default_factory=dict)
    shifts: Mapping[str, tuple[StoredTensor, float]] = field(default_factory=dict)
    rows: Mapping[str, tuple[StoredTensor, tuple[int, ...]]] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()
    vocabulary: int | None = None
    dropped: frozenset[str] = frozenset()
    untied: bool = False
    notes: tuple[str, ...] = ()

    def listed(self, base: Checkpoint) -> list[CarriedRecord]:
        """What happens to which tensor, as JSON values."""
        lines = [(name, "replaced" if name in base.weight_map else "new", part) for name, part in self.sources.items()]
        lines += [(name, f"plus {scale:g} times", part) for name, (part, scale) in self.shifts.items()]
        lines += [(name, f"{len(indices)} rows replaced", part) for name, (part, indices) in self.rows.items()]
        listed: list[CarriedRecord] = [
            {"tensor": name, "change": change, "by": part.info.name} for name, change, part in lines
        ]
        return listed + [
            {"tensor": name, "change": "dropped", "by": "the tie to the embedding"} for name in sorted(self.dropped)
        ]


def match_changes(
    base: Checkpoint,
    adapter: Adapter,
    matched: Mapping[str, str],
    renames: Renames,
    aliases: Mapping[str, StoredTensor] | None = None,
    coded: Collection[str] = (),
) -> TensorEdits:
    """Give every carried tensor of an adapter its tensor in the merged model.

    Parameters
    ----------
    matched
        Module → base tensor of the factors: the same exchange of prefixes holds for the rest.
    renames
        Those of the base's model.
    aliases
        Further names that the model has for tensors of the base.
    coded
        Weights that stand as codes, whose tensors on disk are not to be compared with: a merge refuses to replace them.

    Raises
    ------
    MismatchError
        If a tensor finds no place, or does not fit it.
    UnsupportedError
        If the merged model could not be loaded, or a dtype is not one of values.
    """
    known = {**{name: StoredTensor(*base.locate(name)) for name in base.weight_map}, **(aliases or {})}
    places = _Places(base, adapter, known, matched, renames)
    problems = places.problems
    trained: set[str] = set()
    sources: dict[str, StoredTensor] = {}
    shifts: dict[str, tuple[StoredTensor, float]] = {}
    rows: dict[str, tuple[StoredTensor, tuple[int, ...]]] = {}
    # What replaces comes first: the rest must fit it.
    for c in sorted(adapter.carried, key=lambda c: c.role != "saved"):
        name = None if c.role == "original" else places.find(c)
        if name is None:
            continue
        mine = adapter.tensors[c.source]
        if name in known and name not in coded:
            theirs = sources.get(name) or known[name]
            problem = _misfit(c, mine.info, theirs.info)
            if c.role != "saved" or mine.info.dtype != theirs.info.dtype:
                for part in (mine, theirs):
                    encoding_of(part.info, str(part.file.path))
            if problem:
                problems.append(problem)
        if c.role == "saved":
            sources[name] = mine
            if c.parameter == "bias" or _is_saved_module(c.module, adapter):
                trained.add(name)
        elif c.role == "lora_bias":
            shifts[name] = (mine, c.scale)
        else:
            rows[name] = (mine, c.indices)
    if problems:
        raise MismatchError(
            f"{adapter.file.path}: {listed(problems, separator='; ')}; is {base.path} the base that the adapter was trained on?"
        )
    return TensorEdits(
        sources,
        shifts,
        rows,
        frozenset(trained),
        _vocabulary(base, {n: p for n, p in sources.items() if n not in coded}, adapter),
        notes=tuple(places.notes.values()),
    )


class _Places:
    """Where the tensors of an adapter stand in the merged model.

    Parameters
    ----------
    known
        Names of the model's tensors that exist.
    matched
        Module → base tensor of the factors.
    """

    def __init__(
        self, base: Checkpoint, adapter: Adapter, known: Collection[str], matched: Mapping[str, str], renames: Renames
    ) -> None:
        self.base, self.adapter, self.known = base, adapter, known
        loaded = renames.loaded(base.weight_map)
        self.by_run_time = {now: name for name, now, by, _, _ in loaded if by is None}
        self.built = {now: name for name, now, by, _, _ in loaded if by is not None}
        self.exchanges = sorted({_exchange(m, tensor.removesuffix(".weight")) for m, tensor in matched.items()})
        self.problems: list[str] = []
        self.notes: dict[str, str] = {}

    def find(self, c: Carried) -> str | None:
        """The tensor's name; None where it has none, which is a problem."""
        exchanged = [add + c.name[len(strip) :] for strip, add in self.exchanges if c.name.startswith(strip)]
        found = dict.fromkeys(n for n in (c.name, self.by_run_time.get(c.name), *exchanged) if n in self.known)
        if len(found) > 1:
            self.problems.append(f"{c.source!r} is ambiguous: it could be {listed(map(repr, found))}")
            return None
        if found:
            return next(iter(found))
        if c.role != "saved" or not _is_saved_module(c.module, self.adapter):
            self.problems.append(_no_place(c))
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


def _no_place(c: Carried) -> str:
    if c.role == "lora_bias":
        return f"{c.source!r} would be added to a bias that the base does not have ({c.name!r}), as PEFT cannot merge it either"
    if c.module.rpartition(".")[2] in HEADS:
        return f"{c.source!r} has no tensor in the base (looked for {c.name!r}); if it is tied to the embedding there, untie it first"
    return f"{c.source!r} has no tensor in the base (looked for {c.name!r}), and no modules_to_save in {CONFIG_NAME} names it"


def _is_saved_module(module: str, adapter: Adapter) -> bool:
    """PEFT's rule: a module whose path ends in an entry of modules_to_save, and what is below it. Of a fine-tuned model, all."""
    if adapter.is_model:
        return True
    entries = adapter.config.get("modules_to_save") or ()
    parts = module.split(".")
    paths = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return isinstance(entries, list) and any(p.endswith(e) for p in paths for e in entries if isinstance(e, str) and e)


def _misfit(c: Carried, mine: TensorInfo, base: TensorInfo) -> str:
    if c.role == "tokens":
        expected = (len(c.indices), *base.shape[1:])
        if mine.shape != expected:
            return f"{c.source!r}: expected shape {list(expected)}, found {list(mine.shape)}"
        if c.indices and max(c.indices) >= base.shape[0]:
            return f"{c.source!r}: row {max(c.indices)} of trainable_token_indices is beyond the {base.shape[0]} rows of {base.name!r}"
        return ""
    may_grow = c.module.rpartition(".")[2] in VOCABULARY or LABEL_HEAD.search(base.name)
    resized = may_grow and c.role == "saved" and mine.shape[1:] == base.shape[1:]
    if mine.shape != base.shape and not (resized and mine.shape and mine.shape[0]):
        return f"{c.source!r}: expected shape {list(base.shape)} of {base.name!r}, found {list(mine.shape)}"
    return ""


def _vocabulary(base: Checkpoint, sources: Mapping[str, StoredTensor], adapter: Adapter) -> int | None:
    """The new number of rows of the embeddings, if some have another than the base's; then all must."""
    resized = {
        name: (base.info(name).shape[0], part.info.shape[0])
        for name, part in sources.items()
        if name in base.weight_map and part.info.shape != base.info(name).shape and not LABEL_HEAD.search(name)
    }
    if not resized:
        return None
    name, (before, after) = next(iter(resized.items()))
    for other in base.weight_map:
        module = other.removesuffix(".weight").rpartition(".")[2]
        shape = (sources[other].info if other in sources else base.info(other)).shape
        if module in VOCABULARY and len(shape) == 2 and shape[0] != after and base.info(other).shape[0] == before:
            raise MismatchError(
                f"{adapter.file.path}: gives {name!r} {after} rows, but {other!r} keeps {shape[0]}: the vocabulary grew, and the adapter "
                "was saved without one of the embeddings; save it again with save_embedding_layers=True and both, or neither, targeted"
            )
    return after


def _exchange(module: str, stem: str) -> tuple[str, str]:
    """The prefixes of a module and its tensor that differ: (strip, add)."""
    mine, theirs = module.split("."), stem.split(".")
    n = 0
    while n < min(len(mine), len(theirs)) and mine[-1 - n] == theirs[-1 - n]:
        n += 1
    strip, add = mine[: len(mine) - n], theirs[: len(theirs) - n]
    return "".join(p + "." for p in strip), "".join(p + "." for p in add)


def edited_config(config: Mapping[str, Any], changes: TensorEdits) -> dict[str, Any]:
    """The model's config with what the changes make untrue set right; equal to the one given where nothing is."""
    out = dict(config)
    if changes.vocabulary is not None:
        _set(out, "vocab_size", changes.vocabulary)
    if changes.untied:
        # Stated wherever it could be, since a class may tie by default.
        out["tie_word_embeddings"] = False
        if isinstance(out.get("text_config"), dict):
            out["text_config"] = {**out["text_config"], "tie_word_embeddings": False}
    return out


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a key where the config has it: at the top, and in the language model's part of a vision-language config."""
    text = config.get("text_config")
    if isinstance(text, dict) and key in text:
        config["text_config"] = {**text, key: value}
        if key not in config:
            return
    config[key] = value
