"""Match LoRA on a stacked parameter of experts, split into one matrix for each expert, to the base's tensors.

A loaded model has the experts of a layer in one parameter (E, out, in), or (E, in, out) in some models. A base stores that tensor, or one
tensor for each expert, or even two (gate and up), which transformers combines on loading. Here each expert is a matrix (out, in) of its
own, however it is stored: it is detected, mitigated and merged like any other.

LoRA on ``model.layers.0.mlp.experts.gate_up_proj`` (8, 2·I, H) of a base with ``model.layers.0.mlp.experts.0.gate_proj.weight`` (I, H),
``….0.up_proj.weight`` (I, H) and so on → targets ``model.layers.0.mlp.experts.gate_up_proj[0]`` … ``[7]``, each (2·I, H): the first I rows
are in the expert's ``gate_proj``, the others in its ``up_proj``.

Classify the layers of a fine-tuned model, and match its stacks of experts to the base's, one matrix for each expert.

``model.layers.0.mlp.experts.down_proj`` (8, m, n) of both models → targets ``model.layers.0.mlp.experts.down_proj[0]`` … ``[7]``, each the
difference of two matrices. The table of `architectures` says which tensors are stacks and how they are oriented.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.adapter_config import Wrapped, is_grouped
from streamer.adapters.finetuned import FinetunedModel
from streamer.adapters.modules import LoraModule
from streamer.errors import MismatchError, UnsupportedError
from streamer.plan.architectures import EMBEDDING, Architecture, architecture_for
from streamer.plan.name_matching import CONCATENATE, MERGE, TRANSPOSE, TRANSPOSE_IF, Loaded, Match, Renames, renames_for
from streamer.plan.targets import Orientation, Target, TensorSlice, misfits
from streamer.storage.checkpoint import Checkpoint
from streamer.storage.header import TensorInfo
from streamer.units import listed
from streamer.weights.base import RowConcat, Weight
from streamer.weights.logical import WeightView
from streamer.weights.model_config import ModelConfig

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


def expert_weight(target: Target, weights: WeightView) -> Weight:
    """Make an expert's matrix from the slices that hold its rows."""
    pieces = [weights[p.weight] if p.index is None else weights[p.weight].slice(p.index) for p in target.pieces]
    return replace(pieces[0], name=target.tensor) if len(pieces) == 1 else RowConcat.of(target.tensor, pieces)


def match_experts(weights: WeightView, adapter: DeltaSource, config: ModelConfig, architectures: Sequence[Architecture],
                  names: Mapping[str, Match], renames: Renames) -> list[Target]:  # fmt: skip
    """Match every expert of every wrapped parameter to the slices of the base that hold it.

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
    if not adapter.wrapped:
        return []
    built: defaultdict[str, list[Loaded]] = defaultdict(list)
    run_time: dict[str, str] = {}
    for loaded in renames.loaded(weights):
        run_time[loaded.tensor] = loaded.name
        if loaded.by is not None and loaded.by.stacks:
            built[loaded.name].append(loaded)
    problems: list[str] = []
    pairs: list[tuple[str, Match, Stack, tuple[str, str]]] = []
    for wrapped in adapter.wrapped:
        stacks: dict[str, Stack] = {}
        for parameter in wrapped.parameters:
            match = names[wrapped.matched_as(parameter)]
            stack_names = run_time.get(match.tensor, match.tensor), f"{wrapped.module}.{parameter}"
            stored = {a.stack_orientation(n) for a in architectures for n in stack_names} - {""}
            found = _stack(match.tensor, built, weights, config, stored) if match.tensor else match.why
            if isinstance(found, Stack):
                stacks[parameter] = found
            else:
                problems.append(f"{wrapped.module + '.' + parameter!r} {found}")
        if len(stacks) != len(wrapped.parameters):
            continue
        order = _assign(wrapped, stacks, adapter)
        if isinstance(order, str):
            problems.append(f"{wrapped.module!r} {order}")
            continue
        pairs += [
            (f"{wrapped.module}.{parameter}", names[wrapped.matched_as(parameter)], stacks[parameter], factors)
            for parameter, factors in zip(order, wrapped.factors, strict=True)
        ]
    if problems:
        raise MismatchError(misfits(problems, sum(len(w.parameters) for w in adapter.wrapped), adapter, weights))
    transposed = _transposed([(stack, *_sides(factors, adapter)) for _, _, stack, factors in pairs], adapter)
    return [
        target
        for (name, match, stack, factors), delta_transposed in zip(pairs, transposed, strict=True)
        for target in _targets(name, match, stack, factors, delta_transposed, adapter)
    ]


def _stack(
    tensor: str, built: Mapping[str, list[Loaded]], weights: WeightView, config: ModelConfig, stored: set[str]
) -> Stack | str:
    """Find the stack of this name, or describe what is wrong; `stored` are the orientations that the base's class may use."""
    if tensor not in built and len(weights[tensor].shape) != 3:
        return f"should be a stack of matrices, but {tensor!r} has shape {list(weights[tensor].shape)}"
    if len(stored) != 1:
        return (
            "is a stack of matrices, but the base's config.json does not say whether they are stored as (out, in) or (in, out); name "
            "the base's class with --architecture NAME"
        )
    in_out = stored == {"in,out"}
    if tensor in built:
        return _built(tensor, built[tensor], weights, config, in_out)
    shape = weights[tensor].shape
    experts, m, n = shape
    slices = tuple((TensorSlice(tensor, e),) for e in range(experts))
    if in_out:
        return Stack(tensor, slices, (n, m), True, "in,out")
    return Stack(tensor, slices, (m, n), False, "out,in")


def _built(name: str, loaded: Sequence[Loaded], weights: WeightView, config: ModelConfig, in_out: bool) -> Stack | str:
    """Make the stack that loading builds from each expert's tensors, or from stacks concatenated by rows."""
    by = loaded[0].by
    assert by is not None
    numbered = MERGE in by.by
    sources: list[dict[int, str]] = [{} for _ in by.sources]
    for part in loaded:
        sources[part.source][(part.number if numbered else 0) or 0] = part.tensor
    experts = len(sources[0])
    shapes = {tuple(weights[s[e]].shape for s in sources) for e in range(experts) if all(e in s for s in sources)}
    wrong = f"is built on loading from {loaded[0].tensor!r} and similar tensors, which do not fit together or lack an expert"
    whole = all(sorted(s) == list(range(experts)) for s in sources)
    if not whole or sum(map(len, sources)) != len(loaded) or len(shapes) != 1:
        return wrong
    (one,) = shapes
    kinds = {(*s[:-2], s[-1]) for s in one}  # everything except their heights
    if len(kinds) != 1 or len(one[0]) != (2 if numbered else 3) or (CONCATENATE in by.by and in_out):
        return wrong
    heights, width = [s[-2] for s in one], one[0][-1]
    ends = list(itertools.accumulate(heights))
    rows = [(end - h, end) for h, end in zip(heights, ends, strict=True)] if len(heights) > 1 else [None]

    def slices(e: int) -> tuple[TensorSlice, ...]:
        tensor, index = (e, None) if numbered else (0, e)
        return tuple(TensorSlice(s[tensor], index, r) for s, r in zip(sources, rows, strict=True))

    m, n = ends[-1], width
    transposed = in_out != (TRANSPOSE in by.by)
    if TRANSPOSE_IF in by.by:  # if the shape is not the model's, whose input and output are hidden_size wide
        known = n if not name.endswith("down_proj") else m
        transposed = known != config.hidden_size
        if config.hidden_size not in (m, n):
            return f"is stored as {[m, n]}, but neither dimension is the model's hidden_size {config.hidden_size}"
    if transposed:
        m, n = n, m
    run_time = "out,in" if by.by in ((MERGE,), (MERGE, CONCATENATE), (CONCATENATE,)) else ""
    return Stack(name, tuple(map(slices, range(experts if numbered else one[0][0]))), (m, n), transposed, run_time)


def _sides(factors: tuple[str, str], adapter: DeltaSource) -> tuple[tuple[int, ...], tuple[int, ...]]:
    a, b = (adapter.file.header.by_name[name].shape for name in factors)
    return a, b


def _assign(wrapped: Wrapped, stacks: Mapping[str, Stack], adapter: DeltaSource) -> tuple[str, ...] | str:
    """Assign each wrapper its parameter, innermost first, or describe what is wrong."""
    fits = [
        order
        for order in itertools.permutations(stacks)
        if all(_fit(stacks[p], *_sides(factors, adapter)) for p, factors in zip(order, wrapped.factors, strict=True))
    ]
    if len(fits) == 1:
        return fits[0]
    registered = tuple(sorted(stacks, key=lambda p: REGISTERED.index(p) if p in REGISTERED else len(REGISTERED)))
    if registered in fits and all(p in REGISTERED for p in stacks):
        return registered
    sides = [_sides(factors, adapter) for factors in wrapped.factors]
    shapes = listed((f"lora_A {list(a)}, lora_B {list(b)}" for a, b in sides), separator="; ")
    wanted = listed(f"{p} with {len(s.experts)} experts of {list(s.shape)}" for p, s in stacks.items())
    why = "fit in more than one way" if fits else "do not fit"
    return f"has factors ({shapes}) that {why}: the base has {wanted}"


def _fit(stack: Stack, a: Sequence[int], b: Sequence[int]) -> bool:
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] == 0 or a[0] % len(stack.experts):
        return False
    return {(b[0], a[1]), (a[1], b[0])} >= {stack.shape}


def _transposed(stacks: Sequence[tuple[Stack, Sequence[int], Sequence[int]]], adapter: DeltaSource) -> list[bool]:
    """Return for each stack whether ``(B·A)ᵀ`` is (out, in): by its shape; if square, like the others; else by PEFT's version."""
    by_shape = [None if s.shape[0] == s.shape[1] else (a[1] == s.shape[0]) for s, a, _ in stacks]
    seen = {t for t in by_shape if t is not None}
    out = []
    for (stack, *_), transposed in zip(stacks, by_shape, strict=True):
        if transposed is not None:
            out.append(transposed)
        else:
            out.append(next(iter(seen)) if len(seen) == 1 else _by_version(stack, adapter))
    return out


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
        f"peft_version {stated!r} does not determine the orientation of their factors, which depends on the version of transformers used "
        "for training; train their gate_up_proj as well, whose shape shows it, or merge with PEFT in the versions used for training"
    )


def _targets(
    name: str, match: Match, stack: Stack, factors: tuple[str, str], delta_transposed: bool, adapter: DeltaSource
) -> list[Target]:
    a, b = factors
    experts = len(stack.experts)
    rank = adapter.file.header.by_name[a].shape[0] // experts
    scaling = adapter.config.lora_scaling(name, rank)
    # With one expert, or rank 1, both orders are the same.
    grouped = min(experts, rank) > 1 and is_grouped(adapter.config, adapter.path, adapter.file.header.metadata)
    whole = LoraModule(
        name, a, b, rank, scaling, stack.shape, "expert", grouped=grouped, delta_transposed=delta_transposed
    )
    targets = []
    for e, slices in enumerate(stack.experts):
        module = replace(whole, name=f"{name}[{e}]", expert=(e, experts))
        targets.append(Target(f"{stack.name}[{e}]", module, stack.transposed, match, pieces=slices))
    return targets


def tensor_roles(
    path: Path, base: Checkpoint, config: ModelConfig, orientation: Orientation
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
    classes, renames = orientation.architectures, renames_for(config)
    # For a class of another library, the classes of its type say nothing about stacks.
    unknown = not classes or (bool(config.architectures) and architecture_for(config) is None)

    def role(info: TensorInfo) -> str:
        module, _, parameter = info.name.rpartition(".")
        (loaded,) = renames.loaded([info.name])
        if len(info.shape) == 3 and (layout := stack_layout(info, loaded)):
            return layout
        if parameter != "weight" or len(info.shape) < 2:
            return ""
        if len(info.shape) > 2:  # a table of positions may be called a weight only on disk
            return "weight" if loaded.by or loaded.name.endswith(".weight") else ""
        run_time = loaded.name.removesuffix(".weight")
        telling = [a for a in classes if a.has_module(run_time)] or classes
        if any(a.is_embedding(run_time) for a in telling) if telling else EMBEDDING.search(module):
            return "embedding"
        return "conv1d" if orientation.ways(info.name, run_time) == {True} else "weight"

    def stack_layout(info: TensorInfo, loaded: Loaded) -> str:
        by = () if loaded.by is None else loaded.by.by
        stated = {a.stack_orientation(loaded.name) for a in classes} - {""}
        if len(stated) == 1 and by in ((), (CONCATENATE,), (TRANSPOSE,)):
            (run_time,) = stated
            return ",".join(reversed(run_time.split(","))) if by == (TRANSPOSE,) else run_time
        # A tensor with a vector for each position, such as a token that starts every sequence, has a dimension of 1; so has the kernel
        # of a convolution with one channel. Other convolutions are recognised by their bias.
        undecided = (unknown or by) and min(info.shape) > 1 and not _is_convolution(info, base)
        if stated or undecided:
            raise UnsupportedError(
                f"{path}: {info.name!r} {list(info.shape)} may be a stack of experts, and how their matrices are oriented is not known for "
                f"{listed(map(str, config.architectures)) or 'a model whose config.json names no class'}; name the base's class with "
                "--architecture NAME"
            )
        return ""

    return role


def _is_convolution(info: TensorInfo, base: Checkpoint) -> bool:
    """Test whether a weight (out, in, kernel) has a bias of one number for each output; experts have a bias for each expert."""
    bias = info.name.removesuffix("weight") + "bias"
    return info.name.endswith(".weight") and bias in base.weight_map and base.info(bias).shape == info.shape[:1]


def stacks_of(adapter: DeltaSource) -> list[str]:
    """List the names under which a fine-tuned model's stacks are looked up in a base."""
    return [s.tensor.removesuffix(".weight") for s in adapter.stacks] if isinstance(adapter, FinetunedModel) else []


def match_stacks(weights: WeightView, adapter: DeltaSource, names: Mapping[str, Match]) -> list[Target]:
    """Match every expert of every stack of a fine-tuned model to its slice of the base.

    Parameters
    ----------
    names
        Matches of `match_names`, including the names of `stacks_of`.

    Raises
    ------
    MismatchError
        If a stack is unmatched, or the base's stack has another shape.
    """
    problems: list[str] = []
    targets: list[Target] = []
    for stack in adapter.stacks if isinstance(adapter, FinetunedModel) else ():
        match = names[stack.tensor.removesuffix(".weight")]
        if match.tensor not in weights:
            problems.append(f"{stack.tensor!r} {match.why}")
        elif (shape := weights[match.tensor].shape) != stack.stored:
            problems.append(f"{stack.tensor!r}: expected shape {list(stack.stored)} in the base, found {list(shape)}")
        else:
            targets += [
                Target(f"{match.tensor}[{e}]", module, stack.transposed, match, pieces=(TensorSlice(match.tensor, e),))
                for e, module in enumerate(stack.experts)
            ]
    if problems:
        raise MismatchError(misfits(problems, len(stacks_of(adapter)), adapter, weights))
    return targets
