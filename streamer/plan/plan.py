"""The plan: inputs opened, matched and checked, from headers alone, before anything is written."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamer.adapters.adapter import Adapter, open_adapter
from streamer.adapters.finetuned import is_model, open_tuned
from streamer.adapters.modules import LoraModule
from streamer.errors import FormatError, InputChangedError, MismatchError, OutputError, StorageError, UnsupportedError
from streamer.linalg.operators import Delta
from streamer.plan import tied_embeddings as tied
from streamer.plan.batch import Batch
from streamer.plan.carried_tensors import TensorEdits, match_changes
from streamer.plan.experts import expert_weight, match_experts, parameters_of
from streamer.plan.name_matching import match_names
from streamer.plan.provenance import provenance_notes
from streamer.plan.sources import Source, adapter_source, base_source
from streamer.plan.targets import Target, TensorSlice, match_targets, stores_conv1d
from streamer.plan.transformers_renames import renames_for
from streamer.storage.checkpoint import Checkpoint, open_checkpoint
from streamer.storage.files import Stamp, file_stamp, open_regular
from streamer.storage.identities import AdapterIdentity, BaseIdentity
from streamer.storage.tensor_file import IOMode
from streamer.weights.base import StoredTensor
from streamer.weights.logical import WeightView, open_weights

MODEL_CONFIG = "config.json"

# Weights in other formats would be the old ones beside the new; training state belongs to the old adapter.
_STALE = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|ggml|mlmodel|pb|tflite)(\.index\.json)?$|^streamer\.json$"
)
_SKIPPED_DIRECTORIES = re.compile(
    r"^(\.git|\.cache|__pycache__|checkpoint-\d+|global_step\d+|runs|onnx|openvino|original|coreml|metal)$"
)


@dataclass(frozen=True)
class Plan:
    """A base, an adapter, and which tensor each module changes.

    Attributes
    ----------
    weights
        The logical weights that deltas are added to, by name: the base's, or what the adapter puts in their place.
    targets
        In the base's file order.
    changes
        What the adapter's other tensors do to the base.
    mirrors
        Modules that hold another's factors once more, by the other's name (see `tied.mirrored`).
    config
        The base's ``config.json``, or {} where there is none.
    extra_stamps
        Stamps of the small files that are copied or read whole, by path.
    inputs
        Directories and files that an output must stay out of: those of all plans of its batch.
    """

    base: Checkpoint
    weights: WeightView
    adapter: Adapter
    targets: tuple[Target, ...]
    changes: TensorEdits
    mirrors: Mapping[str, LoraModule]
    config: dict[str, Any]
    extra_stamps: dict[str, Stamp]
    inputs: tuple[Path, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """Say what the inputs are to each other, as warnings and in the record: free of paths, so that outputs are reproducible."""
        return tuple(provenance_notes(self.adapter.config, self.config, self.base.path.resolve().name))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know, and that stops nothing."""
        return *self.base.warnings, *self.notes

    @cached_property
    def by_weight(self) -> dict[str, list[tuple[Target, TensorSlice]]]:
        """What changes each weight: the targets, and which part of it each of them is."""
        out: dict[str, list[tuple[Target, TensorSlice]]] = {}
        for target in self.targets:
            for place in target.places:
                out.setdefault(place.weight, []).append((target, place))
        return out

    @cached_property
    def place(self) -> Callable[[Target], tuple[int, int]]:
        """Gives where a target comes in the base's file order: its weight's place, and which matrix of the weight it is."""
        return _places(self.weights)

    def delta(self, target: Target, base: Tensor | None = None) -> Delta:
        """What the adapter adds to a matrix, (out, in); dense where it is not of low rank, from W0 as it is stored."""
        if base is None and not target.module.low_rank:
            weight = self.weights[target.tensor]
            base = weight.whole(torch.device("cpu")).reshape(weight.matrix)
        return self.adapter.change(target.module, base.T if base is not None and target.transposed else base)

    @cached_property
    def base_identity(self) -> BaseIdentity:
        """See `Checkpoint.identity`."""
        return self.base.identity()

    @cached_property
    def adapter_identity(self) -> AdapterIdentity:
        """See `Adapter.identity`."""
        return self.adapter.identity()

    @cached_property
    def sources(self) -> tuple[Source, Source]:
        """What an output calls its base and its adapter; no paths."""
        base, adapter = self.base, self.adapter
        of_base = base_source(base.path, self.config, adapter.config, self.base_identity)
        return of_base, adapter_source(adapter.path, self.adapter_identity)

    def stamps(self) -> dict[str, Sequence[int]]:
        """Stamps of every input file, by path."""
        return self.detection_stamps() | {os.path.realpath(p): stamp for p, stamp in self.extra_stamps.items()}

    def detection_stamps(self) -> dict[str, Sequence[int]]:
        """Stamps of the input files that detection reads, by real path: however the inputs are spelled, they are the same."""
        config = self.adapter.config_path
        stamps = {
            **self.base.stamps(),
            **{str(file.path): file.stamp for file in self.adapter.files},
            **({} if config is None else {str(config): self.extra_stamps[str(config)]}),
        }
        return {os.path.realpath(path): stamp for path, stamp in stamps.items()}

    def refuse_overwriting(self, paths: Iterable[Path]) -> None:
        """Raise `OutputError` if any of the paths is an input file, under whatever name or link."""
        inputs = {tuple(stamp[:2]): name for name, stamp in self.stamps().items()}
        for path in paths:
            if path.exists() and (same := inputs.get(file_stamp(path.stat())[:2])):
                raise OutputError(f"{path}: is the input {same}; choose another output")

    def check_unchanged(self) -> None:
        """Raise `InputChangedError` if any input changed since the plan was made."""
        self.base.check_unchanged()
        for file in self.adapter.files:
            file.check_unchanged()
        for path, stamp in self.extra_stamps.items():
            if not os.path.exists(path) or _stamp(Path(path)) != stamp:
                raise InputChangedError(
                    f"{path}: changed since the run began; start again with inputs that stay as they are"
                )

    def digest(self, **decisions: Any) -> str:
        """SHA-256 over both identities and the given decisions: what an output is the result of."""
        tree = {"base": self.base_identity, "adapter": self.adapter_identity, **decisions}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def make_plan(base: str | Path, adapter: str | Path, io: IOMode = "mmap", base_is_residual: bool = False) -> Plan:
    """Open and match a base and an adapter; see `make_batch`."""
    return make_batch(base, [adapter], io, base_is_residual).plans[0]


def make_batch(
    base: str | Path, adapters: Sequence[str | Path], io: IOMode = "mmap", base_is_residual: bool = False
) -> Batch:
    """Open a base, once, and match each adapter with it.

    Raises
    ------
    InputError
        If one of them is bad, refused, or they do not belong together. Nothing has been written.
    """
    given = [Path(adapter) for adapter in adapters]
    # What is wrong with an adapter is said before what is wrong with the base.
    opened = [None if is_model(path) else open_adapter(path, io, base_is_residual) for path in given]
    checkpoint = open_checkpoint(base, io)
    config = _model_config(checkpoint.directory)
    weights, inputs, conv1d = open_weights(checkpoint, config), (checkpoint.path, *given), stores_conv1d(config)
    plans = (
        _plan(
            checkpoint,
            weights,
            config,
            adapter or open_tuned(path, checkpoint, _model_config(path), conv1d, io),
            inputs,
        )
        for path, adapter in zip(given, opened, strict=True)
    )
    return Batch(checkpoint, tuple(plans))


def _plan(
    checkpoint: Checkpoint, weights: WeightView, config: dict[str, Any], opened: Adapter, inputs: tuple[Path, ...]
) -> Plan:
    """Match an adapter with a base."""
    extra = [path for _, path in other_files(opened.path)]
    if opened.config_path is not None:
        extra.append(opened.config_path)
    if checkpoint.directory is not None:
        extra += [path for _, path in other_files(checkpoint.directory, opened.path)]
    # Of a fine-tuned model the config says whether it is tied, and goes along.
    tie = None if opened.is_model else tied.find_tie(checkpoint.weight_map, config, opened)
    aliases = {} if tie is None else {tie.head: StoredTensor(*checkpoint.locate(tie.embedding))}
    renames = renames_for(config)
    names = match_names(opened.modules, weights.replaced(aliases), renames, parameters_of(opened))
    matched = {name: match.tensor for name, match in names.items() if match.tensor and name in opened.modules}
    mirrors = tied.mirrored(tie, opened, matched)
    changes = match_changes(checkpoint, opened, matched, renames, aliases, weights.quantized_names)
    if not opened.is_model:
        tied.refuse_other_ties(
            tie, checkpoint.path, checkpoint.weight_map, config, opened, matched, [*changes.sources, *changes.rows]
        )
    if tie is not None:
        changes = tied.settle(tie, checkpoint, changes, matched.values(), opened)
    if opened.is_model:
        _check_whole(checkpoint, weights, opened, {*matched.values(), *changes.sources})
    weights = weights.replaced({**aliases, **changes.sources})
    other = {m.name for m in mirrors.values()}
    own = {name: match for name, match in names.items() if name in opened.modules and name not in other}
    targets = [*match_targets(weights, opened, config, own), *match_experts(weights, opened, config, names, renames)]
    targets.sort(key=_places(weights))
    weights = weights.extended({t.tensor: partial(expert_weight, t) for t in targets if t.pieces})
    stamps = {str(p): _stamp(p) for p in extra}
    return Plan(checkpoint, weights, opened, tuple(targets), changes, mirrors, config, stamps, inputs)


def _places(weights: WeightView) -> Callable[[Target], tuple[int, int]]:
    return lambda target: (weights.file_index(target.places[0].weight), target.places[0].index or 0)


def _check_whole(base: Checkpoint, weights: WeightView, tuned: Adapter, found: set[str]) -> None:
    """Refuse a fine-tuned model that is not one of the base's tensors."""
    if weights.quantized_names:
        raise UnsupportedError(
            f"{base.path}: is quantized; a fine-tuned model is compared with the 16-bit base that it was trained from"
        )
    missing = [name for name in base.weight_map if name not in found]
    if missing:
        raise MismatchError(
            f"{tuned.path}: lacks {len(missing)} of the base's {len(base.weight_map)} tensors, {missing[0]!r} first; is it trained from "
            f"{base.path}, and of the same class?"
        )


def other_files(directory: Path, apart: Path | None = None) -> list[tuple[str, Path]]:
    """Files that an output takes along: (relative name, path), sorted; symlinks are followed.

    All but weights in other formats beside the safetensors, which would be stale, and their copies for other runtimes; trainers'
    state; `.git` and caches; the files of an unfinished run of ours; and everything below `apart`.
    """
    return [(str(p.relative_to(directory)), p) for p, stays in _walk(directory, apart) if not stays]


def skipped_files(directory: Path, apart: Path | None = None) -> list[str]:
    """Relative names of what `other_files` leaves out: files, and directories as a whole."""
    return [str(p.relative_to(directory)) for p, stays in _walk(directory, apart) if stays]


def _walk(directory: Path, apart: Path | None) -> Iterator[tuple[Path, bool]]:
    """Files below a directory, and whether each stays behind; directories that stay behind as a whole."""
    hidden = None if apart is None else apart.resolve()

    def walk(at: Path, above: frozenset[Path]) -> Iterator[tuple[Path, bool]]:
        for path in sorted(at.iterdir()):
            if path.is_dir():
                real = path.resolve()
                if real == hidden or real in above:  # a link to a directory around it would never end
                    continue
                if _SKIPPED_DIRECTORIES.match(path.name):
                    yield path, True
                else:
                    yield from walk(path, above | {real})
            elif path.is_file() and not path.name.startswith(".streamer."):
                # Below the top, weights are those of modules of their own (sentence-transformers' 2_Dense, say).
                yield path, at == directory and bool(_STALE.search(path.name))

    yield from walk(directory, frozenset({directory.resolve()}))


def _model_config(directory: Path | None) -> dict[str, Any]:
    """A model's ``config.json``: read as transformers writes it, with Infinity and NaN; it is copied as bytes in any case."""
    if directory is None or not (directory / MODEL_CONFIG).exists():
        return {}
    path = directory / MODEL_CONFIG
    fd, _ = open_regular(path, "a model's config")
    try:
        with open(fd, "rb") as f:
            tree = json.loads(f.read())
    except OSError as e:
        raise StorageError(f"{path}: cannot read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{path}: bad JSON: {e}; get the file again") from None
    return tree if isinstance(tree, dict) else {}


def _stamp(path: Path) -> Stamp:
    try:
        return file_stamp(os.stat(path))
    except OSError as e:
        raise StorageError(f"{path}: cannot read: {e.strerror}") from e
