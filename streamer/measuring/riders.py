"""Measure variants on held-out sequences: riders of a sweep, whose logits arrive one block of the vocabulary at a time.

For the logits z at a token and the next token y, ``loss = log Σ exp z − z_y``. With the base's z⁰ and p⁰ = softmax(z⁰),
``KL(p⁰ ‖ p) = Σ p⁰ (z⁰ − z) − (log Σ exp z⁰ − log Σ exp z)``. Sums over the vocabulary are float64 and scaled by the largest logit so far.

Divide sequences into groups that run together, count the multiplications of a sweep, and estimate its memory. A row is one token of one
variant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamer.detection.options import Run
from streamer.errors import NumericError, UsageError
from streamer.events import Event
from streamer.measuring.sequences import TextSequences
from streamer.measuring.statistics import MEASURES, SequenceSums, counted_bins
from streamer.streaming.model import LOGIT_BYTES, ModelSize
from streamer.streaming.sweep import Group, Solve, States, SweepModel, TargetWatch, changed_by_padding, check_logits
from streamer.streaming.values import BLOCK_BYTES, ROOM
from streamer.workers import Workers

TRANSFORMERS_BYTES = 150 << 20
"""Anonymous memory for importing transformers and building a model, in addition to `plan.plan.resident_bytes`."""

ROWS = 1024
"""Most tokens that run together unless a budget asks for fewer: reading the weights then needs less than a tenth of the time."""

LOGIT_COPIES = 5
"""Memory for logits and everything computed from them, as a multiple of the logits that exist at one time."""

WIDTHS = 5
"""Number of activations of the widest layer's width that exist at one time for each row of a group, and of the model's width."""

STATES, STOPPED = 3, 5
"""Values of the model's width that each row keeps between two layers (its state, the state before, and a share of embeddings), and while
its group has stopped at a site: what attention and the residual hold as well. At a site wider than the model, attention has ended."""

CALL = 5_000_000
"""Multiplications that take as long as the fixed cost of a module's call, about half a millisecond."""


@dataclass(frozen=True)
class Part:
    """Sequences that run together, with their numbers in the text of this name, and their groups, one for each variant."""

    name: str
    numbers: tuple[int, ...]
    text: TextSequences
    groups: tuple[Group, ...]


def parts(
    text: TextSequences, rows: Sequence[int], tokens: int, short: int | None, one_length: bool
) -> Iterator[tuple[int, ...]]:
    """Divide sequences, the longest first, into parts with at most this many padded tokens, and at least one sequence each.

    Short sequences are not padded to a length at which the model's rotary embeddings change. With `one_length`, nothing is padded. The
    last bits of a sum depend on what runs together; the division depends only on the texts and the budget.
    """
    group: list[int] = []
    for i in sorted(rows, key=lambda i: (-len(text.ids[i]), i)):
        own, longest = len(text.ids[i]), len(text.ids[group[0]]) if group else 0
        full = (len(group) + 1) * longest > tokens
        apart = own != longest if one_length else short is not None and own <= short < longest
        if group and (full or apart):
            yield tuple(group)
            group = []
        group.append(i)
    if group:
        yield tuple(group)


def riders(
    texts: Mapping[str, TextSequences], variants: int, size: ModelSize, rows: int, one_length: bool
) -> list[Part]:
    """Make the groups that measure texts under each of so many variants."""
    found = []
    for name, text in texts.items():
        for numbers in parts(text, range(len(text.ids)), rows, size.short, one_length):
            own = text.take(numbers)
            found.append(Part(name, numbers, own, tuple(Group(own.padded_ids, v) for v in range(variants))))
    return found


class Progress:
    """Progress of a run of sweeps, in multiplications.

    Parameters
    ----------
    stage
        Stage of the events: ``evaluate``, ``fit`` or ``map``.
    """

    def __init__(self, run: Run, size: ModelSize, stage: Literal["evaluate", "fit", "map"]) -> None:
        self.run, self.monitor, self.size, self._stage = run, run.monitor, size, stage
        self._done = self._total = self._items = self._of = 0

    def expect(self, cost: int, layers: int) -> None:
        """Set the cost of the sweeps still to come, and their layers."""
        self._total, self._of = self._done + cost, self._items + layers

    def layer(self, name: str, cost: int) -> None:
        """Count a layer of all groups as done; it cost this many multiplications."""
        self._done, self._items = self._done + cost, self._items + 1
        self._total, self._of = max(self._total, self._done + 1), max(self._of, self._items)
        self.monitor.emit(Event(self._stage, name, self._done, self._total, self._items, self._of))

    def finish(self) -> None:
        """Report that everything is done."""
        self.monitor.emit(Event(self._stage, "", self._done, self._done, self._items, self._items))


def sweep_cost(size: ModelSize, rows: int, groups: int = 1) -> int:
    """Count the multiplications of a sweep of so many rows in so many groups, each of which calls every module."""
    return sum(size.products.values()) * rows + groups * CALL * len(size.products)


Sums = dict[str, SequenceSums]
"""On each text, the sums of variants."""


def measured(model: SweepModel, texts: Mapping[str, TextSequences], held_out: Sequence[Part], progress: Progress, limits: Limits,
             fitted: Sequence[Group] = (), solve: Solve | None = None, states: States | None = None) -> Sums:  # fmt: skip
    """Run a sweep, and return the sums of its riders on each text, in the order of variants and sequences; questions are scored.

    Parameters
    ----------
    held_out
        The riders; groups with results have run, and only their logits are computed.
    fitted, solve, states
        Groups that fit the adapter's targets, and the file from which a killed sweep resumes; see `SweepModel.run`.

    Raises
    ------
    NumericError
        If a sum is not finite, or if the sweep did not use everything that the adapter changes.
    InputChangedError
        If an input changed.
    """
    groups = [*fitted, *(group for part in held_out for group in part.groups if not group.results)]
    plan, checkpoint = model.job.plan, progress.monitor.checkpoint
    each = sweep_cost(progress.size, sum(group.rows for group in groups), len(groups)) // (len(model.layers) + 1)
    if states is not None:
        states.resumed = lambda layers: progress.monitor.resuming(layers, len(model.layers), "layer")
    model.limit(limits.room, limits.spools)
    watch = TargetWatch(plan) if fitted else None
    away = model.run(groups, checkpoint, solve, watch, lambda name: progress.layer(name, each), states, progress.run)
    rows = max((sum(group.rows for group in part.groups) for part in held_out), default=1)
    block = max(64, LOGIT_BYTES // (4 * rows))
    if away:
        ends = [partial(_ended, part.text, block) for part in held_out]
        arrived = dict(model.elsewhere(progress.run, [part.groups for part in held_out], len(model.layers), ends))
        sums = [arrived[number] for number in range(len(held_out))]
    else:
        sums = part_sums(model, held_out, block, checkpoint)
    model.check_all_used()
    plan.check_unchanged()
    found = {}
    for name, text in texts.items():
        own = [(part, one) for part, one in zip(held_out, sums, strict=True) if part.name == name]
        order = np.argsort([i for part, _ in own for i in part.numbers])
        arrays = {
            kind: np.concatenate([getattr(one, kind) for _, one in own], -1)[..., order]
            for kind in ("tokens", *MEASURES)
        }
        for kind in MEASURES:
            if not np.isfinite(arrays[kind]).all():
                v = int(np.argwhere(~np.isfinite(arrays[kind]))[0][0])
                raise NumericError(
                    f"{plan.base.path}: variant {model.job.variants[v].name!r} has a {kind} of NaN or Inf on the {name} text; check the "
                    "adapter's scale"
                )
        found[name] = text.scored(SequenceSums(**arrays, kl_bins=np.sum([one.kl_bins for _, one in own], 0)))
    return found


def _ended(text: TextSequences, block: int, model: SweepModel, groups: Sequence[Group]) -> SequenceSums:
    """Compute the sums of a part's riders on a worker."""
    return part_sums(model, [Part("", (), text, tuple(groups))], block, lambda: None)[0]


def part_sums(
    model: SweepModel, held_out: Sequence[Part], block: int, checkpoint: Callable[[], None]
) -> list[SequenceSums]:
    """Compute the sums of each part's riders, which have run, from the logits of so many tokens of the vocabulary at a time."""
    sums = [_Accumulator(len(part.groups), part.text, model.job.device) for part in held_out]
    for i, _, number, z in model.logits([part.groups for part in held_out], block, checkpoint):
        sums[number].add(z.float(), i)
    return [one.sums() for one in sums]


class _Accumulator:
    """Sums over the vocabulary for each token; shapes are (variants, sequences, length), with the base as the first variant."""

    def __init__(self, variants: int, text: TextSequences, device: torch.device) -> None:
        ids, self.counted = map(torch.from_numpy, text.padded(text.longest))
        shape = (variants, *ids.shape)
        self.labels = torch.roll(ids, -1, 1).to(device)
        self.largest = torch.full(shape, -torch.inf, device=device)
        self.top = torch.zeros(shape, dtype=torch.int64, device=device)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.cross = torch.zeros(shape, dtype=torch.float64, device=device)
        """``Σ exp(z⁰ − largest⁰) (z⁰ − z)``."""
        self.label = torch.zeros(shape, device=device)

    def add(self, z: Tensor, i: int) -> None:
        """Add the logits (…, j − i) of vocabulary entries i to j."""
        most, at = z.max(-1)
        self.top = torch.where(most > self.largest, at + i, self.top)
        largest = torch.maximum(most, self.largest)
        factor = torch.exp(self.largest.double() - largest.double())
        self.largest = largest
        self.total *= factor
        self.cross *= factor[:1]
        base = torch.exp(z[0] - largest[0, ..., None])
        for v in range(len(z)):
            weights = base if v == 0 else torch.exp(z[v] - largest[v, ..., None])
            self.total[v] += weights.sum(-1)
            self.cross[v] += (base * (z[0] - z[v])).sum(-1)
        here = ((self.labels >= i) & (self.labels < i + z.shape[-1])).expand(len(z), -1, -1)
        at = (self.labels - i).clamp(0, z.shape[-1] - 1).expand(len(z), -1, -1)
        self.label = torch.where(here, z.gather(-1, at[..., None])[..., 0], self.label)

    def sums(self) -> SequenceSums:
        """Return the loss, the KL, whether the likeliest token is the base's or the text's own, and the change of p, by sequence."""
        log_sum = self.largest.double() + self.total.log()
        kl = self.cross / self.total[:1] - (log_sum[:1] - log_sum)
        loss = log_sum - self.label.double()
        change = torch.exp(-loss) - torch.exp(-loss[:1])
        agree, right = (self.top == self.top[:1]).double(), (self.top == self.labels).double()
        results = {"loss": loss, "kl": kl, "agree": agree, "right": right, "p_change": change, "p_square": change**2}
        found = {name: (t.cpu() * self.counted).sum(-1).numpy() for name, t in results.items()}
        by_token, counted = kl.cpu().numpy(), self.counted.numpy()
        most = np.where(counted, by_token, 0.0).max(-1)
        tokens = self.counted.sum(-1).double().numpy()
        return SequenceSums(tokens, **found, kl_max=most, kl_bins=counted_bins(by_token, counted))


class Limits(NamedTuple):
    """How a sweep fits a budget.

    Attributes
    ----------
    rows
        Most tokens that run together.
    room
        Bytes for values of one layer that groups share.
    spools
        Whether states lie in a spool while other groups run.
    """

    rows: int
    room: int
    spools: bool


@dataclass(frozen=True)
class Work:
    """Rows of a sweep, which decide its memory.

    Attributes
    ----------
    fitted, riding
        Rows of groups of a fit, and of riders.
    length
        Tokens of the longest sequence.
    variants
        Variants that ride.
    """

    fitted: int
    riding: int
    length: int
    variants: int = 1

    def nbytes(self, size: ModelSize, resident: int, limits: Limits) -> int:
        """Estimate the peak memory of a sweep.

        Parameters
        ----------
        resident
            Bytes in use between two steps; see `plan.plan.resident_bytes`.
        """
        rows, room, spools = limits
        between, results = STATES * (rows if spools else self.riding), self.riding
        states = 4 * (between + results) * size.hidden
        inputs = 4 * self.fitted * max((STOPPED + 1) * size.hidden, (STATES + 1) * size.hidden + size.widest)
        activations = 4 * rows * (WIDTHS * (size.widest + size.hidden) + size.attention * self.length)
        logits = LOGIT_COPIES * LOGIT_BYTES + 40 * self.riding
        weights = 2 * min(BLOCK_BYTES, 4 * max(size.widest, size.vocabulary) * size.hidden)
        computed = states + max(inputs + activations, logits)
        return resident + TRANSFORMERS_BYTES + computed + weights + size.dense + size.factors + room

    def away(self, size: ModelSize, resident: int, workers: Workers | None) -> int:
        """Estimate the memory of workers on this machine, which run one part at a time, and of states on their way."""
        if workers is None or workers.processes is None:
            return 0
        rows = max(self.length, ROWS)
        part = replace(self, fitted=0, riding=min(self.riding, self.variants * rows))
        each = part.nbytes(size, resident, Limits(rows, ROOM, False))
        return workers.processes * each + 8 * workers.at_once * rows * size.hidden

    def beside(
        self, size: ModelSize, resident: int, solving: int, workers: Workers | None, max_memory: int | None
    ) -> int | None:
        """Return the memory that workers on this machine leave to this process.

        Raises
        ------
        UsageError
            If that is too small for one sequence; the message names the smallest budget.
        """
        away = self.away(size, resident, workers)
        if max_memory is None or not away:
            return max_memory
        self.limits(size, resident + solving + away, max_memory)
        return max_memory - away

    def limits(self, size: ModelSize, resident: int, max_memory: int | None) -> Limits:
        """Choose how a sweep fits a budget; states go to a spool if it is too small for them.

        Raises
        ------
        UsageError
            If the budget is too small for one sequence; the message names the smallest budget.
        """
        if max_memory is None:
            return Limits(max(self.length, ROWS), ROOM, False)
        longest = max(self.length, ROWS)
        for least in (Limits(longest, 0, False), Limits(longest, 0, True), Limits(self.length, 0, True)):
            if (free := max_memory - self.nbytes(size, resident, least)) >= 0:
                return least._replace(room=min(ROOM, free))
        raise UsageError(
            f"max_memory: {max_memory >> 20}M is not enough for a sweep of {self.fitted + self.riding} tokens; it needs "
            f"{-((free - max_memory) >> 20)}M, and less with a smaller --length or fewer --sequences"
        )


def longest_padded(groups: Iterable[TextSequences]) -> tuple[NDArray[np.int64], int] | None:
    """Find the longest sequence to which others are padded, and the length of the next longest in its group; None if none is padded.

    Parameters
    ----------
    groups
        Groups of sequences that run together.
    """
    found = None
    for text in groups:
        lengths = sorted({len(ids) for ids in text.ids})
        if len(lengths) > 1 and (found is None or lengths[-1] > len(found[0])):
            found = max(text.ids, key=len), lengths[-2]
    return found


def padding_changes(model: SweepModel, groups: Sequence[TextSequences], checkpoint: Callable[[], None]) -> bool:
    """Check the logits of a model, and test whether padding changes them for sequences that will run together.

    Raises
    ------
    UnsupportedError
        If losses would be meaningless; see `check_logits`.
    """
    model.limit(0, False)  # one group shares nothing with others
    check_logits(model, groups[0].ids[0], checkpoint)
    padded = longest_padded(groups)
    block = max(64, LOGIT_BYTES // (4 * (1 if padded is None else len(padded[0]))))
    return padded is not None and changed_by_padding(model, *padded, block, checkpoint)


LENGTHS = 8
"""Most different lengths of a text's sequences in a fit, which are not padded: a group has sequences of one length."""


def of_few_lengths(text: TextSequences) -> TextSequences:
    """Cut the ends of sequences, if necessary, so that they have at most `LENGTHS` lengths.

    It drops the length that costs the fewest tokens, again and again.
    """
    counts = Counter(len(ids) for ids in text.ids)
    while len(counts) > LENGTHS:
        ordered = sorted(counts)
        _, size, below = min((counts[b] * (b - a), b, a) for a, b in pairwise(ordered))
        counts[below] += counts.pop(size)
    kept = np.array(sorted(counts))
    sizes = [int(kept[kept <= len(ids)].max()) for ids in text.ids]
    cut = tuple(ids[:n] for ids, n in zip(text.ids, sizes, strict=True))
    return TextSequences(cut, tuple(c[:n] for c, n in zip(text.counted, sizes, strict=True)), text.name)
