"""Match an adapter's modules to a base's tensors by name: exact names, transformers' renames, or one exchange of prefixes.

Adapters use run-time module names; checkpoints use their own. A module is looked up under its own name, then under the name that
transformers gives a tensor on loading (`names`), then, for the adapter as a whole, under one exchange of prefixes
that fits every module. A module that finds no tensor, or several, has no match, which is an error and never a mere warning.

``model.layers.0.q_proj`` → ``model.layers.0.q_proj.weight`` (exact); ``model.language_model.layers.0.q_proj`` →
``language_model.model.layers.0.q_proj.weight`` (rename); ``model.layers.0.q_proj`` → ``layers.0.q_proj.weight``, if every module of the
adapter is found after ``model.`` is removed (prefix).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

from streamer.plan.names import NameIndex
from streamer.units import listed
from streamer.weights.base import RowConcat, Weight
from streamer.weights.logical import WeightView

ORDER = [
    ("embed_tokens", "wte", "wpe", "embeddings", "word_embeddings", "position_embeddings", "token_type_embeddings"),
    ("self_attn", "self_attention", "attention", "attn", "linear_attn", "cross_attn", "encoder_attn", "self", "intermediate"),
    ("q_proj", "query", "wq", "q", "q_a_proj", "q_b_proj", "c_attn", "qkv_proj", "query_key_value", "in_proj"),
    ("k_proj", "key", "wk", "k", "kv_a_proj_with_mqa", "kv_b_proj"),
    ("v_proj", "value", "wv", "v"),
    ("o_proj", "out_proj", "wo", "o", "output", "dense"),
    ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    ("router", "gate"),
    ("experts", "shared_expert", "shared_experts"),
    ("gate_proj", "gate_up_proj", "w1", "wi_0", "wi", "fc1", "c_fc"),
    ("up_proj", "w3", "wi_1"),
    ("down_proj", "w2", "fc2", "c_proj"),
    ("norm", "ln_f", "final_layernorm"),
    ("lm_head", "score", "classifier", "qa_outputs"),
]  # fmt: skip
"""Parts of names in the order in which data passes them; unlisted parts sort by name between the feed-forward and the head."""

_RANKS = {name: (i, j) for i, names in enumerate(ORDER) for j, name in enumerate(names)}
_OTHER = (len(ORDER) - 3, 99)


def natural(name: str) -> tuple[Any, ...]:
    """Make the sort key of a tensor's name: numbers by size, and in a layer q, k, v, o, gate, up, down."""
    return tuple(_key(part) for part in re.split(r"[.\[\]]+", name) if part)


@lru_cache(4096)  # a model's names have few distinct parts
def _key(part: str) -> tuple[Any, ...]:
    if part.isdigit():
        return 0, int(part)
    pieces = [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", part)]
    return 1, *_RANKS.get(part, _OTHER), pieces


@dataclass(frozen=True)
class TensorSlice:
    """A part of a base's weight that holds a matrix, or some of its rows.

    Expert 3 of a stack is ``("model.layers.0.mlp.experts.down_proj", 3)``. The upper half of expert 3 of a ``gate_up_proj`` that the base
    stores in two tensors is ``("model.layers.0.mlp.experts.3.gate_proj.weight", None, (0, 4096))``.

    Attributes
    ----------
    weight
        A weight's name.
    index
        Index of the matrix, if the weight is a stack.
    rows
        First and last-plus-one row of the matrix that this weight holds, if other weights hold the rest; None for all rows.
    """

    weight: str
    index: int | None = None
    rows: tuple[int, int] | None = None


def joined(name: str, slices: Sequence[TensorSlice], weights: WeightView) -> Weight:
    """Make a matrix of this name from the slices that hold its rows."""
    parts = [
        weights[s.weight] if s.index is None else weights[s.weight].slice(s.index) for s in slices
    ]
    return replace(parts[0], name=name) if len(parts) == 1 else RowConcat.of(name, parts)


class Match(NamedTuple):
    """A base tensor that was found for a module, and the rule that found it.

    Attributes
    ----------
    tensor
        Name in the base; empty if there is no match.
    rule
        ``exact``, ``rename`` or ``prefix '…' → '…'``; empty if there is no match.
    why
        Reason for the match, or against it.
    pieces
        For a fused matrix of a pipeline, whose name `tensor` is made up: the slices that hold its rows, in order.
    """

    tensor: str
    rule: str
    why: str
    pieces: tuple[TensorSlice, ...] = ()


EXACT = "the module's own name"


def match_names(
    modules: Iterable[str], index: NameIndex, parameters: Iterable[str] = ()
) -> dict[str, Match]:
    """Match every module to its ``.weight`` tensor.

    Parameters
    ----------
    index
        All tensors of the base.
    parameters
        Names of parameters, matched in the same way. A parameter that loading builds from one tensor for each expert has no tensor of its
        own: it matches its run-time name.
    """
    parameters = list(parameters)
    modules = [*modules, *parameters]
    names = _ModuleNames(index, frozenset(parameters))
    matches = {name: names.by_name(name, modules) for name in modules}
    if all(m.tensor for m in matches.values()):
        return matches
    ambiguous = any(m.why for m in matches.values() if not m.tensor)
    exchanged = [] if ambiguous else names.by_prefix(modules)
    if len(exchanged) == 1:
        return exchanged[0]
    for name, match in matches.items():
        if match.tensor or match.why:
            continue
        why = f"has no tensor in the base (looked for {name + '.weight'!r} and for one exchange of prefixes)"
        if exchanged:
            why = f"is ambiguous: it could be {listed(sorted(repr(way[name].tensor) for way in exchanged))}"
        matches[name] = Match("", "", why)
    return matches


class _ModuleNames:
    """A base's names of modules, on disk and in a loaded model."""

    def __init__(self, index: NameIndex, parameters: frozenset[str]) -> None:
        self.index = index
        self.parameters = parameters
        self.stacks: set[str] = set()
        self.disk: dict[str, str] = {}
        self.run_time: defaultdict[str, list[str]] = defaultdict(list)
        for tensor, name, conversion, _, _ in index.loaded.values():
            stem = tensor.removesuffix(".weight")
            # A parameter is found by its whole name, a module by the name of its weight.
            if stem != tensor or stem not in self.disk:
                self.disk[stem] = tensor
            if conversion is None:
                self.run_time[name.removesuffix(".weight")].append(tensor)
                continue
            if conversion.stacks:
                self.stacks.add(name)
            # If the name stays but the values change, the module's weight is not on disk.
            if name == tensor:
                del self.disk[stem]

    def by_name(self, name: str, modules: Sequence[str]) -> Match:
        """Match under the module's own name or a known rename; `why` is empty if there is simply no match."""
        if name in self.stacks and name in self.parameters:
            return self._renamed(name, name)
        exact = self.disk.get(name)
        loaded = self.run_time.get(name, [])
        if exact is not None and (not loaded or exact in loaded):
            return Match(exact, "exact", EXACT)
        one = loaded[0] if len(loaded) == 1 else None
        if exact is None and one is not None:
            return self._renamed(name, one)
        if loaded:  # the name means one tensor on disk and another in a loaded model
            by_disk = all(module in self.disk for module in modules)
            by_run_time = all(module in self.run_time for module in modules)
            if exact is not None and by_disk and not by_run_time:
                return Match(exact, "exact", f"{EXACT}, as for all modules of the adapter")
            if one is not None and by_run_time and not by_disk:
                return self._renamed(name, one)
            places = listed(repr(tensor) for tensor in (exact, *loaded) if tensor)
            return Match("", "", f"is ambiguous: it could be {places}")
        # An adapter of transformers 4 on a checkpoint of transformers 5: rename both forward, and accept only an unambiguous result.
        onward = self._loaded_alone(f"{name}.weight") or name
        tensors = self.run_time.get(onward.removesuffix(".weight"), [])
        if len(tensors) == 1 and self._loaded_alone(onward) == onward:
            return self._renamed(name, *tensors)
        return Match("", "", "")

    def _loaded_alone(self, name: str) -> str | None:
        return self.index.among([name]).at_run_time.get(name)

    def _renamed(self, name: str, tensor: str) -> Match:
        model = self.index.renames.model
        why = f"transformers builds it on loading, in {model}"
        if tensor != name:
            whose = model or "vision-language models"
            why = f"transformers loads {tensor!r} as {name + '.weight'!r}, or did, in {whose}"
        return Match(tensor, "rename", why)

    def by_prefix(self, modules: Sequence[str]) -> list[dict[str, Match]]:
        """List every way in which one exchange of prefixes fits all modules, on disk names or run-time names."""
        loaded = self.run_time.items()
        run_time = {name: tensor for name, (tensor, *others) in loaded if not others}
        run_time |= {name: name for name in self.stacks}
        why = f"this exchange of prefixes fits all {len(modules)} modules, and no other does"
        ways = {}
        for stems in (self.disk, run_time):
            for exchange in _fitting(modules, stems):
                rule = f"prefix {exchange.strip!r} → {exchange.add!r}"
                tensors = tuple(stems[exchange.apply(name)] for name in modules)
                stacks = {
                    name
                    for name, tensor in zip(modules, tensors, strict=True)
                    if tensor in self.stacks
                }
                if stacks <= self.parameters and tensors not in ways:
                    ways[tensors] = {
                        name: Match(tensor, rule, why)
                        for name, tensor in zip(modules, tensors, strict=True)
                    }
        return list(ways.values())


class PrefixExchange(NamedTuple):
    """A prefix of modules, and the prefix that their tensors have in its place.

    ``model.layers.0.q``, ``transformer.layers.0.q`` → ``("model.", "transformer.")``.
    """

    strip: str
    add: str

    @classmethod
    def between(cls, module: str, stem: str) -> PrefixExchange:
        """Compare a module's name with its tensor's."""
        ours, theirs = (name.split(".") for name in (module, stem))
        same = (a == b for a, b in zip(reversed(ours), reversed(theirs), strict=False))
        common = sum(takewhile(bool, same))
        prefixes = (parts[: len(parts) - common] for parts in (ours, theirs))
        return cls(*("".join(f"{part}." for part in prefix) for prefix in prefixes))

    def apply(self, name: str) -> str:
        """Exchange the prefix of a name that has it."""
        return self.add + name.removeprefix(self.strip)

    def fits(self, name: str, stems: Collection[str]) -> bool:
        """Test whether a module is found; a prefix may replace another only if the rest contains a layer's number."""
        if not name.startswith(self.strip) or self.apply(name) not in stems:
            return False
        return not (self.strip and self.add) or _has_number(name.removeprefix(self.strip))


def _has_number(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _fitting(modules: Sequence[str], stems: Collection[str]) -> list[PrefixExchange]:
    """List exchanges of a prefix that fit every module, only those with the longest common suffix.

    A prefix may not contain a number: ``layers.0`` is not ``layers.1``. It may be added or removed, as wrappers do, but replaced by another
    only if the suffix contains a layer's number: ``classifier.dense`` is not ``pooler.dense``.
    """
    first = modules[0]
    last = first.rpartition(".")[2]
    alike = (stem for stem in stems if stem.rpartition(".")[2] == last)
    exchanges = {PrefixExchange.between(first, stem) for stem in alike}
    fitting = [
        exchange
        for exchange in exchanges
        if not _has_number("".join(exchange)) and all(exchange.fits(n, stems) for n in modules)
    ]
    lengths = {exchange: exchange.strip.count(".") for exchange in fitting}
    shortest = min(lengths.values(), default=0)
    return sorted(exchange for exchange, length in lengths.items() if length == shortest)
