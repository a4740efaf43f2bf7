"""Check a planned adapter, from its header and config alone, against the modules that PEFT will look for in the base's class.

``base_model.model.lm_head.lora_A.weight`` planned for a ``WhisperForConditionalGeneration``, whose head is ``proj_out`` →
`UnloadableError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamer.adapters.adapter_config import AdapterConfig
from streamer.adapters.tensor_names import normalize
from streamer.output.job import Job
from streamer.output.loadability import refuse
from streamer.output.model_headers import Headers, Shape
from streamer.plan.architectures import Architecture, pattern_of
from streamer.plan.plan import Plan
from streamer.storage.shard_writer import ShardPlan

PREFIX = "base_model.model."

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.weight)?$")


def check_lora(where: object, job: Job, shard: ShardPlan, config: bytes) -> None:
    """Check that PEFT finds the modules of a LoRA adapter and that its tensors fit them.

    Parameters
    ----------
    where
        The output, for messages.
    config
        The adapter's config, as it will be written.

    Raises
    ------
    UnloadableError
        If modules, shapes and config do not match.
    """
    plan = job.plan
    shapes = {name: plan.base.info(name).shape if name in plan.base.weight_map and name not in plan.weights.quantized_names
              else plan.weights[name].shape for name in plan.weights.stored}  # fmt: skip
    shapes_read = {info.name: info.shape for info in shard.header.tensors}
    faults = list(_Check(shapes_read, json.loads(config), _Class.of(plan, shapes)).faults())
    refuse(where, "PEFT would not load the adapter", faults, "`streamer merge` writes the mitigated model")


@dataclass(frozen=True)
class _Class:
    """Modules of the base's class.

    Attributes
    ----------
    weights
        Run-time name of a module's weight → its shape in the base.
    architecture
        None if the class is not known.
    own
        Names of modules and tensors in the original adapter, which PEFT found.
    """

    weights: Mapping[str, Shape]
    architecture: Architecture | None
    own: frozenset[str]

    @classmethod
    def of(cls, plan: Plan, shapes: Mapping[str, Shape]) -> _Class:
        headers = Headers.of(shapes, plan.config, {})
        adapter = plan.adapter
        own = {*adapter.modules, *map(normalize, adapter.tensors)} if not adapter.describes_model else set()
        weights = {name: shapes[tensors[0]] for name, tensors in headers.loaded.items()}
        return cls(weights, headers.architecture, frozenset(own))

    def has(self, name: str) -> bool:
        """Test whether the model has a tensor of this name."""
        architecture, pattern = self.architecture, pattern_of(name)
        known = architecture is not None and "*" not in pattern and pattern in architecture.tensors
        return known or name in self.weights


@dataclass(frozen=True)
class _Check:
    """Search for faults of a planned LoRA adapter; each is described in one line."""

    shapes: Mapping[str, Shape]
    config: Mapping[str, Any]
    model: _Class

    def faults(self) -> Iterator[str]:
        """Yield a description of each fault, with names."""
        factors: dict[str, dict[str, tuple[bool, Shape]]] = {}
        others: list[str] = []
        for tensor, shape in self.shapes.items():
            name = tensor.removeprefix(PREFIX)
            if name == tensor:
                yield f"{tensor!r} does not begin with {PREFIX!r}"
            elif found := _FACTOR.match(name):
                factors.setdefault(found["module"], {})[found["factor"]] = bool(found["embedding"]), shape
            else:
                others.append(name)
        for module, pair in factors.items():
            yield from self._module(module, pair)
            if entry := self._entry(module):
                yield f"{module!r} has factors, and modules_to_save names it by {entry!r}"
        for name in others:
            yield from self._saved(name, factors)

    def _module(self, module: str, pair: Mapping[str, tuple[bool, Shape]]) -> Iterator[str]:
        rank = AdapterConfig(self.config, Path()).number("rank_pattern", "r", module)
        targets = self.config.get("target_modules") or []
        if pair.keys() != {"A", "B"} or pair["A"][0] != pair["B"][0]:
            yield f"{module!r} does not have two factors"
            return
        (is_embedding, a), (_, b) = pair["A"], pair["B"]
        if a[0] != rank or b[1] != rank:
            yield f"{module!r} has factors of shapes {list(a)} and {list(b)}, and the config says rank {rank:g}"
        if not any(module == target or module.endswith(f".{target}") for target in targets):
            yield f"{module!r} is named by no target_modules"
        if module not in self.model.own and not self.model.has(f"{module}.weight"):
            yield f"{module!r} is no module of the class"
        stored, architecture = self.model.weights.get(f"{module}.weight"), self.model.architecture
        if stored is None or architecture is None:
            return
        if is_embedding != architecture.is_embedding(module):
            yield f"{module!r} has the factors of {'an' if is_embedding else 'no'} embedding"
        wanted = stored if is_embedding or not architecture.transposed(module) else stored[::-1]
        if is_embedding:
            wanted = wanted[::-1]
        grown = f"{module}.weight" in architecture.vocabulary
        if (b[0], *a[1:]) != (wanted[0], *wanted[1:]) and not grown:
            yield f"{module!r} has factors of shapes {list(a)} and {list(b)}, which do not fit {list(stored)}"

    def _saved(self, name: str, factors: Mapping[str, object]) -> Iterator[str]:
        if name in self.model.own:
            return
        module, _, parameter = name.rpartition(".")
        inner = module.removesuffix(".base_layer")
        if inner != module:
            if inner not in factors:
                yield f"{name!r} is in a module without factors"
            name = f"{inner}.{parameter}"
        elif not self._is_saved(module) and not (parameter == "bias" and self.config.get("bias") == "all"):
            yield f"{name!r} is in a module that no modules_to_save names"
        weight = f"{module}.weight"
        if not self.model.has(name):
            yield f"{name!r} is no tensor of the class"
        elif self._entry(module) and self.model.has(weight) and PREFIX + weight not in self.shapes:
            yield f"{name!r} is in a module that modules_to_save names, without its weight"

    def _is_saved(self, module: str) -> bool:
        steps = module.split(".")
        return any(self._entry(".".join(steps[:i])) for i in range(1, len(steps) + 1))

    def _entry(self, module: str) -> str:
        """Return the entry of modules_to_save that names a module, by the end of its path as PEFT does; empty if none does."""
        return next((entry for entry in self.config.get("modules_to_save") or [] if module.endswith(entry)), "")
