"""Plan merged models: the base's tensor order and metadata, its shard names and dtypes unless others are wanted, and its other files.

One plan serves the files written by `merge`, the index, the sizes of a dry run, and the tensors of `iter_merged`: for each tensor of each
file its dtype, its shape, and its recipe.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from streamer.adapters.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from streamer.adapters.finetuned import FinetunedModel
from streamer.detection.detect import detect_matrix, detection_estimates
from streamer.detection.intruders import Detection
from streamer.errors import MismatchError, UnsupportedError
from streamer.events import Monitor, Progress
from streamer.linalg.torch_state import threads
from streamer.methods.files import InputMap, MappedInput
from streamer.output.form import Form
from streamer.output.layout import Layout
from streamer.output.mitigation import Mitigation
from streamer.output.opening import refuse_other_base
from streamer.output.recipes import (
    FEEDBACK,
    RECODED,
    RECODED_BYTES,
    AddBias,
    AddDelta,
    Cast,
    CopyBytes,
    Recipe,
    Recode,
    ReplaceRows,
    Requantize,
    StackedParts,
    WeightRows,
    rows_bytes,
    written_dtype,
)
from streamer.output.record import MergedDtype
from streamer.plan.architectures import architectures_for, pattern_of
from streamer.plan.carried_tensors import Head, implied_head
from streamer.plan.plan import AdapterBatch, MemoryEstimate, Plan, check_budget, resident_bytes
from streamer.plan.side_files import (
    TokenizerChoice,
    other_files,
    skipped_files,
    stale_weights,
    with_modules,
    with_tokenizer,
)
from streamer.plan.targets import Target
from streamer.storage.atomic_file import (
    ShardPlan,
    component_prefix,
    gather,
    index_bytes,
    plan_shard,
)
from streamer.storage.checkpoint import (
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    component_files,
    shard_names,
)
from streamer.storage.header import TensorInfo, tensor_nbytes
from streamer.storage.transaction import RECORD_NAME
from streamer.units import counted, listed
from streamer.weights.base import (
    FLOATS,
    SPELLINGS,
    Plain,
    StoredTensor,
    Weight,
    as_tensor,
    in_memory,
)
from streamer.weights.codes import FP8, GPTQ, Recodable
from streamer.weights.logical import (
    STALE,
    WeightView,
    cast_weights,
    is_activation_scale,
    plain_metadata,
    plain_weights,
)
from streamer.weights.model_config import MODEL_CONFIG

MERGED_DTYPES: dict[MergedDtype, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}

USE_PLAIN_BASE = "merge into the 16-bit base"
"""What to do with a quantized base to which no other way leads."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the merged model, with its dtype spelled as in the format, and its recipe."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    recipe: Recipe


@dataclass(frozen=True)
class MergedModel:
    """Tensors and files that a merge writes.

    Attributes
    ----------
    files
        Output tensors by file name, in file order: the base's, with new tensors at the end; in the base's files unless a size is wanted.
    metadata
        Metadata of each file.
    texts
        Small files with new contents: configs that the merge would make wrong.
    head
        Consequences of a head that the adapter saves.
    """

    files: Mapping[str, tuple[OutputTensor, ...]]
    metadata: Mapping[str, Mapping[str, str]]
    texts: Mapping[str, bytes]
    head: Head

    @property
    def tensor_count(self) -> int:
        """Return the number of output tensors in all files."""
        return sum(map(len, self.files.values()))

    @cached_property
    def recipes(self) -> dict[str, Recipe]:
        """Return the recipe of each output tensor."""
        return {o.name: o.recipe for outputs in self.files.values() for o in outputs}

    def shards(self, metadata: Mapping[str, str] | None = None) -> dict[str, ShardPlan]:
        """Lay out the files with exact headers; their metadata is the base's plus the given metadata."""
        shards = {}
        for name, outputs in self.files.items():
            entries = ((output.name, output.dtype, output.shape) for output in outputs)
            shards[name] = plan_shard(name, entries, {**self.metadata[name], **(metadata or {})})
        return shards


def plan_merged(plan: Plan, form: Form) -> MergedModel:
    """Plan each tensor of the merged model from headers alone.

    Parameters
    ----------
    form
        `dequantize` writes quantized weights plain, in the dtype of the model's config, and omits tensors that only quantized values need.
        `dtype` writes plain weights, and dequantized ones, in this dtype; see `cast_weights`. `shard_bytes` divides the tensors among files
        as transformers does; see `_divided`. `requantize` writes merged 4-bit weights as codes again, by this map of the base's inputs;
        see `Recode`.

    Raises
    ------
    UnsupportedError
        If merged values would have to be written in an encoding that streamer cannot write, or if a pipeline should get another form.
    """
    if plan.config.pipeline and (form.dtype or form.shard_bytes):
        what = "dtype" if form.dtype else "max_shard_size"
        raise UnsupportedError(
            f"{plan.base.path}: {what}: a diffusers pipeline keeps its files and dtypes; leave it out"
        )
    _refuse_quantized(plan, form)
    weights = plain_weights(plan.weights, plan.config) if form.dequantize else plan.weights
    if form.dtype is not None:
        weights = cast_weights(weights, MERGED_DTYPES[form.dtype])
    files: dict[str, list[OutputTensor]] = {}
    for name, file in plan.base.files.items():
        tensors = (StoredTensor(file, info) for info in file.header.tensors)
        outputs = (_of_file(plan, weights, stored, form) for stored in tensors)
        files[name] = [output for output in outputs if output is not None]
    new = (name for name in plan.edits.sources if name not in plan.base.weight_map)
    files[next(reversed(files))] += [_output(plan, weights, name, None) for name in new]
    head = _head(plan, [o.name for outputs in files.values() for o in outputs])
    metadata: dict[str, Mapping[str, str]] = {
        name: file.header.metadata for name, file in plan.base.files.items()
    }
    if form.dequantize:
        metadata = {name: plain_metadata(values, weights) for name, values in metadata.items()}
    written = {name: tuple(outputs) for name, outputs in files.items() if outputs}
    if form.shard_bytes is not None:
        written = _divided(itertools.chain.from_iterable(written.values()), form.shard_bytes)
        joined = {key: text for texts in metadata.values() for key, text in texts.items()}
        metadata = dict.fromkeys(written, joined)
    return MergedModel(written, metadata, _texts(plan, head, form), head)


def _divided(
    outputs: Iterable[OutputTensor], shard_bytes: int
) -> dict[str, tuple[OutputTensor, ...]]:
    """Divide tensors among files of at most so many bytes, with transformers' names; a larger tensor has a file of its own.

    The last file that is begun takes further tensors after a larger one, as in ``huggingface_hub.split_torch_state_dict_into_shards``.
    """
    shards = list[list[OutputTensor]]()
    current = list[OutputTensor]()
    room = shard_bytes
    for output in outputs:
        nbytes = tensor_nbytes(output.dtype, output.shape)
        if nbytes > shard_bytes:
            shards.append([output])
            continue
        if nbytes > room:
            shards.append(current)
            current = []
            room = shard_bytes
        current.append(output)
        room -= nbytes
    shards += [current] if current else []
    return dict(zip(shard_names(len(shards)), map(tuple, shards), strict=True))


def _of_file(
    plan: Plan, weights: WeightView, stored: StoredTensor, form: Form
) -> OutputTensor | None:
    """Plan the output of a base's tensor; None if it is omitted."""
    name = stored.info.name
    if name in plan.edits.dropped or (form.dequantize and is_activation_scale(name, weights)):
        return None
    if name not in weights.owners:
        return _output(plan, weights, name, stored)
    logical, role = weights.owners[name]
    if form.dequantize:
        if role != "weight":
            return None
        weight = weights[logical]
        recipe = _merged(plan, weight) if logical in plan.by_weight else _unmerged(plan, weight)
        return OutputTensor(logical, SPELLINGS[written_dtype(weight)], weight.shape, recipe)
    if logical not in plan.by_weight or role not in ("weight", "quant_scale"):
        return OutputTensor(name, stored.info.dtype, stored.info.shape, CopyBytes(stored))
    recipe = _merged(plan, weights[logical], role, form.requantize)
    return OutputTensor(name, stored.info.dtype, stored.info.shape, recipe)


def _merged(
    plan: Plan, weight: Weight, role: str = "", requantize: InputMap | None = None
) -> Recipe:
    """Make the recipe of a weight that the adapter changes, or, if it stays quantized, of its tensor with this role."""
    slices = plan.by_weight[weight.name]
    recipes = []
    for target, slice_ in slices:
        own = weight if slice_.index is None else weight.slice(slice_.index)
        recipes.append(_change(plan, own, target, slice_.rows, role, requantize))
    is_stack = slices[0][1].index is not None
    return StackedParts(tuple(recipes)) if is_stack else recipes[0]


def _change(
    plan: Plan,
    weight: Weight,
    target: Target,
    rows: tuple[int, int] | None,
    role: str,
    requantize: InputMap | None,
) -> Recipe:
    """Make the recipe of a weight that is one matrix, or some rows of it."""
    if not role:
        tuned = plan.adapter.stored_sum(target.module)
        is_same = tuned is not None and tuned.info.dtype == SPELLINGS[written_dtype(weight)]
        return AddDelta(weight, target, rows, tuned if is_same else None)
    if isinstance(weight, FP8):
        return Requantize(weight, target, rows, role)
    entry = _entry(requantize, target)
    assert isinstance(weight, Recodable)
    assert entry is not None
    return Recode(weight, target, rows, entry=entry)


def _entry(requantize: InputMap | None, target: Target) -> MappedInput | None:
    """Find a matrix's inputs in the map; None if it lacks them, or if all were zero."""
    entry = None if requantize is None else requantize.find(target.tensor, target.module.shape[1])
    return entry if entry is not None and entry.vectors is not None and entry.trace > 0 else None


def _refuse_quantized(plan: Plan, form: Form) -> None:
    """Refuse changes that do not fit quantized weights; a message names the first weight, and counts them."""
    quantized = plan.weights.quantized_names
    replaced = [name for name in plan.edits.sources if name in quantized]
    if replaced:
        saves = f"{plan.adapter.file.path}: saves {replaced[0]!r} (modules_to_save)"
        raise UnsupportedError(
            f"{saves}, which stands quantized in {plan.base.path}; {USE_PLAIN_BASE}"
        )
    refused = [
        name for name in plan.by_weight if name in quantized and not plan.weights.requantizes(name)
    ]
    if form.requantize is not None:
        coded = _coded(plan, form.requantize, refused)
        refused = [name for name in refused if name not in coded]
    refused += [name for name in plan.edits.rows if name in quantized]
    if form.dequantize:
        _refuse_transposed(plan, quantized)
    elif refused:
        first = plan.weights[refused[0]]
        what = f"{len(refused)} of the weights to merge into are quantized, {first.name!r} first ({first.label})"
        codes = any(isinstance(plan.weights[name], Recodable) for name in refused)
        do = f"--dequantize writes a plain model, {'`merge --requantize` new codes, ' * codes}or {USE_PLAIN_BASE}"
        raise UnsupportedError(f"{plan.base.path}: {what}; {do}")


def _coded(plan: Plan, requantize: InputMap, names: Iterable[str]) -> set[str]:
    """Find the weights among these that a map can write as codes again; refuse a map that lacks the inputs of some, or serves none."""
    refuse_other_base(requantize, requantize.facts["base"], {**plan.base_identity})
    coded = [
        name
        for name in names
        if isinstance(weight := plan.weights[name], Recodable)
        and all(target.transposed == weight.turned for target, _ in plan.by_weight[name])
    ]
    lacks = [
        target.tensor
        for name in coded
        for target, _ in plan.by_weight[name]
        if _entry(requantize, target) is None
    ]
    if lacks:
        what = f"has no inputs of {counted(len(lacks), 'matrix')}, {listed(map(repr, lacks))}"
        raise MismatchError(
            f"{requantize.name}: {what}; make a map with more text, or use --dequantize"
        )
    if not coded:
        what = "requantize: the adapter changes no weight that is stored in 4 bits with a scale for each group"
        raise UnsupportedError(f"{plan.base.path}: {what}; leave it out")
    return {*coded}


def _refuse_transposed(plan: Plan, quantized: Collection[str]) -> None:
    """Refuse to dequantize weights that are stored transposed to their plain form."""
    architectures = architectures_for(plan.config)
    if quantized and any(a.conv1d for a in architectures):
        what = f"a quantized {plan.config.model_type} stores its layers as (out, in) and a plain one as (in, out)"
        raise UnsupportedError(
            f"{plan.base.path}: {what}, which is not supported; {USE_PLAIN_BASE}"
        )
    embeddings = {(a.input_embedding or "").rpartition(".")[2] for a in architectures}
    sizes: set[object] = {*embeddings, plan.config.vocab_size}
    for name in sorted(quantized):
        weight = plan.weights[name]
        is_outer = isinstance(weight, GPTQ) and "*" not in pattern_of(name)
        if is_outer and {name.split(".")[-2], weight.shape[1]} & sizes:
            what = f"{name!r} is an embedding in GPTQ, whose values are stored transposed"
            raise UnsupportedError(
                f"{plan.base.path}: {what}, which is not supported; {USE_PLAIN_BASE}"
            )


def _output(
    plan: Plan, weights: WeightView, name: str, stored: StoredTensor | None
) -> OutputTensor:
    """Plan a tensor of the merged model; `stored` is the base's own tensor, if it has one."""
    edits = plan.edits
    source = edits.sources.get(name, stored)
    assert source is not None
    recipe: Recipe
    if name in plan.by_weight:
        recipe = _merged(plan, weights[name])
    elif name in edits.shifts:
        shift, scaling = edits.shifts[name]
        recipe = AddBias(weights[name], Plain.of(shift), scaling)
    elif (
        name in edits.rows
        or (stored or source).info.dtype != source.info.dtype
        or name in weights.casts
    ):
        recipe = _unmerged(plan, weights[name])
    else:
        return OutputTensor(name, source.info.dtype, source.info.shape, CopyBytes(source))
    return OutputTensor(name, SPELLINGS[written_dtype(weights[name])], source.info.shape, recipe)


def _unmerged(plan: Plan, weight: Weight) -> Recipe:
    """Make the recipe of a weight without a delta, with trained tokens if the adapter has some for it."""
    if weight.name not in plan.edits.rows:
        return Cast(weight)
    tokens, indices = plan.edits.rows[weight.name]
    return ReplaceRows(weight, Plain.of(tokens), indices)


def _head(plan: Plan, names: list[str]) -> Head:
    """Derive the head from the adapter's task and saved head; a fine-tuned model's own config describes its head."""
    if plan.adapter.describes_model:
        return Head(plan.config)
    trained = {
        name: stored.info.shape
        for name, stored in plan.edits.sources.items()
        if name in plan.edits.trained
    }
    head = implied_head(plan.config, plan.adapter.config.get("task_type"), trained, names)
    implied = {} if plan.config.values else plan.edits.config(plan.config).values
    if implied:
        says = ", ".join(f"{key}={value}" for key, value in implied.items())
        advice = (
            f"the base has no config.json: load the merged model with a config that says {says}"
        )
        head = replace(head, advice=(*head.advice, advice))
    return head


def _texts(plan: Plan, head: Head, form: Form) -> dict[str, bytes]:
    """Write the model's config if the merge changes what it must state."""
    # A fine-tuned model's own config describes it; without a base config, a config of a few keys could not be loaded.
    stated = plan.adapter.model_config if isinstance(plan.adapter, FinetunedModel) else plan.config
    if not stated.values:
        return {}
    config = stated if plan.adapter.describes_model else plan.edits.config(head.config)
    if form.dequantize:
        config = config.unquantized()
    if form.dtype is not None:
        config = config.with_dtype(str(MERGED_DTYPES[form.dtype]).removeprefix("torch."))
    if config == stated:
        return {}
    return {MODEL_CONFIG: (json.dumps(config.values, indent=2, ensure_ascii=False) + "\n").encode()}


def _uncast(model: MergedModel, dtype: MergedDtype) -> list[str]:
    """Note the floating-point tensors that do not get the requested dtype."""
    dtypes = {o.name: o.dtype for outputs in model.files.values() for o in outputs}
    stay = [
        name
        for name, own in dtypes.items()
        if own in FLOATS and own != SPELLINGS[MERGED_DTYPES[dtype]]
    ]
    what = f"{counted(len(stay), 'tensor')} of quantized weights or stored wider than most"
    return [f"not written in {dtype}: {what}, {stay[0]!r} first"] if stay else []


def merged_layout(mitigation: Mitigation, form: Form) -> Layout:
    """Lay out the base with the mitigated deltas merged in."""
    plan = mitigation.plan
    base = plan.base
    model = _without_unchanged_components(plan_merged(plan, form))
    shards = model.shards(mitigation.stamp("merge"))
    needs_index = base.index is not None if form.shard_bytes is None else len(shards) > 1
    finals = {INDEX_NAME: _index(base, model, shards)} if needs_index else {}
    components = [*dict.fromkeys(name.partition("/")[0] for name in shards)]
    if not plan.config.pipeline:
        components = []
    side = _side_files(plan, form, {*model.texts, *shards}, components)
    # A loader would apply an adapter beside the model again.
    conflicting = [SINGLE_NAME, INDEX_NAME, CONFIG_NAME, WEIGHTS_NAME, "adapter_model.bin"]
    conflicting += [name for component in components for name in component_files(component)]
    data_bytes = base.data_bytes
    if components:
        data_bytes = sum(base.files[name].header.data_bytes for name in shards)
    uncast = _uncast(model, form.dtype) if form.dtype else []
    return Layout(
        command="merge",
        shards=shards,
        recipes=model.recipes,
        memory=partial(merge_memory, model, form.requantize),
        texts=model.texts,
        finals=finals,
        copies=side.tokenizer.copies,
        left_out=side.left_out,
        conflicting_names=conflicting,
        components=components,
        base_bytes=data_bytes,
        tokenizer=side.tokenizer.tokenizer,
        warnings=[*mitigation.warnings, *side.warnings, *side.tokenizer.warnings],
        notes=[*model.head.notes, *side.tokenizer.notes, *uncast],
        advice=model.head.advice,
        model_tensors=model.tensor_count,
        pipeline=model.head.pipeline,
    )


def _without_unchanged_components(model: MergedModel) -> MergedModel:
    """Leave out the files of a pipeline's components in which nothing changes: they are copied."""
    changed = {""} | {
        component_prefix(name)
        for name, outputs in model.files.items()
        if any(not isinstance(output.recipe, CopyBytes) for output in outputs)
    }
    files = {
        name: outputs for name, outputs in model.files.items() if component_prefix(name) in changed
    }
    return replace(model, files=files)


def _index(base: Checkpoint, model: MergedModel, shards: Mapping[str, ShardPlan]) -> bytes:
    """Make the index of the files, in the base's order; new names come last."""
    index = base.index or {"weight_map": {}}
    where = {output.name: name for name, outputs in model.files.items() for output in outputs}
    stays = {name: where[name] for name in index["weight_map"] if name in where}
    nbytes = sum(shard.header.data_bytes for shard in shards.values())
    return index_bytes({**index, "weight_map": stays | where}, nbytes)


class _SideFiles(NamedTuple):
    """Files beside a merged model's: the tokenizer's choice with all copies, what is left out, and warnings."""

    tokenizer: TokenizerChoice
    left_out: list[str]
    warnings: list[str]


def _side_files(
    plan: Plan, form: Form, made: Collection[str], components: Collection[str]
) -> _SideFiles:
    """Choose the files to copy from the base, or from a fine-tuned model used as the adapter, whose own describe it.

    Parameters
    ----------
    made
        Names of the files with new contents.
    """
    # An adapter inside the base's directory is not part of the merged model.
    source = plan.base.directory
    adapter: Path | None = plan.adapter.path
    if plan.adapter.describes_model:
        source = adapter
        adapter = None
    apart = {CONFIG_NAME, WEIGHTS_NAME, *made}
    copies = [(name, path) for name, path in other_files(source, adapter) if name not in apart]
    names = [name for name, _ in copies]
    stale = [name for name in names if form.dequantize and name in STALE]
    stale += stale_weights(names, components)
    copies, warnings = with_modules(
        [(name, path) for name, path in copies if name not in stale], plan.adapter.path
    )
    tokenizer = with_tokenizer(
        copies, plan.adapter, plan.base.directory, plan.config, plan.edits.vocabulary
    )
    written = {*plan.base.files, INDEX_NAME, RECORD_NAME, *apart}
    skipped = [] if source is None else skipped_files(source, adapter)
    left_out = [*stale, *(name for name in skipped if name not in written)]
    return _SideFiles(tokenizer, left_out, warnings)


def merge_memory(
    model: MergedModel, requantize: InputMap | None, mitigation: Mitigation, resident: int
) -> Iterator[MemoryEstimate]:
    """Estimate the peak memory for each matrix, and for each other tensor that is computed, including `resident` bytes already in use."""
    for target in mitigation.plan.targets:
        size = mitigation.memory(target) + rows_bytes(mitigation.plan.weights[target.tensor])
        entry = _entry(requantize, target)
        if entry is not None:
            coded = min(RECODED_BYTES, 4 * math.prod(target.module.shape))
            size += RECODED * coded + FEEDBACK * entry.size * len(entry.values)
        yield MemoryEstimate(target.tensor, target.module.shape, resident + size)
    for output in (o for outputs in model.files.values() for o in outputs):
        size = rows_bytes(output.recipe.weight) if isinstance(output.recipe, WeightRows) else 0
        yield MemoryEstimate(output.name, output.shape, resident + size)


def merged_tensors(
    mitigation: Mitigation, form: Form, monitor: Monitor, wanted: Callable[[str], bool] | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the merged model's tensors, or those wanted, in file order and one at a time in memory; the call itself raises any refusal."""
    plan = mitigation.plan
    model = plan_merged(plan, form)
    infos = (info for shard in model.shards().values() for info in shard.header.tensors)
    made = [
        (info, model.recipes[info.name]) for info in infos if wanted is None or wanted(info.name)
    ]
    resident = resident_bytes(AdapterBatch(plan.base, (plan,)), model.tensor_count)
    busy = resident + max((info.nbytes for info, _ in made), default=0)
    needs = merge_memory(model, form.requantize, mitigation, busy)
    if mitigation.detects:
        needs = itertools.chain(detection_estimates([plan], mitigation.detection, busy), needs)
    check_budget(needs, mitigation.detection.max_memory)
    if mitigation.detects:
        mitigation = _detecting(mitigation, resident, monitor)
    return _tensors(mitigation, made, monitor)


def _detecting(mitigation: Mitigation, resident: int, monitor: Monitor) -> Mitigation:
    """Let a mitigation detect in each matrix when it is asked for, on this thread's number of threads."""
    own = torch.get_num_threads()
    targets = {target.tensor: target for target in mitigation.plan.targets}

    @lru_cache(maxsize=1)  # quantized values and their scales follow each other
    def detected(tensor: str) -> Detection:
        with threads(own):  # the last bits depend on them; merging rows in between uses one
            return detect_matrix(
                mitigation.plan,
                targets[tensor],
                mitigation.detection,
                mitigation.device,
                resident,
                monitor=monitor,
            ).detection

    return replace(mitigation, detect=lambda target: detected(target.tensor))


def _tensors(
    mitigation: Mitigation, made: list[tuple[TensorInfo, Recipe]], monitor: Monitor
) -> Iterator[tuple[str, Tensor]]:
    progress = Progress(monitor, "write", sum(info.nbytes for info, _ in made), len(made))
    for info, recipe in made:
        progress.begin(info.name)
        mitigation.plan.check_unchanged()
        with threads():
            data = gather(recipe.make(mitigation, measures=False), info.nbytes)
        yield info.name, as_tensor(data, *in_memory(info))
        progress.add(info.nbytes)
    progress.end()
