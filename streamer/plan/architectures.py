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
from typing import Any, NamedTuple, TypeVar

from streamer.errors import UsageError
from streamer.weights.model_config import ModelConfig

T = TypeVar("T")

TensorNames = tuple[str, ...]

Patterns = frozenset[str]

KeyPath = tuple[str, ...]
KeyPaths = tuple[KeyPath, ...]
"""Keys that lead to values in a config."""


@cache
def architecture_table() -> dict[str, Any]:
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
    line = architecture_table()["classes"].get(name)
    return None if line is None else dict(json.loads(architecture_table()["lines"][line]))


@cache
def conv1d_names() -> frozenset[str]:
    """List the last names of modules that some class stores (in, out), such as ``c_proj``: in an unknown class they may be either way."""
    records = filter(None, map(record_of, architecture_table()["classes"]))
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
    keys: KeyPaths
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
    config: KeyPath
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
    tensors: Patterns
    vocabulary: Mapping[str, KeyPath]
    ties: tuple[Tie, ...]
    input_embedding: str | None
    output_embedding: str | None
    embeddings: Patterns
    conv1d: Patterns
    expert_stacks: Mapping[str, str]
    matrices: Patterns
    saved_buffers: Patterns
    disk_names: Mapping[str, TensorNames]
    may_be_missing: TensorNames
    unsaved: Patterns
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

    def vocabulary_keys(self, parameter: str) -> KeyPath | None:
        """Return the config keys that state the number of rows of a tensor with a row for each token; None for any other tensor."""
        return self._fact(parameter, self.vocabulary)

    def stack_orientation(self, parameter: str) -> str:
        """Return the orientation of each matrix in a stack of experts, ``out,in`` or ``in,out``; empty if the table does not say."""
        return self._fact(parameter, self.expert_stacks) or ""

    def disk_patterns(self, name: str) -> TensorNames:
        """Return the patterns on disk of a tensor that the table names."""
        return self.disk_names.get(pattern := pattern_of(name), (pattern,))

    def _among(self, name: str, patterns: Patterns) -> bool:
        return not patterns.isdisjoint(self.spellings(pattern_of(name)))

    def _fact(self, name: str, facts: Mapping[str, T]) -> T | None:
        return next((facts[p] for p in self.spellings(pattern_of(name)) if p in facts), None)

    def spellings(self, name: str) -> TensorNames:
        """Return the names under which the table or a file may have a tensor or module."""
        return spellings(name, self.base_prefix)


def spellings(name: str, base_prefix: str) -> TensorNames:
    """Return a name as it is, without the base's prefix, and with it."""
    prefix = f"{base_prefix}."
    return name, name.removeprefix(prefix), prefix + name


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
    of_type = classes_of(config.model_type)
    named = name or config.architecture
    cls = named or next(iter(config.architectures or (of_type if len(of_type) == 1 else ())), None)
    values = dict(config.values)
    if named is not None and not of_type:
        values.pop("model_type", None)  # of an unknown type
    if not isinstance(cls, str) or (values.get("model_type") is not None and cls not in of_type):
        return None
    return _architecture(cls, values, ())


def architectures_for(config: ModelConfig) -> tuple[Architecture, ...]:
    """List the facts about the model with this config; empty if it is not known.

    If the config names no class, or a class of another library without its own code (``auto_map``), list every class of its type.
    """
    of_type = classes_of(config.model_type)
    stated = config.architectures
    elsewhere = of_type and stated and stated[0] not in of_type
    unnamed = not stated or (elsewhere and "auto_map" not in config.values)
    names: Iterable[str | None] = of_type if unnamed and config.architecture is None else [None]
    known = [architecture_for(config, name) for name in names]
    return () if None in known else tuple(filter(None, known))


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
        of_type = classes_of(config.model_type)
        near = get_close_matches(name, of_type or architecture_table()["classes"], 3, 0.4)
        whose = (
            f"of model_type {config.model_type!r}"
            if of_type
            else f"of {architecture_table()['source']}"
        )
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise UsageError(f"architecture: expected a class {whose}, found {name!r}{hint}")
    return replace(config, architecture=name)


def classes_of(model_type: str | None) -> TensorNames:
    """Return the classes that a config of this type can have; empty if the table has none."""
    # The table has classes of no type.
    return tuple(architecture_table()["types"].get(model_type, ())) if model_type else ()


def _architecture(name: str, config: Mapping[str, Any], place: KeyPath) -> Architecture | None:
    """Return the facts about a class whose own config is at `place`."""
    record = record_of(name)
    if record is None:
        return None
    inner = {}
    parts = []
    disk_names = {}
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
        for run_time in _named(part):
            names = tuple(disk + name for name in part.disk_patterns(run_time))
            disk_names[f"{path}.{run_time}"] = names
    disk_names |= {run_time: tuple(names) for run_time, names in record.get("disk", {}).items()}

    def gathered(facts: str) -> dict[str, Any]:
        """Collect facts of the inner models by the names of this one; sets give values of None."""
        found: dict[str, Any] = {}
        for path, part in inner.items():
            of_part = getattr(part, facts)
            values = of_part if isinstance(of_part, Mapping) else dict.fromkeys(of_part)
            found |= {f"{path}.{name}": fact for name, fact in values.items()}
        return found

    may_miss = [*record.get("may_miss", ()), *(n for a in inner.values() for n in a.may_be_missing)]
    vocabulary = {name: (*place, *keys) for name, keys in record.get("vocabulary", {}).items()}
    return Architecture(
        name=name,
        model_type=record["type"],
        base_prefix=record.get("prefix", ""),
        vocabulary=gathered("vocabulary") | vocabulary,
        ties=_ties(record, config, place, inner),
        input_embedding=_embedding(record.get("input"), "input_embedding", inner),
        output_embedding=_embedding(record.get("output"), "output_embedding", inner),
        expert_stacks=gathered("expert_stacks") | record.get("stacks", {}),
        disk_names={name: names for name, names in disk_names.items() if names != (name,)},
        may_be_missing=tuple(dict.fromkeys(may_miss)),
        parts=tuple(parts),
        **{
            facts: frozenset(gathered(facts)).union(record.get(key, ()))
            for facts, key in GATHERED.items()
        },
    )


def _ties(
    record: Mapping[str, Any],
    config: Mapping[str, Any],
    place: KeyPath,
    inner: Mapping[str, Architecture],
) -> tuple[Tie, ...]:
    """Collect the ties of the inner models and a class's own, which replace those of the same names."""
    ties = {}
    for path, part in inner.items():
        for tie in part.ties:
            moved = replace(tie, name=f"{path}.{tie.name}", source=f"{path}.{tie.source}")
            ties[moved.name, moved.source] = moved
    rules = architecture_table()["tie_rules"]
    model_type = record["type"]
    for pattern, tied_to, *stated in record.get("ties", ()):
        defaults = {(*place, *key, TIE_KEY): bool(default) for key, default in stated}
        if model_type in rules["of_text"]:
            text_type = _at(config, (*place, "text_config", "model_type"))
            defaults[*place, "text_config", TIE_KEY] = text_type in rules["default"]
        tied = not stated or any(_flag(config, key, default) for key, default in defaults.items())
        always = model_type in rules["always"]
        keys = () if always or model_type in rules["not_alone"] else tuple(defaults)
        ties[pattern, tied_to] = Tie(pattern, tied_to, keys, always or tied)
    return tuple(ties.values())


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
    class_name: str | None = architecture_table()["auto"][slot["auto"]].get(model_type)
    return class_name


def _at(config: Any, keys: Iterable[str]) -> Any:
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _flag(config: Mapping[str, Any], keys: KeyPath, default: bool) -> bool:
    value = _at(config, keys)
    return default if value is None else bool(value)


def _named(part: Architecture) -> set[str]:
    """Return the part's names for which the table knows the names on disk."""
    embeddings = filter(None, (part.input_embedding, part.output_embedding))
    modules = {*part.embeddings, *part.conv1d, *embeddings}
    return {
        *(f"{module}.weight" for module in modules),
        *(name for tie in part.ties for name in (tie.name, tie.source)),
        *part.disk_names,
        *part.expert_stacks,
        *part.matrices,
        *part.saved_buffers,
    }


def _embedding(path: str | None, kind: str, inner: Mapping[str, Architecture]) -> str | None:
    """Return a module's path; ``@part`` refers to the part's own module."""
    if path is None or not path.startswith("@"):
        return path
    module = getattr(inner[path[1:]], kind)
    return None if module is None else f"{path[1:]}.{module}"
