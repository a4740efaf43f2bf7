"""Check a planned model, from headers alone, against what transformers loads for the class that its config names.

Before the first byte is written, the planned names, shapes and ties are compared with the table of architectures and with the base: every
tensor of the base exists, new tensors belong to the class, every run-time name belongs to one tensor, and the config states which names
are tied. Faults of the base itself are accepted.

``lm_head.weight`` planned for a ``WhisperForConditionalGeneration``, whose head is ``proj_out`` → `UnloadableError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from streamer.errors import UnloadableError
from streamer.output.job import Job
from streamer.output.merge_plan import MergedModel
from streamer.output.merged_tensors import CopyBytes
from streamer.output.model_headers import Headers, Shape, in_class
from streamer.plan.architectures import Architecture, Tie, pattern_of
from streamer.units import listed
from streamer.weights.base import StoredTensor
from streamer.weights.dequantize import is_activation_scale
from streamer.weights.logical import WeightView
from streamer.weights.model_config import MODEL_CONFIG, read_model_config


def check_merged(where: object, job: Job, model: MergedModel) -> None:
    """Check that a planned merged model loads as its config says.

    Parameters
    ----------
    where
        The output, for messages.

    Raises
    ------
    UnloadableError
        If names, shapes or ties do not fit the class.
    """
    plan, base = job.plan, job.plan.base
    shapes = {info.name: info.shape for shard in model.shards().values() for info in shard.header.tensors}
    tuned = plan.adapter.describes_model
    # A fine-tuned model has its base's class, and its own config is copied.
    given = read_model_config(plan.adapter.path) if tuned else plan.config
    given = config = replace(given, architecture=plan.config.architecture)
    if MODEL_CONFIG in model.texts:
        config = replace(given, values=json.loads(model.texts[MODEL_CONFIG]))
    contents: dict[str, Hashable] = {}
    for name, recipe in ((o.name, o.recipe) for outputs in model.files.values() for o in outputs):
        if not isinstance(recipe, CopyBytes):
            contents[name] = name
        elif name not in base.weight_map or recipe.stored != StoredTensor(*base.locate(name)):
            contents[name] = str(recipe.stored.file.path), recipe.stored.info.name
    check_loadable(
        where,
        Headers.of(shapes, config, contents),
        Headers.of({name: base.info(name).shape for name in base.weight_map}, given, {}),
        plan.weights,
        plan.adapter.tensors.__contains__ if tuned else lambda name: plan.adapter.trains(name.rpartition(".")[0]),
        {record["tensor"]: record["change"] for record in plan.edits.listed(base, False)},
    )


def check_loadable(where: object, written: Headers, base: Headers, weights: WeightView, brings: Callable[[str], bool],
                   changes: Mapping[str, str]) -> None:  # fmt: skip
    """Check a model's headers and config against its class and its base.

    Parameters
    ----------
    weights
        The base's logical weights.
    brings
        Tests whether the adapter trained a whole tensor of this name: a head may belong to no class.
    changes
        Tensor → ``new``, ``dropped`` and so on, by the output's record; for models of an unknown class.

    Raises
    ------
    UnloadableError
        If names, shapes or ties do not fit the class.
    """
    check = _Check(written, base, weights, brings, changes)
    cls = "the model" if written.architecture is None else written.architecture.name
    refuse(where, f"{cls} would not load", list(check.faults()), "PEFT's merge_and_unload writes the merged model too")


def refuse(where: object, what: str, faults: Sequence[str], instead: str) -> None:
    """Raise `UnloadableError` with the first fault, if there are any."""
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UnloadableError(
            f"{where}: as planned, {what}: {faults[0]}{more}; this is an error of streamer: nothing was written and the inputs are "
            f"unchanged; please report it with the command; {instead}"
        )


@dataclass(frozen=True)
class _Check:
    """Search for faults of a planned model; each is described in one line."""

    written: Headers
    base: Headers
    weights: WeightView
    brings: Callable[[str], bool]
    changes: Mapping[str, str]

    def faults(self) -> Iterator[str]:
        """Yield a description of each fault, with names."""
        yield from self._collisions()
        yield from self._unexpected()
        yield from self._missing()
        yield from self._shapes()
        yield from self._companions()
        if self.written.architecture is not None:
            yield from self._ties(self.written.architecture)
            yield from self._head(self.written.architecture)

    @cached_property
    def _known(self) -> set[str]:
        """Return the names in the base: of tensors, and of weights that may be written plain."""
        return {*self.base.shapes, *self.weights.stored}

    def _collisions(self) -> Iterator[str]:
        first: dict[tuple[str, int, int | None], str] = {}
        for tensor, key in self.written.run_time.items():
            other = first.setdefault(key, tensor)
            if other != tensor and not {tensor, other} <= self.base.shapes.keys():
                yield f"{other!r} and {tensor!r} are both loaded as {key[0]!r}"

    def _unexpected(self) -> Iterator[str]:
        architecture = self.written.architecture
        for tensor in sorted(self.written.shapes.keys() - self._known):
            name = self.written.run_time[tensor][0]
            if architecture is None:
                if self.changes.get(tensor) != "new":
                    yield f"{tensor!r} is new, and no change adds it"
            elif not architecture.has_tensor(name):
                # A head of the user's own, trained beside the class's modules.
                module = f"{pattern_of(name).rpartition('.')[0]}."
                if not self.brings(tensor) or any(known.startswith(module) for known in architecture.tensors):
                    yield f"{tensor!r} is no tensor of the class"
            elif not self._has_layer(name):
                yield f"{tensor!r} is in a layer that the base does not have"

    def _has_layer(self, name: str) -> bool:
        """Test whether the base has the numbered module of a name, or no module like it."""
        layer = _layer_of(name)
        return not layer or layer in self._layers or pattern_of(layer) not in {pattern_of(n) for n in self._layers}

    @cached_property
    def _layers(self) -> set[str]:
        return {_layer_of(name) for name in self.base.loaded}

    def _missing(self) -> Iterator[str]:
        architecture = self.written.architecture
        there = {self.written.run_time[tensor] for tensor in self.written.shapes}
        for tensor in sorted(self.base.shapes.keys() - self.written.shapes.keys() - self.weights.owners.keys()):
            name, *place = self.base.run_time[tensor]
            name = in_class(name, architecture)
            if (name, *place) in there or is_activation_scale(tensor, self.weights):
                continue
            if architecture is None:
                spare = self.changes.get(tensor) == "dropped"
            else:
                spare = pattern_of(name) in architecture.unsaved or any(
                    re.search(p, n) for p in architecture.may_be_missing for n in (name, tensor)
                )
                spare = spare or any(other in self.written.loaded for other in _tied_to(name, architecture))
            if not spare:
                yield f"{tensor!r} of the base is missing"

    def _shapes(self) -> Iterator[str]:
        for tensor, shape in self.written.shapes.items():
            name = self.written.run_time[tensor][0]
            before = self._shape_before(tensor)
            stated = self._stated_size(name, shape, before)
            if before is not None and shape != before:
                sizes = [s for s, b in zip(shape, before, strict=False) if s != b]
                if len(shape) != len(before) or sizes != [stated]:
                    wanted = "" if stated is None else f" or {stated} rows"
                    yield f"{tensor!r} has shape {list(shape)}, wanted the base's {list(before)}{wanted}"
            elif stated is not None and stated not in shape and not self._stated_before(name, before):
                yield f"{tensor!r} has shape {list(shape)}, and the config says {stated}"

    def _shape_before(self, tensor: str) -> Shape | None:
        """Return the shape of the base's tensor, or of the logical weight if a quantized one is written plain."""
        if tensor in self._quantized and self._plain:
            return self.weights[tensor].shape
        return self.base.shapes.get(tensor)

    def _stated_size(self, name: str, shape: Shape, before: Shape | None) -> int | None:
        """Return a tensor's number of tokens or labels by the written config; None if it has none, or none is stated.

        Without a config, the caller of the loader states them: as many tokens as the embedding has rows, and any number of labels.
        """
        written, pattern = self.written, pattern_of(name)
        if (architecture := written.architecture) is None:
            return written.config.vocab_size if before and self.base.config.vocab_size in before else None
        if pattern in architecture.vocabulary:
            embedding = written.loaded.get(f"{architecture.input_embedding}.weight")
            told = written.shapes[embedding[0]][0] if embedding and not written.config.values else None
            return told or written.stated(architecture.vocabulary[pattern])
        if pattern in architecture.labels:
            return written.labels if written.config.values else shape[0]
        return None

    def _stated_before(self, name: str, before: Shape | None) -> bool:
        """Test whether the base's config states the same size although the base's tensor has another."""
        architecture, pattern = self.written.architecture, pattern_of(name)
        if before is None or architecture is None:
            return before is not None
        if pattern in architecture.vocabulary:
            keys = architecture.vocabulary[pattern]
            return self.base.stated(keys) == self.written.stated(keys)
        return self.base.labels == self.written.labels

    @cached_property
    def _quantized(self) -> frozenset[str]:
        return self.weights.quantized_names

    @cached_property
    def _plain(self) -> bool:
        """Test whether a quantized base is written plain, by its config, or by its tensors if the config does not say."""
        if self.base.config.quantization:
            return not self.written.config.quantization
        companions = self.weights.owners.keys() - self._quantized
        return bool(companions) and not companions & self.written.shapes.keys()

    def _companions(self) -> Iterator[str]:
        for weight in sorted(self._quantized):
            tensors = {stored.info.name for stored in self.weights.stored[weight].tensors.values()}
            wanted = {weight} if self._plain else tensors
            for tensor in sorted(wanted - self.written.shapes.keys()):
                yield f"{tensor!r} is missing, which {'is' if self._plain else 'belongs to'} the weight {weight!r}"
            for tensor in sorted((tensors - wanted) & self.written.shapes.keys()):
                yield f"{tensor!r} is of a quantized weight, and the config says that the model is plain"

    def _ties(self, architecture: Architecture) -> Iterator[str]:
        for tie in architecture.ties:
            found = [self.written.tensors_of(name) for name in (tie.name, tie.source)]
            if tie.tied and all(found) and not self._apart_in_base(tie):
                tensors = [tensor for tensors in found for tensor in tensors]
                if len({self.written.contents.get(tensor) for tensor in tensors}) > 1:
                    yield f"{listed(map(repr, tensors))} differ, and the config says that they are one"
            elif not tie.tied and "*" not in tie.name and any(found) and not all(found):
                there, lacking = (tie.name, tie.source) if found[0] else (tie.source, tie.name)
                if not self._lacked(tie, there, lacking) and not _may_be_missing(lacking, architecture):
                    yield f"{lacking!r} is missing, and the config says that it is not {there!r}"

    def _apart_in_base(self, tie: Tie) -> bool:
        """Test for T5's separate head, which is stored beside the embedding if the config says that they are separate."""
        both = self.base.tensors_of(tie.name) and self.base.tensors_of(tie.source)
        return bool(both) and not tie.keys and self.written.config.tied is False

    def _lacked(self, tie: Tie, there: str, lacking: str) -> bool:
        """Test whether the base lacks one of two names that its own config declares separate."""
        before = self.base.architecture
        if before is None or not self.base.tensors_of(there) or self.base.tensors_of(lacking):
            return False
        return not any(t.tied and {t.name, t.source} == {tie.name, tie.source} for t in before.ties)

    def _head(self, architecture: Architecture) -> Iterator[str]:
        """Look for the head of a class that the base does not have."""
        if self.written.config.architectures == self.base.config.architectures:
            return
        output = architecture.output_embedding
        patterns = {pattern_of(name) for name in self.written.loaded}
        wanted = {*architecture.labels, *([] if output is None else [f"{output}.weight"])}
        for name in sorted(wanted - patterns):
            if not any(other in self.written.loaded for other in _tied_to(name, architecture)):
                yield f"{name!r} is missing, the head of the class that the config names"


def _layer_of(name: str) -> str:
    """Return the start of a name up to its last number and dot: ``model.layers.3.``; empty if there is no number."""
    found = re.match(r"(.*\.)?\d+\.", name)
    return "" if found is None else found[0]


def _tied_to(name: str, architecture: Architecture) -> list[str]:
    """List the other names of a parameter; numbers in a pattern come from the name."""
    pattern, numbers = pattern_of(name), [step for step in name.split(".") if step.isdigit()]
    groups = [{tie.name, tie.source} for tie in architecture.ties if tie.tied]
    same, size = {pattern, name}, 0
    while len(same) != size:
        size = len(same)
        same |= {other for group in groups if group & same for other in group}
    return [_numbered(other, numbers) for other in same - {pattern, name}]


def _numbered(pattern: str, numbers: Sequence[str]) -> str:
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern


def _may_be_missing(name: str, architecture: Architecture) -> bool:
    return any(re.search(pattern, name) for pattern in architecture.may_be_missing)
