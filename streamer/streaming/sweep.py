"""Run groups of sequences through variants of a model in one pass over its layers, and stop where a changed matrix receives its input.

A group is a few sequences under one variant. Each group runs the model's own `forward` in a greenlet, which pauses at each layer's entry
until all groups have run the layer before. A layer's weights are read once, for all groups.

Groups of a fit, which have a stream, also pause at each *site*: the input of matrices that the adapter changes. When all of them have
arrived, the caller receives their inputs and may replace the matrices' deltas, which are in use from there on. Groups without a stream are
*riders*: they run a layer after it was fitted, and end in logits, which are computed a block of the vocabulary at a time by the model's
own `forward`, from the result of the layers below the head.

Losses rely on this: tokens do not see later ones, logits come only from the head, and padding changes nothing. `check_logits` and
`changed_by_padding` test it.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import os
import tempfile
import time
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from streamer.errors import InputError, NumericError, StorageError, UnsupportedError
from streamer.linalg.operators import LowRank, linear
from streamer.methods.files import SealedKind
from streamer.packages import require_package
from streamer.plan.architectures import architecture_for
from streamer.plan.name_matching import TensorSlice, renames_for
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.plan.tied_embeddings import find_ties
from streamer.storage.files import (
    MAX_CALL_BYTES,
    drop_cached,
    give_freed_memory_back,
    read_at,
    storage_errors,
)
from streamer.streaming.model import LoadedModel, quiet_transformers, refused_errors
from streamer.streaming.values import (
    LazyTensor,
    Reader,
    RunTimeTensor,
    VariantSet,
    WeightSource,
    layer_modules,
)

LINEAR_BY_NAME = {"FalconLinear", "Conv1D"}
"""Classes with a `forward` of their own that computes exactly ``x Wᵀ + b``, or ``x W + b``."""


Checkpoint = Callable[[], None]
"""Function that is called before each parameter is read; it may raise to stop."""

PLAIN = type(None), bool, int, float, str
"""Types of a layer's arguments, besides tensors and containers of them, that change nothing outside it."""


@dataclass(frozen=True)
class Spooled:
    """Position of consecutive tensors in a spool.

    Attributes
    ----------
    start, nbytes
        Offset and length in bytes.
    tensors
        Shape, dtype and device of each tensor.
    """

    start: int
    nbytes: int
    tensors: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]


class Spool:
    """File that disappears with the process, and the tensors written to it.

    Parameters
    ----------
    directory
        Directory whose disk holds the file; by default the system's directory for temporary files.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = Path(tempfile.gettempdir()) if directory is None else directory
        with storage_errors(self.directory, "make a temporary file"):
            # Where the file system allows it, the file never has a name that a kill or a power cut could leave behind.
            file = tempfile.TemporaryFile(buffering=0, prefix=".streamer-", dir=self.directory)  # noqa: SIM115  # `close` does
        self._fd = file.fileno()
        self.close = weakref.finalize(self, file.close)
        """Frees the file's blocks."""
        self.end = 0

    def write(self, tensors: Sequence[Tensor], over: Spooled | None = None) -> Spooled:
        """Append tensors, or write them `over` earlier ones of the same size.

        Raises
        ------
        StorageError
            If the disk has no room for them.
        """
        start = (
            self.end
            if over is None or over.nbytes != sum(t.nbytes for t in tensors)
            else over.start
        )
        at = start
        for tensor in tensors:
            data = _bytes(tensor.detach().cpu().contiguous())
            while data:
                with storage_errors(self.directory, "write a temporary file"):
                    done = os.pwrite(self._fd, data[:MAX_CALL_BYTES], at)
                at, data = at + done, data[done:]
        self.end = max(self.end, at)
        return Spooled(start, at - start, tuple((t.shape, t.dtype, t.device) for t in tensors))

    def read(self, place: Spooled) -> list[Tensor]:
        """Read tensors into new memory on their devices."""
        at, out = place.start, []
        for shape, dtype, device in place.tensors:
            tensor = torch.empty(shape, dtype=dtype)
            data = _bytes(tensor)
            while data:
                with storage_errors(self.directory, "read a temporary file"):
                    done = read_at(self._fd, data, at)
                if not done:
                    raise StorageError(
                        f"{self.directory}: a temporary file is shorter than what was written to it; run the same command again"
                    )
                at, data = at + done, data[done:]
            out.append(tensor.to(device))
        drop_cached(self._fd, place.start, place.nbytes)
        return out


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer


@dataclass(eq=False)
class Group:
    """Sequences that run together under one variant.

    Attributes
    ----------
    ids
        Tokens (sequences, length).
    variant
        The variant's number.
    stream
        Name of the stream of a fit; None for a rider.
    results
        Results of the models below the head, by module, once they are known.
    out
        Result of the last layer that ran.
    skips
        Number of layers that an earlier run completed, and that return `out` instead of running.
    """

    ids: Tensor
    variant: int
    stream: Hashable | None = None
    results: dict[nn.Module, Any] = field(default_factory=dict)
    out: Any = None
    skips: int = 0
    _state: list[Tensor] = field(default_factory=list)
    _place: Spooled | None = None
    _first: list[weakref.ref[Tensor]] | None = None

    @property
    def leaves(self) -> tuple[Any, ...]:
        """Return the parts of `out`."""
        return self.out if type(self.out) is tuple else (self.out,)

    @property
    def is_plain(self) -> bool:
        """Test whether `out` consists of tensors, which a file can hold."""
        return all(isinstance(leaf, Tensor) or leaf is None for leaf in self.leaves)

    @property
    def rows(self) -> int:
        """Return the number of tokens, with padding."""
        return self.ids.numel()

    def put_away(self, spool: Spool) -> None:
        """Move the tensors with which the group enters a layer to a spool; their storage is emptied in place, so references hold."""
        # Clones: a tensor that has lent its memory to NumPy, as writing does, cannot be resized any more.
        self._place = spool.write([bits.clone() for bits in self._state], self._place)
        for bits in self._state:
            bits.untyped_storage().resize_(0)

    def bring_back(self, spool: Spool) -> None:
        """Read the tensors that were moved."""
        for bits, read in zip(
            self._state, spool.read(self._place) if self._place and self._state else (), strict=True
        ):
            bits.untyped_storage().resize_(read.nbytes)
            bits.copy_(read)
        self._state.clear()

    def follows(self, args: Sequence[Any]) -> bool:
        """Test whether states with which the group enters a layer are the last layer's result, or were there at the first layer."""
        if self._first is None:
            self._first = [weakref.ref(leaf) for leaf in args if isinstance(leaf, Tensor)]
            return True
        known = {
            leaf.untyped_storage()._cdata
            for leaf in tree_flatten(self.out)[0]
            if isinstance(leaf, Tensor)
        }
        first = [tensor for ref in self._first if (tensor := ref()) is not None]
        others = [
            state for state in self._states(args) if state.untyped_storage()._cdata not in known
        ]
        return all(any(state is tensor for tensor in first) for state in others)

    @contextlib.contextmanager
    def at_hand(self, spool: Spool | None) -> Iterator[None]:
        """Bring the tensors back for the context."""
        state = list(self._state)
        if spool is not None:
            self.bring_back(spool)
        yield
        if spool is not None:
            self._state = state
            self.put_away(spool)

    def enter(self, args: Any) -> None:
        """Note the states of tokens with which the group enters a layer, as bytes of their whole storage."""
        storages = {
            t.untyped_storage()._cdata: t.untyped_storage()
            for t in self._states(tree_flatten(args)[0])
        }
        resizable = [s for s in storages.values() if s.resizable()]
        self._state = [
            torch.empty(0, dtype=torch.uint8, device=s.device).set_(s) for s in resizable
        ]

    def _states(self, leaves: Sequence[Any]) -> list[Tensor]:
        """List the states of the group's tokens among a layer's arguments."""
        tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())
        return [tensor for tensor in tensors if tensor.shape[:2] == self.ids.shape]


SECONDS = 60.0
"""Least time between two saves of states."""

STATES_FILE = SealedKind("streamer.states", "streamer.states/1", "states of a sweep", "start again")


Name = TypeVar("Name")
Value = TypeVar("Value")


@dataclass(frozen=True)
class OnDemand(Mapping[Name, Value]):
    """Values by name, each read or made when it is asked for."""

    names: Collection[Name]
    read: Callable[[Name], Value]

    def __getitem__(self, name: Name) -> Value:
        return self.read(name)

    def __iter__(self) -> Iterator[Name]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class States:
    """States of all groups between two layers, in a file from which a killed sweep resumes.

    Attributes
    ----------
    path
        The file.
    sweep
        Text that distinguishes the sweep from others.
    factors
        Returns what a fit has found so far, by name.
    restore
        Receives it again.
    resumed
        Receives the number of layers that an earlier run completed.
    """

    path: Path
    sweep: str
    factors: Callable[[], Mapping[str, Tensor]] = dict
    restore: Callable[[Mapping[str, Tensor]], None] = lambda factors: None
    resumed: Callable[[int], None] = lambda layers: None
    _saved: float = field(default_factory=time.monotonic)

    def save(self, model: SweepModel, groups: Sequence[Group], layer: int) -> None:
        """Save the states with which groups enter a layer, if it is time to, and if results of layers are all that they depend on."""
        plain = model.resumable and all(group.is_plain for group in groups)
        if time.monotonic() - self._saved < SECONDS or not plain:
            return
        values = model.values
        tree = {
            "sweep": self.sweep,
            "layer": layer,
            "applied": sorted(values.applied),
            "read": sorted(values.read),
            "whole": sorted(model.otherwise_used),
            "outs": [isinstance(group.out, Tensor) or len(group.out) for group in groups],
        }

        def read(group: Group, leaf: Tensor) -> Tensor:
            with group.at_hand(model.spool):
                return leaf.cpu().clone()

        factors, leaves = self.factors(), dict[str, tuple[Group, Tensor]]()
        for number, group in enumerate(groups):
            leaves |= {
                f"{number}.{i}": (group, leaf)
                for i, leaf in enumerate(group.leaves)
                if leaf is not None
            }
        arrays = OnDemand(
            [*factors, *leaves],
            lambda name: read(*leaves[name]) if name in leaves else factors[name],
        )
        STATES_FILE.save(self.path, tree, arrays, overwrite=True)
        self._saved = time.monotonic()

    def load(self, model: SweepModel, groups: Sequence[Group]) -> int:
        """Restore the states, and return the number of layers that all groups skip; 0 if there are none of this sweep."""
        try:
            tree, arrays = STATES_FILE.read(self.path)
        except (InputError, OSError):
            return 0
        if tree["sweep"] != self.sweep:
            return 0
        for number, (group, outs) in enumerate(zip(groups, tree["outs"], strict=True)):
            leaves = [arrays.pop(f"{number}.{i}", None) for i in range(1 if outs is True else outs)]
            group.out, group.skips = leaves[0] if outs is True else tuple(leaves), tree["layer"]
        model.values.applied.update(tree["applied"])
        model.values.read.update(tree["read"])
        model.otherwise_used.update(tree["whole"])
        self.restore(arrays)
        self.resumed(tree["layer"])
        return int(tree["layer"])


@dataclass(frozen=True)
class Site:
    """Input of watched matrices, at which a group of a fit has stopped.

    Attributes
    ----------
    order
        Key by which sites are taken when groups wait at different ones: those of experts first, which some groups do not reach.
    matrices
        The matrices that multiply it.
    x
        Inputs (t, n), or the indices of one-hot inputs.
    size
        Number of possible one-hot inputs; None for other inputs.
    """

    order: tuple[bool, int, int]
    matrices: tuple[Any, ...]
    x: Tensor
    size: int | None = None


def same_inputs(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    """Test whether inputs are the same memory, unchanged; those before are still referenced, so their memory is not reused."""
    return len(before) == len(now) and all(
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a._version == b._version
        for a, b in zip(before, now, strict=True)
    )


Solve = Callable[[Site, Mapping[Group, Tensor]], None]
"""Receives a site and the inputs of the groups that reached it, in the groups' order."""


class TargetWatch:
    """Watches the targets of an adapter: says which matrices of a parameter make sites."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def matrices(
        self, tensor: RunTimeTensor, slice_: TensorSlice, crossed: bool
    ) -> Sequence[Target]:
        """List the targets in a slice whose inputs are multiplied with its columns, or with its rows if `crossed`.

        A tied head has the other side: it multiplies with the transpose of an embedding's delta.
        """
        pairs = self._plan.by_weight.get(slice_.weight, ())
        return [
            t for t, part in pairs if slice_.index in (None, part.index) and t.transposed == crossed
        ]

    def tables(self, tensor: RunTimeTensor) -> Sequence[tuple[Target, int]]:
        """List the targets that are looked up by one-hot inputs, each with the number of possible inputs."""
        return [
            (t, t.module.shape[1])
            for t, part in tensor.targets(self._plan)
            if t.transposed and part.rows is None
        ]

    def names(self, tensor: RunTimeTensor) -> Iterable[str]:
        """Return the names of the targets."""
        return [target.tensor for target, _ in tensor.targets(self._plan)]


LOOKED_UP = " (looked up)"
"""Suffix for the name of an embedding's table, because a head may use the same matrix."""


@dataclass(frozen=True)
class BaseMatrix:
    """A matrix of a base.

    Attributes
    ----------
    tensor
        A unique name: see `LOOKED_UP`.
    names
        Names under which adapters change it: its own, the name of the stack that contains it after loading, and names tied to it.
    """

    tensor: str
    names: tuple[str, ...]


class BaseWatch:
    """Watches all matrices of a base."""

    def __init__(self, plan: Plan) -> None:
        ties = find_ties(
            plan.base.weight_map, architecture_for(plan.config), renames_for(plan.config)
        )
        self._ties = {tie.stored: tie.others for tie in ties if tie.stored}

    def matrices(
        self, tensor: RunTimeTensor, slice_: TensorSlice, crossed: bool
    ) -> Sequence[BaseMatrix]:
        """Return the slice's matrix."""
        name = _name(slice_)
        expert = [
            f"{tensor.name}[{e}]"
            for e, s in enumerate(tensor.adapted)
            if tensor.stacked and slice_ in s.slices
        ]
        return [BaseMatrix(name, tuple(dict.fromkeys((name, *expert, *self._ties.get(name, ())))))]

    def tables(self, tensor: RunTimeTensor) -> Sequence[tuple[BaseMatrix, int]]:
        """Return the embedding's table."""
        ((slice_,),) = (source.slices for source in tensor.adapted)
        name = _name(slice_)
        return [(BaseMatrix(name + LOOKED_UP, (name, *self._ties.get(name, ()))), tensor.shape[0])]

    def names(self, tensor: RunTimeTensor) -> Iterable[str]:
        """Return the names of the matrices; vectors and a stack's biases have none."""
        if len(tensor.shape) - tensor.stacked < 2 or tensor.name.endswith("bias"):
            return []
        return [_name(slice_) for source in tensor.adapted for slice_ in source.slices]


Watch = TargetWatch | BaseWatch


def _name(slice_: TensorSlice) -> str:
    return slice_.weight if slice_.index is None else f"{slice_.weight}[{slice_.index}]"


def _nothing(*_: object) -> None:
    """Do nothing."""


class SweepModel(LoadedModel):
    """Model whose parameters are read when an operation needs them, under the variant of the group that runs.

    Attributes
    ----------
    layers
        Paths of the layers.
    spool
        Where groups' states lie while others run; None keeps them in memory.
    directory
        Directory of the spool; None for the system's.
    resumable
        Whether layers receive tensors and plain values alone, so that a later run can enter any of them.
    otherwise_used
        Names of watched matrices that a group of a fit used in another way than a product or a look-up.
    pause
        Pauses the group that runs: at a layer, or, given a site, until its matrices are fitted.
    """

    def __init__(self, job: VariantSet) -> None:
        super().__init__(job)
        self.group = Group(torch.empty(0, 0), 0)
        self.block: tuple[int, int] | None = None
        self.spool: Spool | None = None
        self.directory: Path | None = None
        self.otherwise_used: set[str] = set()
        self.resumable = True
        self._watch: Watch | None = None
        self._checkpoint: Checkpoint = _nothing
        self.pause: Callable[[Site | None], None] = _nothing
        positions = itertools.count()
        for module, parameters in self.modules:
            for name, tensor in parameters.items():
                rounded = name == "weight" and self._is_rounded(module, tensor)
                reader = _Reader(
                    self, tensor, next(positions), head=module is self._head, rounded=rounded
                )
                module._parameters[name] = LazyTensor.of(reader)  # type: ignore[assignment]  # torch types a Parameter, which this stands in for
        layers = layer_modules(self._model)
        self.layers = list(layers)
        for layer in layers.values():
            layer.register_forward_pre_hook(
                lambda module, *args: self._enter(args), with_kwargs=True
            )
            layer.register_forward_hook(lambda module, args, out: setattr(self.group, "out", out))
            layer.forward = partial(self._layer, layer.forward)
        for module in self._inner:
            module.register_forward_hook(self._end_below_head)

    def _end_below_head(self, module: nn.Module, _: Any, out: Any) -> None:
        if self.group.stream is None:
            self.group.results[module] = out

    def use(self, job: VariantSet) -> None:
        """Run other variants, or other findings, from now on."""
        self.job = self.values.job = job
        self.values.cache.clear()

    def limit(self, room: int, spools: bool) -> None:
        """Limit the memory of the next runs: the bytes of a layer's values that groups share, and whether states lie in a spool."""
        self.values.cache.room, self.spool = room, Spool(self.directory) if spools else None

    def _is_rounded(self, module: nn.Module, weight: RunTimeTensor) -> bool:
        """Test whether a product uses only the base's weight and is to round its factors to bfloat16.

        A weight that the adapter replaces or changes by a dense delta is not rounded: rounding would erase its difference from the base.
        """
        linear = (
            type(module).forward is nn.Linear.forward or type(module).__name__ in LINEAR_BY_NAME
        )
        return (
            self.job.rounds_products
            and linear
            and not (self.values.dense(weight) or self.values.edited(weight))
        )

    @contextlib.contextmanager
    def _running(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Compute without gradients, in silence, and turn errors of the model's own code into ours."""
        self._checkpoint = checkpoint
        try:
            with (
                torch.no_grad(),
                quiet_transformers(),
                refused_errors(self.job.plan.base.path, self._model),
            ):
                yield
        finally:
            self.block, self._checkpoint = None, _nothing

    @property
    def network(self) -> nn.Module:
        """Return the model of transformers, whose parameters are read when an operation needs them."""
        return self._model

    @contextlib.contextmanager
    def alone(self, group: Group, checkpoint: Checkpoint) -> Iterator[None]:
        """Let the model run one group by itself inside the context, without sites, through all layers and the whole head."""
        self.group = group
        with self._running(checkpoint):
            yield

    def run(
        self,
        groups: Sequence[Group],
        checkpoint: Checkpoint,
        solve: Solve | None = None,
        watch: Watch | None = None,
        after: Callable[[str], None] = _nothing,
        states: States | None = None,
    ) -> None:
        """Run groups through all layers.

        Parameters
        ----------
        checkpoint
            Called before each parameter is read; may raise to stop.
        solve
            Receives the inputs of each site.
        watch
            Says which matrices make sites.
        after
            Called with a layer's path each time that all groups have run it; may raise to stop.
        states
            File from which a killed run resumes.
        """
        greenlet = require_package(
            "greenlet", (3,), "evaluate, repair and map need greenlet", "evaluate"
        )
        main, runs, stops = greenlet.getcurrent(), dict[Group, Any](), dict[Group, Site | None]()
        done = 0 if states is None else states.load(self, groups)
        layers = iter(["embeddings", *self.layers][done:])
        fitted = [group for group in groups if group.stream is not None]
        riders = [group for group in groups if group.stream is None]

        def advance(group: Group) -> None:
            self.group, self.block = group, (0, 1)
            if self.spool is not None:
                group.bring_back(self.spool)
            stops[group] = runs[group].switch()
            if self.spool is not None and stops[group] is None:
                group.put_away(self.spool)

        for group in groups:
            runs[group] = greenlet.greenlet(self._forward, main)
            runs[group].gr_context = contextvars.copy_context()
        with self._running(checkpoint), contextlib.ExitStack() as stopped:
            stopped.callback(
                self._end, runs
            )  # within the context, whose grad mode the groups leave as they found it
            self.pause, self._watch = main.switch, watch
            while not all(run.dead for run in runs.values()):
                moving = [group for group in fitted if not runs[group].dead]
                while moving:
                    for group in moving:
                        advance(group)
                    sites = [site for group in fitted if (site := stops[group]) is not None]
                    moving = []
                    give_freed_memory_back()
                    if sites:
                        first = min(sites, key=lambda site: site.order)
                        inputs = {
                            g: site.x
                            for g in fitted
                            if (site := stops[g]) and site.order == first.order
                        }
                        if solve is not None:
                            solve(first, inputs)
                        moving = list(inputs)
                for group in riders:
                    if not runs[group].dead:
                        advance(group)
                after(next(layers, "logits"))
                if states is not None and 0 < done < len(self.layers):
                    states.save(self, groups, done)
                if done:
                    self.values.cache.clear()
                done += 1
                give_freed_memory_back()

    def _end(self, runs: Mapping[Group, Any]) -> None:
        """Unwind groups that were stopped on the way."""
        self.pause, self._watch = _nothing, None
        for run in runs.values():
            if run and not run.dead:
                run.throw()

    def _layer(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.group.skips:
            return forward(*args, **kwargs)
        self.group.skips -= 1
        if not self.group.skips:  # the file's memory cannot be written to
            move = partial(torch.Tensor.to, device=self.job.device, copy=True)
            self.group.out = tree_map(
                lambda leaf: leaf if leaf is None else move(leaf), self.group.out
            )
        return self.group.out

    def _enter(self, args: Any) -> None:
        leaves = tree_flatten(args)[0]
        follows = self.group.follows(leaves)
        if self.group.skips:
            return
        self.resumable &= follows and all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves)
        if self.spool is not None:
            self.group.enter(args)
        self.pause(None)

    def _forward(self) -> None:
        self._model(input_ids=self.group.ids.to(self.job.device), use_cache=False)

    def logits(
        self,
        parts: Sequence[Sequence[Group]],
        block: int | Iterable[tuple[int, int]],
        checkpoint: Checkpoint,
    ) -> Iterator[tuple[int, int, int, Tensor]]:
        """Compute the logits of riders that have run, one block of the vocabulary at a time.

        Parameters
        ----------
        parts
            Groups with the same sequences under different variants.
        block
            Number of tokens of the vocabulary to compute together, or ranges of them.

        Yields
        ------
        i, j, part, logits
            Logits (variants, sequences, length, j − i) of tokens i to j, for the part with this number.

        Raises
        ------
        UnsupportedError
            If the model does not compute all logits with its head alone, token by token.
        """
        size = self.vocabulary
        blocks = (
            [(i, min(size, i + block)) for i in range(0, size, block)]
            if isinstance(block, int)
            else block
        )
        for i, j in blocks:
            for number, part in enumerate(parts):
                with self._running(checkpoint):
                    self.block = i, j
                    logits = torch.stack([self._logits(group) for group in part])
                yield i, j, number, logits
            self.values.cache.clear()

    def _logits(self, group: Group) -> Tensor:
        """Compute a group's logits of the current block: (sequences, length, block)."""
        self.group = group
        outer = next((module for module in self._inner if module in group.results), None)
        if outer is None:
            raise UnsupportedError(
                f"{self.job.plan.base.path}: {type(self._model).__name__} does not compute its logits with a model of its own and its "
                "head alone; not supported by evaluate and repair"
            )
        # If the outermost model below the head returns its result again, nothing inside it runs.
        result, (i, j) = group.results[outer], self.block or (0, self.vocabulary)
        ids = group.ids.to(self.job.device)
        outer.forward = lambda *args, **kwargs: result
        try:
            out: Tensor = self._model(input_ids=ids, use_cache=False).logits
        finally:
            del outer.forward  # uncovers the class's own
        if out.shape != (*ids.shape, j - i):
            raise UnsupportedError(
                f"{self.job.plan.base.path}: {type(self._model).__name__} gives logits {list(out.shape)} for {j - i} tokens of "
                "the vocabulary: it does not compute all logits with its head alone; not supported by evaluate and repair"
            )
        return out


class _Reader(Reader):
    """Reads one parameter under the variant of the group that runs.

    A product with a matrix is split into one with the base's weight, which is read a few rows at a time, and one with each delta's
    factors. Any other operation uses the values with deltas added.

    Parameters
    ----------
    position
        Number of the parameter in the model.
    head
        Whether the parameter belongs to the module that computes the logits, one block of the vocabulary at a time.
    rounded
        Whether the base's weight, and the inputs and results of its products, are rounded to bfloat16.
    """

    def __init__(
        self, model: SweepModel, tensor: RunTimeTensor, position: int, *, head: bool, rounded: bool
    ) -> None:
        self.model, self.tensor, self.position, self.head, self.rounded = (
            model,
            tensor,
            position,
            head,
            rounded,
        )
        self.name, self.shape, self.values, self.device = (
            tensor.name,
            tensor.shape,
            model.values,
            model.values.device,
        )

    @property
    def variant(self) -> int:
        """Return the number of the variant that runs."""
        return self.model.group.variant

    @property
    def sources(self) -> tuple[WeightSource, ...]:
        """Return the parameter's sources under the variant that runs."""
        return self.values.sources(self.tensor, self.variant)

    @property
    def watch(self) -> Watch | None:
        """Return what makes sites for the group that runs; None for a rider."""
        group = self.model.group
        return None if group.stream is None or group.skips else self.model._watch

    def _rows(self) -> tuple[int, int]:
        """Return the range of rows in use: all, or for the head the current block of the vocabulary."""
        return (self.model.block if self.head else None) or (0, self.shape[0])

    def read(self) -> Tensor:
        """Read all values, including deltas."""
        self.model._checkpoint()
        if self.watch is not None:
            self.model.otherwise_used.update(self.watch.names(self.tensor))
        i, j = self._rows()
        if self.values.row_access(self.tensor) and not self.values.changes(
            self.sources[0].slices[0], self.variant
        ):
            rows = [rows for *_, rows in self.values.blocks(self.sources[0], self.variant, i, j)]
            return torch.cat(rows).view(j - i, *self.shape[1:])
        return self.values.whole(self.tensor, self.variant)[i:j]

    def matrix(self, index: int) -> Tensor | None:
        """Return a stand-in for one expert's matrix. The whole stack then counts as used, since the text decides which experts run."""
        if not self.tensor.stacked:
            return None
        if self.values.adapted(self.variant):
            self.values.applied |= self.tensor.weights
            self.values.read |= self.tensor.weights
        return LazyTensor.of(_Expert(self, index))

    def gather(self, ids: Tensor) -> Tensor | None:
        """Look up rows; a look-up is the site of one-hot inputs."""
        group, variant = self.model.group, self.variant
        if not self.values.row_access(self.tensor):
            return None
        self.model._checkpoint()
        for matrix, size in () if self.watch is None else self.watch.tables(self.tensor):
            all_ids, (count, length) = ids, group.ids.shape
            if ids.shape[:2] != (count, length) and (ids.shape[:1] == (1,) or length in ids.shape):
                # One look-up serves all sequences: of positions, (1, length), or of pairs of them, (length, length).
                all_ids = ids.expand(count, *ids.shape)
            self.model.pause(Site((True, 0, self.position), (matrix,), all_ids.flatten(), size))
        changes = [change for _, change in self.values.changes(self.sources[0].slices[0], variant)]
        products = [change for change in changes if isinstance(change, LowRank)]
        if len(products) < len(changes):
            return self.values.whole(self.tensor, variant)[ids]
        unique, rows, at = self.values.looked_up(self.tensor, variant, ids)
        for change in products:
            rows += change.L[unique] @ change.R.T
        return rows[at]

    def product(self, x: Tensor, transposed: bool) -> Tensor:
        """Compute ``x Wᵀ``, or ``x W`` if `transposed`."""
        return self.multiply(x, None, transposed, self._rows())

    def multiply(
        self, x: Tensor, index: int | None, transposed: bool, rows: tuple[int, int]
    ) -> Tensor:
        """Compute ``x Mᵀ`` (``x M`` if `transposed`); the operand on a watched matrix's input side is a site.

        Parameters
        ----------
        index
            Number of the matrix in a stack; None for a tensor that is a matrix.
        rows
            Rows of the source's matrix that M consists of; all are used if its transpose is stored.
        """
        values, source, X = self.values, self.sources[index or 0], x.reshape(-1, x.shape[-1])
        if self.watch is not None:
            self._stop(self.watch, X, index, transposed)
        self.model._checkpoint()
        changes = [values.changes(slice_, self.variant) for slice_ in source.slices]
        if not all(
            isinstance(change, LowRank) for slice_changes in changes for _, change in slice_changes
        ):
            matrix = values.cache.get(
                (self.name, index, self.variant), lambda: values.matrix(source, self.variant)
            )
            W = matrix[slice(*rows)]
            return (X @ (W if transposed else W.T)).view(*x.shape[:-1], -1)
        shapes = [values.weight_of(slice_, self.variant).matrix for slice_ in source.slices]
        starts = [*itertools.accumulate((m for m, _ in shapes), initial=0)]
        if source.transposed:
            transposed, rows = not transposed, (0, starts[-1])
        first, last = rows
        out = self._base_product(X, source, transposed, rows, shapes[0][1])
        for at, end, slice_changes in zip(starts, starts[1:], changes, strict=False):
            i, j = max(first, at), min(last, end)
            for _, change in slice_changes if i < j else ():
                part = change.row_slice(i - at, j - at)
                assert isinstance(part, LowRank)
                if transposed:
                    out.addmm_(X[:, i - first : j - first] @ part.L, part.R.T)
                else:
                    out[:, i - first : j - first].addmm_(X @ part.R, part.L.T)
        return out.view(*x.shape[:-1], -1)

    def _stop(self, watch: Watch, X: Tensor, index: int | None, transposed: bool) -> None:
        # The adapted model's sources name the targets; in the base alone a head may be tied to an embedding.
        adapted, at = self.tensor.adapted[index or 0], 0
        crossed = transposed != adapted.transposed
        order = index is None, index or 0, self.position
        slices = [
            (slice_, watch.matrices(self.tensor, slice_, crossed)) for slice_ in adapted.slices
        ]
        if not crossed:
            if matrices := tuple(
                matrix for _, matrices_of_slice in slices for matrix in matrices_of_slice
            ):
                self.model.pause(Site(order, matrices, X))
            return
        for slice_, matrices_of_slice in slices:
            size = self.values.weight_of(slice_, self.variant).matrix[0]
            if matrices_of_slice:
                self.model.pause(Site(order, tuple(matrices_of_slice), X[:, at : at + size]))
            at += size

    def _base_product(
        self, X: Tensor, source: WeightSource, transposed: bool, rows: tuple[int, int], columns: int
    ) -> Tensor:
        """Compute ``X Mᵀ`` (t, m) for X (t, n), or if `transposed` ``X M`` (t, n) for X (t, m), without deltas."""
        m, out, dtype = rows[1] - rows[0], None, torch.bfloat16 if self.rounded else torch.float32
        x = X.to(dtype)
        for i, j, values in self.values.blocks(source, self.variant, *rows, dtype):
            if transposed:
                part = x[:, i:j] @ values
                out = part.float() if out is None else out.add_(part)
            elif j - i == m:
                out = linear(x, values).float()
            else:
                out = X.new_empty((len(X), m)) if out is None else out
                out[:, i:j] = linear(x, values)
        return X.new_zeros((len(X), columns if transposed else m)) if out is None else out


class _Expert(Reader):
    """Reads one matrix of a stack."""

    def __init__(self, stack: _Reader, index: int) -> None:
        self.stack, self.index = stack, index
        self.name, self.shape, self.device = f"{stack.name}[{index}]", stack.shape[1:], stack.device

    def read(self) -> Tensor:
        """Read all values, including deltas."""
        stack = self.stack
        if stack.watch is not None:
            stack.model.otherwise_used.update(stack.watch.names(stack.tensor))
        return stack.values.matrix(stack.sources[self.index], stack.variant)

    def product(self, x: Tensor, transposed: bool) -> Tensor:
        """Compute ``x Wᵀ``, or ``x W`` if `transposed`."""
        return self.stack.multiply(x, self.index, transposed, (0, self.shape[0]))


LENGTH = 8
"""Tokens in each of the two sequences that `check_logits` runs."""

TOLERANCE = 1e-3
"""Largest difference of logits that rounding may make, as a share of the largest logit."""

Ids = NDArray[np.int64]


def check_logits(model: SweepModel, ids: Ids, checkpoint: Checkpoint) -> None:
    """Check the base's logits on two short sequences that differ in the last token, and compare one vocabulary block with two.

    Parameters
    ----------
    ids
        Tokens of a text.
    checkpoint
        Called before each parameter is read; may raise to stop.

    Raises
    ------
    NumericError
        If a logit is NaN or Inf.
    UnsupportedError
        If the logits differ before the last token, or a token's logit depends on which vocabulary block contains it.
    """
    pair, plan = np.resize(ids, (2, LENGTH)), model.job.plan
    pair[1] = pair[0]
    pair[1, -1] = (pair[0, -1] + 1) % model.vocabulary
    cut = max(1, model.vocabulary // 3)
    group = Group(torch.from_numpy(pair), 0)
    try:
        model.run([group], checkpoint)
        blocks = model.logits(
            [[group]], [(0, model.vocabulary), (0, cut), (cut, model.vocabulary)], checkpoint
        )
        logits, *parts = (z[0] for *_, z in blocks)
    except UnsupportedError as e:
        if isinstance(e.__cause__, IndexError):  # the model indexed a token outside the block
            raise _changed_by_number(plan) from e
        raise
    if not bool(logits.isfinite().all()):
        raise NumericError(
            f"{plan.base.path}: its logits are NaN or Inf on the texts; check its weights"
        )
    in_blocks = float((logits - torch.cat(parts, -1)).abs().max())
    largest = TOLERANCE * max(1.0, float(logits.abs().max()))
    if not in_blocks <= largest:
        raise _changed_by_number(plan)
    if float((logits[0, :-1] - logits[1, :-1]).abs().max()) > largest:
        raise _sees_what_follows(plan)


def changed_by_padding(
    model: SweepModel, ids: Ids, shorter: int, block: int, checkpoint: Checkpoint
) -> bool:
    """Test whether the base's logits of a sequence's first tokens change if the sequence ends after them.

    They do in models whose attention selects some of the keys, because the number of all keys decides ties. The sequence runs whole and
    cut, through the base alone.

    Parameters
    ----------
    ids
        A sequence of a text.
    shorter
        Length of the cut sequence, in tokens.
    block
        Number of tokens of the vocabulary to compute together.

    Raises
    ------
    UnsupportedError
        If the logits depend on which tokens follow.
    """

    def differ(*sequences: Ids) -> bool:
        parts = [[Group(torch.from_numpy(tokens)[None], 0)] for tokens in sequences]
        model.run([group for (group,) in parts], checkpoint)
        off, largest, a = 0.0, 1.0, torch.empty(0)
        for _, _, number, z in model.logits(parts, block, checkpoint):
            if number == 0:
                a = z[0, 0, :shorter]
            else:
                off, largest = (
                    max(off, float((a - z[0, 0, :shorter]).abs().max())),
                    max(largest, float(a.abs().max())),
                )
        return off > TOLERANCE * largest

    if not differ(ids, ids[:shorter]):
        return False
    other = ids.copy()
    other[shorter:] = (ids[shorter:] == 0).astype(ids.dtype)
    if differ(ids, other):
        raise _sees_what_follows(model.job.plan)
    return True


def _changed_by_number(plan: Plan) -> UnsupportedError:
    return UnsupportedError(
        f"{plan.base.path}: the model changes the logits of some tokens by their number, so it does not compute all logits with its head "
        "alone; not supported by evaluate and repair"
    )


def _sees_what_follows(plan: Plan) -> UnsupportedError:
    return UnsupportedError(
        f"{plan.base.path}: in this model a token sees those that follow it, so its losses do not measure prediction; "
        "evaluate and repair need a causal language model"
    )
