"""Index the names of a checkpoint's tensors: on disk, in the loaded model, with and without the base's prefix, and of tied tensors.

Adapters use run-time module names; checkpoints use their own. A rename leads from the name on disk to the name in the loaded model.
transformers chooses the renames by the model's class and type; ``tools/make_renames.py`` extracts them as facts from its table into
``renames.json``, so that reading them needs none of transformers' code. Names are compared at run time: every tensor's name is carried
forward, and no pattern is ever inverted.
``language_model.model.layers.0.mlp.up_proj.weight`` → ``model.language_model.layers.0.mlp.up_proj.weight`` of a vision-language model;
``model.layers.0.mlp.experts.3.w1.weight`` → a part of ``model.layers.0.mlp.experts.gate_up_proj``, which is built from all experts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from streamer.plan.architectures import (
    Architecture,
    KeyPaths,
    TensorNames,
    Tie,
    architectures_for,
    packaged,
    pattern_of,
)
from streamer.weights.model_config import ModelConfig

RENAMES = "renames.json"
"""The packaged table: ``rules`` and ``same`` by class or model type, and ``classes`` by model type."""

# For a model that no table knows: renames common to vision-language models.
COMMON = (
    {"rename": r"^language_model\.lm_head(?!\w)", "to": "lm_head"},
    {"rename": r"^language_model\.model\.", "to": "model.language_model."},
    {"rename": r"^(visual|vision_tower|multi_modal_projector)\.", "to": r"model.\1."},
)

MERGE = "MergeModulelist 0"
CONCATENATE = "Concatenate 1"
TRANSPOSE = "Transpose 1 2"
TRANSPOSE_IF = "Transpose 1 2 check_dims"
"""Operations of conversions: join matrices to a stack, join stacks by rows, transpose every matrix, or those not of the model's shape."""

_LAST_NUMBER = re.compile(r".*\.(\d+)\.")

STACKS = {(MERGE,), (MERGE, CONCATENATE), (CONCATENATE,), (TRANSPOSE,), (TRANSPOSE_IF,)}


@dataclass(frozen=True)
class Conversion:
    """Tensors that loading builds from others: `to` from each match of `sources`, by the named operations."""

    sources: tuple[re.Pattern[str], ...]
    to: TensorNames
    by: TensorNames
    scope: re.Pattern[str] | None = None

    @property
    def stacks(self) -> bool:
        """Return whether it builds one stack of matrices from whole tensors, or from one that is stored transposed."""
        return self.by in STACKS and len(self.to) == 1

    @property
    def numbered(self) -> bool:
        """Return whether each source is one tensor for each expert, told apart by a number."""
        return MERGE in self.by

    def load(self, tensor: str, name: str) -> Loaded | None:
        """Return the loaded name of a tensor, or None if it is not a source of this conversion."""
        built = next(iter(self.to), "")
        for at, source in enumerate(self.sources):
            if renamed := _replace(name, source, built, self.scope):
                new, replaced = renamed
                number = _LAST_NUMBER.match(replaced)
                return Loaded(tensor, new, self, at, int(number[1]) if number else None)
        return None

    def by_source(self, parts: Iterable[Loaded]) -> list[dict[int, str]]:
        """List the tensors on disk of each source, by number; a source that is one tensor has number 0."""
        sources: list[dict[int, str]] = [{} for _ in self.sources]
        for part in parts:
            number = part.number if self.numbered else None
            sources[part.source][number or 0] = part.tensor
        return sources


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
            renamed = (_replace(name, pattern, to, self.scope) for pattern, to in self.pairs)
            if first := next(filter(None, renamed), None):
                out[name], _ = first
        (first_pattern, _), *others = self.pairs
        if others and not any(map(first_pattern.search, out)):
            return {}  # the checkpoint is already converted
        return out


def _replace(
    name: str, pattern: re.Pattern[str], to: str, scope: re.Pattern[str] | None
) -> tuple[str, str] | None:
    """Rename by one pattern, and return the new name and the part of the old one that was replaced; None if nothing matches."""
    start = 0
    if scope is not None:
        scoped = scope.match(name)
        if scoped is None:
            return None
        start = scoped.end()
    match = pattern.search(name[start:])
    if match is None:
        return None
    replacement = to.replace(r"\1", match[1]) if r"\1" in to else to
    return name[:start] + name[start:].replace(match[0], replacement, 1), match[0]


@dataclass(frozen=True)
class Renames:
    """The renames of one model, in the order in which they apply.

    Attributes
    ----------
    model
        The model for messages: a class or model type; empty if there are only the renames common to all models.
    """

    model: str = ""
    renames: tuple[Rename, ...] = ()
    conversions: tuple[Conversion, ...] = ()

    def load(self, tensor: str, name: str) -> Loaded:
        """Apply the first conversion that has a renamed tensor as a source."""
        converted = (conversion.load(tensor, name) for conversion in self.conversions)
        return next(filter(None, converted), Loaded(tensor, name))


def renames_for(config: ModelConfig) -> Renames:
    """Collect the renames of a model: its own, its inner models', and those common to all models; a pipeline has none.

    This follows transformers: by each model's class, else by its type unless a surrounding model used the same type; renames of an inner
    model apply below its path, with or without the base's prefix. ``language_model.embed_tokens`` of ``LlavaForConditionalGeneration`` is
    below ``model.language_model``.
    """
    if config.pipeline:
        return Renames()
    # If the base's class is not known, the class of its type with the most inner models decides.
    unnamed = replace(config, values={**config.values, "architectures": None})
    known = architectures_for(config) or architectures_for(unnamed)
    architecture = max(known, key=lambda a: len(a.parts), default=None)
    models: list[TensorNames]
    if architecture is None:
        named = next(iter(config.architectures), None)
        models = [("", named if isinstance(named, str) else "", config.model_type or "")]
        prefix = ""
    else:
        # EXAONE is a Llama with names of its own: transformers goes by the config's type.
        types = (config.model_type or "", architecture.model_type)
        inner = ((part.path, part.name, part.model_type) for part in architecture.parts)
        models = [("", architecture.name, *types), *inner]
        prefix = architecture.base_prefix
    rules = packaged(RENAMES)["rules"]
    found = list(_own_rules(models, rules))
    steps_within = [(_scope(path, prefix), rules[key]) for path, _, key in found]
    if architecture is None and not found:
        steps_within.append((None, COMMON))
    steps_within.append((None, rules.get("legacy", ())))
    whose = next((shown for _, shown, _ in found), "")
    renames = []
    conversions = []
    for scope, steps in steps_within:
        for step in steps:
            if "convert" in step:
                sources = tuple(map(re.compile, step["convert"]))
                conversions.append(Conversion(sources, tuple(step["to"]), tuple(step["by"]), scope))
            else:
                pairs = step.get("group") or [(step["rename"], step["to"])]
                renames.append(Rename(tuple((re.compile(p), to) for p, to in pairs), scope))
    return Renames(whose, tuple(renames), tuple(conversions))


def _own_rules(
    models: Iterable[TensorNames], rules: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Yield the path of each model that has rules, its class or type, and the key of its rules."""
    same = packaged(RENAMES)["same"]
    seen: defaultdict[str, list[str]] = defaultdict(list)
    for path, cls, *types in models:
        for key in (cls, *types):
            if any(around == "" or path.startswith(f"{around}.") for around in seen[key]):
                break
            if (own := same.get(key, key)) in rules:
                seen[cls].append(path)
                seen[key].append(path)
                yield path, key, own
                break


def _scope(path: str, prefix: str) -> re.Pattern[str] | None:
    """Return a pattern for the start of names below an inner model, loaded with or without the base prefix; None for the whole model."""
    if not path:
        return None
    below = path.removeprefix(prefix).removeprefix(".")
    head = rf"(?:{re.escape(prefix)}\.)?" if prefix else ""
    return re.compile(f"^{head}{re.escape(below)}\\." if below else f"^{head}")


@dataclass(frozen=True)
class TiedNames:
    """Names of one parameter.

    Attributes
    ----------
    on_disk
        Run-time name → the name that it has, or would have, on disk; names to which others are tied come first. None if there is no such
        name, or if the names contain a layer's number.
    stored
        Name on disk of the tensor that is read; there may be copies under other names. Empty if the names contain numbers.
    keys
        Config keys that state the tie (see `architectures.Tie`).
    """

    on_disk: Mapping[str, str | None]
    stored: str
    keys: KeyPaths

    @property
    def names(self) -> TensorNames:
        """Return all names on disk, the stored one first."""
        return (self.stored, *self.others)

    @cached_property
    def others(self) -> TensorNames:
        """Return the names on disk except the stored one."""
        names = dict.fromkeys(self.on_disk.values())
        return tuple(name for name in names if name and name != self.stored)


@dataclass(frozen=True)
class NameIndex:
    """The names of a model's tensors on disk, and what loading makes of them.

    Attributes
    ----------
    tensors
        Names on disk.
    renames
        The model's renames; none for tensors that are in memory already.
    """

    tensors: TensorNames
    renames: Renames = field(default_factory=Renames)

    @classmethod
    def of(cls, tensors: Iterable[str], config: ModelConfig) -> NameIndex:
        """Index the names of a model with this config."""
        return cls(tuple(tensors), renames_for(config))

    def among(self, tensors: Iterable[str]) -> NameIndex:
        """Index other tensors of the same model."""
        return NameIndex(tuple(tensors), self.renames)

    @cached_property
    def loaded(self) -> dict[str, Loaded]:
        """Return what loading makes of each tensor, by its name on disk."""
        names = {name: name for name in self.tensors}
        for rename in self.renames.renames:
            if changed := rename.apply(set(names.values())):
                names = {tensor: changed.get(name, name) for tensor, name in names.items()}
        return {tensor: self.renames.load(tensor, name) for tensor, name in names.items()}

    @cached_property
    def by_run_time(self) -> dict[str, list[Loaded]]:
        """Return the tensors on disk that form each tensor of the loaded model, by its run-time name."""
        out: defaultdict[str, list[Loaded]] = defaultdict(list)
        for loaded in self.loaded.values():
            out[loaded.name].append(loaded)
        return dict(out)

    @cached_property
    def at_run_time(self) -> dict[str, str]:
        """Map names on disk → run-time names, for tensors that are loaded unchanged."""
        return {tensor: loaded.name for tensor, loaded in self.loaded.items() if loaded.by is None}

    @cached_property
    def on_disk(self) -> dict[str, str]:
        """Map run-time names → names on disk, for tensors that are loaded unchanged."""
        return {name: tensor for tensor, name in self.at_run_time.items()}

    def find(self, run_time: str, architecture: Architecture) -> str | None:
        """Return the name on disk of a stored tensor in any layout: with or without the prefix of the base model."""
        for name in architecture.spellings(run_time):
            if name in self.on_disk:
                return self.on_disk[name]
        patterns = (run_time, *architecture.disk_patterns(run_time))
        return next((name for name in patterns if name in self.loaded), None)

    def find_all(self, pattern: str, architecture: Architecture) -> list[str]:
        """List the names on disk of the tensors that match a pattern, in all layers if it stands for a layer's number."""
        if "*" in pattern:
            return [name for now, name in self.on_disk.items() if pattern_of(now) == pattern]
        stored = self.find(pattern, architecture)
        return [] if stored is None else [stored]

    def of_new(
        self, run_time: str, beside: str, beside_on_disk: str, architecture: Architecture
    ) -> str | None:
        """Return a name on disk under which loaders find a new tensor, in the layout of another tensor; None if there is none.

        ``lm_head.weight`` beside ``model.language_model.embed_tokens.weight``, which is stored as
        ``language_model.model.embed_tokens.weight`` → ``language_model.lm_head.weight``.
        """
        prefix = f"{architecture.base_prefix}."
        if beside == prefix + beside_on_disk:
            return run_time.removeprefix(prefix)
        patterns = architecture.disk_patterns(run_time)
        of_table = patterns if beside_on_disk in architecture.disk_patterns(beside) else ()
        for name in (*of_table, run_time, *patterns):
            with_new = self.among([*self.tensors, name])
            if "*" not in name and with_new.at_run_time.get(name) == run_time:
                return name
        return None

    def ties(self, architecture: Architecture | None) -> tuple[TiedNames, ...]:
        """Find the parameters that have several names by the facts about the model; none for a model of an unknown class."""
        if architecture is None:
            return ()
        ties = []
        for run_time, keys in _tied_groups(architecture):
            if any("*" in name for name in run_time):
                ties.append(TiedNames(dict.fromkeys(run_time), "", keys))
                continue
            found = ((name, self.find(name, architecture)) for name in run_time)
            stored = {name: on_disk for name, on_disk in found if on_disk is not None}
            if stored:
                source, read = next(iter(stored.items()))
                names = {
                    name: stored.get(name) or self.of_new(name, source, read, architecture)
                    for name in run_time
                }
                ties.append(TiedNames(names, read, keys))
        return tuple(ties)


def _tied_groups(architecture: Architecture) -> Iterator[tuple[list[str], KeyPaths]]:
    """Yield the run-time names of each parameter with several, and the keys that state its ties."""
    groups: list[list[Tie]] = []
    for tie in architecture.ties:
        if tie.tied:
            names = {tie.name, tie.source}
            same = [g for g in groups if any(names & {t.name, t.source} for t in g)]
            joined = [t for group in same for t in group]
            groups = [*(g for g in groups if g not in same), [*joined, tie]]
    for ties in groups:
        sources = (tie.source for tie in reversed(ties))
        names_in_order = dict.fromkeys([*sources, *(tie.name for tie in ties)])
        # A tie without keys holds whatever the config says, and so do all of its parameter.
        stated = all(tie.keys for tie in ties)
        keys = dict.fromkeys(key for tie in ties for key in tie.keys if stated)
        yield [*names_in_order], tuple(keys)
