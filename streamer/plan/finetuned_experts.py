"""Classify the layers of a fine-tuned model, and match its stacks of experts to the base's, one matrix for each expert.

``model.layers.0.mlp.experts.down_proj`` (8, m, n) of both models → targets ``model.layers.0.mlp.experts.down_proj[0]`` … ``[7]``, each the
difference of two matrices. The table of `architectures` says which tensors are stacks and how they are oriented.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.finetuned import FinetunedModel
from streamer.errors import MismatchError, UnsupportedError
from streamer.plan.architectures import EMBEDDING, architecture_for
from streamer.plan.name_matching import Match
from streamer.plan.targets import Orientation, Target, TensorSlice, misfits
from streamer.plan.transformers_renames import CONCATENATE, TRANSPOSE, Loaded, renames_for
from streamer.storage.checkpoint import Checkpoint
from streamer.storage.header import TensorInfo
from streamer.units import listed
from streamer.weights.logical import WeightView
from streamer.weights.model_config import ModelConfig


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
