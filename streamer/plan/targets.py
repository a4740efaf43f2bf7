"""Which base tensor each adapter module changes; what is refused, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamer.adapters.adapter import Adapter
from streamer.adapters.modules import MethodModule, Module
from streamer.errors import MismatchError
from streamer.plan.name_matching import Match
from streamer.units import listed
from streamer.weights.logical import WeightView

# Models whose linear layers are Conv1D modules, stored (in, out).
_CONV1D_MODELS = {"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"}


@dataclass(frozen=True)
class TensorSlice:
    """Where a matrix stands in the base.

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
        Where its rows stand, one below the other, where it is not a whole tensor.
    """

    tensor: str
    module: Module
    transposed: bool
    match: Match
    stored: tuple[int, ...] = ()
    pieces: tuple[TensorSlice, ...] = ()

    @property
    def places(self) -> tuple[TensorSlice, ...]:
        """Where its rows stand."""
        return self.pieces or (TensorSlice(self.tensor),)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Dimensions of a convolution's kernel."""
        return self.stored[2:]

    @property
    def is_embedding(self) -> bool:
        """Whether the weight is an embedding's, looked up and not multiplied."""
        return self.module.form == "embedding"


def stores_conv1d(config: Mapping[str, Any]) -> bool:
    """Whether a model with this config stores its linear layers as (in, out)."""
    return str(config.get("model_type")) in _CONV1D_MODELS


def match_targets(
    weights: WeightView, adapter: Adapter, config: dict[str, Any], names: Mapping[str, Match]
) -> list[Target]:
    """Every module of the adapter with the one tensor of the base that it changes, in the base's file order.

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
        shape, quantized = weight.shape, weight.quantized  # quantizers store every kind of layer as (out, in)
        conv1d = stores_conv1d(config) and not quantized
        placed, transposed = _place(module, shape, adapter.fan_in_fan_out and not quantized, conv1d)
        if placed and conv1d and not transposed and shape[0] == shape[1] and module.form == "linear":
            problems.append(
                f"{name!r}: is square, {config['model_type']} stores such layers as (in, out), but the adapter's config says "
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
    """Square layers that the config's flag turns, and every other layer says that the flag is wrong: PEFT ignores it on a Linear."""
    turned = [t for t in targets if t.transposed]
    if len(turned) == len(targets) or any(t.stored[0] != t.stored[1] for t in turned):
        return []
    return [
        f"{t.module.name!r}: is square and fan_in_fan_out=true says that it is stored as (in, out), but other layers are stored as "
        "(out, in): set it to false in adapter_config.json if they are all Linear"
        for t in turned
    ]


def misfits(problems: Sequence[str], of: int, adapter: Adapter, weights: WeightView) -> str:
    """Say in one line which modules do not fit the base: two of them, or one where names are long."""
    return (
        f"{adapter.path}: {len(problems)} of {of} modules do not fit {weights.checkpoint.path}: {listed(problems, 2, '; ', 200)}; "
        "is this the base that the adapter was trained on?"
    )


def _place(module: Module, shape: tuple[int, ...], fan_in_fan_out: bool, conv1d: bool) -> tuple[Module | None, bool]:
    """The module on a weight of this shape, None if it does not fit, and whether the weight is stored transposed.

    Where it is square, the adapter's config must tell. PEFT sets the config's flag to what suits the layer that it wrapped last, so in
    a model of Conv1D and Linear layers it is true of some of them only: a shape that fits one way alone goes that way where the flag or
    the kind of model allows it.
    """
    if isinstance(module, MethodModule):
        if module.form != "linear":
            return module.on(shape, True), True
        straight, turned = module.on(shape, False), module.on(shape, True) if fan_in_fan_out or conv1d else None
        transposed = turned is not None and (fan_in_fan_out or straight is None)
        return (turned if transposed else straight), transposed
    if module.form != "linear":
        return module if shape == module.weight else None, module.form == "embedding"
    wanted = module.shape
    if wanted[0] == wanted[1]:
        return module if shape == wanted else None, fan_in_fan_out
    transposed = shape == wanted[::-1]
    return module if shape == wanted or (transposed and (fan_in_fan_out or conv1d)) else None, transposed
