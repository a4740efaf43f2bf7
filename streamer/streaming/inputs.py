"""Collect second moments of the inputs of the modules that an adapter changes, in a pass over the base.

General text runs as the base, the task's as base + adapter. Sequences run in groups, by turns: each group runs one layer, then the next
group does, so that a layer's moments are complete when all have, and are handed on and dropped before the next layer begins. Memory is that
of one layer's moments, and of the layer's outputs on all tokens; a layer's weights are read once for each group.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from streamer.errors import NumericError, UnsupportedError
from streamer.methods import UNCHANGED
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.streaming.differentiable import CoefficientDeltas, DifferentiableReader, Setting
from streamer.streaming.extra import quiet_transformers, refused_errors
from streamer.streaming.installed import is_rounded
from streamer.streaming.layers import layer_modules
from streamer.streaming.lazy import LazyTensor
from streamer.streaming.model import LoadedModel
from streamer.streaming.run_time import RunTimeTensor, Source
from streamer.streaming.values import Job
from streamer.streaming.variants import ADAPTER, BASE, Variant

if TYPE_CHECKING:
    from streamer.evaluation.sequences import TextSequences

GENERAL_AS, TASK_AS = 0, 1
"""Variants that general and task text run as: the base, and base + adapter."""

ROWS = 1024
"""Inputs whose products are added to a moment at a time."""


@dataclass
class Moments:
    """``Σ x xᵀ`` (n, n) over inputs x of one text, float64; of one-hot inputs the diagonal (n,), their counts."""

    total: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add inputs (t, n)."""
        if self.total is None:
            self.total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        for i in range(0, len(x), ROWS):
            exact = x[i : i + ROWS].double()
            self.total.addmm_(exact.T, exact)

    def count(self, ids: Tensor, size: int) -> None:
        """Add one-hot inputs by their numbers, of `size` that there are."""
        counts = torch.bincount(ids.flatten(), minlength=size).double()
        self.total = counts if self.total is None else self.total + counts


@dataclass(frozen=True)
class Group:
    """Sequences of one length that run together.

    Attributes
    ----------
    variant
        `GENERAL_AS` or `TASK_AS`.
    on_read
        Called before each parameter is read.
    """

    text: TextSequences
    variant: int
    on_read: Callable[[RunTimeTensor], None]


Complete = Callable[[list[Target], Tensor, Tensor], None]
"""Takes targets that have the same inputs, and the moments of these on general and on task text, sums over tokens."""


class InputModel(LoadedModel):
    """The model of a base with an adapter, which hands on the moments of its modules' inputs.

    Attributes
    ----------
    unseen
        Names of the matrices that no token of the general text, or none of the task's, reached in a pass.
    """

    def __init__(self, plan: Plan, *, rounds_products: bool = False) -> None:
        variants = Variant(BASE, None), Variant(ADAPTER, UNCHANGED)
        super().__init__(Job(plan, variants, None, rounds_products=rounds_products), together=1)
        self.setting = Setting(self.values, CoefficientDeltas(plan, None), self.batch)
        self.unseen: list[str] = []
        self._collected = _Collected(self.setting)
        self._turns: _Turns | None = None
        for _, module, own in self.modules:
            for name, tensor in own.items():
                rounded = name == "weight" and is_rounded(self.values, module, tensor)
                reader = _CollectingReader(
                    self._collected, self.setting, tensor, head=module is self._head, rounded=rounded
                )
                module._parameters[name] = LazyTensor.of(reader)  # type: ignore[assignment]  # torch types a Parameter, which this stands in for
        for layer in layer_modules(self._model).values():
            layer.register_forward_hook(self._end_of_layer)

    def collect(self, groups: Sequence[Group], complete: Complete) -> None:
        """Run all groups, and hand on the moments of each module's inputs as soon as all are there.

        Raises
        ------
        NumericError
            If an input is NaN or Inf.
        UnsupportedError
            If a module that the adapter changes multiplies inputs in a way that is not seen here, or runs in several layers.
        """
        self.setting.deltas.coefficients = None
        self._turns = _Turns([partial(self._run_group, group) for group in groups])
        self.batch.vocabulary = 0, 1
        path = self.job.plan.base.path

        def begin(number: int) -> None:
            group = groups[number]
            self.setting.variant, self.batch.on_read = group.variant, group.on_read
            self.batch.sequences, self.batch.length = len(group.text.ids), group.text.longest

        try:
            with quiet_transformers(), refused_errors(path, self._model):
                self._turns.run(begin, lambda: self._collected.hand_on(complete, path))
        finally:
            self.batch.vocabulary, self._turns = None, None
        self.setting.deltas.spool.close()
        if whole := sorted(self._collected.whole - self._collected.complete):
            raise UnsupportedError(
                f"{path}: the weights of {len(whole)} matrices are used otherwise than by products and look-ups, as by a convolution, "
                f"{whole[0]!r} first, so that their inputs are not seen; take grain 'direction'"
            )
        self.unseen = sorted({t.tensor for t in self.job.plan.targets} - self._collected.complete)
        self.check_all_used()

    def _run_group(self, group: Group) -> None:
        ids, _ = group.text.padded(group.text.longest)
        with torch.no_grad():
            self._model(input_ids=torch.from_numpy(ids), use_cache=False)

    def _end_of_layer(self, module: nn.Module, args: object, out: object) -> None:
        self._collected.forget_inputs()
        if self._turns is not None:
            self._turns.pause()


@dataclass
class _Collected:
    """Moments that are being collected, by the first matrix that has the inputs, and variant; `whole` are matrices that were read whole."""

    setting: Setting
    moments: dict[str, dict[int, Moments]] = field(default_factory=dict)
    targets: dict[str, list[Target]] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)
    _first: dict[str, str] = field(default_factory=dict)
    _inputs: list[tuple[Tensor, str]] = field(default_factory=list)

    def take(self, target: Target, x: Tensor) -> None:
        """Take inputs (t, n) of a matrix; those that another matrix had just now are not counted again."""
        if len(x) == 0:  # of an expert that no token is routed to
            return
        first = next((name for seen, name in self._inputs if _same(seen, x)), None)
        if first is None:
            first = target.tensor
            self._inputs.append((x, first))
            self._of(first).add(x)
        self._join(target, first)

    def take_ids(self, target: Target, ids: Tensor) -> None:
        """Take one-hot inputs."""
        self._of(target.tensor).count(ids, target.module.shape[1])
        self._join(target, target.tensor)

    def forget_inputs(self) -> None:
        """Let go of the inputs by which modules that share them are told."""
        self._inputs.clear()

    def hand_on(self, complete: Complete, path: object) -> None:
        """Hand on all moments that have been collected, and drop them."""
        for first in list(self.moments):
            own, targets = self.moments.pop(first), self.targets.pop(first)
            general, task = (own.get(variant, Moments()).total for variant in (GENERAL_AS, TASK_AS))
            for total in (general, task):
                if total is not None and not bool(torch.isfinite(total).all()):
                    raise NumericError(f"{path}: the inputs of {targets[0].tensor!r} are NaN or Inf on the texts")
            if general is not None and task is not None and bool(task.any()):
                complete(targets, general, task)
                self.complete.update(target.tensor for target in targets)

    def _of(self, name: str) -> Moments:
        return self.moments.setdefault(name, {}).setdefault(self.setting.variant, Moments())

    def _join(self, target: Target, first: str) -> None:
        tensor = target.tensor
        if tensor in self.complete or self._first.setdefault(tensor, first) != first:
            raise UnsupportedError(
                f"{tensor!r}: its module runs in several layers, or shares its inputs in some runs only, which the fit by inputs does not "
                "do; pass --grain direction"
            )
        known = self.targets.setdefault(first, [])
        if all(one.tensor != tensor for one in known):
            known.append(target)


def _same(one: Tensor, other: Tensor) -> bool:
    """Test whether two tensors are the same values in memory; the first is held, so that its memory is not used again."""
    return (
        one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
        and one._version == other._version
    )  # fmt: skip


class _CollectingReader(DifferentiableReader):
    """Reads one parameter of a model, and hands on what it is multiplied with."""

    def __init__(
        self, collected: _Collected, setting: Setting, tensor: RunTimeTensor, *, head: bool, rounded: bool
    ) -> None:
        super().__init__(setting, tensor, head=head, rounded=rounded)
        self._collected = collected

    def multiply(self, x: Tensor, source: Source, transposed: bool, rows: tuple[int, int]) -> Tensor:
        """``x Mᵀ``, or `transposed`, ``x M``; what is on the input's side of a target are its inputs."""
        X = x.reshape(-1, x.shape[-1])
        # The adapted model's weights have the targets; a head may be tied to an embedding in the base alone.
        adapted, at = self.tensor.adapted[self.sources.index(source)], 0
        crossed = transposed != adapted.transposed
        for held in adapted.slices:
            size = self.setting.values.weight_of(held, TASK_AS).matrix[0]
            for target, part in self.setting.values.plan.by_weight.get(held.weight, ()):
                # The other side is that of a tied head, which multiplies with an embedding's delta transposed.
                if held.index in (None, part.index) and target.transposed == crossed:
                    self._collected.take(target, X[:, at : at + size] if crossed else X)
            at += size
        return super().multiply(x, source, transposed, rows)

    def values_of(self, source: Source) -> Tensor:
        """Read a source whole, and note that its inputs are not seen."""
        self._collected.whole.update(target.tensor for target, _ in self.setting.values.targets(self.tensor))
        return super().values_of(source)

    def gather(self, ids: Tensor) -> Tensor | None:
        """Look rows up, which are the inputs of an embedding's target."""
        found = super().gather(ids)
        if found is not None:
            for target, part in self.setting.values.targets(self.tensor):
                if target.transposed and part.rows is None:
                    self._collected.take_ids(target, ids)
        return found


class _Turns:
    """Functions that run by turns, one at a time, each until it pauses; a thread each, so that they keep their place.

    A round is over when each has paused once more, or ended.
    """

    def __init__(self, runs: Sequence[Callable[[], None]]) -> None:
        self._runs = runs
        self._go = [threading.Semaphore(0) for _ in runs]
        self._back = threading.Semaphore(0)
        self._running, self._stopped = 0, False
        self._error: BaseException | None = None
        self._ended: set[int] = set()

    def run(self, begin: Callable[[int], None], between: Callable[[], None]) -> None:
        """Run all to their ends.

        Parameters
        ----------
        begin
            Called with a run's number before each of its turns.
        between
            Called after each round.
        """
        threads = [
            threading.Thread(target=self._thread, args=(i,), name=f"group {i}", daemon=True)
            for i in range(len(self._runs))
        ]
        try:
            for thread in threads:
                thread.start()
            while len(self._ended) < len(threads):
                for number in range(len(threads)):
                    if number not in self._ended:
                        begin(number)
                        self._running = number
                        self._go[number].release()
                        self._back.acquire()
                        if self._error is not None:
                            raise self._error
                between()
        finally:
            self._stopped = True
            for semaphore in self._go:
                semaphore.release()
            for thread in threads:
                if thread.ident is not None:  # it was started
                    thread.join()

    def pause(self) -> None:
        """End the turn of the run that calls it."""
        number = self._running
        self._back.release()
        self._go[number].acquire()
        if self._stopped:
            raise _Stopped

    def _thread(self, number: int) -> None:
        self._go[number].acquire()
        try:
            if not self._stopped:
                self._runs[number]()
        except _Stopped:
            return
        except BaseException as e:  # handed to the caller, who raises it
            self._error = e
        finally:
            self._ended.add(number)
            self._back.release()


class _Stopped(BaseException):
    """Ends a run whose turns are over because another failed."""
