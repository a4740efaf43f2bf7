"""Collect the inputs of modules, such as those that an adapter changes, in a pass over the base.

General text runs through the base, task text through base + adapter. Sequences run in groups that take turns: each group runs one layer,
then the next group does. When all groups have run a layer, its inputs are complete; their second moments are passed on, and the inputs
are dropped before the next layer begins. The inputs are kept in a temporary file; memory holds the layer's outputs on all tokens. Each
group reads a layer's weights once.

Run functions in turns.

Collect the inputs of all matrices of a base, under the names by which adapters change them.
"""

from __future__ import annotations

import contextlib
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from streamer.errors import UnsupportedError
from streamer.linalg.torch_state import CPU, computes_alone, free_product_buffers
from streamer.methods import UNCHANGED
from streamer.plan.architectures import architecture_for
from streamer.plan.name_matching import renames_for
from streamer.plan.plan import Plan
from streamer.plan.targets import Target, TensorSlice
from streamer.plan.tied_embeddings import find_ties
from streamer.storage.files import give_freed_memory_back
from streamer.streaming.collecting import Collected, CollectingReader, Complete, FactorDeltas, Setting
from streamer.streaming.installed import is_rounded
from streamer.streaming.model import LoadedModel, quiet_transformers, refused_errors
from streamer.streaming.run_time import (
    GENERAL_AS,
    TASK_AS,
    Arguments,
    Elsewhere,
    Group,
    LayerResult,
    LayerRun,
    RunTimeTensor,
    Taken,
    containers_of,
    is_portable,
    layer_modules,
    tensors_of,
    tokens_of,
)
from streamer.streaming.spool import Spool, Written
from streamer.streaming.values import ADAPTER, BASE, LazyTensor, Variant, VariantSet


class Turns:
    """Functions that run in turns, one at a time, each until it pauses; each has a thread, which keeps its position.

    A round is over when each function has paused once more or ended.
    """

    def __init__(self, runs: Sequence[Callable[[], None]]) -> None:
        self._runs = runs
        self._go = [threading.Semaphore(0) for _ in runs]
        self._back = threading.Semaphore(0)
        self._running, self._stopped = 0, False
        self._error: BaseException | None = None
        self._ended: set[int] = set()

    def run(self, begin: Callable[[int], None], between: Callable[[], None]) -> None:
        """Run all functions to their ends.

        Parameters
        ----------
        begin
            Called with a run's number before each of its turns.
        between
            Called after each round.
        """
        threads = [
            threading.Thread(target=self._thread, args=(i,), name=f"streamer group {i}", daemon=True)
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
                if thread.ident is not None:  # the thread was started
                    thread.join()

    def pause(self) -> None:
        """End the turn of the calling function."""
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
        except BaseException as e:  # the main thread raises it
            self._error = e
        finally:
            self._ended.add(number)
            self._back.release()


class _Stopped(BaseException):
    """Ends a function whose turns are over because another failed."""


class Collecting(TypedDict, total=False):
    """Options of `CollectingModel`."""

    rounds_products: bool
    directory: Path | None
    device: torch.device
    elsewhere: Elsewhere | None


class CollectingModel(LoadedModel):
    """Model of a base, with or without an adapter, that passes on the moments of its modules' inputs.

    Parameters
    ----------
    strict
        Whether to refuse a matrix that is multiplied in several layers; otherwise `repeated` lists it.
    directory
        Directory for a layer's inputs; None for the system's temporary directory.
    device
        See `VariantSet`.
    elsewhere
        Runs one layer for all groups at a time; None runs layers here, in turns. The results are the same.

    Attributes
    ----------
    repeated
        Names of matrices that are multiplied in several layers; only the inputs of one layer were passed on.
    """

    def __init__(
        self, plan: Plan, *, strict: bool, rounds_products: bool = False, directory: Path | None = None,
        device: torch.device = CPU, elsewhere: Elsewhere | None = None,
    ) -> None:  # fmt: skip
        variants = Variant(BASE, None), Variant(ADAPTER, UNCHANGED)
        super().__init__(VariantSet(plan, variants, None, rounds_products=rounds_products, device=device), together=1)
        self.setting = Setting(self.values, FactorDeltas(plan, device), self.batch)
        self._collected = Collected[Any](Spool(directory), strict)
        self._turns: Turns | None = None
        self._elsewhere, self._group = elsewhere, 0
        self._asked: dict[int, LayerRun | None] = {}
        self._answers: dict[int, LayerResult] = {}
        self._layers = layer_modules(self._model)
        for _, module, own in self.modules:
            for name, tensor in own.items():
                rounded = name == "weight" and is_rounded(self.values, module, tensor)
                reader = self._reader(tensor, head=module is self._head, rounded=rounded)
                module._parameters[name] = LazyTensor.of(reader)  # type: ignore[assignment]  # torch types a Parameter, which this stands in for
        for layer in self._layers.values():
            layer.register_forward_pre_hook(self._before_layer)
            layer.register_forward_hook(self._after_layer)

    @abstractmethod
    def _reader(self, tensor: RunTimeTensor, *, head: bool, rounded: bool) -> CollectingReader[Any]:
        """Make the reader of a parameter."""

    @property
    def repeated(self) -> set[str]:
        """Return names of matrices that are multiplied in several layers; see the class."""
        return self._collected.repeated

    def collect(self, groups: Sequence[Group], complete: Complete[Any]) -> None:
        """Run all groups, and pass on the moments of each module's inputs once they are complete and every text has some.

        Raises
        ------
        NumericError
            If an input is NaN or Inf.
        """
        tokens, path = tokens_of(groups), self.job.plan.base.path

        def between() -> None:
            self._collected.hand_on(complete, tokens, path)
            self._answer(groups)

        try:
            with self._replaced(self._forward):
                self._run_groups(groups, between)
        finally:
            self._collected.spool.close()

    @contextlib.contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Inside the context, call `forward` instead of each layer's own, with the layer's path and its own `forward`."""
        for path, layer in self._layers.items():
            layer.forward = partial(forward, path, layer.forward)
        try:
            yield
        finally:
            for layer in self._layers.values():
                del layer.forward  # uncovers the class's own

    def _forward(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = self._ask(path, (args, kwargs))
        return forward(*args, **kwargs) if found is None else found.out

    def _ask(self, path: str, arguments: Arguments) -> LayerResult | None:
        """Have a layer run elsewhere for the current group, and return its result; None if it must run here."""
        if self._elsewhere is None:
            return None
        stream, group = self._collected.stream, self._group
        run = LayerRun(path, stream, self.batch.sequences, self.batch.length, arguments)
        self._asked[group] = run if is_portable(arguments) else None
        self._pause()
        found = self._answers.pop(group, None)
        for container, values in zip(containers_of(arguments), found.shared if found else (), strict=found is not None):
            container.update(values)
        return found

    def _pause(self) -> None:
        assert self._turns is not None
        self._turns.pause()

    def _answer(self, groups: Sequence[Group]) -> None:
        """Run the requested layers elsewhere, and add their inputs in the order of the groups."""
        asked, self._asked = self._asked, {}
        runs = {number: self._completed(run) for number, run in asked.items() if run is not None}
        if self._elsewhere is None or len(runs) < len(asked):
            return
        found: dict[int, tuple[LayerResult, list[Written | None]]] = {}
        for number, result in self._elsewhere(runs):
            if result is None:
                return  # all run here, so that inputs come in the order of the groups
            inputs = [None if one.size is not None else one.x for one in result.taken]
            found[number] = result, [None if x is None else Written.to(self._spool, x) for x in inputs]
        for number in sorted(found):
            result, written = found[number]
            self._begin(number, groups[number])
            for tensor in self.inside(runs[number].layer):
                groups[number].on_read(tensor)
            for one, place in zip(result.taken, written, strict=True):
                self._take(replace(one, matrix=self._own(one.matrix), x=one.x if one.size else None), place)
            self.values.applied |= result.applied
            self.values.read |= result.read
            self._collected.whole |= result.whole
            self._collected.forget_inputs()
            self._answers[number] = result

    @property
    def _spool(self) -> Spool:
        return self._collected.spool

    def _completed(self, run: LayerRun) -> LayerRun:
        return run

    def _take(self, one: Taken, written: Written | None) -> None:
        self._collected.add(one, written)

    def _own(self, matrix: Any) -> Any:
        """Return this process' object for a matrix of another process."""
        return matrix

    def run_layer(self, run: LayerRun) -> LayerResult | None:
        """Run a layer for another process; None if it writes into its arguments."""
        collected, values, arguments = self._collected, self.values, run.arguments
        collected.taken, collected.whole, values.applied, values.read = [], set(), set(), set()
        self._set_stream(run.stream, run.sequences, run.length)
        self.batch.vocabulary = 0, 1
        tensors = tensors_of(*arguments)
        versions = [one._version for one in tensors]
        with torch.no_grad(), quiet_transformers(), refused_errors(self.job.plan.base.path, self._model):
            out = self._run_one(run, *arguments)
        collected.forget_inputs()
        if versions != [one._version for one in tensors]:
            return None
        shared = [dict(one) for one in containers_of(arguments)]
        return LayerResult(out, shared, collected.taken, values.applied, values.read, collected.whole)

    def _run_one(self, run: LayerRun, args: Any, kwargs: Any) -> Any:
        return self._layers[run.layer].forward(*args, **kwargs)

    def _run_groups(self, groups: Sequence[Group], between: Callable[[], None]) -> None:
        """Run groups in turns; `between` is called each time all groups have reached the same layer."""
        self._turns = Turns([partial(self._run_group, group) for group in groups])
        self.batch.vocabulary = 0, 1

        def tidy() -> None:  # after a turn, whose thread would keep memory while others run
            if computes_alone():
                free_product_buffers()
            give_freed_memory_back()

        def begin(number: int) -> None:
            tidy()
            self._begin(number, groups[number])

        def round_ends() -> None:
            tidy()
            between()

        try:
            with quiet_transformers(), refused_errors(self.job.plan.base.path, self._model):
                self._turns.run(begin, round_ends)
        finally:
            self.batch.vocabulary, self._turns = None, None

    def _begin(self, number: int, group: Group) -> None:
        """Set the stream and variant for a group's turn."""
        self._group = number
        self.batch.on_read = group.on_read
        self._set_stream(group.stream, len(group.text.ids), group.text.longest)

    def _set_stream(self, stream: int, sequences: int, length: int) -> None:
        """Set the stream, its variant, and how many sequences of how many tokens run."""
        self._collected.stream, self.setting.variant = stream, GENERAL_AS if stream == GENERAL_AS else TASK_AS
        self.batch.sequences, self.batch.length = sequences, length

    def _run_group(self, group: Group) -> None:
        ids, _ = group.text.padded(group.text.longest)
        with torch.no_grad():
            self._model(input_ids=torch.from_numpy(ids).to(self.job.device), use_cache=False)

    def _before_layer(self, module: nn.Module, args: object) -> None:
        """Pause; of the earlier layers only the last one's outputs are still in memory."""
        if self._turns is not None and self._elsewhere is None:  # if layers run elsewhere, `_ask` pauses
            self._turns.pause()

    def _after_layer(self, module: nn.Module, args: object, out: object) -> None:
        self._collected.forget_inputs()


class InputModel(CollectingModel):
    """Model of a base with an adapter that passes on the inputs of the modules that the adapter changes.

    Attributes
    ----------
    unseen
        Names of the matrices that no token of the general text, or none of the task text, reached in a pass.
    """

    def __init__(self, plan: Plan, **options: Unpack[Collecting]) -> None:
        super().__init__(plan, strict=True, **options)
        self.unseen: list[str] = []
        self._targets = {target.tensor: target for target in plan.targets}

    def _own(self, matrix: Target) -> Target:
        return self._targets[matrix.tensor]

    def _reader(self, tensor: RunTimeTensor, *, head: bool, rounded: bool) -> CollectingReader[Target]:
        return _TargetReader(self._collected, self.setting, tensor, head=head, rounded=rounded)

    def collect(self, groups: Sequence[Group], complete: Complete[Target]) -> None:
        """Collect as in `CollectingModel`, and check that everything the adapter changes was used.

        Raises
        ------
        NumericError
            If an input is NaN or Inf.
        UnsupportedError
            If a module that the adapter changes multiplies its inputs in an unknown way, or runs in several layers.
        """
        super().collect(groups, complete)
        if whole := sorted(self._collected.whole - self._collected.complete):
            raise UnsupportedError(
                f"{self.job.plan.base.path}: the weights of {len(whole)} matrices are not used by a matrix product or look-up (a "
                f"convolution, for example; first: {whole[0]!r}), so their inputs cannot be collected; use `mitigate --method shrink`"
            )
        self.unseen = sorted({t.tensor for t in self.job.plan.targets} - self._collected.complete)
        self.check_all_used()


class _TargetReader(CollectingReader[Target]):
    """Passes on the inputs of an adapter's targets."""

    def matrices(self, slice_: TensorSlice, crossed: bool) -> Iterable[Target]:
        """List the targets. A tied head has the other side: it multiplies with the transpose of an embedding's delta."""
        pairs = self.setting.values.plan.by_weight.get(slice_.weight, ())
        return [t for t, part in pairs if slice_.index in (None, part.index) and t.transposed == crossed]

    def tables(self) -> Iterable[tuple[Target, int]]:
        """List the targets that are embeddings."""
        pairs = self.setting.values.targets(self.tensor)
        return [(t, t.module.shape[1]) for t, part in pairs if t.transposed and part.rows is None]

    def names(self) -> Iterable[str]:
        """Return the names of the targets."""
        return [target.tensor for target, _ in self.setting.values.targets(self.tensor)]


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


class BaseInputModel(CollectingModel):
    """Model of a base without an adapter, which passes on the inputs of all its matrices."""

    def __init__(self, plan: Plan, **options: Unpack[Collecting]) -> None:
        ties = find_ties(plan.base.weight_map, architecture_for(plan.config), renames_for(plan.config))
        self._ties = {tie.stored: tie.others for tie in ties if tie.stored}
        super().__init__(plan, strict=False, **options)

    def _reader(self, tensor: RunTimeTensor, *, head: bool, rounded: bool) -> CollectingReader[BaseMatrix]:
        return _BaseReader(self._collected, self.setting, tensor, self._ties, head=head, rounded=rounded)

    def lacking(self) -> list[str]:
        """List the matrices whose inputs were not seen: no token reached them, or they take part in no product."""
        readers = (p.reader for _, module, _ in self.modules for p in module._parameters.values() if p is not None)  # type: ignore[attr-defined]  # lazy
        names = {name for reader in readers for name in reader.names()}
        seen = {name.removesuffix(LOOKED_UP) for name in self._collected.complete}
        return sorted((names - seen) | self.repeated)


class _BaseReader(CollectingReader[BaseMatrix]):
    def __init__(
        self, collected: Collected[BaseMatrix], setting: Setting, tensor: RunTimeTensor,
        ties: dict[str, tuple[str, ...]], *, head: bool, rounded: bool,
    ) -> None:  # fmt: skip
        super().__init__(collected, setting, tensor, head=head, rounded=rounded)
        self._ties = ties
        self._experts = {
            slice_: f"{tensor.name}[{e}]" for e, source in enumerate(tensor.adapted) for slice_ in source.slices
            if tensor.stacked
        }  # fmt: skip

    def matrices(self, slice_: TensorSlice, crossed: bool) -> Iterable[BaseMatrix]:
        """Return the slice's matrix."""
        own = _name(slice_)
        expert = (self._experts[slice_],) if slice_ in self._experts else ()
        return [BaseMatrix(own, tuple(dict.fromkeys((own, *expert, *self._ties.get(own, ())))))]

    def tables(self) -> Iterable[tuple[BaseMatrix, int]]:
        """Return the embedding's table."""
        ((slice_,),) = (source.slices for source in self.tensor.adapted)
        own = _name(slice_)
        return [(BaseMatrix(own + LOOKED_UP, (own, *self._ties.get(own, ()))), self.shape[0])]

    def names(self) -> Iterable[str]:
        """Return the names of the matrices; vectors and a stack's biases have none."""
        if len(self.shape) - self.tensor.stacked < 2 or self.name.endswith("bias"):
            return []
        return [_name(slice_) for source in self.tensor.adapted for slice_ in source.slices]


def _name(slice_: TensorSlice) -> str:
    return slice_.weight if slice_.index is None else f"{slice_.weight}[{slice_.index}]"
