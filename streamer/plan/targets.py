"""Match each adapter module to the base tensor that it changes, and refuse modules that do not fit theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.modules import Module
from streamer.errors import MismatchError
from streamer.plan.name_matching import Match
from streamer.units import listed
from streamer.weights.logical import WeightView
from streamer.weights.model_config import ModelConfig

# Models whose linear layers are Conv1D modules, stored (in, out).
_CONV1D_MODELS = {"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"}


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


def stores_conv1d(config: ModelConfig) -> bool:
    """Say whether a model with this config stores its linear layers as (in, out)."""
    return config.model_type in _CONV1D_MODELS


def match_targets(
    weights: WeightView, adapter: DeltaSource, config: ModelConfig, names: Mapping[str, Match]
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
    for name, match in names.items():
        module, found = adapter.modules[name], match.tensor
        if not found:
            problems.append(f"{name!r} {match.why}")
            continue
        weight = weights[found]
        # Quantizers store every kind of layer as (out, in).
        shape, quantized = weight.shape, weight.quantized
        conv1d = stores_conv1d(config) and not quantized
        placed, transposed = module.placed(shape, adapter.config.fan_in_fan_out and not quantized, conv1d)
        if placed and conv1d and not transposed and shape[0] == shape[1] and module.form == "linear":
            problems.append(
                f"{name!r}: is square, {config.model_type} stores such layers as (in, out), but the adapter's config says "
                "fan_in_fan_out=false, as PEFT also writes where it wrapped a Linear last: set it to true in "
                "adapter_config.json if this layer is a Conv1D"
            )
        elif placed is None:
            has = "found" if found == f"{name}.weight" else f"{found!r} has"
            problems.append(f"{name!r}: expected {module.expected} in the base, {has} {list(shape)}")
        elif found in targets:
            problems.append(f"{name!r} and {targets[found].module.name!r} both change {found!r}")
        else:
            assert placed is not None
            targets[found] = Target(found, placed, transposed, match, shape)
    if not stores_conv1d(config):
        problems += _contradicted([t for t in targets.values() if t.module.form == "linear" and not t.kernel])
    if problems:
        raise MismatchError(misfits(problems, len(names), adapter, weights))
    return [targets[name] for name in weights if name in targets]


def _contradicted(targets: Sequence[Target]) -> list[str]:
    """Report square layers that the config's flag transposes where every other layer contradicts it: PEFT ignores it on a Linear."""
    transposed = [t for t in targets if t.transposed]
    if len(transposed) == len(targets) or any(t.stored[0] != t.stored[1] for t in transposed):
        return []
    return [
        f"{t.module.name!r}: is square and fan_in_fan_out=true says that it is stored as (in, out), but other layers are stored as "
        "(out, in): set it to false in adapter_config.json if they are all Linear"
        for t in transposed
    ]


def misfits(problems: Sequence[str], of: int, adapter: DeltaSource, weights: WeightView) -> str:
    """Say in one line which modules do not fit the base: two of them, or one where names are long."""
    return (
        f"{adapter.path}: {len(problems)} of {of} modules do not fit {weights.checkpoint.path}: {listed(problems, 2, '; ', 200)}; "
        "is this the base that the adapter was trained on?"
    )
