"""Describe model classes: which weights are tied, stored transposed, embeddings or stacks of experts, and their names on disk.

``tools/make_architectures.py`` extracts these facts from transformers' classes into ``architectures.json.gz``; reading them needs none of
transformers' code. Names are run-time names. In a pattern ``*`` replaces a layer's number: ``model.layers.0.mlp`` and
``model.layers.79.mlp`` both match ``model.layers.*.mlp``. A model is described by its class, and each model inside it (a vision tower, a
decoder) by the class that the config names there.

The first line of ``architectures.json.gz`` holds what all classes share. Each further line holds one record, which several classes may
share. A record omits what the records of its inner models already say.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from streamer.errors import UsageError
from streamer.weights.model_config import ModelConfig


@cache
def table() -> dict[str, Any]:
    """Read the table once; records are parsed on demand.

    Returns
    -------
    dict
        ``source``: version of transformers from which the table was made. ``classes``: class → line number of its record. ``types``: model
        type → classes that its config can have. ``auto``: auto class → model type → class that it builds. ``lines``: records as JSON.
        ``tie_rules``: rule → model types. ``always``: the weights are always tied; ``not_alone``: the config key states more than this tie;
        ``of_text``: the ``text_config`` can also state the tie; ``default``: tied by default.
    """
    data = gzip.decompress(
        resources.files(__package__).joinpath("architectures.json.gz").read_bytes()
    )
    head, *lines = data.decode().splitlines()
    return {**json.loads(head), "lines": lines}


@cache
def packaged(name: str) -> dict[str, Any]:
    """Read another packaged table once, which is JSON."""
    data: dict[str, Any] = json.loads(resources.files(__package__).joinpath(name).read_bytes())
    return data


@cache
def record_of(name: str) -> Mapping[str, Any] | None:
    """Return the record of a class, or None if the table has none."""
    line = table()["classes"].get(name)
    return None if line is None else dict(json.loads(table()["lines"][line]))


@cache
def conv1d_names() -> frozenset[str]:
    """List the last names of modules that some class stores (in, out), such as ``c_proj``: in an unknown class they may be either way."""
    records = filter(None, map(record_of, table()["classes"]))
    return frozenset(
        pattern.rpartition(".")[2] for of in records for pattern in of.get("transposed", ())
    )


TIE_KEY = "tie_word_embeddings"

EMBEDDING = re.compile(
    r"(?:^|\.)(?:wte|wpe|shared|(?:\w+_)?relative_attention_bias|embed_(?!out|proj)\w+|(?!patch)\w*embeddings?)$"
)
"""Names of embeddings, as opposed to linear layers, if the model's class is unknown or does not contain the layer."""


@dataclass(frozen=True)
class Tie:
    """Two names of one parameter.

    Attributes
    ----------
    name, source
        Patterns of the two. Loaders give `name` the tensor stored as `source`, or the reverse if only `name` is stored.
    keys
        Paths of config keys that state the tie; any one of them ties. Empty if no config can untie the two: the class ties them whatever
        its config says, or computes something else if the config unties them (T5).
    tied
        Whether they are tied under the given config, by its values or by the defaults of its classes.
    """

    name: str
    source: str
    keys: tuple[tuple[str, ...], ...]
    tied: bool


class Part(NamedTuple):
    """A model inside a model.

    Attributes
    ----------
    path
        Path of its module.
    name, model_type
        Its class, and that class's model type.
    config
        Keys that lead to its config inside the model's config; empty if it uses the whole config.
    disk
        Prefix of its names on disk.
    """

    path: str
    name: str
    model_type: str
    config: tuple[str, ...]
    disk: str


@dataclass(frozen=True)
class Architecture:
    """Facts about a model.

    Attributes
    ----------
    name, model_type
        Its class, and that class's model type.
    base_prefix
        Path of the model without its head (``base_model_prefix``): modules are found with and without it.
    tensors
        Patterns of its parameters under all their names, for every config of the class.
    vocabulary
        Pattern of a tensor with a row for each token → path of the config keys that state the number of rows.
    ties
        Ties that hold, and ties that the config could state.
    input_embedding, output_embedding
        The modules' paths; None if the class has none.
    embeddings, conv1d
        Patterns of embedding modules, and of modules that store (in, out).
    expert_stacks
        Pattern of a parameter with a matrix for each expert, (experts, …) → ``out,in`` or ``in,out``; empty if transformers does not say.
    matrices
        Patterns of two-dimensional parameters of modules other than Linear, Conv1D and embeddings, such as an expert router.
    saved_buffers
        Patterns of tensors on disk that are not parameters.
    disk_names
        Run-time pattern of a tensor named here → patterns on disk, if they differ: several if loading builds one tensor from many, none
        if it builds several from many.
    may_be_missing, unsaved
        Regular expressions of names that loading does not need, and patterns of names that are not saved.
    parts
        The models inside it, outer ones first.
    """

    name: str
    model_type: str
    base_prefix: str
    tensors: frozenset[str]
    vocabulary: Mapping[str, tuple[str, ...]]
    ties: tuple[Tie, ...]
    input_embedding: str | None
    output_embedding: str | None
    embeddings: frozenset[str]
    conv1d: frozenset[str]
    expert_stacks: Mapping[str, str]
    matrices: frozenset[str]
    saved_buffers: frozenset[str]
    disk_names: Mapping[str, tuple[str, ...]]
    may_be_missing: tuple[str, ...]
    unsaved: frozenset[str]
    parts: tuple[Part, ...]

    @property
    def tied_names(self) -> set[str]:
        """Return the patterns of the names that are tied to others."""
        return {name for tie in self.ties if tie.tied for name in (tie.name, tie.source)}

    def has_tensor(self, name: str) -> bool:
        """Test whether a loaded model has a tensor of this name, possibly in another layer."""
        return (pattern := pattern_of(name)) in self.tensors or pattern in self.saved_buffers

    def transposed(self, module: str) -> bool:
        """Test whether a module stores its weight (in, out), as Conv1D does; every other linear layer stores (out, in)."""
        return self._among(module, self.conv1d)

    def has_module(self, module: str) -> bool:
        """Test whether a loaded model has a module with a weight of this name, with or without the base's prefix."""
        return self._among(f"{module}.weight", self.tensors)

    def is_embedding(self, module: str) -> bool:
        """Test whether a module is an embedding (looked up, not multiplied); if the table does not have it, the name decides."""
        named = not self.has_module(module) and EMBEDDING.search(module) is not None
        return named or self._among(module, self.embeddings)

    def is_matrix(self, parameter: str) -> bool:
        """Test whether a two-dimensional parameter belongs to a module other than Linear, Conv1D or embedding, such as an expert router."""
        return self._among(parameter, self.matrices)

    def vocabulary_keys(self, parameter: str) -> tuple[str, ...] | None:
        """Return the config keys that state the number of rows of a tensor with a row for each token; None for any other tensor."""
        return next(
            (self.vocabulary[p] for p in self._spellings(parameter) if p in self.vocabulary), None
        )

    def stack_orientation(self, parameter: str) -> str:
        """Return the orientation of each matrix in a stack of experts, ``out,in`` or ``in,out``; empty if the table does not say."""
        return next(
            (self.expert_stacks[p] for p in self._spellings(parameter) if p in self.expert_stacks),
            "",
        )

    def disk_patterns(self, name: str) -> tuple[str, ...]:
        """Return the patterns on disk of a tensor that the table names."""
        return self.disk_names.get(pattern := pattern_of(name), (pattern,))

    def _among(self, name: str, patterns: frozenset[str]) -> bool:
        return not patterns.isdisjoint(self._spellings(name))

    def _spellings(self, name: str) -> tuple[str, ...]:
        pattern, base = pattern_of(name), f"{self.base_prefix}."
        return pattern, base + pattern, pattern.removeprefix(base)


def pattern_of(name: str) -> str:
    """Return the pattern of a name: ``h.0.attn`` → ``h.*.attn``."""
    return ".".join("*" if step.isdigit() else step for step in name.split("."))


def architecture_for(config: ModelConfig, name: str | None = None) -> Architecture | None:
    """Return the facts about the named class, else the class that the user names, else the first that the config names.

    A named class is accepted for an unknown model type, too.

    Returns
    -------
    Architecture or None
        None if the facts are not known: the table lacks the class, has it for another ``model_type`` or lacks the class of an inner
        model; or the config names no class and its type has several.
    """
    of_type, named = classes_of(config.model_type), name or config.architecture
    unknown = named is not None and not of_type
    cls = named or next(iter(config.architectures or (of_type if len(of_type) == 1 else ())), None)
    if not isinstance(cls, str) or not (
        unknown or config.values.get("model_type") is None or cls in of_type
    ):
        return None
    return _architecture(
        cls, {k: v for k, v in config.values.items() if not unknown or k != "model_type"}, ()
    )


def architectures_for(config: ModelConfig) -> tuple[Architecture, ...]:
    """List the facts about the model with this config; empty if it is not known.

    If the config names no class, or a class of another library without its own code (``auto_map``), list every class of its type.
    """
    of_type = classes_of(config.model_type)
    elsewhere = of_type and config.architectures[:1] and config.architectures[0] not in of_type
    unnamed = not config.architectures or (elsewhere and "auto_map" not in config.values)
    names: Iterable[str | None] = of_type if unnamed and config.architecture is None else [None]
    known = [architecture_for(config, name) for name in names]
    return tuple(a for a in known if a is not None) if None not in known else ()


def with_architecture(config: ModelConfig, name: str | None) -> ModelConfig:
    """Set the class that the user names.

    Raises
    ------
    UsageError
        If the table has no such class, or the config says that the model is of another type.
    """
    if name is None:
        return config
    if architecture_for(config, name) is None:
        known, of_type = table()["classes"], classes_of(config.model_type)
        near = get_close_matches(name, of_type or known, 3, 0.4)
        whose = f"of model_type {config.model_type!r}" if of_type else f"of {table()['source']}"
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise UsageError(f"architecture: expected a class {whose}, found {name!r}{hint}")
    return replace(config, architecture=name)


def classes_of(model_type: str | None) -> tuple[str, ...]:
    """Return the classes that a config of this type can have; empty if the table has none."""
    return (
        tuple(table()["types"].get(model_type, ())) if model_type else ()
    )  # the table has classes of no type


def _architecture(
    name: str, config: Mapping[str, Any], place: tuple[str, ...]
) -> Architecture | None:
    """Return the facts about a class whose own config is at `place`."""
    record = record_of(name)
    if record is None:
        return None
    inner: dict[str, Architecture] = {}
    parts: list[Part] = []
    for path, slot in record.get("parts", {}).items():
        keys = (*place, *slot.get("config", ()))
        part_name = _part_class(slot, _at(config, keys))
        part = None if part_name is None else _architecture(part_name, config, keys)
        if part is None:
            return None
        inner[path] = part
        disk = slot.get("disk", f"{path}.")
        parts.append(Part(path, part.name, part.model_type, keys, disk))
        parts += [p._replace(path=f"{path}.{p.path}", disk=disk + p.disk) for p in part.parts]
    disk_names = {
        f"{path}.{run_time}": tuple(p.disk + n for n in part.disk_patterns(run_time))
        for p in parts
        if (path := p.path) in inner and (part := inner[path])
        for run_time in _named(part)
    }
    disk_names |= {run_time: tuple(names) for run_time, names in record.get("disk", {}).items()}
    moved = [
        replace(t, name=f"{p}.{t.name}", source=f"{p}.{t.source}")
        for p, part in inner.items()
        for t in part.ties
    ]
    ties = {(t.name, t.source): t for t in moved}
    for pattern, tied_to, *stated in record.get("ties", ()):
        keys = tuple((*place, *key, TIE_KEY) for key, _ in stated)
        tied = not stated or any(
            _flag(config, key, bool(d)) for key, (_, d) in zip(keys, stated, strict=True)
        )
        rules = table()["tie_rules"]
        if record["type"] in rules["of_text"]:
            text = _at(config, (*place, "text_config"))
            text_type = text.get("model_type") if isinstance(text, Mapping) else None
            keys = (*keys, (*place, "text_config", TIE_KEY))
            tied = tied or _flag(config, keys[-1], text_type in rules["default"])
        if record["type"] in rules["always"]:
            keys, tied = (), True
        elif record["type"] in rules["not_alone"]:
            keys = ()
        ties[pattern, tied_to] = Tie(pattern, tied_to, keys, tied)

    def nested(facts: str) -> dict[str, Any]:
        return {
            f"{path}.{n}": fact
            for path, a in inner.items()
            for n, fact in getattr(a, facts).items()
        }

    def named(facts: str) -> set[str]:
        return {f"{path}.{n}" for path, a in inner.items() for n in getattr(a, facts)}

    may_miss = [*record.get("may_miss", ()), *(n for a in inner.values() for n in a.may_be_missing)]
    return Architecture(
        name=name,
        model_type=record["type"],
        base_prefix=record.get("prefix", ""),
        vocabulary=nested("vocabulary")
        | {n: (*place, *keys) for n, keys in record.get("vocabulary", {}).items()},
        ties=tuple(ties.values()),
        input_embedding=_embedding(record.get("input"), "input_embedding", inner),
        output_embedding=_embedding(record.get("output"), "output_embedding", inner),
        expert_stacks=nested("expert_stacks") | record.get("stacks", {}),
        disk_names={
            run_time: names for run_time, names in disk_names.items() if names != (run_time,)
        },
        may_be_missing=tuple(dict.fromkeys(may_miss)),
        parts=tuple(parts),
        **{
            facts: frozenset(named(facts)).union(record.get(key, ()))
            for facts, key in GATHERED.items()
        },
    )


GATHERED = {
    "tensors": "tensors",
    "embeddings": "embeddings",
    "conv1d": "transposed",
    "matrices": "matrices",
    "saved_buffers": "buffers",
    "unsaved": "unsaved",
}
"""Sets of names that a class has in addition to its inner models': attributes of `Architecture`, and keys of the records."""


def _part_class(slot: Mapping[str, Any], config: Any) -> str | None:
    """Return the class of a part: the class that the outer class builds, or for an auto class the one for the nested config's type."""
    name: str = slot["class"]
    model_type = config.get("model_type") if isinstance(config, Mapping) else None
    record = record_of(name)
    if model_type is None or "auto" not in slot or record is None or record["type"] == model_type:
        return name
    class_name: str | None = table()["auto"][slot["auto"]].get(model_type)
    return class_name


def _at(config: Any, keys: Iterable[str]) -> Any:
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _flag(config: Mapping[str, Any], keys: tuple[str, ...], default: bool) -> bool:
    value = _at(config, keys)
    return default if value is None else bool(value)


def _named(part: Architecture) -> set[str]:
    """Return the part's names for which the table knows the names on disk."""
    modules = {
        *part.embeddings,
        *part.conv1d,
        *filter(None, (part.input_embedding, part.output_embedding)),
    }
    tied = {name for tie in part.ties for name in (tie.name, tie.source)}
    weights = {f"{module}.weight" for module in modules}
    return (
        weights
        | tied
        | part.disk_names.keys()
        | part.expert_stacks.keys()
        | part.matrices
        | part.saved_buffers
    )


def _embedding(path: str | None, kind: str, inner: Mapping[str, Architecture]) -> str | None:
    """Return a module's path; ``@part`` refers to the part's own module."""
    if path is None or not path.startswith("@"):
        return path
    module = getattr(inner[path[1:]], kind)
    return None if module is None else f"{path[1:]}.{module}"
