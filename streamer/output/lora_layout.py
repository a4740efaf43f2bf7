"""Lay out a LoRA adapter made from a fine-tuned model: the names of its modules, and its tensors other than factors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from streamer.adapters.finetuned import FinetunedModel
from streamer.adapters.tensor_names import PREFIX
from streamer.errors import UnsupportedError
from streamer.plan.architectures import Architecture
from streamer.plan.carried_tensors import TensorEdits
from streamer.plan.tied_embeddings import find_ties
from streamer.plan.transformers_renames import Renames
from streamer.storage.checkpoint import Checkpoint
from streamer.weights.base import StoredTensor, equal

OF_MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Model types in which PEFT 0.21 refuses LoRA for modules whose weights are passed to kernels without calling the module."""

REFUSED_IN_MAMBA = frozenset({"conv1d", "out_proj"})
"""Last names of those modules."""

EXPERTS_OF_QWEN2, EXPERTS_OF_MIXTRAL = ("gate", "gate_proj", "up_proj", "down_proj"), ("gate", "w1", "w2", "w3")

TAKEN_FOR_EXPERTS = dict.fromkeys(("minimax", "minimax_m2"), EXPERTS_OF_MIXTRAL) | dict.fromkeys(
    ("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo",
     "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe", "qwen3_moe",
     "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open"), EXPERTS_OF_QWEN2
)  # fmt: skip
"""Model type → last names of modules that PEFT 0.21 treats as experts anywhere, and so skips in layers without experts."""


@dataclass(frozen=True)
class LoraLayout:
    """Tensors of a LoRA adapter other than factors, and the names of its modules.

    Attributes
    ----------
    names
        Modules with factors → their names in a loaded model.
    carried
        Tensor's name in the adapter → its contents.
    config
        Config entries for these tensors.
    heads
        Embedding's module → modules that are tied to it and get the same delta, and whether each is an embedding.
    embeddings
        Modules that are embeddings in the model's class.
    whole
        Modules saved with their mitigated weight instead of factors, because PEFT has no LoRA for them.
    """

    names: Mapping[str, str]
    carried: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    heads: Mapping[str, Mapping[str, bool]]
    embeddings: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()


def lora_layout(
    tuned: FinetunedModel, architecture: Architecture | None, base: Checkpoint, matched: Mapping[str, str],
    trained: Collection[str], edits: TensorEdits, renames: Renames,
) -> LoraLayout:  # fmt: skip
    """Represent changes of a fine-tuned model outside matrices in the form of a LoRA adapter.

    PEFT identifies modules by their names in a loaded model. A bias stays with its module if that has factors; any other change becomes a
    saved module with all of its tensors; an embedding and its lm_head stay tied. Unchanged tensors are omitted. Examples:

    ``language_model.model.norm.weight``    → saved as ``base_model.model.model.language_model.norm.weight``
    ``….q_proj.bias``, its weight changed   → ``….q_proj.base_layer.bias``
    ``lm_head.bias``, its weight tied       → ``lm_head.base_layer.bias``, with factors of the embedding and of ``lm_head``
    ``model.embed_tokens.weight``, tied     → factors of ``embed_tokens`` and, transposed, of ``lm_head``
    ``….0.mlp.up_proj.weight`` of DeepSeek  → ``….0.mlp.up_proj.weight`` of a layer without experts, whole
    ``….mixer.conv1d.weight`` of Mamba      → ``….mixer.conv1d.weight``, the mitigated one whole

    Parameters
    ----------
    architecture
        Facts about the fine-tuned model.
    matched
        Module → base tensor, for modules that may have factors.
    trained
        Those of these modules whose matrix has changed.

    Raises
    ------
    UnsupportedError
        If a change has no place in a LoRA adapter.
    """
    now = renames.at_run_time(tuned.tensors)
    bases = {
        source.info.name: StoredTensor(*base.locate(n)) for n, source in edits.sources.items() if n in base.weight_map
    }
    changed = {
        c.source: c
        for c in tuned.carried
        if c.source not in bases or not equal(tuned.tensors[c.source], bases[c.source])
    }
    tied = _tied_modules(tuned, architecture, renames)
    owners = {other: module for module, (_, others) in tied.items() if module in matched for other in others}
    biases = {
        c.source: now[c.source].rpartition(".")[0]
        for c in changed.values()
        if c.parameter == "bias" and c.source in now
    }
    biased = {c.module for c in changed.values() if c.parameter == "bias"}
    biased |= {owners[head] for head in biases.values() if head in owners}
    paths = {m: now.get(f"{m}.weight", f"{m}.weight").removesuffix(".weight") for m in matched}
    shapes = {m: base.info(tensor).shape for m, tensor in matched.items()}
    adaptable = [
        m for m in matched if not has_no_lora(paths[m], shapes[m], architecture, tuned.model_config.model_type)
    ]
    named = {m for m in matched if m in trained or m in biased}
    if not named & {*adaptable}:  # PEFT cannot open an adapter without factors
        named |= {*adaptable[:1]}
    names = {m: paths[m] for m in matched if m in named}
    whole = names.keys() - {*adaptable}
    inner = {module.rpartition(".")[0] for module in (*owners, *(name.rpartition(".")[0] for name in tuned.tensors))}
    saved = {names[m] for m in whole}
    for c in changed.values():
        if (c.module in matched and c.parameter == "bias") or biases.get(c.source) in owners:
            continue
        placed = c.module and c.module not in matched and c.source in now
        if not placed or any(f"{i}.".startswith(f"{c.module}.") for i in inner):
            raise UnsupportedError(
                f"{tuned.path}: {c.source!r} has changed, which is no weight or bias of a layer, and so has no place in a LoRA adapter; "
                "use `streamer merge`"
            )
        saved.add(now[c.source].rpartition(".")[0])
    carried = {}
    for c in tuned.carried:
        name = now.get(c.source, c.source)
        module, _, parameter = name.rpartition(".")
        # By PEFT's rule, an entry of modules_to_save names all modules whose path ends in it.
        if any(module.endswith(s) for s in saved):
            saved.add(module)
            carried[PREFIX + name] = tuned.tensors[c.source]
        elif c.source in changed:
            carried[f"{PREFIX}{module}.base_layer.{parameter}"] = tuned.tensors[c.source]
    heads: dict[str, dict[str, bool]] = {}
    pairs = 0
    for module, (mine, others) in tied.items():
        if module in names and architecture is not None:
            heads[module] = {other: architecture.is_embedding(other) for other in others}
        elif mine in saved:  # its size differs from the base's
            saved |= {*others}
            carried |= {f"{PREFIX}{other}.weight": tuned.tensors[f"{module}.weight"] for other in others}
        else:
            continue
        pairs += len(others) == 1
    config: dict[str, Any] = {"modules_to_save": sorted(saved)} if saved else {}
    # If more than two are tied, PEFT treats all except the first as linear layers.
    if pairs:
        config["ensure_weight_tying"] = True
    looked_up = frozenset(
        m for m, name in names.items() if architecture is not None and architecture.is_embedding(name)
    )
    return LoraLayout(names, carried, config, heads, looked_up, frozenset(whole))


def _tied_modules(
    tuned: FinetunedModel, architecture: Architecture | None, renames: Renames
) -> dict[str, tuple[str, list[str]]]:
    """Map each module whose weight others share, by its name on disk → its run-time name and the others'."""
    found = {}
    for tie in find_ties(tuned.tensors, architecture, renames):
        if tie.stored.endswith(".weight") and not {*tie.others} & tuned.tensors.keys():
            mine = next(name.removesuffix(".weight") for name in tie.on_disk if tie.on_disk[name] == tie.stored)
            others = [m for name in tie.on_disk if (m := name.removesuffix(".weight")) not in (mine, name)]
            found[tie.stored.removesuffix(".weight")] = mine, others
    return found


def is_refused(module: str, model_type: str | None) -> bool:
    """Test whether PEFT refuses LoRA for a module, or treats it as an expert's."""
    last = module.rpartition(".")[2]
    in_mamba = model_type in OF_MAMBA and last in REFUSED_IN_MAMBA
    return in_mamba or last in TAKEN_FOR_EXPERTS.get(model_type or "", ())


def has_no_lora(name: str, stored: tuple[int, ...], architecture: Architecture | None, model_type: str | None) -> bool:
    """Test whether PEFT has no LoRA for a module of a loaded model, or one whose forward pass differs from the merged model's.

    Models look up positions by offsets or masks, but PEFT's LoRA of an embedding needs ids. They use the weight of a step size's projection
    (``dt_proj``), and the weight or stride of a convolution over a sequence, without calling the module. A convolution of one channel may
    be one of many groups.
    """
    if name.rpartition(".")[2] == "dt_proj" or is_refused(name, model_type):
        return True
    if len(stored) > 2:
        return len(stored) == 3 or stored[1] == 1
    if architecture is None:
        return False
    of_tokens = name == architecture.input_embedding or architecture.vocabulary_keys(f"{name}.weight") is not None
    positions = architecture.is_embedding(name) and not of_tokens
    return positions or architecture.is_matrix(f"{name}.weight")
