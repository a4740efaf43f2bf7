"""Run texts through models in sweeps: what evaluations, fits and maps share, from the inputs to one file and a journal beside it.

For the logits z at a token and the next token y, ``loss = log Σ exp z − z_y``. With the base's z⁰ and p⁰ = softmax(z⁰),
``KL(p⁰ ‖ p) = Σ p⁰ (z⁰ − z) − (log Σ exp z⁰ − log Σ exp z)``. Sums over the vocabulary are float64 and scaled by the largest logit so far.
A row is one token of one variant.
"""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamer import __version__
from streamer.adapters.adapter_config import NEUTRAL, stated_options
from streamer.detection.detect import naming_inputs
from streamer.detection.options import Run
from streamer.errors import FormatError, InputError, NumericError, OutputExistsError, UsageError
from streamer.events import Event
from streamer.linalg.torch_state import full_float32, thread_count, threads
from streamer.measuring.statistics import ADAPTER_ROW, MEASURES, Floats, SequenceSums
from streamer.measuring.texts import IDENTIFYING, Texts, TextSequences
from streamer.methods import METHODS, MethodName
from streamer.methods.files import SealedKind
from streamer.plan.plan import AdapterBatch, Plan, fits, resident_bytes
from streamer.storage import transaction
from streamer.storage.transaction import Journal, ResumableFile
from streamer.streaming import sweep
from streamer.streaming.model import LOGIT_BYTES, LoadedModel, ModelSize, require_transformers
from streamer.streaming.sweep import Checkpoint, Group, Solve, States, SweepModel, TargetWatch
from streamer.streaming.values import BLOCK_BYTES, ROOM, Variant
from streamer.units import counted, listed

TRANSFORMERS_BYTES = 150 << 20
"""Anonymous memory for importing transformers and building a model, in addition to `plan.plan.resident_bytes`."""

ROWS = 1024
"""Most tokens that run together unless a budget asks for fewer: reading the weights then needs less than a tenth of the time."""

LOGIT_COPIES = 5
"""Memory for logits and everything computed from them, as a multiple of the logits that exist at one time."""

WIDTHS = 5
"""Number of activations of the widest layer's width that exist at one time for each row of a group, and of the model's width."""

STATE_WIDTHS = 3
"""Values of the model's width that each row keeps between two layers: its state, the state before, and a share of embeddings."""

STOPPED_WIDTHS = 5
"""Such values while the row's group has stopped at a site: what attention and the residual hold as well."""

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
    text: TextSequences, tokens: int, short: int | None, one_length: bool
) -> Iterator[tuple[int, ...]]:
    """Divide sequences, the longest first, into parts with at most this many padded tokens, and at least one sequence each.

    Short sequences are not padded to a length at which the model's rotary embeddings change. With `one_length`, nothing is padded. The
    last bits of a sum depend on what runs together; the division depends only on the texts and the budget.
    """
    numbers: list[int] = []
    for i in sorted(range(len(text.ids)), key=lambda i: -len(text.ids[i])):
        length, longest = len(text.ids[i]), len(text.ids[numbers[0]]) if numbers else 0
        full = (len(numbers) + 1) * longest > tokens
        apart = length != longest if one_length else short is not None and length <= short < longest
        if numbers and (full or apart):
            yield tuple(numbers)
            numbers = []
        numbers.append(i)
    if numbers:
        yield tuple(numbers)


def riders(texts: Texts, variants: int, size: ModelSize, rows: int, one_length: bool) -> list[Part]:
    """Make the groups that measure texts under each of so many variants."""
    parts_of_texts = []
    for name, text in texts.items():
        for numbers in parts(text, rows, size.short, one_length):
            part = text.take(numbers)
            parts_of_texts.append(
                Part(name, numbers, part, tuple(Group(part.padded_ids, v) for v in range(variants)))
            )
    return parts_of_texts


class Progress:
    """Progress of a run of sweeps, in multiplications.

    Parameters
    ----------
    stage
        Stage of the events: ``generate``, ``evaluate``, ``fit`` or ``map``.
    """

    def __init__(self, run: Run, stage: Literal["generate", "evaluate", "fit", "map"]) -> None:
        self.run, self.monitor, self._stage = run, run.monitor, stage
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


def measure(
    model: SweepModel,
    held_out: Sequence[Part],
    progress: Progress,
    limits: Limits,
    fitted: Sequence[Group] = (),
    solve: Solve | None = None,
    states: States | None = None,
    check: Checkpoint | None = None,
) -> Sums:
    """Run a sweep, and return the sums of its riders on each text, in the order of variants and sequences.

    Parameters
    ----------
    held_out
        The riders; groups with results have run, and only their logits are computed.
    fitted, solve, states
        Groups that fit the adapter's targets, and the file from which a killed sweep resumes; see `SweepModel.run`.
    check
        Called after each layer; may raise to stop.

    Raises
    ------
    NumericError
        If a sum is not finite, or if the sweep did not use everything that the adapter changes.
    InputChangedError
        If an input changed.
    """
    groups = [*fitted, *(group for part in held_out for group in part.groups if not group.results)]
    plan, checkpoint = model.job.plan, progress.monitor.checkpoint
    layer_cost = sweep_cost(model.size, sum(group.rows for group in groups), len(groups)) // (
        len(model.layers) + 1
    )
    if states is not None:
        states.resumed = lambda layers: progress.monitor.resuming(
            layers, len(model.layers), "layer"
        )
    model.limit(limits.room, limits.spools)
    watch = TargetWatch(plan) if fitted else None

    def after(name: str) -> None:
        progress.layer(name, layer_cost)
        if check is not None:
            check()

    model.run(groups, checkpoint, solve, watch, after, states)
    rows = max((sum(group.rows for group in part.groups) for part in held_out), default=1)
    sums = part_sums(model, held_out, max(64, LOGIT_BYTES // (4 * rows)), checkpoint)
    model.check_all_used()
    plan.check_unchanged()
    by_text = {}
    for name in dict.fromkeys(part.name for part in held_out):
        pairs = [
            (part, total) for part, total in zip(held_out, sums, strict=True) if part.name == name
        ]
        order = np.argsort([i for part, _ in pairs for i in part.numbers])
        kinds = ("tokens", *MEASURES)
        arrays = {
            kind: np.concatenate([getattr(total, kind) for _, total in pairs], -1)[..., order]
            for kind in kinds
        }
        for kind in MEASURES:
            if not np.isfinite(arrays[kind]).all():
                v = int(np.argwhere(~np.isfinite(arrays[kind]))[0][0])
                raise NumericError(
                    f"{plan.base.path}: variant {model.job.variants[v].name!r} has a {kind} of NaN or Inf on the {name} text; check the "
                    "adapter's scale"
                )
        by_text[name] = SequenceSums(**arrays)
    return by_text


def part_sums(
    model: SweepModel, held_out: Sequence[Part], block: int, checkpoint: Checkpoint
) -> list[SequenceSums]:
    """Compute the sums of each part's riders, which have run, from the logits of so many tokens of the vocabulary at a time."""
    sums = [_Accumulator(len(part.groups), part.text, model.job.device) for part in held_out]
    for i, _, number, z in model.logits([part.groups for part in held_out], block, checkpoint):
        sums[number].add(z.float(), i)
    return [accumulator.sums() for accumulator in sums]


class _Accumulator:
    """Sums over the vocabulary for each token; shapes are (variants, sequences, length), with the base first, then the adapter."""

    def __init__(self, variants: int, text: TextSequences, device: torch.device) -> None:
        ids, self.counted = text.padded()
        self.drawn, self.adapter = text.drawn, min(ADAPTER_ROW, variants - 1)
        shape = (variants, *ids.shape)
        self.labels = torch.roll(ids, -1, 1).to(device)
        self.largest = torch.full(shape, -torch.inf, device=device)
        self.top = torch.zeros(shape, dtype=torch.int64, device=device)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.cross = torch.zeros(shape, dtype=torch.float64, device=device)
        """``Σ exp(z⁰ − largest⁰) (z⁰ − z)``."""
        self.from_adapter = torch.zeros(shape, dtype=torch.float64, device=device)
        """The same with the adapter's logits z¹ in place of z⁰."""
        self.adapter_mean = torch.zeros(shape[1:], dtype=torch.float64, device=device)
        """``Σ exp(z¹ − largest¹) z¹``."""
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
        self.from_adapter *= factor[self.adapter]
        self.adapter_mean *= factor[self.adapter]
        base, adapter = (torch.exp(z[v] - largest[v, ..., None]) for v in (0, self.adapter))
        self.adapter_mean += (adapter * z[self.adapter]).sum(-1)
        for v in range(len(z)):
            known = {self.adapter: adapter, 0: base}
            weights = known[v] if v in known else torch.exp(z[v] - largest[v, ..., None])
            self.total[v] += weights.sum(-1)
            self.cross[v] += (base * (z[0] - z[v])).sum(-1)
            self.from_adapter[v] += (adapter * (z[self.adapter] - z[v])).sum(-1)
        here = ((self.labels >= i) & (self.labels < i + z.shape[-1])).expand(len(z), -1, -1)
        at = (self.labels - i).clamp(0, z.shape[-1] - 1).expand(len(z), -1, -1)
        self.label = torch.where(here, z.gather(-1, at[..., None])[..., 0], self.label)

    def sums(self) -> SequenceSums:
        """Return the loss, the KLs, and whether the likeliest token is the base's or the text's own, by sequence."""
        log_sum = self.largest.double() + self.total.log()
        kl = self.cross / self.total[:1] - (log_sum[:1] - log_sum)
        of_adapter = self.total[self.adapter]
        from_adapter = self.from_adapter / of_adapter - (log_sum[self.adapter] - log_sum)
        entropy = log_sum[self.adapter] - self.adapter_mean / of_adapter
        loss = log_sum - self.label.double()
        agree, right = (self.top == self.top[:1]).double(), (self.top == self.labels).double()
        results = {
            "loss": entropy + from_adapter if self.drawn else loss,
            "kl": kl,
            "kl_from_adapter": from_adapter,
            "agree": agree,
            "right": right,
        }
        arrays = {name: (t.cpu() * self.counted).sum(-1).numpy() for name, t in results.items()}
        return SequenceSums(self.counted.sum(-1).double().numpy(), **arrays)


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
    """

    fitted: int
    riding: int
    length: int

    def nbytes(self, size: ModelSize, resident: int, limits: Limits) -> int:
        """Estimate the peak memory of a sweep.

        Parameters
        ----------
        resident
            Bytes in use between two steps; see `plan.plan.resident_bytes`.
        """
        rows, room, spools = limits
        between, results = STATE_WIDTHS * (rows if spools else self.riding), self.riding
        states = 4 * (between + results) * size.hidden
        inputs = 4 * self.fitted * (STOPPED_WIDTHS * size.hidden + size.widest)
        activations = (
            4 * rows * (WIDTHS * (size.widest + size.hidden) + size.attention * self.length)
        )
        logits = LOGIT_COPIES * LOGIT_BYTES + 40 * self.riding
        weights = 2 * min(BLOCK_BYTES, 4 * max(size.widest, size.vocabulary) * size.hidden)
        computed = states + max(inputs + activations, logits)
        return resident + TRANSFORMERS_BYTES + computed + weights + size.dense + size.factors + room

    def limits(self, size: ModelSize, resident: int, max_memory: int | None) -> Limits:
        """Choose how a sweep fits a budget; states go to a spool if it is too small for them.

        Raises
        ------
        UsageError
            If the budget is too small for one sequence; the message names the smallest budget.
        """
        longest = max(self.length, ROWS)
        fewer = [
            rows
            for rows in (longest >> k for k in range(longest.bit_length()))
            if rows > self.length
        ]
        for least in (
            Limits(longest, 0, False),
            *(Limits(rows, 0, True) for rows in [*fewer, self.length]),
        ):
            needed = self.nbytes(size, resident, least)
            if fits(needed, max_memory):
                return least._replace(
                    room=ROOM if max_memory is None else min(ROOM, max_memory - needed)
                )
        raise UsageError(
            f"max_memory: {(max_memory or 0) >> 20}M is not enough for a sweep of {self.fitted + self.riding} tokens; it needs "
            f"{-(-needed >> 20)}M, and less with a smaller --length or fewer --sequences"
        )


def longest_padded(groups: Iterable[TextSequences]) -> tuple[NDArray[np.int64], int] | None:
    """Find the longest sequence to which others are padded, and the length of the next longest in its group; None if none is padded.

    Parameters
    ----------
    groups
        Groups of sequences that run together.
    """
    longest = None
    for text in groups:
        lengths = sorted({len(ids) for ids in text.ids})
        if len(lengths) > 1 and (longest is None or lengths[-1] > len(longest[0])):
            longest = max(text.ids, key=len), lengths[-2]
    return longest


def needs_one_length(model: SweepModel, texts: Texts, rows: int, checkpoint: Checkpoint) -> bool:
    """Check the logits of a model, and test whether only sequences of one length may run together: padding would change the logits.

    Raises
    ------
    UnsupportedError
        If losses would be meaningless; see `check_logits`.
    """
    model.limit(0, False)  # one group shares nothing with others
    groups = [part.text for part in riders(texts, 1, model.size, rows, False)]
    sweep.check_logits(model, groups[0].ids[0], checkpoint)
    keys, padded = model.size.keys, longest_padded(groups)
    if keys is not None and any(text.longest > keys for text in texts.values()):
        return True  # attention selects some of the keys, and the number of all keys decides ties
    block = max(64, LOGIT_BYTES // (4 * (1 if padded is None else len(padded[0]))))
    return padded is not None and sweep.changed_by_padding(model, *padded, block, checkpoint)


LENGTHS = 8
"""Most different lengths of a text's sequences in a fit, which are not padded: a group has sequences of one length."""


def of_few_lengths(text: TextSequences) -> TextSequences:
    """Cut the ends of sequences, if necessary, so that they have at most `LENGTHS` lengths.

    It drops the length that costs the fewest tokens, again and again.
    """
    counts = Counter(len(ids) for ids in text.ids)

    def tokens_lost(neighbours: tuple[int, int]) -> int:
        shorter, longer = neighbours
        return counts[longer] * (longer - shorter)

    while len(counts) > LENGTHS:
        shorter, longer = min(pairwise(sorted(counts)), key=tokens_lost)
        counts[shorter] += counts.pop(longer)
    lengths = [max(length for length in counts if length <= len(ids)) for ids in text.ids]
    cut = tuple(ids[:n] for ids, n in zip(text.ids, lengths, strict=True))
    return replace(
        text, ids=cut, counted=tuple(c[:n] for c, n in zip(text.counted, lengths, strict=True))
    )


ORDER = (None, *METHODS)


@dataclass(frozen=True)
class EvaluatedVariant:
    """A model that was evaluated; `VariantRecord` explains the attributes."""

    name: str
    method: MethodName | None
    mitigation_lambda: float | None
    keep: float | None = None

    @classmethod
    def of(cls, variant: Variant) -> EvaluatedVariant:
        """Describe a variant that was run."""
        return cls(variant.name, variant.method, variant.mitigation_lambda, variant.keep)

    @property
    def order(self) -> tuple[int, float]:
        """Return the sort key for tables: the base and the adapter come first, then each method from its mildest variant on."""
        method = ORDER.index(self.method) if self.method in ORDER else len(ORDER)
        return method, -(self.mitigation_lambda or self.keep or 0.0)


Facts = Mapping[str, Any]

Configs = Annotated[
    dict[str, Any],
    "Configs: of the base, as transformers writes what its class reads; of the adapter, what determines "
    "its deltas.",
]

OPTIONS = {
    "algorithm": "another version's algorithm",
    **{
        name: f"--{name}"
        for name in (
            "projected",
            "dtype",
            "holdout",
            "seed",
            "vectors",
            "keep",
            "sequences",
            "length",
            "prompts",
        )
    },
    "weights": "--mu",
    "max_memory": "--max-memory",
}
"""Facts that options decide, with their names in messages."""

DETECTION = ("detection", "scale", "findings", "intruders")
"""Keys that matter only to variants that scale intruders; without such variants `detection` is null."""


def model_facts(model: LoadedModel, **inputs: Facts) -> dict[str, Any]:
    """Describe what determines a model's losses, except texts and variants; `inputs` are the identities of ``base`` and ``adapter``."""
    stated = model.job.plan.adapter.config.values.items()
    of_adapter = {
        key: value for key, value in stated if key not in NEUTRAL and value not in (None, [], {})
    }
    return {
        "version": __version__,
        "transformers": require_transformers().__version__,
        **inputs,
        "configs": {what: model.config if what == "base" else of_adapter for what in inputs},
        "dtype": "bf16" if model.job.rounds_products else "float32",
    }


def writable(plan: Plan) -> dict[str, bool]:
    """Describe how `mitigate` and `merge` can write an adapter's variants."""
    names = plan.weights.quantized_names
    return {
        "factored": not plan.adapter.describes_model
        and all(target.module.factors for target in plan.targets),
        "quantized": any(
            name in names and not plan.weights.requantizes(name) for name in plan.by_weight
        ),
    }


def input_options(facts: Mapping[str, Any]) -> list[str]:
    """List the command-line options that make a command read the inputs as these facts do: as a residual, and with which model class."""
    words = stated_options(facts["adapter"])
    return words + (
        ["--architecture", facts["base"]["architecture"]] if "architecture" in facts["base"] else []
    )


def differences(ours: Facts, recorded: Facts) -> list[str]:
    """Name the differences between the facts of two runs of one command; variants of such evaluations are not comparable."""
    names = []
    for what, config in ours["configs"].items():
        stated = recorded.get("configs", {}).get(what, {})
        if any(ours[what].get(key) != recorded[what].get(key) for key in IDENTIFYING):
            names.append(what)
        elif keys := [key for key in {**config, **stated} if config.get(key) != stated.get(key)]:
            names.append(f"the {what}'s config: {listed(keys)}")
    our_texts, recorded_texts = _texts(ours), _texts(recorded)
    for name in dict.fromkeys([*our_texts, *recorded_texts]):
        if name not in our_texts or name not in recorded_texts:
            names.append(f"{name} {'is asked for' if name in our_texts else 'is not asked for'}")
        elif our_texts[name]["sha256"] != recorded_texts[name]["sha256"]:
            pair = our_texts[name], recorded_texts[name]
            wanted, there = (
                f"{text['sequences']} sequences of {text['length']} tokens" for text in pair
            )
            names.append(name + (f": {wanted}, not {there}" if wanted != there else ""))
    names += [
        words for option, words in OPTIONS.items() if ours.get(option) != recorded.get(option)
    ]
    names += ["version of transformers"] if ours["transformers"] != recorded["transformers"] else []
    if ours.get("detection") is not None and recorded.get("detection") is not None:
        options = {"--top-k": "top_k", "--epsilon": "threshold_epsilon", "--solver": "solver"}
        names += [
            name
            for name, key in options.items()
            if ours["detection"][key] != recorded["detection"][key]
        ]
        names += ["--select"] if ours["scale"] != recorded["scale"] else []
        findings = {facts["findings"] for facts in (ours, recorded) if "findings" in facts}
        names += ["findings"] if len(findings) > 1 else []
    digests = {entry["keep"]: entry["sha256"] for entry in recorded.get("coefficients", ())}
    if any(
        digests.get(entry["keep"], entry["sha256"]) != entry["sha256"]
        for entry in ours.get("coefficients", ())
    ):
        names.append("coefficients")
    maps = {facts["map"]["sha256"] for facts in (ours, recorded) if "map" in facts}
    return names + (["map"] if len(maps) > 1 else [])


def _texts(facts: Facts) -> dict[str, Any]:
    """Return the texts' facts by the names used in messages."""
    texts: Any = facts["texts"]
    if isinstance(texts, list):
        return {f"text {text['name']}": text for text in texts}
    two = {f"{name} text": texts[name] for name in texts if name != "others"}
    return two | {f"other text {text['name']}": text for text in texts.get("others", ())}


def joined_facts(ours: Facts, recorded: Facts) -> dict[str, Any]:
    """Join the facts of a run with the facts of the evaluation that it adds to; only detection, coefficients and map may differ."""
    tree = {**recorded, "version": ours["version"]}
    if recorded["detection"] is None:
        tree |= {key: ours[key] for key in DETECTION if key in ours}
    sets = {
        entry["keep"]: entry
        for entry in [*recorded.get("coefficients", ()), *ours.get("coefficients", ())]
    }
    if sets:
        tree["coefficients"] = list(sets.values())
    if "map" in ours:
        tree["map"] = ours["map"]
    return with_digest(tree)


def with_digest(facts: Facts, **others: Any) -> dict[str, Any]:
    """Add the digest of all facts except streamer's version, and of other things that decide a result."""
    tree = {key: value for key, value in facts.items() if key not in ("version", "plan")}
    others |= {"products": 2} if tree.get("dtype") == "bf16" else {}  # version 1 rounded no results
    text = json.dumps(tree | others, sort_keys=True)
    return {**facts, "plan": hashlib.sha256(text.encode()).hexdigest()}


State = Literal["new", "resume", "done"]

Arrays = Mapping[str, Floats]
"""Sums of a sweep, by name."""


Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Prepared(ABC, Generic[Result]):
    """A run on texts whose inputs are open and checked; nothing is written until it writes its result at its end, in one file.

    Attributes
    ----------
    max_memory
        Budget in bytes; None for no budget.
    model
        Model that runs, and supplies sizes.
    kind
        Kind of the file, if it is a sealed one.
    noun, same, example
        Words for messages: such a file, such as ``a map``; this result, such as ``this very map``; and a possible name of its file.
    """

    plan: Plan
    run: Run
    max_memory: int | None
    model: SweepModel

    kind: ClassVar[SealedKind | None] = None
    noun: ClassVar[str]
    same: ClassVar[str]
    example: ClassVar[str]

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return inputs and options as JSON, with a digest of everything that determines the result; see `with_digest`."""

    @abstractmethod
    def compute(self, records: Records, output: Path | None) -> Result:
        """Run to the end and return the result; `records` holds those of an interrupted run, and receives this run's."""

    @abstractmethod
    def sweeps(self, known: Result | None = None) -> list[Work]:
        """List the sweeps of a run that does not stop early, to which earlier results are known."""

    @abstractmethod
    def written_bytes(self, known: Result | None) -> tuple[int, int]:
        """Estimate the bytes of the file, and of temporary files."""

    @staticmethod
    @abstractmethod
    def read(path: Path) -> Any:
        """Read a result from its file."""

    def known(self, path: Path | None) -> Result | None:
        """Return the earlier results in the file, to which this run adds."""
        return None

    def save(self, result: Any, path: Path) -> None:
        """Write a result to its file; `inspect` has permitted it for any existing file."""
        result.save(path, overwrite=True)  # a fit, or a map

    def is_whole(self, path: Path) -> bool:
        """Test whether the file at a path is the complete result; raise `OutputExistsError` if it belongs to others, see `of_others`."""
        try:
            recorded = self.read(path).facts
        except FormatError as e:
            if self.kind is not None and self.kind.is_at(path):
                raise OutputExistsError(f"{e}, or pass --overwrite", path) from e
            raise
        if recorded.get("plan") != self.facts["plan"]:
            known = {"plan", "configs"} <= recorded.keys()
            raise of_others(path, self.noun, differences(self.facts, recorded) if known else ())
        return True

    def refuse_others(self, path: Path, except_for: str) -> None:
        """Refuse a file of other inputs or options than this run's, apart from one of the texts.

        Raises
        ------
        OutputExistsError
            If there is such a file.
        """
        recorded = self.read(path).facts
        if not {"texts", "configs"} <= recorded.keys():
            raise of_others(path, self.noun)
        texts = {**self.facts["texts"], except_for: recorded["texts"].get(except_for)}
        if differing := differences({**self.facts, "texts": texts}, recorded):
            raise of_others(path, self.noun, differing)

    def warn(self) -> None:
        """Warn of texts that give a poor result."""

    def run_facts(self, path: Path) -> tuple[dict[str, Any], str]:
        """Return the facts that the journal holds, and text that distinguishes inputs which differ only in rounding.

        The budget decides what runs together, and so the last bits, but nothing that makes a finished result another one.
        """
        return with_digest({**self.facts, "max_memory": self.max_memory}), ""

    @property
    def solving_bytes(self) -> int:
        """Estimate the memory of what a sweep does between layers."""
        return 0

    @property
    def resident(self) -> int:
        """Estimate the bytes that stay in memory between two steps."""
        return resident_bytes(AdapterBatch(self.plan.base, (self.plan,)))

    @cached_property
    def limits(self) -> Limits:
        """Choose how the first sweep fits the budget."""
        return self.limits_of(self.sweeps()[0])

    def limits_of(self, work: Work) -> Limits:
        """Choose how a sweep fits the budget."""
        return work.limits(self.model.size, self.resident + self.solving_bytes, self.max_memory)

    def inspect(self, path: Path) -> State:
        """Check, without writing, that the result can be written, and whether it exists, was begun, or is still to be made.

        Raises
        ------
        OutputExistsError
            If the path holds something else, or a result or an interrupted run of other inputs or options, which `overwrite` replaces.
        OutputError, InputChangedError
            If no file can be written there, or the path is an input, or if another version or other inputs began the run.
        UsageError
            If the budget is too small.
        """
        transaction.refuse_symlink(path.parent)
        transaction.check_file_path(path, self.example, transaction.journal_of(path).name)
        transaction.refuse_within_output(path)
        for work in self.sweeps():
            self.limits_of(work)
        if path.exists() and not transaction.is_placeholder(path):
            with naming_inputs(self.plan, [path], self.run.overwrite):
                try:
                    if self.is_whole(path) and not self.run.overwrite:
                        return "done"
                except OutputExistsError:
                    if not self.run.overwrite:
                        raise
                except InputError:
                    raise transaction.not_own(path, self.noun) from None
        self.plan.refuse_overwriting([path])
        return "resume" if self._resumable(path).is_begun() else "new"

    def result(self, output: Path | None) -> Result:
        """Return the result, from its file if that holds it already; write it if an output is given.

        The file is locked while a journal beside it receives records; if the run fails, the journal stays, unless the inputs are at fault.
        """
        if output is None:
            return self._compute(Records(), None)
        if self.inspect(output) == "done":
            return self.keep_finished(output)
        with self._resumable(output).begun((InputError, NumericError)) as (journal, resumed):
            result = self._compute(Records(journal), output)
            self.plan.check_unchanged()
            self.save(result, output)
        self.run.monitor.outputs[output] = "resumed" if resumed else "written"
        return result

    def _compute(self, records: Records, output: Path | None) -> Result:
        """Compute in full float32, with the number of threads with which the run began; emit a note if torch now has another number."""
        if (count := records.threads) != torch.get_num_threads():
            words = f"goes on with {counted(count, 'thread')}, as it began; --no-resume starts over"
            self.run.monitor.note(words)
        with threads(count), full_float32():
            return self.compute(records, output)

    def keep_finished(self, path: Path) -> Result:
        """Keep a file that is complete, say so, and return what it holds; see `touch_finished`."""
        transaction.touch_finished(
            path, self.run.monitor, f"{path} holds {self.same} already; nothing to do"
        )
        return cast(Result, self.read(path))

    def _resumable(self, path: Path) -> ResumableFile:
        """Describe the file and its journal, whose head has the run, the names of its sums, and the threads and torch behind their bits."""
        facts, bits = self.run_facts(path)
        bits = (
            f"{bits} {self.run.model_device} torch {torch.__version__} {' '.join(MEASURES)}".strip()
        )
        head = {
            "plan": facts["plan"],
            "facts": facts,
            "version": __version__,
            "stamps": self.plan.detection_stamps(),
            "bits": bits,
            "threads": torch.get_num_threads(),
        }

        def differing(found: Mapping[str, Any]) -> str:
            same = found.get("version") == __version__ and "facts" in found
            return in_words(differences(facts, found["facts"])) if same else ""

        return ResumableFile(path, head, self.run.resume, self.run.overwrite, differing=differing)


def of_others(path: Path, one: str, differing: Sequence[str] = ()) -> OutputExistsError:
    """Make the error for a file that holds a result of other inputs or options, with the differences."""
    return transaction.holds(path, f"{one} of other inputs or options{in_words(differing)}")


def in_words(differing: Sequence[str]) -> str:
    """Put differences into parentheses."""
    return f" ({listed(differing)})" if differing else ""


def pack(name: str, arrays: Arrays) -> bytes:
    """Pack arrays behind a line of JSON that names them."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # in numpy's stub any name could be `allow_pickle`
    return json.dumps(name).encode() + b"\n" + file.getvalue()


def unpack(payload: bytes) -> tuple[str, dict[str, Floats]]:
    """Unpack the name and arrays from what `pack` returned."""
    line, _, raw = payload.partition(b"\n")
    with np.load(io.BytesIO(raw)) as arrays:
        return json.loads(line), dict(arrays)


class Records:
    """Records of a run in its journal, if it has one: each is read only when it is asked for.

    Attributes
    ----------
    threads
        Number of torch threads with which the run began.
    """

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal, numbers = journal, range(1, 0 if journal is None else len(journal))
        self._at = {} if journal is None else {unpack(journal[i])[0]: i for i in numbers}
        self.threads = thread_count(
            None if journal is None else json.loads(journal[0]).get("threads")
        )

    def find(self, name: str) -> Arrays | None:
        """Find the arrays recorded under a key."""
        return (
            unpack(self._journal[self._at[name]])[1] if self._journal and name in self._at else None
        )

    def add(self, name: str, arrays: Arrays) -> None:
        """Record the results of a sweep durably."""
        if self._journal is not None:
            self._at[name] = len(self._journal)
            self._journal.append(pack(name, arrays))

    def snapshot(self) -> tuple[Path, str] | None:
        """Return the file from which a killed run of generation resumes, and what identifies the run; None without a journal."""
        return (
            None
            if self._journal is None
            else (transaction.states_of(self._journal.path), self._run())
        )

    def _run(self) -> str:
        assert self._journal is not None
        return hashlib.sha256(self._journal[0]).hexdigest()

    def states(self, sweep: str, *fit: Any) -> States | None:
        """Return the file from which a killed sweep resumes; None without a journal.

        Parameters
        ----------
        fit
            What saves and restores the factors of a fit; see `States`.
        """
        if self._journal is None:
            return None
        return States(transaction.states_of(self._journal.path), f"{self._run()} {sweep}", *fit)
