"""Match the tensors of a loaded model to the weights on disk that form them.

``model.layers.0.mlp.up_proj.weight`` of a vision-language model → ``language_model.model.layers.0.mlp.up_proj.weight`` on disk;
``model.layers.0.mlp.experts.gate_up_proj`` (8, 2·I, H) → for each expert, ``….experts.3.w1.weight`` above ``….experts.3.w3.weight``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from streamer.errors import MismatchError, UnsupportedError
from streamer.plan.architectures import architecture_for, architectures_for, spellings
from streamer.plan.name_matching import TensorSlice
from streamer.plan.names import TRANSPOSE, TRANSPOSE_IF, Loaded, TiedNames
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.units import listed


@dataclass(frozen=True)
class WeightSource:
    """Weights on disk, concatenated by rows, that form a tensor of the loaded model or one matrix of a stack.

    Attributes
    ----------
    slices
        The weights' names, with the matrix's index if a weight is a stack.
    transposed
        Whether the loaded tensor is the transpose.
    """

    slices: tuple[TensorSlice, ...]
    transposed: bool = False


@dataclass(frozen=True)
class RunTimeTensor:
    """Parameter or buffer of the loaded model.

    Attributes
    ----------
    name, shape
        Name and shape in the loaded model.
    base, adapted
        Sources in the base and in the adapted model, which may undo a tie: one for the whole tensor, or one for each expert.
    stacked
        Whether there is one source for each expert.
    """

    name: str
    shape: tuple[int, ...]
    base: tuple[WeightSource, ...]
    adapted: tuple[WeightSource, ...]
    stacked: bool = False

    @property
    def weights(self) -> set[str]:
        """Return the names of the adapted model's weights that form it."""
        return {piece.weight for source in self.adapted for piece in source.slices}

    def targets(self, plan: Plan) -> list[tuple[Target, TensorSlice]]:
        """List the targets in it, each with its slice."""
        return [pair for weight in sorted(self.weights) for pair in plan.by_weight.get(weight, ())]


class RunTimeModule(NamedTuple):
    """A module of the loaded model, with the parameters of its own by their names in it."""

    module: nn.Module
    parameters: dict[str, RunTimeTensor]


def match_run_time(
    plan: Plan, shapes: Mapping[str, tuple[int, ...]], optional: Iterable[str], prefix: str
) -> dict[str, RunTimeTensor]:
    """Match each tensor of a loaded model to the base's weights, and check that they include everything that the adapter changes.

    Parameters
    ----------
    shapes
        Name → shape of every parameter and persistent buffer.
    optional
        Buffers that a checkpoint may lack because the class computes them.
    prefix
        The class's ``base_model_prefix``, with which a checkpoint's names may begin.

    Raises
    ------
    MismatchError
        If a parameter has no weights, or weights of another shape.
    UnsupportedError
        If loading builds weights in an unknown way, or the adapter changes a weight that the loaded model does not have.
    """
    if plan.weights.quantized_names and any(a.conv1d for a in architectures_for(plan.config)):
        raise UnsupportedError(
            f"{plan.base.path}: a quantized {plan.config.model_type} stores its layers as (out, in), and the loaded model as (in, out), "
            "which is not supported by evaluate and repair; use the 16-bit base"
        )
    names = _RunTimeNames(plan, prefix)
    optional = set(optional)
    tensors = {
        name: tensor
        for name, shape in shapes.items()
        if (tensor := names.find(name, shape)) is not None
    }
    if missing := [name for name in shapes if name not in tensors and name not in optional]:
        raise MismatchError(
            f"{plan.base.path}: lacks {len(missing)} of {len(shapes)} tensors of its class, {listed(map(repr, missing))}; is it of another "
            "class than its config.json says?"
        )
    used = {weight for tensor in tensors.values() for weight in tensor.weights}
    if lost := sorted(names.edited - used):
        raise UnsupportedError(
            f"{plan.adapter.path}: changes {len(lost)} tensors that the class of {plan.base.path} does not use to compute a text's losses, "
            f"{listed(map(repr, lost))}; evaluate and repair cannot measure them"
        )
    return tensors


class _RunTimeNames:
    """Index of weights on disk by the run-time names that loading gives them."""

    def __init__(self, plan: Plan, prefix: str) -> None:
        self.plan = plan
        self.prefix = prefix
        edits = plan.edits
        on_disk = [
            *plan.weights.stored,
            *(n for n in edits.sources if n not in plan.weights.stored),
        ]
        self.at = plan.names.among(on_disk).by_run_time
        for (
            name
        ) in on_disk:  # transformers skips a rename if the model has no tensor of the new name
            self.at.setdefault(name, [Loaded(name, name)])
        self.ties: dict[str, TiedNames] = {}
        architecture = architecture_for(plan.config)
        for tie in plan.names.ties(architecture):
            self.ties |= {name: tie for name in tie.on_disk if tie.stored}
        self.edited = {*edits.sources, *edits.rows, *edits.shifts, *plan.by_weight}

    def find(self, name: str, shape: tuple[int, ...]) -> RunTimeTensor | None:
        """Find the sources of one tensor; None if it has none."""
        names = spellings(name, self.prefix)
        loaded = next((self.at[spelling] for spelling in names if spelling in self.at), [])
        tie = next((self.ties[spelling] for spelling in names if spelling in self.ties), None)
        if loaded and loaded[0].by is not None:
            sources = self._built(name, loaded, shape)
            return RunTimeTensor(name, shape, sources, sources, stacked=True)
        weight = loaded[0].tensor if loaded else None
        if weight is None and tie is not None:
            weight = next((tie.on_disk[s] for s in names if s in tie.on_disk), None) or tie.stored
        if weight is None or (tie is None and weight not in self.plan.weights.stored):
            return None
        stands = weight in self.plan.weights.stored
        tied_to = weight if tie is None else tie.stored
        has_weight = weight in self.edited or (stands and weight not in self.plan.edits.dropped)
        base = self._direct(weight if stands else tied_to, shape)
        adapted = self._direct(weight if has_weight else tied_to, shape)
        stacked = len(shape) == 3 and adapted[0].slices[0].index is not None
        return RunTimeTensor(name, shape, base, adapted, stacked)

    def _direct(self, weight: str, shape: tuple[int, ...]) -> tuple[WeightSource, ...]:
        """Use a weight unchanged; a stack gives one source for each matrix."""
        weights = self.plan.weights
        sources = self.plan.edits.sources
        stored = weights.shape(weight) if weight in weights else sources[weight].info.shape
        if stored != shape:
            raise MismatchError(
                f"{self.plan.base.path}: {weight!r} has shape {list(stored)}, and its class expects {list(shape)}; is it of another class, "
                "or another vocabulary, than its config.json says?"
            )
        if len(shape) == 3 and not weight.endswith(
            ".weight"
        ):  # a name in .weight is a convolution's
            return tuple(WeightSource((TensorSlice(weight, e),)) for e in range(shape[0]))
        return (WeightSource((TensorSlice(weight),)),)

    def _built(
        self, name: str, loaded: Sequence[Loaded], shape: tuple[int, ...]
    ) -> tuple[WeightSource, ...]:
        """Collect the pieces of a tensor that loading builds, from each expert's tensors or from stacks."""
        by = loaded[0].by
        assert by is not None
        if not by.stacks or len(shape) != 3:
            raise UnsupportedError(
                f"{self.plan.base.path}: {name!r} is built on loading by {' and '.join(by.by)} from {loaded[0].tensor!r}, "
                "which is not supported by evaluate and repair; save the base again with the transformers that is installed"
            )
        numbered = by.numbered
        sources = by.by_source(loaded)
        experts = range(shape[0])
        if any(sorted(s) != (list(experts) if numbered else [0]) for s in sources):
            raise MismatchError(
                f"{self.plan.base.path}: {name!r} is built on loading from {loaded[0].tensor!r} and similar tensors, which are not one for "
                f"each of {shape[0]} experts"
            )
        shapes = [self.plan.weights[s[0]].shape[0 if numbered else 1 :] for s in sources]
        if any(len(shape) != 2 for shape in shapes) or len({shape[1] for shape in shapes}) != 1:
            raise MismatchError(
                f"{self.plan.base.path}: {sources[0][0]!r} and its like do not fit together: {shapes}"
            )
        rows = sum(shape[0] for shape in shapes)
        width = shapes[0][1]
        transposed = by.by == (TRANSPOSE,) or (
            by.by == (TRANSPOSE_IF,) and (rows, width) != shape[1:]
        )
        if ((width, rows) if transposed else (rows, width)) != shape[1:]:
            raise MismatchError(
                f"{self.plan.base.path}: {name!r} is built on loading of matrices {[rows, width]}, and its class expects {list(shape[1:])}"
            )

        def pieces(e: int) -> tuple[TensorSlice, ...]:
            return tuple(TensorSlice(s[e]) if numbered else TensorSlice(s[0], e) for s in sources)

        return tuple(WeightSource(pieces(e), transposed) for e in experts)
