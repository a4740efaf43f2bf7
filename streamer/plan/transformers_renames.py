"""Rename tensors as transformers does on loading: name on disk → name in the loaded model.

``language_model.model.layers.0.mlp.up_proj.weight`` → ``model.language_model.layers.0.mlp.up_proj.weight`` of a vision-language model;
``model.layers.0.mlp.experts.3.w1.weight`` → a part of ``model.layers.0.mlp.experts.gate_up_proj``, which is built from all experts.

transformers renames tensors between the two, by the model's class and type. The renames stand in ``renames.json`` as facts taken from
transformers' own table by ``tools/make_renames.py``; none of its code is needed to read them. They point one way only, from disk to
run time, so names are compared there: every tensor's name is carried forward, and no pattern is ever inverted.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from streamer.plan.architectures import Architecture, architectures_for
from streamer.weights.model_config import ModelConfig

# Where no table knows the model: what vision-language models have in common.
COMMON = (
    {"rename": r"^language_model\.lm_head(?!\w)", "to": "lm_head"},
    {"rename": r"^language_model\.model\.", "to": "model.language_model."},
    {"rename": r"^(visual|vision_tower|multi_modal_projector)\.", "to": r"model.\1."},
)


@dataclass(frozen=True)
class Conversion:
    """Tensors that are built from others on loading: `to` from each match of `sources`, by the operations named."""

    sources: tuple[re.Pattern[str], ...]
    to: tuple[str, ...]
    by: tuple[str, ...]
    scope: re.Pattern[str] | None = None

    @property
    def stacks(self) -> bool:
        """Whether it makes one stack of matrices out of whole tensors, or out of one that is stored the other way round."""
        return self.by in STACKS and len(self.to) == 1

    def load(self, tensor: str, name: str) -> Loaded | None:
        """Return the loaded name of a tensor, or None if it is no source of this."""
        for at, source in enumerate(self.sources):
            found = _replace(name, source, self.to[0] if self.to else "", self.scope)
            if found is not None:
                numbers = re.findall(r"(?<=\.)\d+(?=\.)", found[1])
                return Loaded(tensor, found[0], self, at, int(numbers[-1]) if numbers else None)
        return None


MERGE, CONCATENATE, TRANSPOSE, TRANSPOSE_IF = (
    "MergeModulelist 0", "Concatenate 1", "Transpose 1 2", "Transpose 1 2 check_dims",
)  # fmt: skip
STACKS = {(MERGE,), (MERGE, CONCATENATE), (CONCATENATE,), (TRANSPOSE,), (TRANSPOSE_IF,)}


class Loaded(NamedTuple):
    """A tensor on disk, and its name in the loaded model.

    Attributes
    ----------
    tensor, name
        Its name on disk, and the run-time name of what it becomes, or becomes a part of.
    by
        What builds that out of it and others; None if it is loaded as it is.
    source, number
        Which source of the conversion it is, and which of that source's tensors, where these are numbered.
    """

    tensor: str
    name: str
    by: Conversion | None = None
    source: int = 0
    number: int | None = None


@dataclass(frozen=True)
class Rename:
    """Pairs of a pattern and what replaces its first match; of several pairs, all wait for the first one to be seen."""

    pairs: tuple[tuple[re.Pattern[str], str], ...]
    scope: re.Pattern[str] | None = None

    def apply(self, names: Iterable[str]) -> dict[str, str]:
        """Name → renamed, for those that it changes."""
        out = {}
        for name in names:
            for pattern, to in self.pairs:
                found = _replace(name, pattern, to, self.scope)
                if found is not None:
                    out[name] = found[0]
                    break
        if len(self.pairs) > 1 and not any(self.pairs[0][0].search(name) for name in out):
            return {}  # a checkpoint that has been converted already
        return out


def _replace(name: str, pattern: re.Pattern[str], to: str, scope: re.Pattern[str] | None) -> tuple[str, str] | None:
    """Rename by one pattern: the new name, and the part of it that matched; None if none does."""
    head = ""
    if scope is not None:
        at = scope.match(name)
        if at is None:
            return None
        head, name = name[: at.end()], name[at.end() :]
    match = pattern.search(name)
    if match is None:
        return None
    replacement = to.replace(r"\1", match[1]) if r"\1" in to else to
    return head + name.replace(match[0], replacement, 1), match[0]


@dataclass(frozen=True)
class Renames:
    """The renames of one model, in the order in which they act.

    Attributes
    ----------
    model
        Whose they are, for messages: a class or a model type; empty where they are only those that all models share.
    """

    model: str
    renames: tuple[Rename, ...]
    conversions: tuple[Conversion, ...]

    def at_run_time(self, names: Iterable[str]) -> dict[str, str]:
        """Map each tensor on disk → its run-time name, for those that are loaded as they are."""
        return {tensor: name for tensor, name, by, _, _ in self.loaded(names) if by is None}

    def loaded(self, names: Iterable[str]) -> list[Loaded]:
        """Return the loaded name of every tensor."""
        now = {name: name for name in names}
        for rename in self.renames:
            changed = rename.apply(set(now.values()))
            if changed:
                now = {name: changed.get(at, at) for name, at in now.items()}
        return [
            next((found for c in self.conversions if (found := c.load(name, at))), Loaded(name, at))
            for name, at in now.items()
        ]


@cache
def table() -> dict[str, Any]:
    """Read the facts: ``rules`` and ``same`` by class or model type, and ``classes`` by model type."""
    data: dict[str, Any] = json.loads(resources.files(__package__).joinpath("renames.json").read_text())
    return data


def _steps(key: str) -> list[dict[str, Any]] | None:
    rules = table()["rules"]
    found: list[dict[str, Any]] | None = rules.get(table()["same"].get(key, key))
    return found


def renames_for(config: ModelConfig) -> Renames:
    """Collect the renames of a model: its own, those of the models within it, and those that all models share.

    As transformers collects them: by each model's class, else by its type where no model around it has had those; renames of a model
    within act below its path, with the base's prefix or without. ``language_model.embed_tokens`` of
    ``LlavaForConditionalGeneration`` is below ``model.language_model``.
    """
    architecture = _architecture(config)
    if architecture is None:
        named = next(iter(config.architectures), None)
        models = [("", named if isinstance(named, str) else "", config.model_type or "")]
        prefix = ""
    else:
        models = [("", architecture.name, architecture.model_type), *(p[:3] for p in architecture.parts)]
        prefix = architecture.base_prefix
    seen: defaultdict[str, list[str]] = defaultdict(list)
    found: list[tuple[str | None, list[dict[str, Any]]]] = []
    whose = ""
    for path, *keys in models:
        for key in keys:
            if any(around == "" or path.startswith(f"{around}.") for around in seen[key]):
                break
            steps = _steps(key)
            if steps is not None:
                found.append((_scope(path, prefix), steps))
                seen[keys[0]].append(path)
                seen[key].append(path)
                whose = whose or key
                break
    if architecture is None and not found:
        found.append((None, list(COMMON)))
    found.append((None, _steps("legacy") or []))
    renames, conversions = [], []
    for within, steps in found:
        where = None if within is None else re.compile(within)
        for step in steps:
            if "convert" in step:
                sources = tuple(re.compile(s) for s in step["convert"])
                conversions.append(Conversion(sources, tuple(step["to"]), tuple(step["by"]), where))
            else:
                pairs = step["group"] if "group" in step else [(step["rename"], step["to"])]
                renames.append(Rename(tuple((re.compile(p), to) for p, to in pairs), where))
    return Renames(whose, tuple(renames), tuple(conversions))


def _architecture(config: ModelConfig) -> Architecture | None:
    """The facts of the base's class; where that is not known, those of the class of its type that has the most models within it."""
    unnamed = replace(config, values={**config.values, "architectures": None})
    return max(architectures_for(config) or architectures_for(unnamed), key=lambda a: len(a.parts), default=None)


def _scope(path: str, prefix: str) -> str | None:
    """Pattern of the beginning of names below a model within, loaded with the model's base prefix or without; None for the model."""
    if not path:
        return None
    below = path.removeprefix(prefix).removeprefix(".")
    head = rf"(?:{re.escape(prefix)}\.)?" if prefix else ""
    return f"^{head}{re.escape(below)}\\." if below else f"^{head}"
