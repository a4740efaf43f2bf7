"""Match each adapter module to the base tensor that it changes, and refuse modules that do not fit theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.modules import Module
from streamer.errors import MismatchError
from streamer.plan.architecture_table import conv1d_names
from streamer.plan.architectures import Architecture, architecture_for, architectures_for, pattern_of
from streamer.plan.name_matching import Match
from streamer.plan.transformers_renames import Renames
from streamer.storage.checkpoint import Checkpoint
from streamer.units import listed
from streamer.weights.base import Weight
from streamer.weights.logical import WeightView
from streamer.weights.model_config import ModelConfig


@dataclass(frozen=True)
class TensorSlice:
    """A share of a weight of the base that holds a matrix, or some of its rows.

    Expert 3 of a stack is ``("model.layers.0.mlp.experts.down_proj", 3)``; the upper half of expert 3 of a ``gate_up_proj`` that the base
    stores apart is ``("model.layers.0.mlp.experts.3.gate_proj.weight", None, (0, 4096))``.

    Attributes
    ----------
    weight
        A weight's name.
    index
        Which matrix of it, where the weight is a stack.
    rows
        From and to: the weight holds these rows of the matrix, other weights the others; None: all.
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
        Its name: the tensor's in the base, or one made for a matrix that is a part of a tensor, or made of several.
    module
        The adapter's module.
    transposed
        The base stores (in, out): its transpose is the matrix that the delta is added to.
    match
        How the name was found.
    pieces
        Slices that hold its rows, one below the other, where it is not a whole tensor.
    """

    tensor: str
    module: Module
    transposed: bool
    match: Match
    stored: tuple[int, ...] = ()
    pieces: tuple[TensorSlice, ...] = ()

    @property
    def slices(self) -> tuple[TensorSlice, ...]:
        """Slices that hold its rows, one below the other."""
        return self.pieces or (TensorSlice(self.tensor),)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Dimensions of a convolution's kernel."""
        return self.stored[2:]

    @property
    def is_embedding(self) -> bool:
        """Whether the weight is an embedding's, looked up and not multiplied."""
        return self.module.form == "embedding"


@dataclass(frozen=True)
class Orientation:
    """Tells which layers of a base store (in, out), as Conv1D does, where every other linear layer stores (out, in).

    Of a base that is not known, ``c_proj`` and the other names that Conv1D has in some class may be either; a layer of the same stack of
    layers, ``transformer.h.0`` to ``transformer.h.11``, settles that they are Linear. A base that names no class of its type, as another
    library's ``NanoGPT`` of type ``gpt2``, is known where its biases show that it stores its layers as those classes do.

    Attributes
    ----------
    architectures
        Facts of the base's class, or of all that it can be of; none where it is not known.
    has_conv1d
        Whether a base that is not known has a layer whose bias shows that it is stored (in, out): others may be, too.
    linear
        Stacks of layers of a base that is not known in which layers that are called as Conv1D is are seen to be Linear.
    """

    architectures: tuple[Architecture, ...]
    has_conv1d: bool = False
    linear: frozenset[str] = frozenset()

    @classmethod
    def of(cls, base: Checkpoint, config: ModelConfig) -> Orientation:
        """Ask the table of architectures, and the shapes of a base that it does not know."""
        known = architectures_for(config)
        biased = {} if architecture_for(config) else _by_bias(base)
        if known and (architecture_for(config) or _stored_as(known, base, biased)):
            return cls(known)
        linear = frozenset(
            _stack_of(name) for name, transposed in biased.items() if not transposed and _may_be_conv1d(name)
        )
        return cls((), any(biased.values()), linear)

    def seen(self, adapter: DeltaSource, weights: WeightView, names: Mapping[str, Match]) -> Orientation:
        """Learn from the layers of an adapter on a base that is not known: those that fit (out, in) alone."""
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
        """List the ways in which a weight that is called so may be stored: False is (out, in), True (in, out).

        PEFT sets ``fan_in_fan_out`` where it wrapped a Conv1D last, and ignores it on a Linear; users set it by habit: it decides nothing.

        Parameters
        ----------
        names
            Names of its module in a loaded model.
        """
        if self.architectures:
            return {any(map(a.transposed, names)) for a in self.architectures}
        unsettled = any(map(_may_be_conv1d, (tensor, *names))) and _stack_of(tensor) not in self.linear
        return {False, True} if self.has_conv1d or fan_in_fan_out or unsettled else {False}


def _may_be_conv1d(name: str) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in conv1d_names()


def _stack_of(name: str) -> str:
    """Path of the stack of layers that a name stands in: ``transformer.h.0.attn.c_proj.weight`` → ``transformer.h.``."""
    return pattern_of(name).partition("*")[0]


def _ways_that_fit(module: Module, weight: Weight) -> set[bool]:
    linear = module.form == "linear" and len(weight.shape) == 2 and not weight.quantized
    return {way for way in (False, True) if linear and module.placed(weight.shape, way) is not None}


def _by_bias(base: Checkpoint) -> dict[str, bool]:
    """Tell by their biases of layers that are not square whether they are stored (in, out)."""
    found = {}
    for name in base.weight_map:
        if name.endswith(".weight") and (bias := name.removesuffix("weight") + "bias") in base.weight_map:
            shape, outputs = base.info(name).shape, base.info(bias).shape
            if len(shape) == 2 and shape[0] != shape[1] and outputs in (shape[:1], shape[1:]):
                found[name] = outputs == shape[1:]
    return found


def _stored_as(classes: Sequence[Architecture], base: Checkpoint, biased: Mapping[str, bool]) -> bool:
    """Tell whether layers with biases are stored as these classes store them, one in each stack of layers in which these have Conv1D."""
    conv1d = {name for name in base.weight_map if any(a.transposed(name.removesuffix(".weight")) for a in classes)}
    shown = {_stack_of(name) for name in biased}
    return {n for n, way in biased.items() if way} == conv1d & biased.keys() and {_stack_of(n) for n in conv1d} <= shown


def match_targets(
    weights: WeightView, adapter: DeltaSource, orientation: Orientation, names: Mapping[str, Match], renames: Renames
) -> list[Target]:
    """Match every module of the adapter to the one tensor of the base that it changes, in the base's file order.

    Parameters
    ----------
    names
        From `match_names`.

    Raises
    ------
    MismatchError
        If any module is unmatched, ambiguous, of a wrong shape, or two name one tensor: all of them in one message.
    UnsupportedError
        If a matched tensor is encoded in a way that cannot be computed with.
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
        if module.form != "linear":
            ways = {module.form != "convolution"}
        elif weight.quantized or len(shape) != 2:  # quantizers store every kind of layer as (out, in)
            ways = {False}
        else:
            loaded = run_time.get(found, found).removesuffix(".weight")
            ways = orientation.ways(found, name, loaded, fan_in_fan_out=adapter.config.fan_in_fan_out)
        fitting = [(placed, way) for way in sorted(ways) if (placed := module.placed(shape, way)) is not None]
        if not fitting:
            has = "found" if found == f"{name}.weight" else f"{found!r} has"
            problems.append(f"{name!r}: expected {_expected(module, ways)} in the base, {has} {list(shape)}")
        elif len(fitting) > 1 or (adapter.describes_model and len(ways) > 1):
            problems.append(
                f"{name!r}: {list(shape)} does not tell whether it is stored as (out, in) or, as a Conv1D, (in, out), and "
                "neither does the base's config.json; name its class with --architecture NAME"
            )
        elif found in targets:
            problems.append(f"{name!r} and {targets[found].module.name!r} both change {found!r}")
        else:
            ((placed, transposed),) = fitting
            targets[found] = Target(found, placed, transposed, match, shape)
    if problems:
        raise MismatchError(misfits(problems, len(names), adapter, weights))
    return [targets[name] for name in weights if name in targets]


def _expected(module: Module, ways: set[bool]) -> str:
    return f"{module.expected}, transposed," if ways == {True} and module.form == "linear" else module.expected


def misfits(problems: Sequence[str], of: int, adapter: DeltaSource, weights: WeightView) -> str:
    """Say in one line which modules do not fit the base: two of them, or one where names are long."""
    return (
        f"{adapter.path}: {len(problems)} of {of} modules do not fit {weights.checkpoint.path}: {listed(problems, 2, '; ', 200)}; "
        "is this the base that the adapter was trained on?"
    )
