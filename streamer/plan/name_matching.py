"""Match an adapter's modules to the tensors of a base by exact names, known renames, or one exchange of prefixes.

Adapters use run-time module names; checkpoints use their own. A module is looked up under its own name, then under the name that
transformers gives a tensor on loading (`transformers_renames`), then, for the adapter as a whole, under one exchange of prefixes
that fits every module. A module that finds no tensor, or several, has no match, which is an error and never a mere warning.

``model.layers.0.q_proj`` → ``model.layers.0.q_proj.weight`` (exact); ``model.language_model.layers.0.q_proj`` →
``language_model.model.layers.0.q_proj.weight`` (rename); ``model.layers.0.q_proj`` → ``layers.0.q_proj.weight``, if every module of the
adapter is found after ``model.`` is removed (prefix).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from streamer.plan.transformers_renames import Renames
from streamer.units import listed


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
                best = {
                    m: Match(self.disk[_exchange(m, *rule)], "prefix", "as most of the adapter's modules") for m in fit
                }
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
