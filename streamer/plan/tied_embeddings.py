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
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path

import torch
from torch import Tensor

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.finetuned import FinetunedModel
from streamer.adapters.modules import Module, values_of
from streamer.errors import UnsupportedError
from streamer.plan.architectures import TIE_KEY as KEY
from streamer.plan.architectures import Architecture, architecture_for, pattern_of, record_of
from streamer.plan.base import Found, OpenBase
from streamer.plan.carried_tensors import TensorEdits, VocabularyTensor
from streamer.plan.names import TiedNames
from streamer.storage.checkpoint import Checkpoint
from streamer.units import listed
from streamer.weights.base import StoredTensor, equal
from streamer.weights.model_config import ModelConfig

BY_TIE = "the tie to the embedding"
"""Reason for dropping a tensor, in records."""


def with_ties(
    base: OpenBase, adapter: DeltaSource, found: Found, edits: TensorEdits
) -> TensorEdits:
    """Keep or undo the base's ties, as an adapter's deltas and edits require."""
    checkpoint = base.checkpoint
    matched = found.matched
    if found.architecture is None:
        refuse_unknown_ties(base, adapter, found, edits)
        return edits
    refuse_numbered_ties(found.ties, checkpoint.path, adapter, matched)
    deltas = {*matched.values()}
    mirrored = {matched[name] for name in found.mirrors}
    editor = TieEditor(
        checkpoint, adapter, base.config, found.architecture, edits, deltas, mirrored
    )
    return editor.edited(found.ties)


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
    deltas: Set[str]
    mirrored: Set[str]

    def edited(self, ties: Iterable[TiedNames]) -> TensorEdits:
        """Return all edits.

        Raises
        ------
        UnsupportedError
            If names separate but no config can untie them.
        """
        ties = [self._without_apart(tie) for tie in ties if tie.stored]
        rows = dict(self.edits.rows)
        for tie in ties:
            # PEFT saves the embedding's trained tokens again for a tied head.
            own = self._input(tie)
            if own in rows and self._shares_tokens(tie):
                tokens, indices = rows[own]
                for name in {*tie.names} & rows.keys() - {own}:
                    others, other_indices = rows[name]
                    if other_indices == indices and equal(others, tokens):
                        del rows[name]
        return replace(self, edits=replace(self.edits, rows=rows))._edited(ties)

    def _edited(self, ties: Sequence[TiedNames]) -> TensorEdits:
        parted = [tie for tie in ties if self._parts(tie)]
        untied = tuple(dict.fromkeys(key for tie in parted for key in tie.keys))
        still = set()
        if parted:
            if untied and not self.config.values:
                names = listed(map(repr, parted[0].names))
                raise UnsupportedError(
                    f"{self.base.path}: has no config.json to say that {names} are no longer one tensor; add it"
                )
            apart = architecture_for(self.config.untied(untied), self.architecture.name)
            still = set() if apart is None else apart.tied_names
        edits = replace(self.edits, untied=untied)
        for tie in ties:
            if parted and not still & tie.on_disk.keys():
                edits = self._apart(tie, edits)
            elif tie in parted:
                has_rows = self.edits.rows.keys() & {*tie.names}
                option = "trainable_token_indices" if has_rows else "exclude_modules"
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
        copies = _copies(self.base, tie)
        # A T5 stores its own head beside the embedding if the config says that they are separate.
        refuse = bool(tie.keys) or self.config.tied is not False
        apart = _unequal(copies, self.base.path, "the config", refuse)
        kept = {now: name for now, name in tie.on_disk.items() if name not in apart}
        return replace(tie, on_disk=kept)

    def _parts(self, tie: TiedNames) -> bool:
        """Test whether the names stop being one tensor: they change, but not all in the same way."""
        edits = self.edits
        changed = self._changed(tie)
        delta = changed & self.deltas
        if not changed or delta & self.mirrored:
            return False
        saved = {name: edits.sources[name] for name in tie.names if name in edits.sources}
        same = all(equal(*pair) for pair in pairwise(saved.values()))
        whole = len(saved) == len(tie.names) or not edits.trained & saved.keys()
        rows = changed & edits.rows.keys()
        own = self._input(tie)
        shares = self._shares_tokens(tie)
        tokens = not rows or (rows == {own} and shares)
        if tokens and not delta and not changed & edits.shifts.keys() and same and whole:
            return False
        if shares and own in rows and len(changed) > 1:
            others = listed(map(repr, sorted({*tie.names} - {own})))
            which = f"{own!r}, which is tied to {others}, and also changes one of them otherwise"
            raise self._refused(f"trains tokens of {which}", f"or untie them first, by {KEY}=false")
        if missing := next((now for now, name in tie.on_disk.items() if name is None), ""):
            which = f"{tie.stored!r} and {missing!r}, which is tied to it, separately"
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
        base = StoredTensor(*self.base.locate(tie.stored))
        sources = dict(edits.sources)
        untrained = (name for name in tie.names if name in sources and name not in edits.trained)
        saved = next(untrained, None)
        start = base if saved is None else sources[saved]
        for name in tie.names:
            if saved is not None or name not in self.base.weight_map:
                sources.setdefault(name, start)
        shapes = {name: sources.get(name, base).info.shape for name in tie.names}
        shape = shapes[tie.stored]
        if other := next((name for name in tie.others if shapes[name] != shape), None):
            which = f"{tie.stored!r} {shape[0]} rows, but {other!r}, which is tied to it, has {shapes[other][0]}"
            raise self._refused(
                f"gives {which}", "or save it again with save_embedding_layers=True"
            )
        return replace(edits, sources=sources)

    def _together(self, tie: TiedNames, edits: TensorEdits) -> TensorEdits:
        """Write only the stored name, with the edits that change all names."""
        sources = dict(edits.sources)
        rows = dict(edits.rows)
        shifts = dict(edits.shifts)
        for name in tie.others:
            if name in sources:
                sources.setdefault(tie.stored, sources.pop(name))
            if name in rows:
                rows.setdefault(tie.stored, rows.pop(name))
            shifts.pop(name, None)
        gone = {name: BY_TIE for name in tie.others if name in self.base.weight_map}
        dropped = {**edits.dropped, **gone}
        return replace(edits, sources=sources, rows=rows, shifts=shifts, dropped=dropped)


def _copies(base: Checkpoint, tie: TiedNames) -> dict[str, StoredTensor]:
    """Return the tensors that a base stores for a tied parameter, by name."""
    return {n: StoredTensor(*base.locate(n)) for n in tie.names if n in base.weight_map}


def without_copies(base: OpenBase, tuned: FinetunedModel) -> tuple[FinetunedModel, dict[str, str]]:
    """Omit a fine-tuned model's copies of tied tensors, which would otherwise be judged and mitigated separately.

    If embedding and ``lm_head`` have equal bytes in both models and are tied, only the embedding is judged and written.

    Returns
    -------
    tuned, dropped
        The model without the copies, and the base's copies that the merged model omits, with the reason.

    Raises
    ------
    UnsupportedError
        If copies in either model differ, or if it is not known whether the class ties tensors of equal bytes.
    """
    stated = tuned.model_config if tuned.model_config.values else base.config
    architecture = architecture_for(stated, base.config.architecture)
    separate = tuned.model_config.tied is False
    if architecture is None and not separate:
        _refuse_equal_matrices(tuned)
    copies = set()
    dropped: dict[str, str] = {}
    for tie in base.names.among(tuned.tensors).ties(architecture):
        of_tuned = {name: tuned.tensors[name] for name in tie.names if name in tuned.tensors}
        of_base = _copies(base.checkpoint, tie)
        refuse = bool(tie.keys) or not separate
        apart = _unequal(of_tuned, tuned.path, "the config", refuse)
        apart |= _unequal(of_base, base.checkpoint.path, f"the config of {tuned.path}", refuse)
        same = [name for name in tie.names if name not in apart]
        in_both = (name for name in same if name in of_tuned and name in of_base)
        kept = next(in_both, tie.stored)
        copies |= {name for name in same if name in of_tuned and name != kept}
        dropped |= {name: BY_TIE for name in same if name in of_base and name != kept}
    return tuned.without(copies) if copies else tuned, dropped


def _refuse_equal_matrices(tuned: FinetunedModel) -> None:
    """Refuse a model of unknown class that has equal matrices outside layers: they may be tied."""
    outer = [
        tensor
        for name, tensor in tuned.tensors.items()
        if len(tensor.info.shape) == 2 and "*" not in pattern_of(name)
    ]
    for one, other in combinations(outer, 2):
        if equal(one, other):
            raise UnsupportedError(
                f"{tuned.path}: whether {one.info.name!r} and {other.info.name!r}, whose bytes are equal, are tied depends on the "
                f"model's class: {_unknown(tuned.model_config)}"
            )


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
    turned = (embedding.shape[::-1], embedding.rank, embedding.scaling)
    if (head.shape, head.rank, head.scaling) != turned:
        return False

    def factors(module: Module) -> tuple[Tensor, Tensor]:
        # A NaN has its own error later.
        a, b, *_ = (values_of(adapter.tensors[name]).nan_to_num() for name in module.tensor_names)
        return a, b

    A, B = factors(head)
    rows, columns = factors(embedding)
    return torch.equal(A, columns.T) and torch.equal(B, rows.T)


def refuse_numbered_ties(
    ties: Iterable[TiedNames], base: Path, adapter: DeltaSource, matched: Iterable[str]
) -> None:
    """Refuse changes to parameters that are tied layer by layer."""
    tied = [now for tie in ties if not tie.stored for now in tie.on_disk]
    for name in (*(f"{module}.weight" for module in matched), *(c.name for c in adapter.carried)):
        pattern = f".{pattern_of(name)}"
        if any(pattern.endswith(f".{now}") or f".{now}".endswith(pattern) for now in tied):
            raise UnsupportedError(
                f"{base}: ties {name!r}, which {adapter.path} changes, to others layer by layer; train without it (exclude_modules)"
            )


def refuse_unknown_ties(
    base: OpenBase, adapter: DeltaSource, found: Found, edits: TensorEdits
) -> None:
    """Refuse changes to tensors that may be tied, in a model of an unknown class.

    A matrix outside layers may be tied if no other has its shape, as the base may store only one of the names. If the config states a
    vocabulary, only matrices with that many rows count; if not, linear layers (a projector, a pooler) do not count if their number of rows
    is a width found in layers. A matrix with the bytes of another is refused, too. If the config states that nothing is tied, nothing is.
    """
    config = base.config
    if config.tied is False:
        return
    stored = {n: StoredTensor(*base.checkpoint.locate(n)) for n in base.checkpoint.weight_map}
    shapes = {name: tensor.info.shape for name, tensor in stored.items()}
    outer = {name: shape for name, shape in shapes.items() if "*" not in pattern_of(name)}
    inside = (shape for n, shape in shapes.items() if n not in outer and n.endswith(".weight"))
    widths = {n for shape in inside if len(shape) == 2 for n in shape}
    kinds = {name: adapter.modules[module].layer_kind for module, name in found.matched.items()}
    for name in dict.fromkeys([*found.matched.values(), *edits.sources, *edits.rows]):
        # A quantized weight has other names on disk and is tied to nothing.
        new = name in edits.sources and name not in stored
        shape = edits.sources[name].info.shape if new else outer.get(name, ())
        if len(shape) != 2 or "*" in pattern_of(name) or config.vocab_size not in (None, shape[0]):
            continue
        alike = [other for other in outer if other != name and outer[other] == shape]
        inner = config.vocab_size is None and kinds.get(name) == "linear" and shape[0] in widths
        apart = alike and not new and not config.tied
        spared = inner or apart or (new and not alike)
        if spared and (new or not any(equal(stored[name], stored[other]) for other in alike)):
            continue
        raise UnsupportedError(
            f"{base.checkpoint.path}: whether {name!r} is tied to another tensor depends on the model's class: {_unknown(config)}"
        )


def _unknown(config: ModelConfig) -> str:
    whose = listed(map(repr, config.architectures)) if config.architectures else "no class"
    return f"the config names {whose}, which is not known here; name the class, or a similar one, with --architecture"


def _unequal(copies: Mapping[str, StoredTensor], path: Path, whose: str, refuse: bool) -> set[str]:
    """Return the names of a tied tensor's copies that differ from the first."""
    if not copies:
        return set()
    first, *others = copies.values()
    apart = [other.info.name for other in others if not equal(first, other)]
    if apart and refuse:
        raise UnsupportedError(
            f"{path}: {apart[0]!r} differs from {first.info.name!r}, to which {whose} ties it, and loaders disagree on which of them "
            f"to use; correct {KEY}, or remove the copy"
        )
    return set(apart)


def vocabulary_tensors(base: OpenBase, found: Found) -> dict[str, VocabularyTensor]:
    """Find the tensors with a row for each entry of a vocabulary, by their names on disk.

    In a model of an unknown class, these are the tensors with as many rows as the config states.
    """
    tensors = {}
    architecture = found.architecture
    if architecture is None:
        for name in base.checkpoint.weight_map:
            if base.checkpoint.info(name).shape[:1] == (base.config.vocab_size,):
                tensors[name] = VocabularyTensor((name,), base.config.vocabulary_keys)
        return tensors
    for run_time, keys in architecture.vocabulary.items():
        for name in base.names.find_all(run_time, architecture):
            tensors[name] = VocabularyTensor((name,), keys)
    for tie in found.ties:
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
    changed = {
        name: base.info(name).shape
        for name, part in edits.sources.items()
        if name in vocabulary
        and name in base.weight_map
        and part.info.shape != base.info(name).shape
    }
    before = {vocabulary[name].keys: shape[0] for name, shape in changed.items()}
    patterns = () if architecture is None else architecture.may_be_missing
    stale = {}
    for name in sorted(vocabulary.keys() & base.weight_map.keys() - edits.dropped.keys()):
        keys = vocabulary[name].keys
        saved = edits.sources.get(name)
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
