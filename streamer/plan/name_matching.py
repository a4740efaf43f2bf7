"""Match an adapter's modules to the tensors of a base by exact names, known renames, or one exchange of prefixes.

Adapters use run-time module names; checkpoints use their own. A module is looked up under its own name, then under the name that
transformers gives a tensor on loading (`Renames`), then, for the adapter as a whole, under one exchange of prefixes
that fits every module. A module that finds no tensor, or several, has no match, which is an error and never a mere warning.

``model.layers.0.q_proj`` → ``model.layers.0.q_proj.weight`` (exact); ``model.language_model.layers.0.q_proj`` →
``language_model.model.layers.0.q_proj.weight`` (rename); ``model.layers.0.q_proj`` → ``layers.0.q_proj.weight``, if every module of the
adapter is found after ``model.`` is removed (prefix).

Sort names of tensors in natural order: numbers by size, and parts of a layer in the order in which data passes them.

Rename tensors as transformers does on loading: name on disk → name in the loaded model.

``language_model.model.layers.0.mlp.up_proj.weight`` → ``model.language_model.layers.0.mlp.up_proj.weight`` of a vision-language model;
``model.layers.0.mlp.experts.3.w1.weight`` → a part of ``model.layers.0.mlp.experts.gate_up_proj``, which is built from all experts.

transformers chooses the renames by the model's class and type. ``tools/make_renames.py`` extracts them as facts from transformers' table
into ``renames.json``; reading them needs none of transformers' code. They lead only from disk to run time, so names are compared there:
every tensor's name is carried forward, and no pattern is ever inverted.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from streamer.plan.architectures import architectures_for, packaged
from streamer.units import listed
from streamer.weights.model_config import ModelConfig

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
    return 1, *_RANKS.get(part, _OTHER), [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", part)]


# For a model that no table knows: renames common to vision-language models.
COMMON = (
    {"rename": r"^language_model\.lm_head(?!\w)", "to": "lm_head"},
    {"rename": r"^language_model\.model\.", "to": "model.language_model."},
    {"rename": r"^(visual|vision_tower|multi_modal_projector)\.", "to": r"model.\1."},
)


@dataclass(frozen=True)
class Conversion:
    """Tensors that loading builds from others: `to` from each match of `sources`, by the named operations."""

    sources: tuple[re.Pattern[str], ...]
    to: tuple[str, ...]
    by: tuple[str, ...]
    scope: re.Pattern[str] | None = None

    @property
    def stacks(self) -> bool:
        """Return whether it builds one stack of matrices from whole tensors, or from one that is stored transposed."""
        return self.by in STACKS and len(self.to) == 1

    def load(self, tensor: str, name: str) -> Loaded | None:
        """Return the loaded name of a tensor, or None if it is not a source of this conversion."""
        for at, source in enumerate(self.sources):
            if found := _replace(name, source, self.to[0] if self.to else "", self.scope):
                numbers = re.findall(r"(?<=\.)\d+(?=\.)", found[1])
                return Loaded(tensor, found[0], self, at, int(numbers[-1]) if numbers else None)
        return None


MERGE, CONCATENATE, TRANSPOSE, TRANSPOSE_IF = (
    "MergeModulelist 0", "Concatenate 1", "Transpose 1 2", "Transpose 1 2 check_dims",
)  # fmt: skip
STACKS = {(MERGE,), (MERGE, CONCATENATE), (CONCATENATE,), (TRANSPOSE,), (TRANSPOSE_IF,)}


class Loaded(NamedTuple):
    """A tensor on disk, and its name in the loaded model.

    Attributes
    ----------
    tensor, name
        Its name on disk, and the run-time name of the tensor that it becomes, whole or as a part.
    by
        Conversion that builds that tensor from this one and others; None if it is loaded unchanged.
    source, number
        Index of the conversion's source that it matches, and its number within that source, if numbered.
    """

    tensor: str
    name: str
    by: Conversion | None = None
    source: int = 0
    number: int | None = None


@dataclass(frozen=True)
class Rename:
    """Pairs of a pattern and the replacement of its first match; several pairs apply only if the first one matches some name."""

    pairs: tuple[tuple[re.Pattern[str], str], ...]
    scope: re.Pattern[str] | None = None

    def apply(self, names: Iterable[str]) -> dict[str, str]:
        """Return name → new name for the names that it changes."""
        out = {}
        for name in names:
            found = (_replace(name, pattern, to, self.scope) for pattern, to in self.pairs)
            if first := next(filter(None, found), None):
                out[name] = first[0]
        if len(self.pairs) > 1 and not any(self.pairs[0][0].search(name) for name in out):
            return {}  # the checkpoint is already converted
        return out


def _replace(name: str, pattern: re.Pattern[str], to: str, scope: re.Pattern[str] | None) -> tuple[str, str] | None:
    """Rename by one pattern: return the new name and the part that matched; None if nothing matches."""
    scoped = None if scope is None else scope.match(name)
    start = scoped.end() if scoped else 0
    match = pattern.search(name[start:]) if scoped or scope is None else None
    if match is None:
        return None
    replacement = to.replace(r"\1", match[1]) if r"\1" in to else to
    return name[:start] + name[start:].replace(match[0], replacement, 1), match[0]


@dataclass(frozen=True)
class Renames:
    """The renames of one model, in the order in which they apply.

    Attributes
    ----------
    model
        The model for messages: a class or model type; empty if there are only the renames common to all models.
    """

    model: str
    renames: tuple[Rename, ...]
    conversions: tuple[Conversion, ...]

    def at_run_time(self, names: Iterable[str]) -> dict[str, str]:
        """Map each tensor on disk → its run-time name, for tensors that are loaded unchanged."""
        return {tensor: name for tensor, name, by, _, _ in self.loaded(names) if by is None}

    def loaded(self, names: Iterable[str]) -> list[Loaded]:
        """Return the loaded name of every tensor."""
        now = {name: name for name in names}
        for rename in self.renames:
            changed = rename.apply(set(now.values()))
            now = {name: changed.get(at, at) for name, at in now.items()} if changed else now
        return [
            next((found for c in self.conversions if (found := c.load(name, at))), Loaded(name, at))
            for name, at in now.items()
        ]


RENAMES = "renames.json"
"""The packaged table: ``rules`` and ``same`` by class or model type, and ``classes`` by model type."""


def _steps(key: str) -> list[dict[str, Any]] | None:
    table = packaged(RENAMES)
    found: list[dict[str, Any]] | None = table["rules"].get(table["same"].get(key, key))
    return found


def renames_for(config: ModelConfig) -> Renames:
    """Collect the renames of a model: its own, its inner models', and those common to all models.

    This follows transformers: by each model's class, else by its type unless a surrounding model used the same type; renames of an inner
    model apply below its path, with or without the base's prefix. ``language_model.embed_tokens`` of ``LlavaForConditionalGeneration`` is
    below ``model.language_model``.
    """
    if config.pipeline:
        return Renames("", (), ())
    # If the base's class is not known, the class of its type with the most inner models decides.
    unnamed = replace(config, values={**config.values, "architectures": None})
    known = architectures_for(config) or architectures_for(unnamed)
    architecture = max(known, key=lambda a: len(a.parts), default=None)
    models: list[tuple[str, ...]]
    if architecture is None:
        named = next(iter(config.architectures), None)
        models = [("", named if isinstance(named, str) else "", config.model_type or "")]
        prefix = ""
    else:
        # EXAONE is a Llama with names of its own: transformers goes by the config's type.
        types = config.model_type or "", architecture.model_type
        models = [("", architecture.name, *types), *(p[:3] for p in architecture.parts)]
        prefix = architecture.base_prefix
    seen: defaultdict[str, list[str]] = defaultdict(list)
    found: list[tuple[str | None, list[dict[str, Any]]]] = []
    whose = ""
    for path, *keys in models:
        for key in keys:
            if any(around == "" or path.startswith(f"{around}.") for around in seen[key]):
                break
            if (steps := _steps(key)) is not None:
                found.append((_scope(path, prefix), steps))
                seen[keys[0]].append(path)
                seen[key].append(path)
                whose = whose or key
                break
    if architecture is None and not found:
        found.append((None, list(COMMON)))
    found.append((None, _steps("legacy") or []))
    renames, conversions = [], []
    for within, steps in found:
        where = None if within is None else re.compile(within)
        for step in steps:
            if "convert" in step:
                sources = tuple(re.compile(s) for s in step["convert"])
                conversions.append(Conversion(sources, tuple(step["to"]), tuple(step["by"]), where))
            else:
                pairs = step["group"] if "group" in step else [(step["rename"], step["to"])]
                renames.append(Rename(tuple((re.compile(p), to) for p, to in pairs), where))
    return Renames(whose, tuple(renames), tuple(conversions))


def _scope(path: str, prefix: str) -> str | None:
    """Return a pattern for the start of names below an inner model, loaded with or without the base prefix; None for the whole model."""
    if not path:
        return None
    below = path.removeprefix(prefix).removeprefix(".")
    head = rf"(?:{re.escape(prefix)}\.)?" if prefix else ""
    return f"^{head}{re.escape(below)}\\." if below else f"^{head}"


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
    """

    tensor: str
    rule: str
    why: str


EXACT = "the module's own name"


def match_names(
    modules: Iterable[str], tensors: Iterable[str], renames: Renames, parameters: Iterable[str] = ()
) -> dict[str, Match]:
    """Match every module to its ``.weight`` tensor.

    Parameters
    ----------
    tensors
        All tensor names of the base.
    renames
        Renames of the base's model.
    parameters
        Names of parameters, matched in the same way. A parameter that loading builds from one tensor for each expert has no tensor of its
        own: it matches its run-time name.
    """
    parameters = list(parameters)
    modules = [*modules, *parameters]
    names = _Names(list(tensors), renames, frozenset(parameters))
    found = {name: names.by_name(name, modules) for name in modules}
    if all(m.tensor for m in found.values()):
        return found
    ambiguous = any(m.why for m in found.values() if not m.tensor)
    exchanged = [] if ambiguous else names.by_prefix(modules)
    if len(exchanged) == 1:
        return exchanged[0]
    others = {} if ambiguous or exchanged else names.by_prefix_of_most(modules)
    for name, match in found.items():
        if match.tensor or match.why:
            continue
        why = f"has no tensor in the base (looked for {name + '.weight'!r} and for one exchange of prefixes)"
        if exchanged:
            why = f"is ambiguous: it could be {listed(sorted(repr(way[name].tensor) for way in exchanged))}"
        found[name] = others.get(name) or Match("", "", why)
    return found


class _Names:
    """A base's tensor names, on disk and in a loaded model."""

    def __init__(self, tensors: Sequence[str], renames: Renames, parameters: frozenset[str]) -> None:
        self.renames = renames
        self.parameters = parameters
        self.stacks: set[str] = set()
        self.disk: dict[str, str] = {}
        self.run_time: defaultdict[str, list[str]] = defaultdict(list)
        for tensor, name, conversion, _, _ in renames.loaded(tensors):
            stem = tensor.removesuffix(".weight")
            # A parameter is found by its whole name, a module by the name of its weight.
            if stem != tensor or stem not in self.disk:
                self.disk[stem] = tensor
            if conversion is None:
                self.run_time[name.removesuffix(".weight")].append(tensor)
                continue
            if conversion.stacks:
                self.stacks.add(name)
            if name == tensor:  # the name stays but the values change: the module's weight is not on disk
                del self.disk[stem]

    def by_name(self, name: str, modules: Sequence[str]) -> Match:
        """Match under the module's own name or a known rename; `why` is empty if there is simply no match."""
        if name in self.stacks and name in self.parameters:
            return self._renamed(name, name)
        exact, loaded = self.disk.get(name), self.run_time.get(name, [])
        if exact is not None and (not loaded or exact in loaded):
            return Match(exact, "exact", EXACT)
        if exact is None and len(loaded) == 1:
            return self._renamed(name, loaded[0])
        if loaded:  # the name means one tensor on disk and another in a loaded model
            by_disk, by_run_time = (all(m in names for m in modules) for names in (self.disk, self.run_time))
            if exact is not None and by_disk and not by_run_time:
                return Match(exact, "exact", f"{EXACT}, as for all modules of the adapter")
            if len(loaded) == 1 and by_run_time and not by_disk:
                return self._renamed(name, loaded[0])
            places = listed(repr(t) for t in ([exact] if exact else []) + loaded)
            return Match("", "", f"is ambiguous: it could be {places}")
        # An adapter of transformers 4 on a checkpoint of transformers 5: rename both forward, and accept only an unambiguous result.
        onward = self.renames.at_run_time([name + ".weight"]).get(name + ".weight", name)
        loaded = self.run_time.get(onward.removesuffix(".weight"), [])
        if len(loaded) == 1 and self.renames.at_run_time([onward]).get(onward) == onward:
            return self._renamed(name, loaded[0])
        return Match("", "", "")

    def _renamed(self, name: str, tensor: str) -> Match:
        if tensor == name:
            return Match(tensor, "rename", f"transformers builds it on loading, in {self.renames.model}")
        whose = f"in {self.renames.model}" if self.renames.model else "in vision-language models"
        return Match(tensor, "rename", f"transformers loads {tensor!r} as {name + '.weight'!r}, or did, {whose}")

    def by_prefix(self, modules: Sequence[str]) -> list[dict[str, Match]]:
        """List every way in which one exchange of prefixes fits all modules, on disk names or run-time names."""
        run_time = {name: tensors[0] for name, tensors in self.run_time.items() if len(tensors) == 1}
        run_time |= {name: name for name in self.stacks}
        ways: dict[tuple[str, ...], dict[str, Match]] = {}
        for stems in (self.disk, run_time):
            for strip, add in _prefix_rules(modules, stems):
                why = f"this exchange of prefixes fits all {len(modules)} modules, and no other does"
                rule = f"prefix {strip!r} → {add!r}"
                found = {name: Match(stems[_exchange(name, strip, add)], rule, why) for name in modules}
                if all(m.tensor not in self.stacks or name in self.parameters for name, m in found.items()):
                    ways.setdefault(tuple(m.tensor for m in found.values()), found)
        return list(ways.values())

    def by_prefix_of_most(self, modules: Sequence[str]) -> dict[str, Match]:
        """Match the modules that fit the exchange of prefixes that fits most of them, so that only the others are reported as problems."""
        best: dict[str, Match] = {}
        for rule in {rule for m in (modules[0], modules[-1]) for rule in _prefix_rules([m], self.disk)}:
            fit = [m for m in modules if _fits(m, *rule, self.disk)]
            if len(fit) > max(len(best), len(modules) // 2):
                why = "as most of the adapter's modules"
                best = {m: Match(self.disk[_exchange(m, *rule)], "prefix", why) for m in fit}
        return best


def prefix_exchange(module: str, stem: str) -> tuple[str, str]:
    """Return the differing prefixes of a module and its tensor: (strip, add).

    ``model.layers.0.q``, ``transformer.layers.0.q`` → ``("model.", "transformer.")``.
    """
    mine, theirs = module.split("."), stem.split(".")
    n = 0
    while n < min(len(mine), len(theirs)) and mine[-1 - n] == theirs[-1 - n]:
        n += 1
    strip, add = ("".join(p + "." for p in parts[: len(parts) - n]) for parts in (mine, theirs))
    return strip, add


def _exchange(name: str, strip: str, add: str) -> str:
    return add + name[len(strip) :]


def _prefix_rules(modules: Sequence[str], stems: Mapping[str, str]) -> list[tuple[str, str]]:
    """List exchanges of a prefix that fit every module, only those with the longest common suffix.

    A prefix may not contain a number: ``layers.0`` is not ``layers.1``. It may be added or removed, as wrappers do, but replaced by another
    only if the suffix contains a layer's number: ``classifier.dense`` is not ``pooler.dense``.
    """
    first, *others = modules
    last = first.rpartition(".")[2]
    rules = {prefix_exchange(first, stem) for stem in stems if stem.rpartition(".")[2] == last}
    rules = {rule for rule in rules if not any(part.isdigit() for part in "".join(rule).split("."))}
    found = [rule for rule in rules if all(_fits(name, *rule, stems) for name in (first, *others))]
    shortest = min((strip.count(".") for strip, _ in found), default=0)
    return sorted(rule for rule in found if rule[0].count(".") == shortest)


def _fits(name: str, strip: str, add: str, stems: Mapping[str, str]) -> bool:
    if not name.startswith(strip) or _exchange(name, strip, add) not in stems:
        return False
    return not (strip and add) or any(part.isdigit() for part in name[len(strip) :].split("."))
