"""Compare and join what evaluations are made of: variants are added to one only if its inputs, texts and options are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from streamer.adapters.stated import stated_options

Facts = Mapping[str, Any]

IDENTIFYING = ("architecture", "files", "weights_sha256", "config_sha256", "base_is_residual", "lora_b_layout",
               "ignored_keys")  # fmt: skip
"""Keys of a base's or adapter's identity that tell it from another; findings and evaluations have them."""

DETECTION = ("detection", "scale", "findings", "intruders")
"""Keys that matter only to variants that scale intruders; without such variants `detection` is null."""


def same_input(one: Facts, other: Facts) -> bool:
    """Test whether two descriptions are of the same base, or of the same adapter, wherever it lies."""
    return all(one.get(key) == other.get(key) for key in IDENTIFYING)


def input_options(facts: Mapping[str, Any]) -> list[str]:
    """List the options by which a command takes the inputs as those facts were made of them: as a residual, and of what class."""
    words = stated_options(facts["adapter"])
    return words + (["--architecture", facts["base"]["architecture"]] if "architecture" in facts["base"] else [])


def differences(mine: Facts, theirs: Facts) -> list[str]:
    """Name what differs between two evaluations whose variants would not be comparable."""
    found = [what for what in ("base", "adapter") if not same_input(mine[what], theirs[what])]
    here, there = _texts(mine), _texts(theirs)
    for name in dict.fromkeys([*here, *there]):
        if name not in here or name not in there:
            found.append(f"{name} {'is asked for' if name in here else 'is not asked for'}")
        elif here[name]["sha256"] != there[name]["sha256"]:
            own, other = (
                f"{one['sequences']} sequences of {one['length']} tokens" for one in (here[name], there[name])
            )
            found.append(name + (f": {own}, not {other}" if own != other else ""))
    found += [f"--{option}" for option in ("projected", "dtype") if mine[option] != theirs[option]]
    found += ["version of transformers"] if mine["transformers"] != theirs["transformers"] else []
    if mine["detection"] is not None and theirs["detection"] is not None:
        options = {"--top-k": "top_k", "--epsilon": "threshold_epsilon", "--solver": "solver"}
        found += [name for name, key in options.items() if mine["detection"][key] != theirs["detection"][key]]
        found += ["--scale"] if mine["scale"] != theirs["scale"] else []
        found += ["findings"] if len({facts["findings"] for facts in (mine, theirs) if "findings" in facts}) > 1 else []
    digests = {one["keep"]: one["sha256"] for one in theirs.get("coefficients", ())}
    others = [one for one in mine.get("coefficients", ()) if digests.get(one["keep"], one["sha256"]) != one["sha256"]]
    maps = len({facts["map"]["sha256"] for facts in (mine, theirs) if "map" in facts}) > 1
    return found + (["coefficients"] if others else []) + (["map"] if maps else [])


def _texts(facts: Facts) -> dict[str, Any]:
    """List the texts by what they are called."""
    texts: dict[str, Any] = facts["texts"]
    two = {f"{name} text": texts[name] for name in texts if name != "others"}
    return two | {f"other text {one['name']}": one for one in texts.get("others", ())}


def joined_facts(mine: Facts, theirs: Facts) -> dict[str, Any]:
    """Say what an evaluation is made of to which variants were added; both are the same but for detection, coefficients and map."""
    tree = {**theirs, "version": mine["version"]}
    if theirs["detection"] is None:
        tree |= {key: mine[key] for key in DETECTION if key in mine}
    sets = {one["keep"]: one for one in [*theirs.get("coefficients", ()), *mine.get("coefficients", ())]}
    if sets:
        tree["coefficients"] = list(sets.values())
    if "map" in mine:
        tree["map"] = mine["map"]
    return with_digest(tree)


def with_digest(facts: Facts) -> dict[str, Any]:
    """Add to facts a digest of them all, the version of streamer apart."""
    told = json.dumps({key: value for key, value in facts.items() if key not in ("version", "plan")}, sort_keys=True)
    return {**facts, "plan": hashlib.sha256(told.encode()).hexdigest()}
