"""Compare what an adapter's config announces with the tensors in its file.

PEFT loads a partly saved adapter and fills the gaps with values that nobody trained. Only the adapter can supply the tensors of
``modules_to_save`` and ``trainable_token_indices``, and the biases of ``lora_bias`` for layers that have one, so an adapter without them
is refused. Biases of ``bias="all"`` and modules of ``target_modules`` may be missing on purpose, so the base's values are kept, with a
warning. Factors that the config does not target are applied, with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.adapter_config import CONFIG_NAME
from streamer.errors import FormatError
from streamer.plan.architectures import Architecture, architecture_for
from streamer.plan.carried_tensors import TensorEdits
from streamer.plan.task_heads import LABEL_TASKS, auto_class
from streamer.plan.transformers_renames import Renames
from streamer.units import listed
from streamer.weights.model_config import ModelConfig


class Announced:
    """Comparison of what an adapter's config announces about a base with what its file contains.

    Parameters
    ----------
    names
        All names of the base's tensors, including names of tied tensors, in the order of messages.
    edits
        Edits that the adapter's other tensors make.
    biased
        Modules whose layers have a bias in the base.
    """

    def __init__(self, adapter: DeltaSource, names: Collection[str], renames: Renames, config: ModelConfig,
                 architecture: Architecture | None, edits: TensorEdits, biased: Collection[str]) -> None:  # fmt: skip
        self._adapter, self._config, self._renames, self._biased = adapter, config, renames, biased
        self._brought = edits.sources.keys()
        self._saved = {c.name for c in adapter.carried if c.role == "saved"}
        known = architecture.has_tensor if architecture is not None else lambda name: False
        # A file may hold more than the model loads, such as a mask that earlier versions called ``attn.bias``.
        self._tensors = {
            tensor: now
            for tensor, now in renames.at_run_time(names).items()
            if (known(now) or f"{tensor.removesuffix('bias')}weight" in names or tensor.endswith(".weight"))
            and not _is_behind(now, config)
        }

    def check(self) -> tuple[str, ...]:
        """Return notes on announced tensors that the file lacks and the base has.

        Raises
        ------
        FormatError
            If the file lacks tensors that only the adapter can supply; the message names all of them.
        """
        missing = [*self._saved_modules(), *self._tokens(), *self._lora_biases()]
        if missing:
            raise FormatError(
                f"{self._adapter.file.path}: lacks tensors that {CONFIG_NAME} announces: {listed(missing, separator='; ')}; save the "
                "adapter again with PEFT's save_pretrained"
            )
        return (*self._biases(), *self._targets(), *self._untargeted())

    def _biases(self) -> Iterator[str]:
        """Note missing biases that ``bias`` announces: all, or those of the adapter's modules."""
        stated = self._adapter.config.get("bias")
        biases = [t for t in self._tensors if t.endswith(".bias") and stated in ("all", "lora_only")]
        if stated == "lora_only":  # of these, PEFT before 0.21 saved none
            adapted = {
                t.removesuffix("weight") for t, now in self._tensors.items() if not self._known.isdisjoint((t, now))
            }
            biases = [t for t in biases if t.removesuffix("bias") in adapted]
        if missing := [t for t in biases if not self._brings(t)]:
            yield (
                f"the adapter's bias is {stated!r}, but its file lacks {len(missing)} of the base's {len(biases)} biases, {missing[0]!r} "
                "first: the base's values are kept"
            )

    @cached_property
    def _known(self) -> set[str]:
        """Return the names of the weights of the adapter's modules, in its version of the class and in this one."""
        adapter = self._adapter
        given = [
            f"{module}.weight" for module in (*adapter.modules, *(name for w in adapter.wrapped for name in w.layers))
        ]
        return {*given, *self._renames.at_run_time(given).values()}

    def _targets(self) -> Iterator[str]:
        """Note missing modules that ``target_modules`` names by their full paths."""
        adapter, config = self._adapter, self._adapter.config
        if config.get("exclude_modules") or config.get("layers_to_transform"):
            return
        pairs = {name: pair for pair in self._tensors.items() for name in pair}
        named = [m for m in config.strings("target_modules") if f"{m}.weight" in pairs and not adapter.trains(m)]
        missing = [m for m in named if self._known.isdisjoint(pairs[f"{m}.weight"])]
        # In a base without its class's prefix, a part of a path looks like a whole one.
        if missing := [m for m in missing if not any(name.endswith(f".{m}.weight") for name in self._known)]:
            one = len(missing) == 1
            yield (
                f"the adapter's target_modules names {listed(map(repr, missing))}, but its file has no factors of "
                f"{'it' if one else 'them'}: the base's values are kept"
            )

    def _untargeted(self) -> Iterator[str]:
        """Note modules with factors that the config does not target; PEFT ignores them."""
        config = self._adapter.config
        named = {*config.strings("target_modules")}
        if not named or config.get("target_parameters") or config.get("ensure_weight_tying"):
            return
        excluded = tuple(f".{module}" for module in config.strings("exclude_modules"))
        stated = config.get("layers_to_transform")
        layers = {str(layer) for layer in (stated if isinstance(stated, list) else [stated]) if layer is not None}
        now = self._renames.at_run_time([f"{name}.weight" for name in self._adapter.modules])
        ignored = []
        for name in self._adapter.modules:
            names = {name, now.get(f"{name}.weight", name).removesuffix(".weight")}
            elsewhere = layers and layers.isdisjoint(name.split(".")) and names.isdisjoint(named)
            unnamed = not any(f".{n}".endswith(f".{target}") for n in names for target in named)
            if unnamed or elsewhere or f".{name}".endswith(excluded):
                ignored.append(name)
        if ignored:
            yield (
                f"the adapter's file has factors of {listed(map(repr, ignored))}, but its config does not target "
                f"{'it' if len(ignored) == 1 else 'them'} (target_modules, exclude_modules, layers_to_transform): PEFT ignores these, "
                "streamer applies them; correct the config, or remove the factors"
            )

    def _brings(self, tensor: str) -> bool:
        return tensor in self._brought or self._tensors[tensor] in self._saved

    def _saved_modules(self) -> Iterator[str]:
        """Report the entries of modules_to_save whose module the model has, but some of whose tensors the file lacks.

        PEFT adds the names of common heads for a task, and the model has only one of them: an entry alone announces nothing.
        """
        for entry in self._adapter.config.strings("modules_to_save"):
            missing = [t for t, now in self._tensors.items() if _is_below(now, entry) and not self._brings(t)]
            if not missing and not any(_is_below(name, entry) for name in self._tensors.values()):
                missing = self._missing_of_head(entry)
            if missing:
                yield f"modules_to_save names {entry!r}, but {_missing(missing)}"

    def _missing_of_head(self, entry: str) -> list[str]:
        """List the missing tensors of a head that the base does not have: PEFT's loader needs every one.

        A class may have a head in one of two forms: LayoutLMv3 has a ``classifier`` or a ``classifier.dense``, depending on the number of
        labels. So a module counts as present if the file has tensors of a module inside it or around it.
        """
        there = {name.rpartition(".")[0] for name in self._saved if _is_below(name, entry)}
        lacking = [name for name in self._task_head() if _is_below(name, entry) and name not in self._saved]
        return [name for name in lacking if not any(_is_nested(name.rpartition(".")[0], module) for module in there)]

    def _task_head(self) -> list[str]:
        """List the tensors outside layers of the class for the adapter's task."""
        task = self._adapter.config.get("task_type")
        cls = auto_class(self._config.model_type, task) if task in LABEL_TASKS else None
        architecture = None if cls is None else architecture_for(self._config, cls)
        return [] if architecture is None else sorted(name for name in architecture.tensors if "*" not in name)

    def _tokens(self) -> Iterator[str]:
        stated = self._adapter.config.get("trainable_token_indices")
        found = {c.module: list(c.indices) for c in self._adapter.carried if c.role == "tokens"}
        if isinstance(stated, list) and stated and not found:
            yield f"the rows of its {len(stated)} trainable_token_indices are missing"
        for key, rows in stated.items() if isinstance(stated, dict) else ():
            # PEFT saves only one of several tied modules with the same rows.
            if rows and not any(f".{module}".endswith(f".{key}") or found[module] == rows for module in found):
                yield f"trainable_token_indices names {key!r}, but its rows are missing"

    def _lora_biases(self) -> Iterator[str]:
        if not self._adapter.config.get("lora_bias"):
            return
        found = {c.module for c in self._adapter.carried if c.role == "lora_bias"}
        # Some programs write biases only for layers that have one; PEFT takes missing ones as zero.
        if missing := [f"{name}.lora_B.bias" for name in self._biased if name not in found]:
            yield f"lora_bias is true, but {_missing(missing)}"


def _is_behind(name: str, config: ModelConfig) -> bool:
    """Test whether a tensor belongs to a layer after the last that the config counts (multi-token prediction): no class loads it."""
    layers, found = config.values.get("num_hidden_layers"), re.match(r"(?:model\.)?layers\.(\d+)\.", name)
    return found is not None and type(layers) is int and int(found[1]) >= layers


def _missing(names: Sequence[str]) -> str:
    return f"{listed(map(repr, names), 1)} {'is' if len(names) == 1 else 'are'} missing"


def _is_below(tensor: str, entry: str) -> bool:
    """Test whether a tensor is in a module that an entry of modules_to_save names by the end of its path, as PEFT matches it."""
    steps = tensor.split(".")[:-1]
    return any(".".join(steps[:i]).endswith(entry) for i in range(1, len(steps) + 1))


def _is_nested(a: str, b: str) -> bool:
    """Test whether one of two modules is inside the other."""
    return a.startswith(f"{b}.") or b.startswith(f"{a}.")
