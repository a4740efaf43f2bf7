"""Tell the layers of a fine-tuned model, and match its stacks of experts to those of its base, a matrix an expert.

``model.layers.0.mlp.experts.down_proj`` (8, m, n) of both models → targets ``model.layers.0.mlp.experts.down_proj[0]`` … ``[7]``, each the
difference of two matrices. Which tensors are stacks, and which way round they are stored, the table of `architectures` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.finetuned import FinetunedModel
from streamer.adapters.layer_names import EMBEDDING
from streamer.errors import MismatchError, UnsupportedError
from streamer.plan.architectures import architecture_for
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
    """Return the function that tells of a tensor of a fine-tuned model what it is to a layer; see `open_finetuned`.

    By the base's class; where that is not known, or has no such layer under a usual config, by names that embeddings have.

    Parameters
    ----------
    path
        The fine-tuned model's, for messages.
    config
        The base's.

    Raises
    ------
    UnsupportedError
        By that function, if a tensor may be a stack of experts, and it is not known which way round.
    """
    classes, renames = orientation.architectures, renames_for(config)
    # Of a class of another library its type's classes tell nothing of stacks.
    unknown = not classes or (bool(config.architectures) and architecture_for(config) is None)

    def role(info: TensorInfo) -> str:
        module, _, parameter = info.name.rpartition(".")
        (loaded,) = renames.loaded([info.name])
        if len(info.shape) == 3 and (layout := stack_layout(info, loaded)):
            return layout
        if parameter != "weight" or len(info.shape) < 2:
            return ""
        if len(info.shape) > 2:  # a table of positions may be a weight by its name on disk alone
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
        # A vector a position, as a token that all sequences begin with, has a dimension of 1, and so has the kernel of a convolution
        # of one channel; another convolution shows itself by its bias.
        undecided = (unknown or by) and min(info.shape) > 1 and not _is_convolution(info, base)
        if stated or undecided:
            raise UnsupportedError(
                f"{path}: {info.name!r} {list(info.shape)} may be a stack of experts, of which it is not known which way round they are "
                f"stored in {listed(map(str, config.architectures)) or 'a model whose config.json names no class'}; name the base's class "
                "with --architecture NAME"
            )
        return ""

    return role


def _is_convolution(info: TensorInfo, base: Checkpoint) -> bool:
    """Say whether a bias of one number an output stands beside a weight (out, in, kernel): experts have a bias each."""
    bias = info.name.removesuffix("weight") + "bias"
    return info.name.endswith(".weight") and bias in base.weight_map and base.info(bias).shape == info.shape[:1]


def stacks_of(adapter: DeltaSource) -> list[str]:
    """List the names under which a base is searched for the stacks of a fine-tuned model."""
    return [s.tensor.removesuffix(".weight") for s in adapter.stacks] if isinstance(adapter, FinetunedModel) else []


def match_stacks(weights: WeightView, adapter: DeltaSource, names: Mapping[str, Match]) -> list[Target]:
    """Match every expert of every stack of a fine-tuned model to its slice of the base's.

    Parameters
    ----------
    names
        From `match_names`, those of `stacks_of` among them.

    Raises
    ------
    MismatchError
        If a stack is unmatched, or the base's has another shape.
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
