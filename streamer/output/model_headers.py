"""Describe a model's files by their headers, as transformers loads them for the class that their config names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from streamer.plan.architectures import Architecture, architectures_for
from streamer.plan.transformers_renames import renames_for
from streamer.weights.model_config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Headers:
    """Tensors of a model's files, and the config beside them.

    Attributes
    ----------
    shapes
        Shapes by name on disk.
    config
        The config in ``config.json``, with the user's class if that names no known one.
    contents
        Tensors whose bytes are not the base's of that name → a key that equal bytes share.
    """

    shapes: Mapping[str, Shape]
    config: ModelConfig
    contents: Mapping[str, Hashable]

    @classmethod
    def of(cls, shapes: Mapping[str, Shape], config: ModelConfig, contents: Mapping[str, Hashable]) -> Headers:
        """Describe files; the class that the config names has priority over the user's."""
        stated = replace(config, architecture=None)
        return cls(shapes, stated if len(architectures_for(stated)) == 1 else config, contents)

    @cached_property
    def architecture(self) -> Architecture | None:
        """Look up the model's class; None if the config or the table does not determine it."""
        found = architectures_for(self.config)
        return found[0] if len(found) == 1 else None

    @cached_property
    def run_time(self) -> dict[str, tuple[str, int, int | None]]:
        """Map each tensor → its name in the loaded model; if loading builds that from several tensors, also its place among them."""
        return {
            tensor: (name if by else in_class(name, self.architecture), source if by else -1, number)
            for tensor, name, by, source, number in renames_for(self.config).loaded(self.shapes)
        }

    @cached_property
    def loaded(self) -> dict[str, list[str]]:
        """Map each name in the loaded model → the tensors from which it is loaded."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        for tensor, (name, _, _) in self.run_time.items():
            found[name].append(tensor)
        return dict(found)

    def tensors_of(self, name: str) -> list[str]:
        """List the tensors from which a name in the loaded model is loaded: by renames, else by the table's names on disk."""
        if name in self.loaded or self.architecture is None:
            return self.loaded.get(name, [])
        return [tensor for tensor in self.architecture.disk_patterns(name) if tensor in self.shapes]

    def stated(self, keys: tuple[str, ...]) -> int | None:
        """Return a number in the config; None if it is not stated."""
        value: Any = self.config.values
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value if type(value) is int else None

    @property
    def labels(self) -> int | None:
        """Return the number of labels in the config; None if it is not stated."""
        names = self.config.values.get("id2label")
        return len(names) if isinstance(names, Mapping) else self.stated(("num_labels",))


def in_class(name: str, architecture: Architecture | None) -> str:
    """Add or remove the base model's prefix of a run-time name to match its class, as loaders do."""
    if architecture is None or not architecture.base_prefix:
        return name
    base = f"{architecture.base_prefix}."
    bare = name.removeprefix(base)
    if bare != name and architecture.has_tensor(bare):
        return bare
    return base + name if architecture.has_tensor(base + name) and not architecture.has_tensor(name) else name
