"""Which base tensor each adapter module changes; what is refused, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from streamer.adapter import Adapter, LoraModule
from streamer.encodings import encoding_of
from streamer.errors import MismatchError, UnsupportedError
from streamer.names import Match, match_names
from streamer.renames import renames_for
from streamer.storage.checkpoint import Checkpoint

# Models whose linear layers are Conv1D modules, stored (in, out).
CONV1D_MODELS = {"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"}

MAX_LISTED = 8


@dataclass(frozen=True)
class Target:
    """One base tensor and the module that changes it.

    Attributes
    ----------
    tensor
        Name in the base.
    module
        The adapter's module.
    transposed
        The base stores (in, out): its transpose is the matrix that the delta is added to.
    match
        How the name was found.
    """

    tensor: str
    module: LoraModule
    transposed: bool
    match: Match


def match_targets(base: Checkpoint, adapter: Adapter, config: dict[str, Any]) -> list[Target]:
    """Match every module of the adapter to one tensor of the base, in the base's file order.

    Raises
    ------
    MismatchError
        If any module is unmatched, ambiguous, of a wrong shape, or two name one tensor: all of them in one message.
    UnsupportedError
        If a matched tensor is of a dtype that cannot be computed with.
    """
    names = match_names(adapter.modules, base.weight_map, renames_for(config))
    problems: list[str] = []
    targets: dict[str, Target] = {}
    for name, module in adapter.modules.items():
        match = names[name]
        found = match.tensor
        if not found:
            problems.append(f"{name!r} {match.why}")
            continue
        file, info = base.locate(found)
        encoding_of(info, str(file.path))  # before the shape: packed codes have any
        shape = info.shape
        conv1d = config.get("model_type") in CONV1D_MODELS
        fits, transposed = _orient(shape, module.shape, adapter.fan_in_fan_out, conv1d)
        if fits and conv1d and not transposed and shape[0] == shape[1]:
            problems.append(
                f"{name!r}: is square, {config['model_type']} stores such layers as (in, out), but the adapter's config says "
                "fan_in_fan_out=false, as PEFT also writes where it wrapped a Linear last: set it to true in "
                "adapter_config.json if this layer is a Conv1D"
            )
        elif not fits:
            problems.append(f"{name!r}: expected shape {list(module.shape)} in the base, {found!r} has {list(shape)}")
        elif found in targets:
            problems.append(f"{name!r} and {targets[found].module.name!r} both change {found!r}")
        else:
            targets[found] = Target(found, module, transposed, match)
    if problems:
        shown = "; ".join(problems[:MAX_LISTED])
        more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise MismatchError(
            f"{adapter.path}: {len(problems)} of {len(adapter.modules)} modules do not fit {base.path}: {shown}{more}; "
            "is this the base that the adapter was trained on?"
        )
    return [targets[t.name] for f in base.files.values() for t in f.header.tensors if t.name in targets]


def _orient(shape: tuple[int, ...], wanted: tuple[int, int], fan_in_fan_out: bool, conv1d: bool) -> tuple[bool, bool]:
    """Does the shape fit, and is it transposed? Where it is square, the adapter's config must tell.

    PEFT sets the config's flag to what suits the layer that it wrapped last, so in a model of Conv1D and Linear layers it is true
    of some of them only: a shape that fits one way alone goes that way where the flag or the kind of model allows it.
    """
    if wanted[0] == wanted[1]:
        return shape == wanted, fan_in_fan_out
    transposed = shape == wanted[::-1]
    return shape == wanted or (transposed and (fan_in_fan_out or conv1d)), transposed


def refuse_tied_changes(config: dict[str, Any], targets: Iterable[Target], base: Checkpoint) -> None:
    """Refuse a delta on a tensor that the model also uses under another name.

    With ``tie_word_embeddings`` a loader overwrites ``lm_head`` with the embedding: a merged delta would vanish.
    """
    text = config.get("text_config")  # vision-language models keep the language model's config there
    if not config.get("tie_word_embeddings") and not (isinstance(text, dict) and text.get("tie_word_embeddings")):
        return
    for target in targets:
        if target.tensor.endswith("lm_head.weight"):
            raise UnsupportedError(
                f"{base.path}: module {target.module.name!r}: the config ties lm_head to the embedding, so its delta would vanish "
                "when the model is loaded; untie it first (save the model with tie_word_embeddings=false)"
            )
