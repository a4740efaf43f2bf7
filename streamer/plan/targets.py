"""Match each adapter module to the base tensor that it changes, and refuse modules that do not fit theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.modules import Module
from streamer.errors import MismatchError
from streamer.plan.architectures import Architecture, architectures_for
from streamer.plan.name_matching import Match
from streamer.plan.transformers_renames import Renames
from streamer.storage.checkpoint import Checkpoint
from streamer.units import listed
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

    Attributes
    ----------
    architectures
        Facts of the base's class, or of all that it can be of; none where its config does not tell.
    has_conv1d
        Whether a base that is not known has a layer whose bias shows that it is stored (in, out): others may be, too.
    """

    architectures: tuple[Architecture, ...]
    has_conv1d: bool

    @classmethod
    def of(cls, base: Checkpoint, config: ModelConfig) -> Orientation:
        """Ask the table of architectures, and the shapes of a base that it does not know."""
        known = architectures_for(config)
        return cls(known, not known and _has_conv1d(base))

    def ways(self, *names: str, fan_in_fan_out: bool = False) -> set[bool]:
        """List the ways in which the layer with any of these names may be stored: False is (out, in), True (in, out).

        PEFT sets ``fan_in_fan_out`` where it wrapped a Conv1D last, and ignores it on a Linear; users set it by habit: it decides nothing.
        """
        if self.architectures:
            return {any(map(a.transposed, names)) for a in self.architectures}
        return {False, True} if self.has_conv1d or fan_in_fan_out else {False}

    def is_conv1d(self, module: str) -> bool:
        """Say whether a layer is known to be stored (in, out)."""
        return self.ways(module) == {True}


def _has_conv1d(base: Checkpoint) -> bool:
    for name in base.weight_map:
        if name.endswith(".weight") and (bias := name.removesuffix("weight") + "bias") in base.weight_map:
            shape, outputs = base.info(name).shape, base.info(bias).shape
            if len(shape) == 2 and outputs == shape[1:] != shape[:1]:
                return True
    return False


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
            ways = orientation.ways(name, loaded, fan_in_fan_out=adapter.config.fan_in_fan_out)
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
