"""Compare and join the facts of evaluations: variants are added to an evaluation only if inputs, texts and options are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from streamer.adapters.stated import stated_options

Facts = Mapping[str, Any]

IDENTIFYING = ("architecture", "files", "weights_sha256", "config_sha256", "base_is_residual", "lora_b_layout",
               "ignored_keys")  # fmt: skip
"""Keys that identify a base or an adapter, in findings and in evaluations."""

DETECTION = ("detection", "scale", "findings", "intruders")
"""Keys that matter only to variants that scale intruders; without such variants `detection` is null."""


def same_input(one: Facts, other: Facts) -> bool:
    """Test whether two descriptions identify the same base, or the same adapter, wherever it is stored."""
    return all(one.get(key) == other.get(key) for key in IDENTIFYING)


def input_options(facts: Mapping[str, Any]) -> list[str]:
    """List the command-line options that make a command read the inputs as these facts do: as a residual, and with which model class."""
    words = stated_options(facts["adapter"])
    return words + (["--architecture", facts["base"]["architecture"]] if "architecture" in facts["base"] else [])


def differences(mine: Facts, theirs: Facts) -> list[str]:
    """Name the differences that make the variants of two evaluations incomparable."""
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
        found += ["--select"] if mine["scale"] != theirs["scale"] else []
        found += ["findings"] if len({facts["findings"] for facts in (mine, theirs) if "findings" in facts}) > 1 else []
    digests = {one["keep"]: one["sha256"] for one in theirs.get("coefficients", ())}
    others = [one for one in mine.get("coefficients", ()) if digests.get(one["keep"], one["sha256"]) != one["sha256"]]
    maps = len({facts["map"]["sha256"] for facts in (mine, theirs) if "map" in facts}) > 1
    return found + (["coefficients"] if others else []) + (["map"] if maps else [])


def _texts(facts: Facts) -> dict[str, Any]:
    """Return the texts' facts by the names used in messages."""
    texts: dict[str, Any] = facts["texts"]
    two = {f"{name} text": texts[name] for name in texts if name != "others"}
    return two | {f"other text {one['name']}": one for one in texts.get("others", ())}


def joined_facts(mine: Facts, theirs: Facts) -> dict[str, Any]:
    """Join the facts of a run with the facts of the evaluation that it adds to; only detection, coefficients and map may differ."""
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
    """Add the digest of all facts except streamer's version."""
    told = json.dumps({key: value for key, value in facts.items() if key not in ("version", "plan")}, sort_keys=True)
    return {**facts, "plan": hashlib.sha256(told.encode()).hexdigest()}
