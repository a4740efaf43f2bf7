"""Describe what a run over text was made from, and name the differences from another run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from streamer import __version__
from streamer.adapters.adapter_config import NEUTRAL, stated_options
from streamer.errors import OutputExistsError, UsageError
from streamer.json_types import JsonObject
from streamer.linalg.torch_state import has_fast_bfloat16
from streamer.measuring.sequences import same_input
from streamer.plan.plan import Plan
from streamer.storage import transaction
from streamer.streaming.model import LoadedModel
from streamer.streaming.skeleton import require_transformers
from streamer.units import listed

Configs = Annotated[
    dict[str, Any],
    "Configs: of the base, as transformers writes what its class reads; of the adapter, what determines "
    "its deltas.",
]

ProductDtype = Literal["float32", "bf16"]
"""Dtype to which base weights, and the inputs and results of their products, are rounded; see `has_fast_bfloat16`."""


def check_dtype(dtype: str) -> None:
    """Refuse a dtype in which this processor multiplies slowly."""
    if dtype == "bf16" and not has_fast_bfloat16():
        raise UsageError(
            "dtype: bf16 needs a processor that multiplies bfloat16 matrices (AVX512-BF16 or AMX); use float32 here"
        )


OPTIONS = {
    "algorithm": "another version's algorithm",
    "projected": "--projected",
    "dtype": "--dtype",
    "holdout": "--holdout",
    "seed": "--seed",
    "vectors": "--vectors",
    "keep": "--keep",
    "sequences": "--sequences",
    "length": "--length",
    "prompts": "--prompts",
    "weights": "--mu",
    "max_memory": "--max-memory",
}
"""Facts that options decide, with their names in messages."""

DETECTION_OPTIONS = {"top_k": "--top-k", "threshold_epsilon": "--epsilon", "solver": "--solver"}

DETECTION = ("detection", "scale", "findings", "intruders")
"""Keys that matter only to variants that scale intruders; without such variants `detection` is null."""


def model_facts(model: LoadedModel, **inputs: JsonObject) -> JsonObject:
    """Describe what determines a model's losses, except texts and variants; `inputs` are the identities of ``base`` and ``adapter``."""
    of_adapter = {
        key: value
        for key, value in model.job.plan.adapter.config.values.items()
        if key not in NEUTRAL and value not in (None, [], {})
    }
    configs = {"base": model.config, "adapter": of_adapter}
    return {
        "version": __version__,
        "transformers": require_transformers().__version__,
        **inputs,
        "configs": {what: configs[what] for what in inputs},
        "dtype": "bf16" if model.job.rounds_products else "float32",
    }


def identities(plan: Plan) -> dict[str, JsonObject]:
    """Return what identifies the base and the adapter."""
    return {"base": plan.base_identity, "adapter": plan.adapter_identity}


def writable(plan: Plan) -> dict[str, bool]:
    """Describe how `mitigate` and `merge` can write an adapter's variants."""
    weights = plan.weights
    factored = all(target.module.factors for target in plan.targets)
    return {
        "factored": factored and not plan.adapter.describes_model,
        "quantized": any(
            name in weights.quantized_names and not weights.requantizes(name)
            for name in plan.by_weight
        ),
    }


def input_options(facts: JsonObject) -> list[str]:
    """List the command-line options that make a command read the inputs as these facts do: as a residual, and with which model class."""
    words = stated_options(facts["adapter"])
    if "architecture" in facts["base"]:
        words += ["--architecture", facts["base"]["architecture"]]
    return words


def differences(ours: JsonObject, recorded: JsonObject) -> list[str]:
    """Name the differences between the facts of two runs of one command; variants of such evaluations are not comparable."""
    names = [*_other_inputs(ours, recorded), *_other_texts(ours, recorded)]
    names += [
        words for option, words in OPTIONS.items() if ours.get(option) != recorded.get(option)
    ]
    if ours["transformers"] != recorded["transformers"]:
        names.append("version of transformers")
    detection = ours.get("detection")
    known = recorded.get("detection")
    if detection is not None and known is not None:
        names += [
            option for key, option in DETECTION_OPTIONS.items() if detection[key] != known[key]
        ]
        if ours["scale"] != recorded["scale"]:
            names.append("--select")
        if _differ("findings", ours, recorded):
            names.append("findings")
    sets = _sets(ours)
    if any(_differ("sha256", sets.get(keep, {}), one) for keep, one in _sets(recorded).items()):
        names.append("coefficients")
    if _differ("sha256", ours.get("map", {}), recorded.get("map", {})):
        names.append("map")
    return names


def _differ(key: str, ours: JsonObject, recorded: JsonObject) -> bool:
    """Test whether both have a key, with different values."""
    return key in ours and key in recorded and ours[key] != recorded[key]


def _sets(facts: JsonObject) -> dict[float, JsonObject]:
    """Return the coefficients that were evaluated, by the share that they keep."""
    return {entry["keep"]: entry for entry in facts.get("coefficients", ())}


def _other_inputs(ours: JsonObject, recorded: JsonObject) -> Iterator[str]:
    """Name what differs of the base and the adapter."""
    for what, config in ours["configs"].items():
        known = recorded.get("configs", {}).get(what, {})
        if not same_input(ours[what], recorded[what]):
            yield what
        elif keys := [key for key in {**config, **known} if config.get(key) != known.get(key)]:
            yield f"the {what}'s config: {listed(keys)}"


def _other_texts(ours: JsonObject, recorded: JsonObject) -> Iterator[str]:
    """Name what differs of the texts."""
    texts = _named_texts(ours)
    known = _named_texts(recorded)
    for name in {**texts, **known}:
        if name not in known:
            yield f"{name} is asked for"
        elif name not in texts:
            yield f"{name} is not asked for"
        elif texts[name]["sha256"] != known[name]["sha256"]:
            wanted, found = (
                f"{text['sequences']} sequences of {text['length']} tokens"
                for text in (texts[name], known[name])
            )
            yield name if wanted == found else f"{name}: {wanted}, not {found}"


def _named_texts(facts: JsonObject) -> JsonObject:
    """Return the texts' facts by the names used in messages."""
    texts: Any = facts["texts"]
    if isinstance(texts, list):
        return {f"text {text['name']}": text for text in texts}
    two = {f"{name} text": texts[name] for name in texts if name != "others"}
    return two | {f"other text {text['name']}": text for text in texts.get("others", ())}


def joined_facts(ours: JsonObject, recorded: JsonObject) -> JsonObject:
    """Join the facts of a run with the facts of the evaluation that it adds to; only detection, coefficients and map may differ."""
    tree = {**recorded, "version": ours["version"]}
    if recorded["detection"] is None:
        tree |= {key: ours[key] for key in DETECTION if key in ours}
    if sets := _sets(recorded) | _sets(ours):
        tree["coefficients"] = list(sets.values())
    if "map" in ours:
        tree["map"] = ours["map"]
    return with_digest(tree)


def with_digest(facts: JsonObject, **others: Any) -> JsonObject:
    """Add the digest of all facts except streamer's version, and of other things that decide a result."""
    tree = {key: value for key, value in facts.items() if key not in ("version", "plan")} | others
    if facts.get("dtype") == "bf16":
        tree["products"] = 2  # version 1 rounded no results
    text = json.dumps(tree, sort_keys=True)
    return {**facts, "plan": hashlib.sha256(text.encode()).hexdigest()}


def of_others(path: Path, one: str, differing: Sequence[str] = ()) -> OutputExistsError:
    """Make the error for a file that holds a result of other inputs or options, with the differences."""
    return transaction.holds(path, f"{one} of other inputs or options{in_words(differing)}")


def in_words(differing: Sequence[str]) -> str:
    """Put differences into parentheses."""
    return f" ({listed(differing)})" if differing else ""
