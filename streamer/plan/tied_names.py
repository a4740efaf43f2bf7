"""Find all names of one parameter: in a loaded model, by the table of architectures, and on disk.

A checkpoint stores one of them. ``lm_head.weight`` and ``model.language_model.embed_tokens.weight`` of a LLaVA that ties them →
``language_model.model.embed_tokens.weight`` on disk, where the head would be ``language_model.lm_head.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from streamer.errors import UnsupportedError
from streamer.plan.architectures import Architecture, pattern_of
from streamer.plan.carried_tensors import TensorEdits, VocabularyTensor
from streamer.plan.transformers_renames import Renames
from streamer.storage.checkpoint import Checkpoint
from streamer.weights.base import StoredTensor
from streamer.weights.model_config import ModelConfig


@dataclass(frozen=True)
class TiedNames:
    """Names of one parameter.

    Attributes
    ----------
    on_disk
        Run-time name → the name that it has, or would have, on disk; names to which others are tied come first. None if there is no such
        name, or if the names contain a layer's number.
    stored
        Name on disk of the tensor that is read; there may be copies under other names. Empty if the names contain numbers.
    keys
        Config keys that state the tie (see `architectures.Tie`).
    """

    on_disk: Mapping[str, str | None]
    stored: str
    keys: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Return all names on disk, the stored one first."""
        return tuple(dict.fromkeys([self.stored, *(name for name in self.on_disk.values() if name)]))

    @property
    def others(self) -> tuple[str, ...]:
        """Return the names on disk except the stored one."""
        return self.names[1:]


class NamesOnDisk:
    """Lookup of the names that a loaded model's tensors have, or would have, on disk.

    Parameters
    ----------
    names
        Names in a checkpoint.
    """

    def __init__(self, names: Collection[str], architecture: Architecture, renames: Renames) -> None:
        self._names, self._architecture, self._renames = names, architecture, renames
        self._at = {now: name for name, now in renames.at_run_time(names).items()}
        self._base = f"{architecture.base_prefix}."

    def find(self, run_time: str) -> str | None:
        """Return the name on disk of a stored tensor in any layout: with or without the prefix of the base model."""
        for name in (run_time, run_time.removeprefix(self._base), self._base + run_time):
            if (found := self._at.get(name)) is not None:
                return found
        return next((n for n in (run_time, *self._architecture.disk_patterns(run_time)) if n in self._names), None)

    def find_all(self, pattern: str) -> list[str]:
        """List the names on disk of the tensors that match a pattern, in all layers if it stands for a layer's number."""
        if "*" in pattern:
            return [name for now, name in self._at.items() if pattern_of(now) == pattern]
        found = self.find(pattern)
        return [] if found is None else [found]

    def of_new(self, run_time: str, beside: str, beside_on_disk: str) -> str | None:
        """Return a name on disk under which loaders find a new tensor, in the layout of another tensor; None if there is none.

        ``lm_head.weight`` beside ``model.language_model.embed_tokens.weight``, which is stored as
        ``language_model.model.embed_tokens.weight`` → ``language_model.lm_head.weight``.
        """
        if beside != beside_on_disk and beside == self._base + beside_on_disk:
            return run_time.removeprefix(self._base)
        patterns = self._architecture.disk_patterns(run_time)
        of_table = patterns if beside_on_disk in self._architecture.disk_patterns(beside) else ()
        for name in (*of_table, run_time, *patterns):
            if "*" not in name and self._renames.at_run_time([*self._names, name]).get(name) == run_time:
                return name
        return None


def find_ties(names: Collection[str], architecture: Architecture | None, renames: Renames) -> tuple[TiedNames, ...]:
    """Find the parameters of a checkpoint that have several names.

    Parameters
    ----------
    names
        The checkpoint's tensors.
    """
    if architecture is None:
        return ()
    on_disk = NamesOnDisk(names, architecture, renames)
    return tuple(t for group in _groups(architecture) if (t := _located(*group, on_disk)) is not None)


def _groups(architecture: Architecture) -> list[tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]]:
    """List the run-time names of each parameter with several, and the keys of their ties: no keys if one of the ties has none."""
    groups: list[tuple[list[str], list[tuple[tuple[str, ...], ...]]]] = []
    for tie in architecture.ties:
        if not tie.tied:
            continue
        same = [g for g in groups if tie.name in g[0] or tie.source in g[0]]
        names = dict.fromkeys([tie.source, *(n for g in same for n in g[0]), tie.name])
        groups = [g for g in groups if g not in same] + [(list(names), [*(k for g in same for k in g[1]), tie.keys])]
    return [
        (tuple(names), tuple(dict.fromkeys(k for keys in stated for k in keys)) if all(stated) else ())
        for names, stated in groups
    ]


def _located(run_time: tuple[str, ...], keys: tuple[tuple[str, ...], ...], on_disk: NamesOnDisk) -> TiedNames | None:
    if any("*" in name for name in run_time):
        return TiedNames(dict.fromkeys(run_time), "", keys)
    found = {name: on_disk.find(name) for name in run_time}
    source = next((name for name in run_time if found[name]), None)
    if source is None or not (stored := found[source]):
        return None
    return TiedNames({n: found[n] or on_disk.of_new(n, source, stored) for n in run_time}, stored, keys)


def vocabulary_tensors(
    base: Checkpoint,
    config: ModelConfig,
    architecture: Architecture | None,
    ties: Iterable[TiedNames],
    renames: Renames,
) -> dict[str, VocabularyTensor]:
    """Find the tensors with a row for each entry of a vocabulary, by their names on disk.

    In a model of an unknown class, these are the tensors with as many rows as the config states.
    """
    if architecture is None:
        shapes = {name: base.info(name).shape for name in base.weight_map}
        rows, keys = config.vocab_size, config.vocabulary_keys
        return {name: VocabularyTensor((name,), keys) for name, shape in shapes.items() if shape and shape[0] == rows}
    on_disk = NamesOnDisk(base.weight_map, architecture, renames)
    found: dict[str, VocabularyTensor] = {}
    for run_time, keys in architecture.vocabulary.items():
        for name in on_disk.find_all(run_time):
            found[name] = VocabularyTensor((name,), keys)
    for tie in ties:
        stated = next(filter(None, map(architecture.vocabulary_keys, tie.on_disk)), None)
        if tie.stored and stated:
            found |= dict.fromkeys(tie.names, VocabularyTensor(tie.names, stated))
    return found


def without_stale_values(
    base: Checkpoint, architecture: Architecture | None, vocabulary: Mapping[str, VocabularyTensor], edits: TensorEdits
) -> TensorEdits:
    """Omit zeros with one value for each token if the vocabulary's size changes: loaders do not need them (BART's ``final_logits_bias``).

    Raises
    ------
    UnsupportedError
        If other tensors have a value for each token that the adapter does not supply for new tokens: a head's bias, a router's table.
    """
    before = {
        vocabulary[name].keys: base.info(name).shape[0]
        for name, part in edits.sources.items()
        if name in vocabulary and name in base.weight_map and part.info.shape != base.info(name).shape
    }
    patterns = () if architecture is None else architecture.may_be_missing
    stale = {}
    for name in sorted(vocabulary.keys() & base.weight_map.keys() - edits.dropped.keys()):
        keys, saved = vocabulary[name].keys, edits.sources.get(name)
        if before.get(keys) not in (base.info(name) if saved is None else saved.info).shape:
            continue
        spare = saved is None and any(re.search(pattern, name) for pattern in patterns)
        if not spare or StoredTensor(*base.locate(name)).whole().any():
            raise UnsupportedError(
                f"{base.path}: {name!r} has a value for each of {before[keys]} tokens, but the adapter gives the model "
                f"{edits.vocabularies[keys]}; train from a model whose embeddings have that many rows"
            )
        stale[name] = "the vocabulary's new size"
    return replace(edits, dropped={**edits.dropped, **stale})
