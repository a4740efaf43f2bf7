"""Match each adapter module to the base tensor that it changes, and refuse modules that do not fit theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.modules import Module
from streamer.errors import MismatchError
from streamer.plan.architectures import Architecture, architecture_for, architectures_for, conv1d_names, pattern_of
from streamer.plan.name_matching import Match, Renames
from streamer.storage.checkpoint import Checkpoint
from streamer.units import listed
from streamer.weights.base import Weight
from streamer.weights.logical import WeightView
from streamer.weights.model_config import ModelConfig


@dataclass(frozen=True)
class TensorSlice:
    """A part of a base's weight that holds a matrix, or some of its rows.

    Expert 3 of a stack is ``("model.layers.0.mlp.experts.down_proj", 3)``. The upper half of expert 3 of a ``gate_up_proj`` that the base
    stores in two tensors is ``("model.layers.0.mlp.experts.3.gate_proj.weight", None, (0, 4096))``.

    Attributes
    ----------
    weight
        A weight's name.
    index
        Index of the matrix, if the weight is a stack.
    rows
        First and last-plus-one row of the matrix that this weight holds, if other weights hold the rest; None for all rows.
    """

    weight: str
    index: int | None = None
    rows: tuple[int, int] | None = None


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
    stored: tuple[int, ...] = ()
    pieces: tuple[TensorSlice, ...] = ()

    @property
    def slices(self) -> tuple[TensorSlice, ...]:
        """Return the slices that together hold its rows, in order."""
        return self.pieces or (TensorSlice(self.tensor),)

    @property
    def kernel(self) -> tuple[int, ...]:
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
        known = architectures_for(config)
        biased = {} if architecture_for(config) else _by_bias(base)
        if known and (architecture_for(config) or _stored_as(known, base, biased)):
            return cls(known)
        linear = frozenset(
            _stack_of(name) for name, transposed in biased.items() if not transposed and _may_be_conv1d(name)
        )
        return cls((), any(biased.values()), linear)

    def seen(self, adapter: DeltaSource, weights: WeightView, names: Mapping[str, Match]) -> Orientation:
        """Learn from an adapter's layers on an unknown base: layers that fit only (out, in) are Linear."""
        if self.architectures or adapter.describes_model:
            return self
        fitting = {
            match.tensor
            for name, match in names.items()
            if match.tensor
            and _may_be_conv1d(match.tensor)
            and _ways_that_fit(adapter.modules[name], weights[match.tensor]) == {False}
        }
        return replace(self, linear=self.linear | {_stack_of(tensor) for tensor in fitting})

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
        unsettled = any(map(_may_be_conv1d, (tensor, *names))) and _stack_of(tensor) not in self.linear
        return {False, True} if self.has_conv1d or fan_in_fan_out or unsettled else {False}


def _may_be_conv1d(name: str) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in conv1d_names()


def _stack_of(name: str) -> str:
    """Return the path of the stack of layers that contains a name: ``transformer.h.0.attn.c_proj.weight`` → ``transformer.h.``."""
    return pattern_of(name).partition("*")[0]


def _ways_that_fit(module: Module, weight: Weight) -> set[bool]:
    linear = module.layer_kind == "linear" and len(weight.shape) == 2 and not weight.quantized
    return {way for way in (False, True) if linear and module.placed(weight.shape, way) is not None}


def _by_bias(base: Checkpoint) -> dict[str, bool]:
    """Determine from the biases of layers that are not square whether each is stored (in, out)."""
    found = {}
    for name in base.weight_map:
        if name.endswith(".weight") and (bias := name.removesuffix("weight") + "bias") in base.weight_map:
            shape, outputs = base.info(name).shape, base.info(bias).shape
            if len(shape) == 2 and shape[0] != shape[1] and outputs in (shape[:1], shape[1:]):
                found[name] = outputs == shape[1:]
    return found


def _stored_as(classes: Sequence[Architecture], base: Checkpoint, biased: Mapping[str, bool]) -> bool:
    """Test whether layers with biases are stored as in these classes, with at least one in every stack of layers that has a Conv1D."""
    conv1d = {name for name in base.weight_map if any(a.transposed(name.removesuffix(".weight")) for a in classes)}
    shown = {_stack_of(name) for name in biased}
    return {n for n, way in biased.items() if way} == conv1d & biased.keys() and {_stack_of(n) for n in conv1d} <= shown


def match_targets(
    weights: WeightView, adapter: DeltaSource, orientation: Orientation, names: Mapping[str, Match], renames: Renames
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
    problems: list[str] = []
    targets: dict[str, Target] = {}
    run_time = renames.at_run_time([match.tensor for match in names.values() if match.tensor])
    orientation = orientation.seen(adapter, weights, names)
    for name, match in names.items():
        module, found = adapter.modules[name], match.tensor
        if not found:
            problems.append(f"{name!r} {match.why}")
            continue
        weight = weights[found]
        shape = weight.shape
        if module.layer_kind != "linear":
            ways = {module.layer_kind != "convolution"}
        elif weight.quantized or len(shape) != 2:  # quantizers store all kinds of layers as (out, in)
            ways = {False}
        else:
            loaded = run_time.get(found, found).removesuffix(".weight")
            ways = orientation.ways(found, name, loaded, fan_in_fan_out=bool(adapter.config.get("fan_in_fan_out")))
        fitting = [(placed, way) for way in sorted(ways) if (placed := module.placed(shape, way)) is not None]
        if not fitting:
            has = "found" if found == f"{name}.weight" else f"{found!r} has"
            turned = ", transposed," if ways == {True} and module.layer_kind == "linear" else ""
            problems.append(f"{name!r}: expected {module.expected}{turned} in the base, {has} {list(shape)}")
        elif len(fitting) > 1 or (adapter.describes_model and len(ways) > 1):
            problems.append(
                f"{name!r}: {list(shape)} does not show whether it is stored as (out, in) or, as a Conv1D, (in, out), and the base's "
                "config.json does not say; name its class with --architecture NAME"
            )
        elif found in targets:
            problems.append(f"{name!r} and {targets[found].module.name!r} both change {found!r}")
        else:
            ((placed, transposed),) = fitting
            targets[found] = Target(found, placed, transposed, match, shape)
    if problems:
        raise MismatchError(misfits(problems, len(names), adapter, weights))
    return [targets[name] for name in weights if name in targets]


def misfits(problems: Sequence[str], of: int, adapter: DeltaSource, weights: WeightView) -> str:
    """Describe in one line which modules do not fit the base: two of them, or one if names are long."""
    return (
        f"{adapter.path}: {len(problems)} of {of} modules do not fit {weights.checkpoint.path}: {listed(problems, 2, '; ', 200)}; "
        "is this the base that the adapter was trained on?"
    )
