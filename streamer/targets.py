"""Which base tensor each adapter module changes; what is refused, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamer.adapter import Adapter, LoraModule
from streamer.bases.registry import Weights
from streamer.bases.weight import Coded
from streamer.errors import MismatchError
from streamer.names import Match

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


def match_targets(
    weights: Weights, adapter: Adapter, config: dict[str, Any], names: Mapping[str, Match]
) -> list[Target]:
    """Every module of the adapter with the one tensor of the base that it changes, in the base's file order.

    Parameters
    ----------
    names
        From `match_names`.

    Raises
    ------
    MismatchError
        If any module is unmatched, ambiguous, of a wrong shape, or two name one tensor: all of them in one message.
    UnsupportedError
        If a matched tensor is encoded in a way that cannot be computed with.
    """
    problems: list[str] = []
    targets: dict[str, Target] = {}
    for name, match in names.items():
        module, found = adapter.modules[name], match.tensor
        if not found:
            problems.append(f"{name!r} {match.why}")
            continue
        weight = weights[found]
        shape, coded = weight.shape, isinstance(weight, Coded)  # quantizers store every kind of layer as (out, in)
        conv1d = config.get("model_type") in CONV1D_MODELS and not coded
        fits, transposed = _orient(shape, module, adapter.fan_in_fan_out and not coded, conv1d)
        if fits and conv1d and not transposed and shape[0] == shape[1] and module.form == "linear":
            problems.append(
                f"{name!r}: is square, {config['model_type']} stores such layers as (in, out), but the adapter's config says "
                "fan_in_fan_out=false, as PEFT also writes where it wrapped a Linear last: set it to true in "
                "adapter_config.json if this layer is a Conv1D"
            )
        elif not fits:
            problems.append(f"{name!r}: expected shape {list(module.weight)} in the base, {found!r} has {list(shape)}")
        elif found in targets:
            problems.append(f"{name!r} and {targets[found].module.name!r} both change {found!r}")
        else:
            targets[found] = Target(found, module, transposed, match)
    if problems:
        shown = "; ".join(problems[:MAX_LISTED])
        more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise MismatchError(
            f"{adapter.path}: {len(problems)} of {len(adapter.modules)} modules do not fit {weights.checkpoint.path}: {shown}{more}; "
            "is this the base that the adapter was trained on?"
        )
    return [targets[name] for name in weights if name in targets]


def _orient(shape: tuple[int, ...], module: LoraModule, fan_in_fan_out: bool, conv1d: bool) -> tuple[bool, bool]:
    """Does the shape fit, and is it transposed? Where it is square, the adapter's config must tell.

    PEFT sets the config's flag to what suits the layer that it wrapped last, so in a model of Conv1D and Linear layers it is true
    of some of them only: a shape that fits one way alone goes that way where the flag or the kind of model allows it.
    """
    if module.form != "linear":
        return shape == module.weight, module.form == "embedding"
    wanted = module.shape
    if wanted[0] == wanted[1]:
        return shape == wanted, fan_in_fan_out
    transposed = shape == wanted[::-1]
    return shape == wanted or (transposed and (fan_in_fan_out or conv1d)), transposed
