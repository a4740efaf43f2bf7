"""Match an adapter's carried tensors, those that are not factors, to the tensors that they edit; refuse adapters that lack some.

Weights and biases replace the base's or are new; LoRA biases are added; trained tokens replace rows. Names are matched in the same way as
the factors' names (`targets`): if the module ``model.layers.0.mlp.up_proj`` was found as ``layers.0.mlp.up_proj.weight``, the saved
``model.norm.weight`` is ``norm.weight``. So `plan` knows every tensor of the merged model before anything is written.

An adapter for classification saves a head that its base does not have, or has for another number of labels. The class of the merged
model follows from the base's type and the adapter's task, by transformers' own table (``auto_classes.json``, see
``tools/make_auto_classes.py``); the number of labels is the head's number of rows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple, TypedDict

from streamer.adapters.adapter import Carried, DeltaSource, is_below
from streamer.adapters.adapter_config import CONFIG_NAME
from streamer.errors import FormatError, MismatchError, UnsupportedError
from streamer.plan.architectures import (
    Architecture,
    KeyPath,
    KeyPaths,
    TensorNames,
    architecture_for,
    packaged,
)
from streamer.plan.base import Found, OpenBase
from streamer.plan.name_matching import PrefixExchange
from streamer.plan.names import NameIndex
from streamer.storage.checkpoint import Checkpoint
from streamer.storage.header import TensorInfo
from streamer.units import listed
from streamer.weights.base import StoredTensor, Tensors, TensorShape, equal, float_dtype
from streamer.weights.model_config import ModelConfig

LABEL_HEAD = re.compile(
    r"(?:^|\.)(?:score|classifier|qa_outputs|logits_proj|sequence_summary\.summary|"
    r"(?:classifier|classification_head)\.(?:out_proj|linear_out|1))\.(?P<parameter>weight|bias)$"
)
"""Names of the last layer of transformers' heads for classification and question answering, with a row for each label."""

PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""PEFT's task types, and the hub's names for the same tasks."""

LABEL_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")

LANGUAGE_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@dataclass(frozen=True)
class Head:
    """A model's config, updated for an adapter's task and head, with notes.

    Attributes
    ----------
    config
        The updated config.
    pipeline
        The hub's name of the task if the class changed, else empty.
    notes, advice
        What was set, and what is not known and must be passed on loading; one line each.
    """

    config: ModelConfig
    pipeline: str = ""
    notes: TensorNames = ()
    advice: TensorNames = ()


AUTO_CLASSES = "auto_classes.json"
"""The packaged table. ``names``: names by model type; ``tasks``: for each of PEFT's task types the patterns of class names, and each
pattern's model types; ``ties``: for each task the model types whose head is only the tied embedding, tied by ``default`` or if the config
``stated`` it."""


def auto_class(model_type: object, task: object) -> str | None:
    """Return the class that transformers uses to load a model of this type for one of PEFT's tasks; None if there is none."""
    if not isinstance(model_type, str) or not isinstance(task, str):
        return None
    table = packaged(AUTO_CLASSES)
    for name, types in table["tasks"].get(task, {}).items():
        if model_type in types:
            return str(name).replace("*", table["names"].get(model_type, ""))
    return None


def merged_architecture(config: ModelConfig, adapter: DeltaSource) -> Architecture | None:
    """Return the facts about the merged model's class: the class for the adapter's task if the base's class lacks the head.

    If the base's config names no class and the adapter no task, use the class that PEFT recorded in training.
    """
    stated = architecture_for(config)
    if adapter.describes_model:
        return stated
    task = adapter.config.get("task_type")
    cls = auto_class(config.model_type, task)
    bare = stated is None and not config.architectures
    trained = adapter.config.get("auto_mapping")
    if bare and config.model_type and cls is None and isinstance(trained, dict):
        cls = trained.get("base_model_class")
    of_task = None if cls is None else architecture_for(config, cls)
    labelled = task in LABEL_TASKS and any(LABEL_HEAD.search(c.name) for c in adapter.carried)
    headless = task in LANGUAGE_TASKS and (stated is None or stated.output_embedding is None)
    return of_task or stated if labelled or headless or bare else stated


def implied_head(
    config: ModelConfig, task: object, saved: Mapping[str, TensorShape], names: Collection[str]
) -> Head:
    """Update a model's config for the head that an adapter saves.

    Parameters
    ----------
    config
        The base's config.
    task
        PEFT's ``task_type`` in the adapter's config.
    saved
        Shapes of tensors that the adapter trained and saved whole (``modules_to_save``), by their names in the merged model.
    names
        All tensors of the merged model.
    """
    labels = _labels(saved)
    notes = []
    advice = _advice_on_labels(config, task, labels, names)
    if not config.values:
        return Head(config, advice=tuple(advice))
    out = dict(config.values)
    id2label = config.values.get("id2label")
    if labels is not None and _set_labels(out, labels):
        notes.append(f"config.json says num_labels={labels}, by the rows of the saved head")
    elif labels is not None and isinstance(id2label, dict):
        named = any("LABEL_" not in str(name) for name in id2label.values())
        if named:
            advice.append(
                "config.json keeps the base's names of labels, because there are as many as rows in the saved head: if the adapter was "
                "trained on other labels, set id2label and label2id"
            )
    cls = auto_class(config.model_type, task)
    old = next((c for c in config.architectures[:1] if isinstance(c, str)), "")
    if cls is None:
        if labels is not None and not re.search(r"Classification|QuestionAnswering", old):
            advice.append(
                f"no class for {config.model_type!r} and the task {task} is known: load the model with the class used to train the adapter"
            )
    elif cls != old and _fits_task(str(task), old, config.model_type, saved):
        if _has_head(str(task), config, names):
            out["architectures"] = [cls]
            notes.append(f"config.json says {cls}, by the adapter's task {task}")
        elif task in LANGUAGE_TASKS:
            advice.append(
                f"the adapter is for {task}, but neither it nor the base has the head of {cls}, which loading would create with random "
                f"values: config.json keeps {old or 'no class'}; merge into the model on which the adapter was trained"
            )
    changed = out.get("architectures") != config.values.get("architectures")
    pipeline = PIPELINES[str(task)] if changed else ""
    return Head(replace(config, values=out), pipeline, tuple(notes), tuple(advice))


def _labels(saved: Mapping[str, TensorShape]) -> int | None:
    """Return the number of labels of the only head that is saved."""
    heads = ((LABEL_HEAD.search(name), shape) for name, shape in saved.items())
    rows = {shape[0] for head, shape in heads if shape and head and head["parameter"] == "weight"}
    return rows.pop() if len(rows) == 1 else None


def _advice_on_labels(
    config: ModelConfig, task: object, labels: int | None, names: Collection[str]
) -> list[str]:
    if labels is not None and not config.values:
        return [f"the base has no config.json: load the model with a config of num_labels={labels}"]
    if task in LABEL_TASKS and not any(map(LABEL_HEAD.search, names)):
        load = "load the model with the class and the num_labels of its training"
        return [f"the adapter is for {task}, but neither it nor the base has a known head: {load}"]
    return []


def _fits_task(task: str, old: str, model_type: object, saved: Mapping[str, TensorShape]) -> bool:
    """Test whether the task's class may replace the stated class: only a bare model or a classifier may be replaced."""
    if task in LABEL_TASKS or not old:
        return True
    if task == "FEATURE_EXTRACTION":
        return bool(saved)
    return old in {auto_class(model_type, other) for other in (*LABEL_TASKS, "FEATURE_EXTRACTION")}


def _has_head(task: str, config: ModelConfig, names: Collection[str]) -> bool:
    """Test whether the merged model has the head of the task's class, or a tie that provides it."""
    if task in LABEL_TASKS:
        return any(map(LABEL_HEAD.search, names))
    cls = auto_class(config.model_type, task)
    architecture = None if cls is None else architecture_for(config, cls)
    head = None if architecture is None else architecture.output_embedding
    if task not in LANGUAGE_TASKS or architecture is None or head is None:
        return True
    # The head's outermost module holds everything between model and vocabulary: ``lm_head.decoder`` → ``lm_head.``.
    paths = (head, *architecture.disk_patterns(f"{head}.weight"))
    modules = tuple(f"{path.partition('.')[0]}." for path in paths)
    ties = packaged(AUTO_CLASSES)["ties"][task]
    if config.tied is None:
        tied = config.model_type in ties["default"]
    else:
        tied = config.tied and any(config.model_type in types for types in ties.values())
    return tied or any(name.startswith(modules) for name in names)


def _set_labels(config: dict[str, Any], labels: int) -> bool:
    """Set the number of labels as transformers writes it; keep the base's names if there are as many. Return whether anything changed."""
    names = config.get("id2label")
    # The default number of labels depends on the class: usually 2, for BART 3.
    if (len(names) if isinstance(names, dict) else config.get("num_labels")) == labels:
        return False
    # The problem type does not follow from the number.
    for key in ("num_labels", "_num_labels", "problem_type"):
        config.pop(key, None)
    config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
    config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    return True


class CarriedRecord(TypedDict):
    """A carried tensor."""

    tensor: Annotated[str, "The tensor of the base that changes."]
    change: Annotated[str, "What happens to the tensor: replaced, new, rows replaced, …"]
    by: Annotated[str, "The adapter's tensor."]


class VocabularyTensor(NamedTuple):
    """A tensor with a row for each entry of a vocabulary.

    Attributes
    ----------
    names
        All names of the same parameter.
    keys
        Config keys that state the number of rows: encoder and decoder may have separate vocabularies.
    """

    names: TensorNames
    keys: KeyPath


@dataclass(frozen=True)
class TensorEdits:
    """Edits of the base other than deltas, by the name of the merged model's tensor.

    Attributes
    ----------
    sources
        Tensors that replace the base's before any delta is added; a name that the base does not have is a new tensor.
    shifts
        Tensors that are added, each with its factor.
    rows
        Tensors that replace some rows, and the rows' indices.
    trained
        The sources that the adapter trained; the rest are copies of the base.
    vocabularies
        Config keys of a vocabulary's size → its new size, if a replaced embedding changes it.
    dropped
        Tensors of the base that the merged model omits, each with the reason.
    untied
        Key paths of ties that the config must no longer state (see `tied_embeddings`).
    """

    sources: Tensors = field(default_factory=dict)
    shifts: Mapping[str, tuple[StoredTensor, float]] = field(default_factory=dict)
    rows: Mapping[str, tuple[StoredTensor, TensorShape]] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()
    vocabularies: Mapping[KeyPath, int] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    untied: KeyPaths = ()

    @property
    def vocabulary(self) -> int | None:
        """Return the vocabulary's new size if it changes; with several vocabularies, the first."""
        return next(iter(self.vocabularies.values()), None)

    def listed(self, base: Checkpoint, of_model: bool) -> list[CarriedRecord]:
        """List the edits as JSON values; edits `of_model`, a fine-tuned model, only if they differ from the base."""
        changes = []
        for name, part in self.sources.items():
            is_new = name not in base.weight_map
            if is_new or not (of_model and equal(part, StoredTensor(*base.locate(name)))):
                changes.append((name, "new" if is_new else "replaced", part.info.name))
        for name, (part, scaling) in self.shifts.items():
            changes.append((name, f"plus {scaling:g} times", part.info.name))
        for name, (part, indices) in self.rows.items():
            changes.append((name, f"{len(indices)} rows replaced", part.info.name))
        changes += [(name, "dropped", reason) for name, reason in sorted(self.dropped.items())]
        return [{"tensor": name, "change": change, "by": by} for name, change, by in changes]

    def config(self, config: ModelConfig) -> ModelConfig:
        """Return the model's config with every value corrected that the edits make wrong."""
        for keys, rows in self.vocabularies.items():
            config = config.with_vocabulary(rows, keys)
        return config.untied(self.untied)


def match_carried(
    base: OpenBase,
    adapter: DeltaSource,
    found: Found,
    vocabulary: Mapping[str, VocabularyTensor],
) -> TensorEdits:
    """Match every carried tensor of an adapter to its tensor in the merged model, by the same exchange of prefixes as the modules.

    Replacements of quantized weights are not compared, because a merge refuses them.

    Parameters
    ----------
    vocabulary
        Tensors with a row for each entry of a vocabulary; their rows may grow or shrink in number.

    Raises
    ------
    MismatchError
        If a tensor has no match, or does not fit its match.
    UnsupportedError
        If the merged model could not be loaded, or a dtype does not hold plain values.
    """
    checkpoint = base.checkpoint
    known = {name: StoredTensor(*checkpoint.locate(name)) for name in checkpoint.weight_map}
    known |= found.aliases
    quantized = base.weights.quantized_names
    index = base.names.among({**known, **dict.fromkeys(quantized)})
    stems = ((module, tensor.removesuffix(".weight")) for module, tensor in found.placed.items())
    exchanges = sorted({PrefixExchange.between(module, stem) for module, stem in stems})
    problems = []
    trained = set()
    sources: dict[str, StoredTensor] = {}
    shifts = {}
    rows = {}
    # Replacements come first: the other edits must fit them.
    for c in sorted(adapter.carried, key=lambda c: c.role != "saved"):
        if c.role == "original":
            continue
        name, problem = _find(c, adapter, index, exchanges)
        if problem:
            problems.append(problem)
            continue
        tensor = adapter.tensors[c.source]
        if name in quantized:
            if c.role == "tokens":
                problem = _misfit_of_tokens(c, tensor.info.shape, name, base.weights[name].shape)
        elif name in known:
            replaced = sources.get(name) or known[name]
            problem = _misfit(c, tensor.info, replaced.info, vocabulary)
            if c.role != "saved" or tensor.info.dtype != replaced.info.dtype:
                for part in (tensor, replaced):
                    float_dtype(part.info, str(part.file.path))
        if problem:
            problems.append(problem)
        if c.role == "lora_bias":
            shifts[name] = (tensor, c.scaling)
        elif c.role == "tokens":
            rows[name] = (tensor, c.indices)
        else:
            sources[name] = tensor
            # A head's bias is saved along with a vocabulary that has grown, whether or not it was trained.
            is_bias = c.parameter == "bias" and adapter.config.get("bias", "none") != "none"
            if is_bias or adapter.trains(c.module):
                trained.add(name)
    if problems:
        raise MismatchError(
            f"{adapter.file.path}: {listed(problems, separator='; ')}; is {checkpoint.path} the base that the adapter was trained on?"
        )
    plain = {name: part for name, part in sources.items() if name not in quantized}
    sizes = _vocabularies(known, plain, adapter, vocabulary)
    return TensorEdits(sources, shifts, rows, frozenset(trained), sizes)


def _find(
    c: Carried, adapter: DeltaSource, index: NameIndex, exchanges: Sequence[PrefixExchange]
) -> tuple[str, str]:
    """Find the name of the tensor that changes, or say why it is not found."""
    exchanged = [
        exchange.apply(c.name) for exchange in exchanges if c.name.startswith(exchange.strip)
    ]
    possible = (c.name, index.on_disk.get(c.name), *exchanged)
    matches = [*dict.fromkeys(name for name in possible if name in index.loaded)]
    if len(matches) > 1:
        return "", f"{c.source!r} is ambiguous: it could be {listed(map(repr, matches))}"
    if matches:
        (name,) = matches
        return name, ""
    if c.role != "saved" or not adapter.trains(c.module):
        looked = f"looked for {c.name!r}), and modules_to_save does not name it"
        return "", f"{c.source!r} has no tensor in the base ({looked}"
    built = {part.name: part.tensor for part in index.loaded.values() if part.by is not None}
    if name := next((name for name in (c.name, *exchanged) if name in built), ""):
        raise UnsupportedError(
            f"{adapter.file.path}: {c.source!r} replaces {name!r}, built on loading from {built[name]!r} and others; not supported"
        )
    return exchanged[0] if len({*exchanged}) == 1 else c.name, ""


def _misfit(
    c: Carried, info: TensorInfo, base: TensorInfo, vocabulary: Mapping[str, VocabularyTensor]
) -> str:
    if c.role == "tokens":
        return _misfit_of_tokens(c, info.shape, base.name, base.shape)
    resized = (
        c.role == "saved" and info.shape[1:] == base.shape[1:] and info.shape and info.shape[0]
    )
    may_grow = base.name in vocabulary or LABEL_HEAD.search(base.name)
    if info.shape == base.shape or (resized and may_grow):
        return ""
    ask = ""
    if resized and not vocabulary:
        ask = " (if its rows are the vocabulary, name the base's class with --architecture NAME)"
    return f"{c.source!r}: expected shape {list(base.shape)} of {base.name!r}, found {list(info.shape)}{ask}"


def _misfit_of_tokens(c: Carried, shape: TensorShape, name: str, base: TensorShape) -> str:
    expected = (len(c.indices), *base[1:])
    if shape != expected:
        return f"{c.source!r}: expected shape {list(expected)}, found {list(shape)}"
    if c.indices and max(c.indices) >= base[0]:
        return f"{c.source!r}: row {max(c.indices)} of trainable_token_indices is beyond the {base[0]} rows of {name!r}"
    return ""


def _vocabularies(
    known: Tensors,
    sources: Tensors,
    adapter: DeltaSource,
    vocabulary: Mapping[str, VocabularyTensor],
) -> dict[KeyPath, int]:
    """Return the new number of rows of each vocabulary that a replaced embedding resizes; all its embeddings must match."""
    resized = {
        name: (known[name].info.shape[0], part.info.shape[0])
        for name, part in sources.items()
        if name in known
        and part.info.shape != known[name].info.shape
        and not LABEL_HEAD.search(name)
    }
    follow = {other for changed in resized for other in vocabulary[changed].names}
    sizes: dict[KeyPath, int] = {}
    for name, (before, after) in resized.items():
        sizes.setdefault(vocabulary[name].keys, after)
        for other in vocabulary.keys() & known.keys() - follow:
            # One value for each token, such as a head's bias, is not an embedding (`tied_embeddings.without_stale_values`).
            info = known[other].info
            rows = sources.get(other, known[other]).info.shape[0]
            embedding = (
                other.endswith(".weight") and len(info.shape) == 2 and info.shape[0] == before
            )
            if embedding and vocabulary[other].keys == vocabulary[name].keys and rows != after:
                raise MismatchError(
                    f"{adapter.file.path}: gives {name!r} {after} rows, but {other!r} keeps {rows}: the vocabulary grew, but the adapter "
                    "was saved without one of the embeddings; save it again with save_embedding_layers=True and target both or neither"
                )
    return sizes


def check_announced(
    base: OpenBase, adapter: DeltaSource, found: Found, edits: TensorEdits
) -> TensorNames:
    """Compare what an adapter's config announces with what its file holds: PEFT fills the gaps with values that nobody trained.

    Parameters
    ----------
    edits
        Edits that the adapter's other tensors make.

    Returns
    -------
    tuple of str
        A note if the file lacks the biases that ``bias`` announces: PEFT before 0.21 saved none for ``lora_only``.

    Raises
    ------
    FormatError
        If the file lacks tensors that only the adapter can supply; the message names all of them.
    """
    architecture = found.architecture
    names = base.names.among(dict.fromkeys([*base.checkpoint.weight_map, *found.aliases]))
    # A file may hold more than the model loads, such as a mask that earlier versions called ``attn.bias``.
    tensors = {
        tensor: now
        for tensor, now in names.at_run_time.items()
        if (
            (architecture is not None and architecture.has_tensor(now))
            or f"{tensor.removesuffix('bias')}weight" in names.loaded
            or tensor.endswith(".weight")
        )
        and not _is_behind(now, base.config)
    }
    missing = [*_missing_saved(adapter, tensors, base.config, edits), *_missing_rows(adapter)]
    # Some programs write biases only for layers that have one; PEFT takes missing ones as zero.
    shifted = {c.module for c in adapter.carried if c.role == "lora_bias"}
    matched = found.matched.items()
    biased = [n for n, t in matched if f"{t.removesuffix('weight')}bias" in base.weights]
    lacking = [f"{name}.lora_B.bias" for name in biased if name not in shifted]
    if adapter.config.get("lora_bias") and lacking:
        missing.append(f"{listed(map(repr, lacking), 1)} of lora_bias")
    if missing:
        raise FormatError(
            f"{adapter.file.path}: lacks tensors that {CONFIG_NAME} announces: {listed(missing, separator='; ')}; save it again"
        )
    notes = _untargeted(adapter, names)
    bias = adapter.config.get("bias")
    biases = {"all": sum(t.endswith(".bias") for t in tensors), "lora_only": len(biased)}
    count = biases.get(str(bias), 0)
    brought = sum(c.parameter == "bias" for c in adapter.carried)
    if brought < count:
        has = f"the adapter's bias is {bias!r}, but its file has {brought} of {count} biases"
        notes.append(f"{has}: the base's values are kept")
    return tuple(notes)


def _missing_saved(
    adapter: DeltaSource, tensors: Mapping[str, str], config: ModelConfig, edits: TensorEdits
) -> Iterator[str]:
    """Yield what the file lacks of each entry of ``modules_to_save``; `tensors` are the base's, with their run-time names.

    PEFT adds the names of common heads for a task, and the model has only one of them: an entry alone announces nothing.
    """
    saved = {c.name for c in adapter.carried if c.role == "saved"}
    for entry in adapter.config.strings("modules_to_save"):
        below = {t: now for t, now in tensors.items() if is_below(_module(now), entry)}
        lacking = [t for t, now in below.items() if t not in edits.sources and now not in saved]
        if not below:
            lacking = _missing_of_head(entry, saved, config, adapter.config.get("task_type"))
        if lacking:
            yield f"{listed(map(repr, lacking), 1)} of {entry!r} in modules_to_save"


def _missing_rows(adapter: DeltaSource) -> Iterator[str]:
    """Yield the modules whose trained tokens the file lacks; PEFT saves only one of several tied modules with the same rows."""
    stated = adapter.config.get("trainable_token_indices")
    by_module = stated if isinstance(stated, dict) else {"the embedding": stated}
    rows = {c.module: list(c.indices) for c in adapter.carried if c.role == "tokens"}
    for module, indices in by_module.items():
        there = (f".{m}".endswith(f".{module}") or own == indices for m, own in rows.items())
        if indices and not any(there):
            yield f"the rows of {module!r} in trainable_token_indices"


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _untargeted(adapter: DeltaSource, index: NameIndex) -> list[str]:
    """Note modules with factors that the config does not target."""
    config = adapter.config
    named = {*config.strings("target_modules")}
    excluded = tuple(f".{module}" for module in config.strings("exclude_modules"))
    if not named or config.get("target_parameters") or config.get("ensure_weight_tying"):
        return []
    stated = config.get("layers_to_transform")
    layers = {str(i) for i in (stated if isinstance(stated, list) else [stated]) if i is not None}
    run_time = index.among(f"{name}.weight" for name in adapter.modules).at_run_time
    untargeted = []
    for name in adapter.modules:
        names = {name, run_time.get(f"{name}.weight", name).removesuffix(".weight")}
        if (
            not any(f".{n}".endswith(f".{target}") for n in names for target in named)
            or f".{name}".endswith(excluded)
            or (layers and layers.isdisjoint(name.split(".")) and names.isdisjoint(named))
        ):
            untargeted.append(name)
    if not untargeted:
        return []
    return [
        f"PEFT ignores the factors of {listed(map(repr, untargeted))}, which target_modules, exclude_modules or layers_to_transform "
        "leave out; streamer applies them: correct the config, or remove the factors"
    ]


def _missing_of_head(entry: str, saved: set[str], config: ModelConfig, task: object) -> list[str]:
    """List the missing tensors of a task's head that the base does not have: PEFT's loader needs every one.

    LayoutLMv3's has one layer, or two inside it: so a module counts as present if the file has tensors of a module inside or around it.
    """
    cls = auto_class(config.model_type, task) if task in LABEL_TASKS else None
    architecture = None if cls is None else architecture_for(config, cls)
    if architecture is None:
        return []
    there = {_module(name) for name in saved if is_below(_module(name), entry)}
    return sorted(
        name
        for name in architecture.tensors - saved
        if "*" not in name
        and is_below(module := _module(name), entry)
        and not any(module.startswith(f"{t}.") or t.startswith(f"{module}.") for t in there)
    )


def _is_behind(name: str, config: ModelConfig) -> bool:
    """Test whether a tensor belongs to a layer after the last that the config counts (multi-token prediction): no class loads it."""
    layers = config.values.get("num_hidden_layers")
    match = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
    return match is not None and type(layers) is int and int(match[1]) >= layers
