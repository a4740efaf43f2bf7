"""Keep or undo ties if an adapter changes an embedding and a head that are one tensor, or other names of one parameter.

A checkpoint stores one of the names, and a loader gives its tensor to the others as well: anything that a merge writes for the head would
be lost, and anything that it adds to the embedding would change both. In PEFT's model the names separate as soon as an adapter changes
one of them (only PEFT's merge, in place on the shared tensor, mixes them up). So if the names separate, the merged model is untied: all
names are written, and the config says so. If all change in the same way, they stay tied. The table of `architectures` says which names
are one parameter, and where the config states it: ``lm_head.weight`` and ``model.language_model.embed_tokens.weight`` of a LLaVA that ties
them → ``language_model.model.embed_tokens.weight`` on disk, where the head would be ``language_model.lm_head.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.finetuned import FinetunedModel
from streamer.adapters.modules import Module, values_of
from streamer.errors import UnsupportedError
from streamer.plan.architectures import TIE_KEY as KEY
from streamer.plan.architectures import Architecture, architecture_for, pattern_of, record_of
from streamer.plan.carried_tensors import TensorEdits, VocabularyTensor
from streamer.plan.name_matching import Renames
from streamer.storage.checkpoint import Checkpoint
from streamer.units import listed
from streamer.weights.base import StoredTensor, equal
from streamer.weights.model_config import ModelConfig

BY_TIE = "the tie to the embedding"
"""Reason for dropping a tensor, in records."""


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
        return tuple(
            dict.fromkeys([self.stored, *(name for name in self.on_disk.values() if name)])
        )

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

    def __init__(
        self, names: Collection[str], architecture: Architecture, renames: Renames
    ) -> None:
        self._names, self._architecture, self._renames = names, architecture, renames
        self._at = {now: name for name, now in renames.at_run_time(names).items()}
        self._base = f"{architecture.base_prefix}."

    def find(self, run_time: str) -> str | None:
        """Return the name on disk of a stored tensor in any layout: with or without the prefix of the base model."""
        for name in (run_time, run_time.removeprefix(self._base), self._base + run_time):
            if (stored := self._at.get(name)) is not None:
                return stored
        return next(
            (
                n
                for n in (run_time, *self._architecture.disk_patterns(run_time))
                if n in self._names
            ),
            None,
        )

    def find_all(self, pattern: str) -> list[str]:
        """List the names on disk of the tensors that match a pattern, in all layers if it stands for a layer's number."""
        if "*" in pattern:
            return [name for now, name in self._at.items() if pattern_of(now) == pattern]
        stored = self.find(pattern)
        return [] if stored is None else [stored]

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
            if (
                "*" not in name
                and self._renames.at_run_time([*self._names, name]).get(name) == run_time
            ):
                return name
        return None


def find_ties(
    names: Collection[str], architecture: Architecture | None, renames: Renames
) -> tuple[TiedNames, ...]:
    """Find the parameters of a checkpoint that have several names.

    Parameters
    ----------
    names
        The checkpoint's tensors.
    """
    if architecture is None:
        return ()
    # The run-time names of each parameter with several, and the keys of each of its ties.
    groups: list[tuple[list[str], list[tuple[tuple[str, ...], ...]]]] = []
    for tie in (tie for tie in architecture.ties if tie.tied):
        same = [g for g in groups if tie.name in g[0] or tie.source in g[0]]
        together = dict.fromkeys([tie.source, *(n for g in same for n in g[0]), tie.name])
        groups = [g for g in groups if g not in same] + [
            ([*together], [*(k for g in same for k in g[1]), tie.keys])
        ]
    on_disk, ties = NamesOnDisk(names, architecture, renames), []
    for run_time, stated in groups:
        # A tie without keys holds whatever the config says, and so do all of its parameter.
        keys = (
            tuple(dict.fromkeys(key for keys_of_tie in stated for key in keys_of_tie))
            if all(stated)
            else ()
        )
        if any("*" in name for name in run_time):
            ties.append(TiedNames(dict.fromkeys(run_time), "", keys))
            continue
        stored_names = {name: stored for name in run_time if (stored := on_disk.find(name))}
        if stored_names:
            source, stored = next(iter(stored_names.items()))
            at = {
                name: stored_names.get(name) or on_disk.of_new(name, source, stored)
                for name in run_time
            }
            ties.append(TiedNames(at, stored, keys))
    return tuple(ties)


@dataclass(frozen=True)
class TieEditor:
    """Editor that extends an adapter's edits so that they keep or undo the ties of its base.

    LoRA on ``lm_head`` of a tied model: ``lm_head.weight``, which the base does not have, becomes a source with the embedding's values,
    the delta is added to it, and the model is untied. Embedding and ``lm_head`` saved with equal values: the copy is dropped.

    Attributes
    ----------
    deltas
        Names of the tensors with a delta.
    mirrored
        Those whose delta another name of the same tensor has too (see `mirrored`).
    """

    base: Checkpoint
    adapter: DeltaSource
    config: ModelConfig
    architecture: Architecture
    edits: TensorEdits
    deltas: frozenset[str]
    mirrored: frozenset[str]

    def edited(self, ties: Iterable[TiedNames]) -> TensorEdits:
        """Return all edits.

        Raises
        ------
        UnsupportedError
            If names separate but no config can untie them.
        """
        ties, rows = [self._without_apart(tie) for tie in ties if tie.stored], dict(self.edits.rows)
        for tie in ties:
            # PEFT saves the embedding's trained tokens again for a tied head.
            if (first := rows.get(self._input(tie) or "")) is not None and self._shares_tokens(tie):
                for name in {*tie.names} & rows.keys() - {self._input(tie)}:
                    if rows[name][1] == first[1] and equal(rows[name][0], first[0]):
                        del rows[name]
        return replace(self, edits=replace(self.edits, rows=rows))._edited(ties)

    def _edited(self, ties: Sequence[TiedNames]) -> TensorEdits:
        parted = [tie for tie in ties if self._parts(tie)]
        untied = tuple(dict.fromkeys(key for tie in parted for key in tie.keys))
        if untied and not self.config.values:
            raise UnsupportedError(
                f"{self.base.path}: has no config.json to say that {listed(map(repr, parted[0].names))} are no longer one tensor; add it"
            )
        architecture = (
            architecture_for(self.config.untied(untied), self.architecture.name) if parted else None
        )
        still = architecture.tied_names if architecture else set()
        edits = replace(self.edits, untied=untied)
        for tie in ties:
            if parted and not still & tie.on_disk.keys():
                edits = self._apart(tie, edits)
            elif tie in parted:
                option = (
                    "trainable_token_indices"
                    if self.edits.rows.keys() & {*tie.names}
                    else "exclude_modules"
                )
                why = f"changes {listed(map(repr, tie.names))} separately, which {self.architecture.name} ties whatever its config says"
                raise self._refused(why, option)
            elif self._changed(tie):
                edits = self._together(tie, edits)
        return edits

    def _refused(self, why: str, option: str = "exclude_modules") -> UnsupportedError:
        advice = f"train an adapter that leaves them unchanged ({option})"
        return UnsupportedError(f"{self.base.path}: {self.adapter.path} {why}; {advice}")

    def _changed(self, tie: TiedNames) -> set[str]:
        edits = self.edits
        return {*tie.names} & {*edits.sources, *edits.rows, *edits.shifts, *self.deltas}

    def _without_apart(self, tie: TiedNames) -> TiedNames:
        """Compare the stored copies of a tensor that changes, and omit unequal copies if the config says that they are separate."""
        if not self._changed(tie):
            return tie
        copies = {
            name: StoredTensor(*self.base.locate(name))
            for name in tie.names
            if name in self.base.weight_map
        }
        # A T5 stores its own head beside the embedding if the config says that they are separate.
        apart = _unequal(
            copies, self.base.path, "the config", bool(tie.keys) or self.config.tied is not False
        )
        return replace(
            tie, on_disk={now: name for now, name in tie.on_disk.items() if name not in apart}
        )

    def _parts(self, tie: TiedNames) -> bool:
        """Test whether the names stop being one tensor: they change, but not all in the same way."""
        changed, edits = self._changed(tie), self.edits
        delta, rows = changed & self.deltas, changed & edits.rows.keys()
        if not changed or delta & self.mirrored:
            return False
        saved = {name: edits.sources[name] for name in tie.names if name in edits.sources}
        first = next(iter(saved.values()), None)
        same = all(
            first is part or equal(part, first) for part in saved.values() if first is not None
        )
        whole = len(saved) == len(tie.names) or not edits.trained & saved.keys()
        tokens = not rows or (rows == {self._input(tie)} and self._shares_tokens(tie))
        if not (
            (rows and not tokens) or delta or changed & edits.shifts.keys() or not (same and whole)
        ):
            return False
        if (
            self._input(tie) in rows
            and self._shares_tokens(tie)
            and (changed - rows or len(rows) > 1)
        ):
            others = listed(map(repr, sorted({*tie.names} - {self._input(tie)})))
            which = f"{self._input(tie)!r}, which is tied to {others}, and also changes one of them otherwise"
            raise self._refused(f"trains tokens of {which}", f"or untie them first, by {KEY}=false")
        if missing := [now for now, name in tie.on_disk.items() if name is None]:
            which = f"{tie.stored!r} and {missing[0]!r}, which is tied to it, separately"
            raise self._refused(
                f"changes {which}, but the name under which loaders would find the latter is not known"
            )
        return True

    def _input(self, tie: TiedNames) -> str | None:
        return tie.on_disk.get(f"{self.architecture.input_embedding}.weight")

    def _shares_tokens(self, tie: TiedNames) -> bool:
        """Test whether PEFT applies trained tokens to all names: it does if the class itself, and its own config, ties them."""
        stated = (record_of(self.architecture.name) or {}).get("ties")
        return bool(stated) and (not tie.keys or any(len(key) == 1 for key in tie.keys))

    def _apart(self, tie: TiedNames, edits: TensorEdits) -> TensorEdits:
        """Write all names; names that do not change get the values that the adapter has for the base."""
        sources, base = dict(edits.sources), StoredTensor(*self.base.locate(tie.stored))
        start = next(
            (sources[name] for name in tie.names if name in sources and name not in edits.trained),
            base,
        )
        for name in tie.names:
            if start is not base or name not in self.base.weight_map:
                sources.setdefault(name, start)
        shapes = {
            name: (sources[name].info if name in sources else base.info).shape for name in tie.names
        }
        if other := next((name for name in tie.others if shapes[name] != shapes[tie.stored]), None):
            which = f"{tie.stored!r} {shapes[tie.stored][0]} rows, but {other!r}, which is tied to it, has {shapes[other][0]}"
            raise self._refused(
                f"gives {which}", "or save it again with save_embedding_layers=True"
            )
        return replace(edits, sources=sources)

    def _together(self, tie: TiedNames, edits: TensorEdits) -> TensorEdits:
        """Write only the stored name, with the edits that change all names."""
        sources, rows, shifts = dict(edits.sources), dict(edits.rows), dict(edits.shifts)
        for name in tie.others:
            if name in sources:
                sources.setdefault(tie.stored, sources.pop(name))
            if name in rows:
                rows.setdefault(tie.stored, rows.pop(name))
            shifts.pop(name, None)
        gone = {name: BY_TIE for name in tie.others if name in self.base.weight_map}
        return replace(
            edits, sources=sources, rows=rows, shifts=shifts, dropped={**edits.dropped, **gone}
        )


def without_copies(
    base: Checkpoint, tuned: FinetunedModel, architecture: Architecture | None, renames: Renames
) -> tuple[FinetunedModel, dict[str, str]]:
    """Omit a fine-tuned model's copies of tied tensors, which would otherwise be judged and mitigated separately.

    If embedding and ``lm_head`` have equal bytes in both models and are tied, only the embedding is judged and written.

    Parameters
    ----------
    architecture
        Facts about the fine-tuned model.

    Returns
    -------
    tuned, dropped
        The model without the copies, and the base's copies that the merged model omits, with the reason.

    Raises
    ------
    UnsupportedError
        If copies in either model differ, or if it is not known whether the class ties tensors of equal bytes.
    """
    if architecture is None and tuned.model_config.tied is not False:
        outer = [
            t
            for name, t in tuned.tensors.items()
            if len(t.info.shape) == 2 and "*" not in pattern_of(name)
        ]
        if pair := next((p for p in combinations(outer, 2) if equal(*p)), None):
            raise UnsupportedError(
                f"{tuned.path}: whether {pair[0].info.name!r} and {pair[1].info.name!r}, whose bytes are equal, are tied depends on the "
                f"model's class: {_unknown(tuned.model_config)}"
            )
    copies: set[str] = set()
    dropped: dict[str, str] = {}
    for tie in find_ties(tuned.tensors, architecture, renames):
        tuned_copies = {name: tuned.tensors[name] for name in tie.names if name in tuned.tensors}
        base_copies = {
            name: StoredTensor(*base.locate(name)) for name in tie.names if name in base.weight_map
        }
        refuse = bool(tie.keys) or tuned.model_config.tied is not False
        apart = _unequal(tuned_copies, tuned.path, "the config", refuse)
        apart |= _unequal(base_copies, base.path, f"the config of {tuned.path}", refuse)
        same = [
            name
            for name in tie.names
            if name in tuned_copies.keys() | base_copies and name not in apart
        ]
        tuned_name = next(
            (name for name in same if name in tuned_copies and name in base_copies), tie.stored
        )
        copies |= {name for name in same if name in tuned_copies and name != tuned_name}
        dropped |= {name: BY_TIE for name in same if name in base_copies and name != tuned_name}
    return tuned.without(copies) if copies else tuned, dropped


def mirrored(
    ties: Iterable[TiedNames], adapter: DeltaSource, matched: Mapping[str, str]
) -> dict[str, Module]:
    """Find modules that repeat another module's factors, transposed: PEFT's LoRA on a tied head with ``ensure_weight_tying``.

    DoRA's factors are shared in the same way, but each module has its own magnitudes, so its deltas differ.

    Parameters
    ----------
    matched
        Module → base tensor.

    Returns
    -------
    dict
        The embedding's module → the head's module; its ``lora_A`` is the embedding's ``lora_embedding_B`` transposed, and vice versa.
    """
    if not adapter.config.get("ensure_weight_tying") or adapter.config.peft_type != "LORA":
        return {}
    by_tensor = {tensor: adapter.modules[module] for module, tensor in matched.items()}
    mirrors = {}
    for tie in ties:
        modules = [by_tensor[name] for name in tie.names if name in by_tensor]
        if len(modules) < 2:
            continue
        embedding, head, *others = sorted(modules, key=lambda m: m.layer_kind != "embedding")
        if others or not _repeats(head, embedding, adapter):
            raise UnsupportedError(
                f"{adapter.path}: says ensure_weight_tying, but the factors of {embedding.name!r} and {head.name!r} are not those of one "
                "delta; to use them as trained, set ensure_weight_tying to false in its config, and name both in target_modules"
            )
        if embedding.low_rank:
            mirrors[embedding.name] = head
    return mirrors


def _repeats(head: Module, embedding: Module, adapter: DeltaSource) -> bool:
    """Test whether a head's factors are an embedding's, transposed, with the same scaling."""
    if (head.shape, head.rank, head.scaling) != (
        embedding.shape[::-1],
        embedding.rank,
        embedding.scaling,
    ):
        return False
    # A NaN has its own error later.
    A, B, *_ = (values_of(adapter.tensors[name]).nan_to_num() for name in head.tensor_names)
    rows, columns, *_ = (
        values_of(adapter.tensors[name]).nan_to_num() for name in embedding.tensor_names
    )
    return torch.equal(A, columns.T) and torch.equal(B, rows.T)


def refuse_numbered_ties(
    ties: Iterable[TiedNames], base: Path, adapter: DeltaSource, matched: Iterable[str]
) -> None:
    """Refuse changes to parameters that are tied layer by layer."""
    for name in (*(f"{module}.weight" for module in matched), *(c.name for c in adapter.carried)):
        pattern = pattern_of(name)
        tied = [now for tie in ties if not tie.stored for now in tie.on_disk]
        if any(
            pattern == now or now.endswith(f".{pattern}") or pattern.endswith(f".{now}")
            for now in tied
        ):
            raise UnsupportedError(
                f"{base}: ties {name!r}, which {adapter.path} changes, to others layer by layer; train without it (exclude_modules)"
            )


def refuse_unknown_ties(
    base: Checkpoint,
    config: ModelConfig,
    adapter: DeltaSource,
    edits: TensorEdits,
    matched: Mapping[str, str],
) -> None:
    """Refuse changes to tensors that may be tied, in a model of an unknown class.

    A matrix outside layers may be tied if no other has its shape, as the base may store only one of the names. If the config states a
    vocabulary, only matrices with that many rows count; if not, linear layers (a projector, a pooler) do not count if their number of rows
    is a width found in layers. A matrix with the bytes of another is refused, too. If the config states that nothing is tied, nothing is.
    """
    if config.tied is False:
        return
    in_layers = [
        name for name in base.weight_map if "*" in pattern_of(name) and name.endswith(".weight")
    ]
    widths = {
        n
        for shape in (base.info(name).shape for name in in_layers)
        if len(shape) == 2
        for n in shape
    }
    linear = {
        name for module, name in matched.items() if adapter.modules[module].layer_kind == "linear"
    }
    outer = {
        name: base.info(name).shape for name in base.weight_map if not pattern_of(name).count("*")
    }
    for name in dict.fromkeys([*matched.values(), *edits.sources, *edits.rows]):
        # A quantized weight has other names on disk and is tied to nothing.
        new = name in edits.sources and name not in base.weight_map
        shape = edits.sources[name].info.shape if new else outer.get(name, ())
        if len(shape) != 2 or "*" in pattern_of(name) or config.vocab_size not in (None, shape[0]):
            continue
        alike = [other for other in outer if other != name and outer[other] == shape]
        inner = config.vocab_size is None and name in linear and shape[0] in widths
        apart = alike and not new and not config.tied
        copied = not new and any(
            equal(*(StoredTensor(*base.locate(n)) for n in (name, other))) for other in alike
        )
        if (inner or apart or (new and not alike)) and not copied:
            continue
        raise UnsupportedError(
            f"{base.path}: whether {name!r} is tied to another tensor depends on the model's class: {_unknown(config)}"
        )


def _unknown(config: ModelConfig) -> str:
    whose = listed(map(repr, config.architectures)) if config.architectures else "no class"
    return f"the config names {whose}, which is not known here; name the class, or a similar one, with --architecture"


def _unequal(copies: Mapping[str, StoredTensor], path: Path, whose: str, refuse: bool) -> set[str]:
    """Return the names of a tied tensor's copies that differ from the first."""
    first, *others = copies.values() or (None,)
    apart = {other.info.name for other in others if first and other and not equal(first, other)}
    if first and apart and refuse:
        raise UnsupportedError(
            f"{path}: {apart.pop()!r} differs from {first.info.name!r}, to which {whose} ties it, and loaders disagree on which of them "
            f"to use; correct {KEY}, or remove the copy"
        )
    return apart


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
        return {
            name: VocabularyTensor((name,), keys)
            for name, shape in shapes.items()
            if shape and shape[0] == rows
        }
    on_disk = NamesOnDisk(base.weight_map, architecture, renames)
    tensors: dict[str, VocabularyTensor] = {}
    for run_time, keys in architecture.vocabulary.items():
        for name in on_disk.find_all(run_time):
            tensors[name] = VocabularyTensor((name,), keys)
    for tie in ties:
        stated = next(filter(None, map(architecture.vocabulary_keys, tie.on_disk)), None)
        if tie.stored and stated:
            tensors |= dict.fromkeys(tie.names, VocabularyTensor(tie.names, stated))
    return tensors


def without_stale_values(
    base: Checkpoint,
    architecture: Architecture | None,
    vocabulary: Mapping[str, VocabularyTensor],
    edits: TensorEdits,
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
        if name in vocabulary
        and name in base.weight_map
        and part.info.shape != base.info(name).shape
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
