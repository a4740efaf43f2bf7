"""Rename tensors as transformers does on loading: name on disk → name in the loaded model.

``language_model.model.layers.0.mlp.up_proj.weight`` → ``model.language_model.layers.0.mlp.up_proj.weight`` of a vision-language model;
``model.layers.0.mlp.experts.3.w1.weight`` → a part of ``model.layers.0.mlp.experts.gate_up_proj``, which is built from all experts.

transformers chooses the renames by the model's class and type. ``tools/make_renames.py`` extracts them as facts from transformers' table
into ``renames.json``; reading them needs none of transformers' code. They lead only from disk to run time, so names are compared there:
every tensor's name is carried forward, and no pattern is ever inverted.
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

# For a model that no table knows: renames common to vision-language models.
COMMON = (
    {"rename": r"^language_model\.lm_head(?!\w)", "to": "lm_head"},
    {"rename": r"^language_model\.model\.", "to": "model.language_model."},
    {"rename": r"^(visual|vision_tower|multi_modal_projector)\.", "to": r"model.\1."},
)


@dataclass(frozen=True)
class Conversion:
    """Tensors that loading builds from others: `to` from each match of `sources`, by the named operations."""

    sources: tuple[re.Pattern[str], ...]
    to: tuple[str, ...]
    by: tuple[str, ...]
    scope: re.Pattern[str] | None = None

    @property
    def stacks(self) -> bool:
        """Return whether it builds one stack of matrices from whole tensors, or from one that is stored transposed."""
        return self.by in STACKS and len(self.to) == 1

    def load(self, tensor: str, name: str) -> Loaded | None:
        """Return the loaded name of a tensor, or None if it is not a source of this conversion."""
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
        Its name on disk, and the run-time name of the tensor that it becomes, whole or as a part.
    by
        Conversion that builds that tensor from this one and others; None if it is loaded unchanged.
    source, number
        Index of the conversion's source that it matches, and its number within that source, if numbered.
    """

    tensor: str
    name: str
    by: Conversion | None = None
    source: int = 0
    number: int | None = None


@dataclass(frozen=True)
class Rename:
    """Pairs of a pattern and the replacement of its first match; several pairs apply only if the first one matches some name."""

    pairs: tuple[tuple[re.Pattern[str], str], ...]
    scope: re.Pattern[str] | None = None

    def apply(self, names: Iterable[str]) -> dict[str, str]:
        """Return name → new name for the names that it changes."""
        out = {}
        for name in names:
            for pattern, to in self.pairs:
                found = _replace(name, pattern, to, self.scope)
                if found is not None:
                    out[name] = found[0]
                    break
        if len(self.pairs) > 1 and not any(self.pairs[0][0].search(name) for name in out):
            return {}  # the checkpoint is already converted
        return out


def _replace(name: str, pattern: re.Pattern[str], to: str, scope: re.Pattern[str] | None) -> tuple[str, str] | None:
    """Rename by one pattern: return the new name and the part that matched; None if nothing matches."""
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
    """The renames of one model, in the order in which they apply.

    Attributes
    ----------
    model
        The model for messages: a class or model type; empty if there are only the renames common to all models.
    """

    model: str
    renames: tuple[Rename, ...]
    conversions: tuple[Conversion, ...]

    def at_run_time(self, names: Iterable[str]) -> dict[str, str]:
        """Map each tensor on disk → its run-time name, for tensors that are loaded unchanged."""
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
    """Read the table: ``rules`` and ``same`` by class or model type, and ``classes`` by model type."""
    data: dict[str, Any] = json.loads(resources.files(__package__).joinpath("renames.json").read_bytes())
    return data


def _steps(key: str) -> list[dict[str, Any]] | None:
    rules = table()["rules"]
    found: list[dict[str, Any]] | None = rules.get(table()["same"].get(key, key))
    return found


def renames_for(config: ModelConfig) -> Renames:
    """Collect the renames of a model: its own, its inner models', and those common to all models.

    This follows transformers: by each model's class, else by its type unless a surrounding model used the same type; renames of an inner
    model apply below its path, with or without the base's prefix. ``language_model.embed_tokens`` of ``LlavaForConditionalGeneration`` is
    below ``model.language_model``.
    """
    if config.pipeline:
        return Renames("", (), ())
    architecture = _architecture(config)
    models: list[tuple[str, ...]]
    if architecture is None:
        named = next(iter(config.architectures), None)
        models = [("", named if isinstance(named, str) else "", config.model_type or "")]
        prefix = ""
    else:
        # EXAONE is a Llama with names of its own: transformers goes by the config's type.
        types = config.model_type or "", architecture.model_type
        models = [("", architecture.name, *types), *(p[:3] for p in architecture.parts)]
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
    """Return the facts about the base's class; if that is not known, about the class of its type with the most inner models."""
    unnamed = replace(config, values={**config.values, "architectures": None})
    return max(architectures_for(config) or architectures_for(unnamed), key=lambda a: len(a.parts), default=None)


def _scope(path: str, prefix: str) -> str | None:
    """Return a pattern for the start of names below an inner model, loaded with or without the base prefix; None for the whole model."""
    if not path:
        return None
    below = path.removeprefix(prefix).removeprefix(".")
    head = rf"(?:{re.escape(prefix)}\.)?" if prefix else ""
    return f"^{head}{re.escape(below)}\\." if below else f"^{head}"
