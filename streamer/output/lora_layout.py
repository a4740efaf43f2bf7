"""Lay out a LoRA adapter made from a fine-tuned model: the names of its modules, and its tensors other than factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamer.adapters.finetuned import FinetunedModel
from streamer.errors import UnsupportedError
from streamer.plan.carried_tensors import TensorEdits
from streamer.plan.tied_embeddings import OF_A_TIE, find_tie, is_without_head, refuse_other_ties
from streamer.plan.transformers_renames import Renames
from streamer.storage.checkpoint import Checkpoint
from streamer.weights.base import StoredTensor, equal

PREFIX = "base_model.model."
"""Prefix of the names in a PEFT adapter: ``model.layers.0.mlp.up_proj`` → ``base_model.model.model.layers.0.mlp.up_proj.lora_A.weight``."""


@dataclass(frozen=True)
class LoraLayout:
    """Tensors of a LoRA adapter other than factors, and the names of its modules.

    Attributes
    ----------
    names
        Module → its name in a loaded model, where that is another one.
    carried
        Tensor's name in the adapter → what it holds.
    config
        What the config says of it.
    heads
        Embedding's module → the lm_head that is tied to it, and takes the same delta.
    """

    names: Mapping[str, str]
    carried: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    heads: Mapping[str, str]


def lora_layout(
    tuned: FinetunedModel, base: Checkpoint, matched: Mapping[str, str], edits: TensorEdits, renames: Renames
) -> LoraLayout:
    """Give what changed in a fine-tuned model outside of matrices its form in a LoRA adapter.

    PEFT knows the modules by their names in a loaded model; a bias is its module's own where that has factors; what else has changed
    is a saved module, with all of its tensors; an embedding and its lm_head stay tied. Tensors that have not changed stay
    out. Examples:

    ``language_model.model.norm.weight``    → saved as ``base_model.model.model.language_model.norm.weight``
    ``….q_proj.bias``, its weight changed   → ``….q_proj.base_layer.bias``
    ``model.embed_tokens.weight``, tied     → factors of ``embed_tokens`` and, transposed, of ``lm_head``

    Parameters
    ----------
    matched
        Module → base tensor of those that have factors.

    Raises
    ------
    UnsupportedError
        If something changed that has no place in a LoRA adapter.
    """
    now = renames.at_run_time(tuned.tensors)
    names = {m: now.get(f"{m}.weight", f"{m}.weight").removesuffix(".weight") for m in matched}
    bases = {
        source.info.name: StoredTensor(*base.locate(n)) for n, source in edits.sources.items() if n in base.weight_map
    }
    changed = {
        c.source: c
        for c in tuned.carried
        if c.source not in bases or not equal(tuned.tensors[c.source], bases[c.source])
    }
    inner = {name.rpartition(".")[0].rpartition(".")[0] for name in tuned.tensors}
    saved = set()
    for c in changed.values():
        if c.module in matched and c.parameter == "bias":
            continue
        if (
            not c.module
            or c.module in matched
            or c.source not in now
            or any(f"{i}.".startswith(f"{c.module}.") for i in inner)
        ):
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
    headless = is_without_head(tuned.tensors, tuned.model_config)
    tie = None if headless else find_tie(tuned.tensors, tuned.model_config, tuned)
    trained = {
        m: f"{m}.weight"
        for m, n in matched.items()
        if OF_A_TIE.search(f"{m}.weight") and not equal(tuned.tensors[f"{m}.weight"], StoredTensor(*base.locate(n)))
    }
    refuse_other_ties(tie, tuned.path, tuned.tensors, tuned.model_config, tuned, trained, changed)
    heads, one = {}, tie is not None and tie.head not in tuned.tensors
    if tie is not None and one:
        head = renames.at_run_time([tie.head]).get(tie.head, tie.head).removesuffix(".weight")
        heads = {m: head for m in matched if f"{m}.weight" == tie.embedding}
        if not heads and now.get(tie.embedding, "").removesuffix(".weight") in saved:  # of another size than the base's
            saved.add(head)
            carried[f"{PREFIX}{head}.weight"] = tuned.tensors[tie.embedding]
    config: dict[str, Any] = {"modules_to_save": sorted(saved)} if saved else {}
    if one:
        config["ensure_weight_tying"] = True
    return LoraLayout(names, carried, config, heads)
