"""Describe what determines a run on texts as facts, which its file and its journal hold, and compare them with the facts found there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from streamer import __version__
from streamer.adapters.adapter_config import stated_options
from streamer.adapters.rules import NEUTRAL
from streamer.plan.plan import Plan
from streamer.streaming.extra import require_transformers
from streamer.streaming.model import LoadedModel
from streamer.units import listed

Facts = Mapping[str, Any]

Configs = Annotated[dict[str, Any], "Configs: of the base, as transformers writes what its class reads; of the adapter, what determines "
    "its deltas."]  # fmt: skip

IDENTIFYING = ("architecture", "files", "weights_sha256", "base_is_residual", "lora_b_layout", "ignored_keys")
"""Keys that identify a base or an adapter, in findings and in evaluations, besides its config."""

OPTIONS = ("projected", "dtype", "holdout", "seed", "vectors")
"""Facts that options of the same names decide."""

DETECTION = ("detection", "scale", "findings", "intruders")
"""Keys that matter only to variants that scale intruders; without such variants `detection` is null."""


def same_input(one: Facts, other: Facts) -> bool:
    """Test whether two descriptions identify the same base, or the same adapter, wherever it is stored."""
    return all(one.get(key) == other.get(key) for key in (*IDENTIFYING, "config_sha256"))


def model_facts(model: LoadedModel, **inputs: Facts) -> dict[str, Any]:
    """Describe what determines a model's losses, except texts and variants; `inputs` are the identities of ``base`` and ``adapter``."""
    stated = model.job.plan.adapter.config.values.items()
    of_adapter = {key: value for key, value in stated if key not in NEUTRAL and value not in (None, [], {})}
    return {
        "version": __version__,
        "transformers": require_transformers().__version__,
        **inputs,
        "configs": {what: model.config if what == "base" else of_adapter for what in inputs},
        "dtype": "bf16" if model.job.rounds_products else "float32",
    }


def writable(plan: Plan) -> dict[str, bool]:
    """Describe how `mitigate` and `merge` can write an adapter's variants."""
    names = plan.weights.quantized_names
    return {
        "factored": not plan.adapter.describes_model and all(target.module.factors for target in plan.targets),
        "quantized": any(name in names and not plan.weights.requantizes(name) for name in plan.by_weight),
    }


def input_options(facts: Mapping[str, Any]) -> list[str]:
    """List the command-line options that make a command read the inputs as these facts do: as a residual, and with which model class."""
    words = stated_options(facts["adapter"])
    return words + (["--architecture", facts["base"]["architecture"]] if "architecture" in facts["base"] else [])


def differences(mine: Facts, theirs: Facts) -> list[str]:
    """Name the differences between the facts of two runs of one command; variants of such evaluations are not comparable."""
    found = []
    for what, config in mine["configs"].items():
        stated = theirs.get("configs", {}).get(what, {})
        if any(mine[what].get(key) != theirs[what].get(key) for key in IDENTIFYING):
            found.append(what)
        elif "configs" not in theirs:
            found.append(f"no config of the {what}, as of an earlier version")
        elif keys := [key for key in {**config, **stated} if config.get(key) != stated.get(key)]:
            found.append(f"the {what}'s config: {listed(keys)}")
    here, there = _texts(mine), _texts(theirs)
    for name in dict.fromkeys([*here, *there]):
        if name not in here or name not in there:
            found.append(f"{name} {'is asked for' if name in here else 'is not asked for'}")
        elif here[name]["sha256"] != there[name]["sha256"]:
            own, other = (
                f"{one['sequences']} sequences of {one['length']} tokens" for one in (here[name], there[name])
            )
            found.append(name + (f": {own}, not {other}" if own != other else ""))
    found += [f"--{option}" for option in OPTIONS if mine.get(option) != theirs.get(option)]
    found += ["version of transformers"] if mine["transformers"] != theirs["transformers"] else []
    if mine.get("detection") is not None and theirs.get("detection") is not None:
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
    texts: Any = facts["texts"]
    if isinstance(texts, list):
        return {f"text {one['name']}": one for one in texts}
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


def with_digest(facts: Facts, **others: Any) -> dict[str, Any]:
    """Add the digest of all facts except streamer's version, and of other things that decide a result."""
    tree = {key: value for key, value in facts.items() if key not in ("version", "plan")}
    told = json.dumps(tree | others, sort_keys=True)
    return {**facts, "plan": hashlib.sha256(told.encode()).hexdigest()}
