"""Which base tensor each adapter module changes; what is refused, and why.

Adapters use run-time module names, checkpoints their own. A module is looked for under its own name, then under known
renames, then, for the adapter as a whole, under one exchange of prefixes that fits every module. A module that finds no
tensor, or more than one, is an error: a partial match is never a warning.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from streamer.adapter import Adapter, LoraModule
from streamer.bases.registry import Weights
from streamer.bases.weight import Coded
from streamer.errors import MismatchError

# Run-time name → name on disk, where transformers renames between them (both directions: it depends on the version).
RENAMES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^model\.(visual|vision_tower|multi_modal_projector)\."), r"\1."),
    (re.compile(r"^(visual|vision_tower|multi_modal_projector)\."), r"model.\1."),
)

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
    why
        How the name was matched: ``exact``, ``rename`` or ``prefix '…' → '…'``.
    """

    tensor: str
    module: LoraModule
    transposed: bool
    why: str


def match_targets(
    weights: Weights, adapter: Adapter, config: dict[str, Any], names: Mapping[str, tuple[str, str]]
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
    for name, (found, why) in names.items():
        module = adapter.modules[name]
        if not found:
            problems.append(f"{name!r} {why}")
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
            targets[found] = Target(found, module, transposed, why)
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


def match_names(modules: Iterable[str], tensors: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Module → (tensor, how it was matched), or ("", what is wrong with it)."""
    modules = list(modules)
    stems = {t.removesuffix(".weight"): t for t in tensors if t.endswith(".weight")}
    out: dict[str, tuple[str, str]] = {}
    for name in modules:
        if name in stems:
            out[name] = stems[name], "exact"
            continue
        renamed = {p.sub(r, name) for p, r in RENAMES if p.search(name)} & stems.keys()
        if len(renamed) == 1:
            out[name] = stems[renamed.pop()], "rename"
    if len(out) == len(modules):
        return out
    rules = _prefix_rules(modules, stems)
    if len(rules) == 1:
        strip, add = rules[0]
        why = f"prefix {strip!r} → {add!r}"
        return {name: (stems[_exchange(name, strip, add)], why) for name in modules}
    for name in modules:
        if name not in out:
            out[name] = "", _what_is_wrong(name, rules, tensors=stems.values())
    return out


def _what_is_wrong(name: str, rules: list[tuple[str, str]], tensors: Iterable[str]) -> str:
    if rules:
        places = ", ".join(repr(_exchange(name, strip, add) + ".weight") for strip, add in rules[:3])
        return f"is ambiguous: it could be {places}"
    if name.rpartition(".")[2] == "lm_head" and f"{name}.weight" not in set(tensors):
        return "has no tensor in the base; if lm_head is tied to the embedding there, untie it first"
    return f"has no tensor in the base (looked for {name + '.weight'!r} and for one exchange of prefixes)"


def _exchange(name: str, strip: str, add: str) -> str:
    return add + name[len(strip) :]


def _prefix_rules(modules: list[str], stems: Iterable[str]) -> list[tuple[str, str]]:
    """Exchanges of a prefix that fit every module, those with the longest common suffix only.

    A prefix may not hold a number: ``layers.0`` is not ``layers.1``. It may be added or taken away, as wrappers do, but exchanged for
    another only where the suffix holds a number, a layer's: ``classifier.dense`` is not ``pooler.dense``.
    """
    by_last: defaultdict[str, list[list[str]]] = defaultdict(list)
    for stem in stems:
        parts = stem.split(".")
        by_last[parts[-1]].append(parts)
    common: set[tuple[str, str]] | None = None
    for name in modules:
        mine = name.split(".")
        rules = set()
        for theirs in by_last[mine[-1]]:
            n = 0
            while n < min(len(mine), len(theirs)) and mine[-1 - n] == theirs[-1 - n]:
                n += 1
            strip, add = mine[: len(mine) - n], theirs[: len(theirs) - n]
            anchored = any(part.isdigit() for part in mine[len(mine) - n :])
            if (anchored or not (strip and add)) and not any(part.isdigit() for part in strip + add):
                rules.add(("".join(p + "." for p in strip), "".join(p + "." for p in add)))
        common = rules if common is None else common & rules
        if not common:
            return []
    assert common is not None
    shortest = min(strip.count(".") for strip, _ in common)
    return sorted(rule for rule in common if rule[0].count(".") == shortest)
