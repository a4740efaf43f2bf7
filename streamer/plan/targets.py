"""Match each module, expert and stack of a fine-tuned model to the matrix of the base that it changes, and refuse what does not fit.

A loaded model has the experts of a layer in one parameter (E, out, in), or (E, in, out) in some models. A base stores that tensor, or one
tensor for each expert, or even two (gate and up), which transformers combines on loading. Here each expert is a matrix (out, in) of its
own, however it is stored: it is detected, mitigated and merged like any other.

LoRA on ``model.layers.0.mlp.experts.gate_up_proj`` (8, 2·I, H) of a base with ``model.layers.0.mlp.experts.0.gate_proj.weight`` (I, H),
``….0.up_proj.weight`` (I, H) and so on → targets ``model.layers.0.mlp.experts.gate_up_proj[0]`` … ``[7]``, each (2·I, H): the first I rows
are in the expert's ``gate_proj``, the others in its ``up_proj``.

``model.layers.0.mlp.experts.down_proj`` (8, m, n) of both models → targets ``model.layers.0.mlp.experts.down_proj[0]`` … ``[7]``, each the
difference of two matrices. The table of `architectures` says which tensors are stacks and how they are oriented.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.adapter_config import Wrapped, is_grouped
from streamer.adapters.finetuned import FinetunedModel
from streamer.adapters.modules import LoraModule, Module
from streamer.errors import MismatchError, UnsupportedError
from streamer.plan import architectures as tables
from streamer.plan import names as naming
from streamer.plan.architectures import Architecture, architecture_for, pattern_of
from streamer.plan.name_matching import Match, TensorSlice
from streamer.plan.names import Loaded, NameIndex
from streamer.storage.checkpoint import Checkpoint
from streamer.storage.header import TensorInfo
from streamer.units import listed
from streamer.weights.base import TensorShape, Weight
from streamer.weights.logical import WeightView
from streamer.weights.model_config import ModelConfig


@dataclass(frozen=True)
class Target:
    """One matrix of the base and the module that changes it.

    Attributes
    ----------
    tensor
        The matrix's name: the tensor's name in the base, or a made-up name if the matrix is part of a tensor or combines several.
    module
        The adapter's module.
    transposed
        Whether the base stores (in, out): the delta is then added to the transpose.
    match
        How the name was found.
    pieces
        Slices that together hold its rows, in order, if it is not a whole tensor.
    """

    tensor: str
    module: Module
    transposed: bool
    match: Match
    stored: TensorShape = ()
    pieces: tuple[TensorSlice, ...] = ()

    @property
    def slices(self) -> tuple[TensorSlice, ...]:
        """Return the slices that together hold its rows, in order."""
        return self.pieces or (TensorSlice(self.tensor),)

    @property
    def kernel(self) -> TensorShape:
        """Return the dimensions of a convolution's kernel."""
        return self.stored[2:]

    @property
    def is_embedding(self) -> bool:
        """Return whether the weight is an embedding, which is looked up and not multiplied."""
        return self.module.layer_kind == "embedding"


@dataclass(frozen=True)
class Orientation:
    """The layers of a base that store (in, out), as Conv1D does; every other linear layer stores (out, in).

    In an unknown base, ``c_proj`` and the other names that Conv1D has in some class may be either. If another layer of the same stack of
    layers (``transformer.h.0`` to ``transformer.h.11``) is seen to be Linear, all are. A base without a class of its type, such as another
    library's ``NanoGPT`` of type ``gpt2``, counts as known if its biases show that it stores its layers as the classes of that type do.

    Attributes
    ----------
    architectures
        Facts about the base's class, or about all classes that it may have; empty if not known.
    has_conv1d
        Whether the bias of some layer of an unknown base shows (in, out): other layers may be stored so, too.
    linear
        For an unknown base, stacks of layers in which layers with a Conv1D name were seen to be Linear.
    """

    architectures: tuple[Architecture, ...]
    has_conv1d: bool = False
    linear: frozenset[str] = frozenset()

    @classmethod
    def of(cls, base: Checkpoint, config: ModelConfig) -> Orientation:
        """Decide by the table of architectures, or by the shapes of a base that it does not know."""
        known = tables.architectures_for(config)
        if known and architecture_for(config):
            return cls(known)
        biased = _by_bias(base)
        if known and _stored_as(known, base, biased):
            return cls(known)
        linear = {_stack_of(n) for n, turned in biased.items() if not turned and _may_be_conv1d(n)}
        return cls((), any(biased.values()), frozenset(linear))

    def seen(
        self, adapter: DeltaSource, weights: WeightView, names: Mapping[str, Match]
    ) -> Orientation:
        """Learn from an adapter's layers on an unknown base: layers that fit only (out, in) are Linear."""
        if self.architectures or adapter.describes_model:
            return self
        fitting = {
            _stack_of(match.tensor)
            for name, match in names.items()
            if match.tensor
            and _may_be_conv1d(match.tensor)
            and _ways_that_fit(adapter.modules[name], weights[match.tensor]) == {False}
        }
        return replace(self, linear=self.linear | fitting)

    def ways(self, tensor: str, *names: str, fan_in_fan_out: bool = False) -> set[bool]:
        """List the ways in which a weight of this name may be stored: False is (out, in), True (in, out).

        PEFT sets ``fan_in_fan_out`` if the last module that it wrapped is a Conv1D, and ignores the key on a Linear; users set it out of
        habit. So it decides nothing.

        Parameters
        ----------
        names
            Names of the weight's module in a loaded model.
        """
        if self.architectures:
            return {any(map(a.transposed, names)) for a in self.architectures}
        named = any(map(_may_be_conv1d, (tensor, *names)))
        unsettled = named and _stack_of(tensor) not in self.linear
        return {False, True} if self.has_conv1d or fan_in_fan_out or unsettled else {False}


def _may_be_conv1d(name: str) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in tables.conv1d_names()


def _stack_of(name: str) -> str:
    """Return the path of the stack of layers that contains a name: ``transformer.h.0.attn.c_proj.weight`` → ``transformer.h.``."""
    return pattern_of(name).partition("*")[0]


def _ways_that_fit(module: Module, weight: Weight) -> set[bool]:
    linear = module.layer_kind == "linear" and len(weight.shape) == 2 and not weight.quantized
    return {way for way in (False, True) if linear and module.placed(weight.shape, way) is not None}


def _by_bias(base: Checkpoint) -> dict[str, bool]:
    """Determine from the biases of layers that are not square whether each is stored (in, out)."""
    transposed = {}
    for name in base.weight_map:
        bias = f"{name.removesuffix('weight')}bias"
        if name.endswith(".weight") and bias in base.weight_map:
            shape = base.info(name).shape
            outputs = base.info(bias).shape
            if len(shape) == 2 and shape[0] != shape[1] and outputs in (shape[:1], shape[1:]):
                transposed[name] = outputs == shape[1:]
    return transposed


def _stored_as(
    classes: Sequence[Architecture], base: Checkpoint, biased: Mapping[str, bool]
) -> bool:
    """Test whether layers with biases are stored as in these classes, with at least one in every stack of layers that has a Conv1D."""
    modules = {name: name.removesuffix(".weight") for name in base.weight_map}
    conv1d = {n for n, module in modules.items() if any(a.transposed(module) for a in classes)}
    transposed = {name for name, is_transposed in biased.items() if is_transposed}
    stacks = set(map(_stack_of, conv1d))
    return transposed == conv1d & biased.keys() and stacks <= set(map(_stack_of, biased))


def match_targets(
    weights: WeightView,
    adapter: DeltaSource,
    orientation: Orientation,
    names: Mapping[str, Match],
    index: NameIndex,
) -> list[Target]:
    """Match every module of the adapter to the base tensor that it changes, in the base's file order.

    Parameters
    ----------
    names
        Matches of `match_names`.

    Raises
    ------
    MismatchError
        If any module is unmatched, ambiguous or of a wrong shape, or two modules change one tensor; the message names all of them.
    UnsupportedError
        If computing with a matched tensor's encoding is not supported.
    """
    problems = []
    targets: dict[str, Target] = {}
    orientation = orientation.seen(adapter, weights, names)
    for name, match in names.items():
        module = adapter.modules[name]
        tensor = match.tensor
        if not tensor:
            problems.append(f"{name!r} {match.why}")
            continue
        weight = weights[tensor]
        shape = weight.shape
        if module.layer_kind != "linear":
            ways = {module.layer_kind != "convolution"}
        elif weight.quantized or len(shape) != 2:
            ways = {False}  # quantizers store all kinds of layers as (out, in)
        else:
            loaded = index.at_run_time.get(tensor, tensor).removesuffix(".weight")
            flag = bool(adapter.config.get("fan_in_fan_out"))
            ways = orientation.ways(tensor, name, loaded, fan_in_fan_out=flag)
        placed = {way: module.placed(shape, way) for way in sorted(ways)}
        fitting = [(fitted, way) for way, fitted in placed.items() if fitted is not None]
        if not fitting:
            has = "found" if tensor == f"{name}.weight" else f"{tensor!r} has"
            turned = ", transposed," if ways == {True} and module.layer_kind == "linear" else ""
            problems.append(
                f"{name!r}: expected {module.expected}{turned} in the base, {has} {list(shape)}"
            )
        elif len(fitting) > 1 or (adapter.describes_model and len(ways) > 1):
            problems.append(
                f"{name!r}: {list(shape)} does not show whether it is stored as (out, in) or, as a Conv1D, (in, out), and the base's "
                "config.json does not say; name its class with --architecture NAME"
            )
        elif tensor in targets:
            problems.append(f"{name!r} and {targets[tensor].module.name!r} both change {tensor!r}")
        else:
            ((fitted, transposed),) = fitting
            targets[tensor] = Target(tensor, fitted, transposed, match, shape, match.pieces)
    refuse_misfits(problems, len(names), adapter, weights)
    return [targets[name] for name in weights if name in targets]


def refuse_misfits(
    problems: Sequence[str], of: int, adapter: DeltaSource, weights: WeightView
) -> None:
    """Raise `MismatchError` if modules do not fit the base; it describes two of the problems, or one if names are long."""
    if problems:
        which = f"{len(problems)} of {of} modules do not fit {weights.checkpoint.path}: {listed(problems, 2, '; ', 200)}"
        raise MismatchError(
            f"{adapter.path}: {which}; is this the base that the adapter was trained on?"
        )


# The order in which transformers' modules register their parameters; PEFT wraps them in that order.
REGISTERED = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "down_proj", "w2")


@dataclass(frozen=True)
class Stack:
    """A parameter of the loaded model that holds a matrix for each expert.

    Attributes
    ----------
    name
        Its name in findings: the tensor's name, or the run-time name if it is built on loading.
    experts
        The location of each expert's rows.
    shape
        (out, in) of one matrix.
    transposed
        Whether the base stores (in, out).
    run_time
        ``out,in`` or ``in,out``: how the loaded model stores a matrix; empty if versions of transformers differ.
    """

    name: str
    experts: tuple[tuple[TensorSlice, ...], ...]
    shape: tuple[int, int]
    transposed: bool
    run_time: str


def match_experts(
    weights: WeightView,
    adapter: DeltaSource,
    config: ModelConfig,
    architectures: Sequence[Architecture],
    names: Mapping[str, Match],
    index: NameIndex,
) -> list[Target]:
    """Match every expert of every wrapped parameter, or of a fine-tuned model's stacks, to the slices of the base that hold it.

    Parameters
    ----------
    architectures
        Facts about the base's class, or about all classes that it may have.
    names
        Matches of `match_names`, including the wrapped parameters.

    Raises
    ------
    MismatchError
        If a parameter is unmatched, or its shape fits no factors, or factors fit several parameters; the message names all of them.
    UnsupportedError
        If the orientation of square matrices' factors is not known.
    """
    if isinstance(adapter, FinetunedModel):
        return _match_stacks(weights, adapter, names)
    if not adapter.wrapped:
        return []
    problems = []
    placed = []
    for wrapped in adapter.wrapped:
        stacks = {}
        for parameter in wrapped.parameters:
            name = f"{wrapped.module}.{parameter}"
            match = names[wrapped.matched_as(parameter)]
            found = _stack(name, match, weights, config, architectures, index)
            if isinstance(found, Stack):
                stacks[parameter] = found
            else:
                problems.append(f"{name!r} {found}")
        if len(stacks) != len(wrapped.parameters):
            continue
        order = _assign(wrapped, stacks, adapter)
        if isinstance(order, str):
            problems.append(f"{wrapped.module!r} {order}")
            continue
        for parameter, factors in zip(order, wrapped.factors, strict=True):
            match = names[wrapped.matched_as(parameter)]
            name = f"{wrapped.module}.{parameter}"
            placed.append(_PlacedFactors(name, match, stacks[parameter], factors))
    refuse_misfits(problems, sum(len(w.parameters) for w in adapter.wrapped), adapter, weights)
    turned = _transposed(placed, adapter)
    return [
        target
        for of, delta_transposed in zip(placed, turned, strict=True)
        for target in _expert_targets(of, adapter, delta_transposed)
    ]


class _PlacedFactors(NamedTuple):
    """The names of a parameter's lora_A and lora_B, and the stack that they change."""

    name: str
    match: Match
    stack: Stack
    factors: tuple[str, str]


def _expert_targets(
    of: _PlacedFactors, adapter: DeltaSource, delta_transposed: bool
) -> Iterator[Target]:
    stack = of.stack
    experts = len(stack.experts)
    a, b = of.factors
    header = adapter.file.header
    rank = header.by_name[a].shape[0] // experts
    scaling = adapter.config.lora_scaling(of.name, rank)
    # With one expert, or rank 1, both orders are the same.
    grouped = min(experts, rank) > 1 and is_grouped(adapter.config, adapter.path, header.metadata)
    all_experts = LoraModule(
        of.name, a, b, rank, scaling, stack.shape, "expert", (), None, grouped, delta_transposed
    )
    for e, slices in enumerate(stack.experts):
        module = replace(all_experts, name=f"{of.name}[{e}]", expert=(e, experts))
        yield Target(f"{stack.name}[{e}]", module, stack.transposed, of.match, pieces=slices)


def _stack(
    name: str,
    match: Match,
    weights: WeightView,
    config: ModelConfig,
    architectures: Sequence[Architecture],
    index: NameIndex,
) -> Stack | str:
    """Find the stack that a parameter of this name is, or describe what is wrong."""
    tensor = match.tensor
    if not tensor:
        return match.why
    loaded = index.loaded.get(tensor)
    run_time = tensor if loaded is None else loaded.name
    stored = {a.stack_orientation(n) for a in architectures for n in (run_time, name)} - {""}
    parts = [of for of in index.by_run_time.get(tensor, ()) if of.by is not None and of.by.stacks]
    shape = () if parts else weights[tensor].shape
    if not parts and len(shape) != 3:
        return f"should be a stack of matrices, but {tensor!r} has shape {list(shape)}"
    if len(stored) != 1:
        return (
            "is a stack of matrices, but the base's config.json does not say whether they are stored as (out, in) or (in, out); name "
            "the base's class with --architecture NAME"
        )
    (order,) = stored
    in_out = order == "in,out"
    if parts:
        return _built(tensor, parts, weights, config, in_out)
    experts, m, n = shape
    slices = tuple((TensorSlice(tensor, e),) for e in range(experts))
    return Stack(tensor, slices, (n, m) if in_out else (m, n), in_out, order)


def _built(
    name: str, loaded: Sequence[Loaded], weights: WeightView, config: ModelConfig, in_out: bool
) -> Stack | str:
    """Make the stack that loading builds from each expert's tensors, or from stacks concatenated by rows."""
    first = loaded[0]
    by = first.by
    assert by is not None
    sources = by.by_source(loaded)
    numbers = [*range(len(sources[0]))]
    complete = all(sorted(source) == numbers for source in sources)
    of_experts = {tuple(weights[s[e]].shape for s in sources) for e in numbers if complete}
    wrong = f"is built on loading from {first.tensor!r} and similar tensors, which do not fit together or lack an expert"
    if len(of_experts) != 1 or sum(map(len, sources)) != len(loaded):
        return wrong
    (shapes,) = of_experts
    kinds = {(*shape[:-2], shape[-1]) for shape in shapes}  # everything except their heights
    is_whole = len(shapes[0]) == (2 if by.numbered else 3)
    if len(kinds) != 1 or not is_whole or (naming.CONCATENATE in by.by and in_out):
        return wrong
    heights = [shape[-2] for shape in shapes]
    m = sum(heights)
    n = shapes[0][-1]
    rows = [*itertools.pairwise(itertools.accumulate(heights, initial=0))]
    spans = rows if len(rows) > 1 else [None]

    def slices(e: int) -> tuple[TensorSlice, ...]:
        parts = zip(sources, spans, strict=True)
        if by.numbered:
            return tuple(TensorSlice(source[e], None, span) for source, span in parts)
        return tuple(TensorSlice(source[0], e, span) for source, span in parts)

    transposed = in_out != (naming.TRANSPOSE in by.by)
    if naming.TRANSPOSE_IF in by.by:
        # If the shape is not the model's, whose input and output are hidden_size wide.
        known = m if name.endswith("down_proj") else n
        transposed = known != config.hidden_size
        if config.hidden_size not in (m, n):
            return f"is stored as {[m, n]}, but neither dimension is the model's hidden_size {config.hidden_size}"
    experts = numbers if by.numbered else range(shapes[0][0])
    turns = by.by in ((naming.TRANSPOSE,), (naming.TRANSPOSE_IF,))
    shape = (n, m) if transposed else (m, n)
    return Stack(name, tuple(map(slices, experts)), shape, transposed, "" if turns else "out,in")


Sides = tuple[TensorShape, TensorShape]
"""Shapes of lora_A and lora_B."""


def _sides(factors: tuple[str, str], adapter: DeltaSource) -> Sides:
    a, b = (adapter.file.header.by_name[name].shape for name in factors)
    return a, b


def _assign(
    wrapped: Wrapped, stacks: Mapping[str, Stack], adapter: DeltaSource
) -> tuple[str, ...] | str:
    """Assign each wrapper its parameter, innermost first, or describe what is wrong."""
    sides = [_sides(factors, adapter) for factors in wrapped.factors]
    fits = [
        order
        for order in itertools.permutations(stacks)
        if all(_fit(stacks[p], *s) for p, s in zip(order, sides, strict=True))
    ]
    if len(fits) == 1:
        return fits[0]
    registered = tuple(parameter for parameter in REGISTERED if parameter in stacks)
    if registered in fits:
        return registered
    shapes = listed((f"lora_A {list(a)}, lora_B {list(b)}" for a, b in sides), separator="; ")
    wanted = listed(
        f"{p} with {len(s.experts)} experts of {list(s.shape)}" for p, s in stacks.items()
    )
    why = "fit in more than one way" if fits else "do not fit"
    return f"has factors ({shapes}) that {why}: the base has {wanted}"


def _fit(stack: Stack, a: Sequence[int], b: Sequence[int]) -> bool:
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] == 0 or a[0] % len(stack.experts):
        return False
    return {(b[0], a[1]), (a[1], b[0])} >= {stack.shape}


def _transposed(placed: Sequence[_PlacedFactors], adapter: DeltaSource) -> list[bool]:
    """Return for each stack whether ``(B·A)ᵀ`` is (out, in): by its shape; if square, like the others; else by PEFT's version."""
    by_shape = []
    for of in placed:
        (_, width), _ = _sides(of.factors, adapter)
        m, n = of.stack.shape
        by_shape.append(width == m if m != n else None)
    seen = {*by_shape} - {None}
    alike = seen.pop() if len(seen) == 1 else None
    turned = []
    for of, shown in zip(placed, by_shape, strict=True):
        known = alike if shown is None else shown
        turned.append(_by_version(of.stack, adapter) if known is None else known)
    return turned


def _by_version(stack: Stack, adapter: DeltaSource) -> bool:
    """Decide by PEFT's version: up to 0.19.0 it added ``(B·A)ᵀ`` to the stored parameter; since 0.19.1 lora_A has the input's width.

    For a parameter (in, out), PEFT 0.19 and later also depends on whether transformers marks the module as transposed (``is_transposed``):
    version 5 does, version 4 does not, and the adapter does not record which one was used. For a parameter (out, in) neither marks it.
    """
    stated = adapter.config.get("peft_version", "0.17.0")  # later versions write it
    match = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", stated) if isinstance(stated, str) else None
    version = tuple(map(int, match.groups())) if match else ()
    if version and stack.run_time == "out,in":
        return version < (0, 19, 1)
    if version and version < (0, 19) and stack.run_time == "in,out":
        return False
    raise UnsupportedError(
        f"{adapter.config.path}: refused: the experts of {stack.name!r} are square ({stack.shape[0]}x{stack.shape[1]}), and "
        f"peft_version {stated!r} does not determine the orientation of their factors; train gate_up_proj as well, or merge with PEFT"
    )


def tensor_roles(
    path: Path, base: Checkpoint, config: ModelConfig, orientation: Orientation, names: NameIndex
) -> Callable[[TensorInfo], str]:
    """Return a function that gives the role in its layer of a fine-tuned model's tensor; see `open_finetuned`.

    The base's class decides. If that is not known, or has no such layer under a usual config, common names of embeddings decide.

    Parameters
    ----------
    path
        Path of the fine-tuned model, for messages.
    config
        Config of the base.

    Raises
    ------
    UnsupportedError
        Raised by the returned function if a tensor may be a stack of experts with unknown orientation.
    """
    classes = orientation.architectures

    def role(info: TensorInfo) -> str:
        module, _, parameter = info.name.rpartition(".")
        (loaded,) = names.among([info.name]).loaded.values()
        if len(info.shape) == 3 and (order := _order(path, base, config, classes, info, loaded)):
            return order
        if parameter != "weight" or len(info.shape) < 2:
            return ""
        if len(info.shape) > 2:  # a table of positions may be called a weight only on disk
            return "weight" if loaded.by or loaded.name.endswith(".weight") else ""
        run_time = loaded.name.removesuffix(".weight")
        telling = [a for a in classes if a.has_module(run_time)] or classes
        named = not classes and tables.EMBEDDING.search(module) is not None
        if named or any(a.is_embedding(run_time) for a in telling):
            return "embedding"
        return "conv1d" if orientation.ways(info.name, run_time) == {True} else "weight"

    return role


def _order(
    path: Path,
    base: Checkpoint,
    config: ModelConfig,
    classes: Sequence[Architecture],
    info: TensorInfo,
    loaded: Loaded,
) -> str:
    """Return the order in which the matrices of a stack of experts are stored; empty for another tensor."""
    by = () if loaded.by is None else loaded.by.by
    stated = {a.stack_orientation(loaded.name) for a in classes} - {""}
    if len(stated) == 1 and by in ((), (naming.CONCATENATE,), (naming.TRANSPOSE,)):
        (run_time,) = stated
        other = {"out,in": "in,out", "in,out": "out,in"}
        return other[run_time] if by == (naming.TRANSPOSE,) else run_time
    # For a class of another library, the classes of its type say nothing about stacks.
    unknown = not classes or (bool(config.architectures) and architecture_for(config) is None)
    # A tensor with a vector for each position, such as a token that starts every sequence, has a dimension of 1; so has the kernel
    # of a convolution with one channel. Other convolutions have a bias of one number for each output, experts one for each expert.
    bias = info.name.removesuffix("weight") + "bias" if info.name.endswith(".weight") else ""
    convolution = bias in base.weight_map and base.info(bias).shape == info.shape[:1]
    undecided = (unknown or by) and min(info.shape) > 1 and not convolution
    if stated or undecided:
        raise UnsupportedError(
            f"{path}: {info.name!r} {list(info.shape)} may be a stack of experts, whose orientation is not known for "
            f"{listed(map(str, config.architectures)) or 'no class'}; name the base's class with --architecture NAME"
        )
    return ""


def _match_stacks(
    weights: WeightView, tuned: FinetunedModel, names: Mapping[str, Match]
) -> list[Target]:
    """Match every expert of every stack of a fine-tuned model to its slice of the base.

    Parameters
    ----------
    names
        Matches of `match_names`, including the stacks.

    Raises
    ------
    MismatchError
        If a stack is unmatched, or the base's stack has another shape.
    """
    problems = []
    targets = []
    for stack in tuned.stacks:
        match = names[stack.name.removesuffix(".weight")]
        stored = tuned.tensors[stack.name].info.shape
        if match.tensor not in weights:
            problems.append(f"{stack.name!r} {match.why}")
        elif (shape := weights[match.tensor].shape) != stored:
            problems.append(
                f"{stack.name!r}: expected shape {list(stored)} in the base, found {list(shape)}"
            )
        else:
            transposed = stack.layer_kind == "conv1d"
            for e in range(stored[0]):
                module = replace(stack, name=f"{stack.name}[{e}]", expert=e)
                pieces = (TensorSlice(match.tensor, e),)
                name = f"{match.tensor}[{e}]"
                targets.append(Target(name, module, transposed, match, pieces=pieces))
    refuse_misfits(problems, len(tuned.stacks), tuned, weights)
    return targets
