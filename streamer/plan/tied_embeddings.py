"""Tied embeddings: keep or undo the tie of an embedding and an lm_head that are one tensor, where an adapter changes either one.

With ``tie_word_embeddings`` a checkpoint stores the embedding alone, and a loader gives it to the lm_head as well: whatever a merge
writes for the lm_head would vanish, and whatever it adds to the embedding would change both. In PEFT's model the two part as soon as an
adapter changes one of them (only its own merge, in place on the shared tensor, mixes them up). So the merged model is untied where they
part: the lm_head is written, and the config says so. Where they change as one, they stay tied.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.modules import Module
from streamer.errors import UnsupportedError
from streamer.plan.carried_tensors import TensorEdits
from streamer.storage.checkpoint import Checkpoint
from streamer.weights.base import StoredTensor, equal
from streamer.weights.model_config import ModelConfig

KEY = "tie_word_embeddings"

_EMBEDDING = re.compile(
    r"^(?P<outer>(?:[^.]+\.)*?)(?:model|transformer)\.(?:language_model\.|decoder\.)?(?:embed_tokens|wte)\.weight$"
)
OF_A_TIE = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|shared|embed_in|embed_out|lm_head|decoder)\.weight$")
_LANGUAGE_MODEL = re.compile(r"LMHead|ForCausalLM|ConditionalGeneration|MaskedLM|PreTraining")
_NO_LANGUAGE_MODEL = re.compile(rf"^(?!.*(?:{_LANGUAGE_MODEL.pattern}|MTModel$))")


@dataclass(frozen=True)
class Tie:
    """Two names of one tensor.

    Attributes
    ----------
    embedding
        The one that is stored.
    head
        The other one; on disk there may be a copy.
    """

    embedding: str
    head: str


def find_tie(names: Collection[str], config: ModelConfig, adapter: DeltaSource) -> Tie | None:
    """Find the tie that the config states; where it states none, that of a language model that is stored without its lm_head.

    Parameters
    ----------
    names
        The tensors of the model that the config is of.

    Returns
    -------
    Tie or None
        None where the model has no tie, or one that is not of this pattern (see `refuse_other_ties`).
    """
    if not _tied(names, config, adapter):
        return None
    found = [m for m in map(_EMBEDDING.match, names) if m]
    if len(found) != 1 or any(name.endswith("shared.weight") for name in names):
        return None
    return Tie(found[0].string, f"{found[0]['outer']}lm_head.weight")


def _tied(names: Collection[str], config: ModelConfig, adapter: DeltaSource) -> bool:
    if config.tied is not None:
        return config.tied
    # A config leaves out what is its class's default.
    if any(re.search(r"(^|\.)(lm_head|embed_out)\.weight$", name) for name in names):
        return False
    classes = " ".join(map(str, config.architectures))
    touched = [*adapter.modules, *(c.module for c in adapter.carried)]
    return bool(_LANGUAGE_MODEL.search(classes)) or any(m.rpartition(".")[2] == "lm_head" for m in touched)


def refuse_other_ties(
    tie: Tie | None,
    model: Path,
    names: Collection[str],
    config: ModelConfig,
    adapter: DeltaSource,
    matched: Mapping[str, str],
    others: Iterable[str],
) -> None:
    """Refuse a change of a tied tensor where what it is tied to is not known.

    Parameters
    ----------
    model, names, config
        The model, its tensors, and its config.
    matched
        Module → the model's tensor that has a delta.
    others
        Names of further tensors that change.
    """
    if tie is not None or not _tied(names, config, adapter):
        return
    # Trained on what stands there, a BertModel say, and not on a model with a head around it.
    own_names = all(tensor == f"{module}.weight" for module, tensor in matched.items())
    if own_names and is_without_head(names, config):
        return
    for name in (*matched.values(), *others):
        if OF_A_TIE.search(name):
            raise UnsupportedError(
                f"{model}: the model ties its embeddings in a way that is not known here, and the adapter changes {name!r}; train "
                "one that leaves embeddings and lm_head as they are (exclude_modules)"
            )


def is_without_head(names: Collection[str], config: ModelConfig) -> bool:
    """Say whether a model has no lm_head, and nothing else that is tied: a config says that it is tied all the same."""
    return (
        bool(config.architectures)
        and all(_NO_LANGUAGE_MODEL.search(str(a)) for a in config.architectures)
        and not config.values.get("is_encoder_decoder")
        and not any(name.endswith("shared.weight") for name in names)
    )


def edits_with_tie(
    tie: Tie, base: Checkpoint, edits: TensorEdits, deltas: Iterable[str], adapter: DeltaSource
) -> TensorEdits:
    """Add to the edits that keep the tie, or undo it.

    LoRA on ``lm_head`` of a tied model: ``lm_head.weight``, which the base does not have, becomes a source with the embedding's values,
    its delta is added to that, and the model is untied. Embedding and ``lm_head`` saved with the same values: the copy is dropped.

    Parameters
    ----------
    deltas
        Names of the tensors that have a delta.
    """
    E, H = tie.embedding, tie.head
    delta = {E, H} & set(deltas)
    sources, rows = dict(edits.sources), dict(edits.rows)
    base_embedding = StoredTensor(*base.locate(E))
    start = base_embedding if E in edits.trained else sources.get(E, base_embedding)
    if not delta and not {E, H} & (sources.keys() | rows.keys()):
        return edits
    gone = frozenset({H} & base.weight_map.keys())
    if gone and not equal(base_embedding, StoredTensor(*base.locate(H))):
        raise UnsupportedError(
            f"{base.path}: {H!r} differs from {E!r}, to which the config ties it, and loaders disagree which of them counts; set {KEY} "
            "to what it is, or remove the copy"
        )
    if _as_one(E, H, delta, edits, adapter):
        sources.pop(H, None)
        rows.pop(H, None)
        return replace(edits, sources=sources, rows=rows, dropped=gone)
    if E in rows and H not in rows and (delta or H in sources):
        raise UnsupportedError(
            f"{adapter.path}: trains tokens of {E!r}, which is tied to the lm_head, and changes one of the two besides; untie them "
            f"first (save the model with {KEY}=false) and train again"
        )
    sources.setdefault(H, start)
    if sources[H].info.shape != sources.get(E, base_embedding).info.shape:
        raise UnsupportedError(
            f"{adapter.path}: gives {E!r} {sources.get(E, base_embedding).info.shape[0]} rows, but the lm_head that is tied to it "
            f"{sources[H].info.shape[0]}; save the adapter again with save_embedding_layers=True"
        )
    return replace(edits, sources=sources, untied=True)


def _as_one(E: str, H: str, delta: set[str], edits: TensorEdits, adapter: DeltaSource) -> bool:
    """Say whether both stay one tensor: neither is changed, or both in the same way."""
    if adapter.config.ensure_weight_tying and H not in edits.rows:
        return True
    if delta or H in edits.rows:
        return False
    if H in edits.sources:
        return E in edits.sources and equal(edits.sources[E], edits.sources[H])
    return E not in edits.trained


def mirrored(tie: Tie | None, adapter: DeltaSource, matched: Mapping[str, str]) -> dict[str, Module]:
    """Find modules that hold another's factors once more, transposed: PEFT's LoRA on a tied lm_head with ``ensure_weight_tying``.

    Parameters
    ----------
    matched
        Module → base tensor.

    Returns
    -------
    dict
        The embedding's module → the lm_head's, whose ``lora_A`` is its ``lora_embedding_B`` transposed, and the reverse.
    """
    if tie is None or not adapter.config.ensure_weight_tying or adapter.config.peft_type != "LORA":
        return {}
    by_tensor = {tensor: module for module, tensor in matched.items()}
    if tie.embedding not in by_tensor or tie.head not in by_tensor:
        return {}
    embedding, head = adapter.modules[by_tensor[tie.embedding]], adapter.modules[by_tensor[tie.head]]
    if head.shape != embedding.shape[::-1] or head.rank != embedding.rank or head.scaling != embedding.scaling:
        raise UnsupportedError(
            f"{adapter.path}: says ensure_weight_tying, but the factors of {embedding.name!r} and {head.name!r} are not of one delta"
        )
    return {embedding.name: head}
