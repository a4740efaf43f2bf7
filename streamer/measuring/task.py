"""Run a pass in this process, or as a task of a worker, which builds the same model from the paths of the inputs.

Measure the losses of all variants on a batch of sequences, from logits that arrive one block of the vocabulary at a time.

For the logits z at a token and the next token y, ``loss = log Σ exp z − z_y``. With the base's z⁰ and p⁰ = softmax(z⁰),
``KL(p⁰ ‖ p) = Σ p⁰ (z⁰ − z) − (log Σ exp z⁰ − log Σ exp z)``. Sums over the vocabulary are float64 and scaled by the largest logit so far.

Estimate the memory of a pass, and choose how many rows run together. A row is one token of one variant.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from streamer.detection.matrices import inputs_of
from streamer.detection.options import Run
from streamer.errors import NumericError, UsageError
from streamer.events import Monitor
from streamer.linalg.torch_state import full_float32
from streamer.measuring.sequences import TextSequences
from streamer.measuring.statistics import MEASURES, SequenceSums, counted_bins
from streamer.plan.batch import AdapterBatch
from streamer.plan.plan import Plan
from streamer.streaming.model import LoadedModel, ModelSize, StreamingModel, vocabulary_block
from streamer.streaming.run_time import RunTimeTensor
from streamer.streaming.values import BLOCK_BYTES, VariantSet
from streamer.workers import Carried, Task, keep_last


class _Accumulator:
    """Sums over the vocabulary for each token; shapes are (variants, sequences, length), with the base as the first variant."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.largest = torch.full(shape, -torch.inf, device=device)
        self.top = torch.zeros(shape, dtype=torch.int64, device=device)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.cross = torch.zeros(shape, dtype=torch.float64, device=device)
        """``Σ exp(z⁰ − largest⁰) (z⁰ − z)``."""
        self.label = torch.zeros(shape, device=device)

    def add(self, z: Tensor, i: int, labels: Tensor) -> None:
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
        here = ((labels >= i) & (labels < i + z.shape[-1])).expand(len(z), -1, -1)
        found = z.gather(-1, (labels - i).clamp(0, z.shape[-1] - 1).expand(len(z), -1, -1)[..., None])[..., 0]
        self.label = torch.where(here, found, self.label)

    def results(self, labels: Tensor) -> dict[str, Tensor]:
        """Return for each token the loss, the KL, whether the likeliest token is the base's or the text's own, and the change of p."""
        log_sum = self.largest.double() + self.total.log()
        kl = self.cross / self.total[:1] - (log_sum[:1] - log_sum)
        loss = log_sum - self.label.double()
        change = torch.exp(-loss) - torch.exp(-loss[:1])
        agree, right = (self.top == self.top[:1]).double(), (self.top == labels).double()
        return {"loss": loss, "kl": kl, "agree": agree, "right": right, "p_change": change, "p_square": change**2}


def measure(model: StreamingModel, text: TextSequences, block: int) -> SequenceSums:
    """Run one pass over all sequences of a text, padded at their ends, where no counted token attends to the padding.

    Parameters
    ----------
    block
        Number of vocabulary entries whose logits are computed together.
    """
    length, device = text.longest, model.job.device
    ids, counted = map(torch.from_numpy, text.padded(length))
    labels = torch.roll(ids, -1, 1).to(device)
    sums = _Accumulator((model.batch.variants, len(text.ids), length), device)
    with torch.inference_mode():
        for i, _, z in model.logits(ids, model.vocabulary_blocks(block)):
            sums.add(z.float(), i, labels)
        results = {name: t.cpu() for name, t in sums.results(labels).items()}
        found = {name: (t * counted).sum(-1).numpy() for name, t in results.items()}
        kl = results["kl"].numpy()
    bins = counted_bins(kl, counted.numpy())
    most = np.where(counted.numpy(), kl, 0.0).max(-1)
    return SequenceSums(counted.sum(-1).double().numpy(), **found, kl_max=most, kl_bins=bins)


TRANSFORMERS_BYTES = 150 << 20
"""Anonymous memory for importing transformers and building a model, in addition to `plan.batch.resident_bytes`."""

ROWS = 4096
"""Rows that run together if no budget requires fewer; reading the weights is then about a hundredth of the time."""

LOGIT_COPIES = 5
"""Memory for logits and everything computed from them, as a multiple of the logits that exist at one time."""

WIDTHS = 5
"""Number of activations of the widest layer's width that exist at one time for each row, and of the model's width."""


@dataclass(frozen=True)
class Pass:
    """Sequences and variants that run together.

    Attributes
    ----------
    text
        ``general``, ``task``, or the name of another.
    sequences
        Numbers of the sequences.
    variants
        Numbers of the variants, without the base, which is in every pass.
    """

    text: str
    sequences: tuple[int, ...]
    variants: tuple[int, ...]


def pass_bytes(size: ModelSize, resident: int, rows: int, length: int) -> int:
    """Estimate the peak memory of a pass.

    Parameters
    ----------
    resident
        Bytes in use between two steps; see `plan.batch.resident_bytes`.
    rows
        Tokens, counted for each variant.
    length
        Tokens per sequence.
    """
    activations = 4 * rows * (WIDTHS * (size.widest + size.hidden) + size.attention * length)
    logits = LOGIT_COPIES * 4 * rows * min(size.vocabulary, vocabulary_block(rows))
    weights = 2 * min(BLOCK_BYTES, 4 * max(size.widest, size.vocabulary) * size.hidden)
    computed = max(activations, logits + 8 * rows * size.hidden)
    return resident + TRANSFORMERS_BYTES + computed + weights + size.dense + size.factors


def measured_bytes(passes: Sequence[Pass], texts: Mapping[str, TextSequences], size: ModelSize, resident: int) -> int:
    """Estimate the peak memory over all passes; see `pass_bytes`."""
    most = 0
    for one in passes:
        length = max(len(texts[one.text].ids[i]) for i in one.sequences)
        most = max(most, pass_bytes(size, resident, (1 + len(one.variants)) * len(one.sequences) * length, length))
    return most


def plan_passes(
    texts: Mapping[str, TextSequences],
    variants: int,
    size: ModelSize,
    resident: int,
    max_memory: int | None,
    one_length: bool,
) -> list[Pass]:
    """Divide sequences and variants into passes that fit the budget, grouping sequences of similar length to reduce padding.

    The last bits of a sum depend on what runs together. Therefore the division depends only on what is measured and on the budget, and not
    on who runs the passes: any number of processes gives the same bytes.

    Parameters
    ----------
    variants
        Number of variants, including the base.
    one_length
        Whether only sequences of equal length run together, without padding.

    Raises
    ------
    UsageError
        If the budget is too small for one sequence under the base and one variant; the message names the smallest budget.
    """
    longest = max(text.longest for text in texts.values())
    most = rows_within(max_memory, 2 * longest, ROWS, lambda rows: pass_bytes(size, resident, rows, longest),
                       f"a sequence of {longest} tokens under two variants")  # fmt: skip
    together = variants if max_memory is None else max(2, min(variants, most // longest))
    others = range(1, variants)
    chunks = [tuple(others[i : i + together - 1]) for i in range(0, variants - 1, together - 1)]
    passes = []
    for name, text in texts.items():
        for part in parts(text, range(len(text.ids)), max(1, most // together), size.short, one_length):
            passes += [Pass(name, part, chunk) for chunk in chunks]
    return passes


def rows_within(max_memory: int | None, least: int, most: int, needed: Callable[[int], int], what: str) -> int:
    """Find how many rows run together: as many as fit the budget, but at most `most` and at least `least`.

    Parameters
    ----------
    needed
        Returns the bytes that a number of rows needs.
    what
        Description of the least rows, for a message.

    Raises
    ------
    UsageError
        If the budget is too small for the least rows; the message names the smallest budget.
    """
    if max_memory is None:
        return most
    if needed(least) > max_memory:
        raise UsageError(
            f"max_memory: {max_memory >> 20}M is not enough for {what}; it needs {-(-needed(least) >> 20)}M, and less with a smaller "
            "--length or fewer --sequences"
        )
    return max(rows for rows in range(least, max(least, most) + 1, 64) if needed(rows) <= max_memory)


def parts(
    text: TextSequences, rows: Sequence[int], tokens: int, short: int | None, one_length: bool
) -> Iterator[tuple[int, ...]]:
    """Divide sequences, the longest first, into parts with at most this many padded tokens, and at least one sequence each.

    Short sequences are not padded to a length at which the model's rotary embeddings change. With `one_length`, nothing is padded.
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


def run_pass(
    model: StreamingModel, text: TextSequences, where: str, on_read: Callable[[RunTimeTensor], None]
) -> SequenceSums:
    """Measure all variants of a model on sequences that run together.

    Parameters
    ----------
    where
        Name of the text, for messages.

    Raises
    ------
    NumericError
        If a sum is not finite, or if the pass did not use everything that the adapter changes.
    InputChangedError
        If an input changed.
    """
    plan = model.job.plan
    model.batch.on_read = on_read
    sums = measure(model, text, vocabulary_block(model.batch.variants * sum(map(len, text.ids))))
    model.check_all_used()
    plan.check_unchanged()
    for name in MEASURES:
        if not np.isfinite(getattr(sums, name)).all():
            v = int(np.argwhere(~np.isfinite(getattr(sums, name)))[0][0])
            raise NumericError(
                f"{plan.base.path}: variant {model.job.variants[v].name!r} has a {name} of NaN or Inf on the {where} text; "
                "check the adapter's scale"
            )
    return sums


_computing = threading.Lock()
"""Lock that lets a process run one pass at a time, because torch's settings for matrix products apply to all threads."""

Model = TypeVar("Model", bound=LoadedModel)

_models: dict[Any, StreamingModel] = {}


@contextlib.contextmanager
def kept_model(models: dict[Any, Model], key: object, plan: Plan, make: Callable[[], Model]) -> Iterator[Model]:
    """Yield one of the models that a process keeps for later tasks, or make it; in full float32, and to one task at a time."""
    with _computing, full_float32():
        model = models.pop(key, None)
        if model is None or model.job.plan is not plan:
            model = make()
        yield model
        models[key] = model
        keep_last(models)


@dataclass(frozen=True)
class PassTask(Task[SequenceSums]):
    """A pass.

    Attributes
    ----------
    described
        The model's `VariantSet` without the plan, for all variants of a request.
    variants
        Numbers of the variants to run.
    text, where
        The sequences, and the name of their text.
    """

    described: Carried[Mapping[str, Any]]
    variants: tuple[int, ...]
    text: TextSequences
    where: str

    @property
    def name(self) -> str:
        """Return the name of the text."""
        return f"the {self.where} text"

    def do(self, batch: AdapterBatch, monitor: Monitor) -> SequenceSums:
        """Run the pass, on a model that the process keeps for later passes."""
        (plan,), key = batch.plans, (self.described.digest, self.variants)

        def make() -> StreamingModel:
            job = VariantSet(plan=plan, **self.described.value)
            return StreamingModel(replace(job, variants=tuple(job.variants[v] for v in self.variants)))

        with kept_model(_models, key, plan, make) as model:
            return run_pass(model, self.text, self.where, lambda _tensor: None)


def describe(job: VariantSet) -> Carried[Mapping[str, Any]]:
    """Describe a model for workers, which make the plan themselves."""
    return Carried({f.name: getattr(job, f.name) for f in fields(job) if f.name != "plan"})


def run_on_workers(job: VariantSet, passes: Mapping[int, tuple[Pass, TextSequences]], run: Run, threads: int,
                   begin: Callable[[str], None]) -> Generator[tuple[int, SequenceSums], None, None]:  # fmt: skip
    """Run passes on workers, and yield each pass's number and sums as they arrive.

    Parameters
    ----------
    job
        Model of all variants of the request.
    passes
        Passes with their sequences, by number.
    begin
        Called before each wait, with the name of the pass that has been running longest.
    """
    assert run.workers is not None
    inputs, described = inputs_of(AdapterBatch(job.plan.base, (job.plan,)), run), describe(job)
    tasks = {i: PassTask(inputs, threads, described, (0, *p.variants), own, p.text) for i, (p, own) in passes.items()}
    with contextlib.closing(run.workers.run(tasks, run.monitor, lambda i: begin(tasks[i].name))) as stream:
        for i, sums in stream:
            job.plan.check_unchanged()  # a worker that opened the inputs anew saw no earlier version
            yield i, sums
