"""Records of the table of architectures: a class's facts less those that the classes of the models within it say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from model_facts import Facts, Model


def record(
    name: str, facts: Facts, built: Mapping[str, Facts], auto: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """The entry of a class, with only what is not empty."""
    parts = _parts(name, facts, built)
    whole = {path: _within(path, built[cls], key) for path, (cls, key, _) in parts.items()}
    disk: dict[str, list[str]] = {}
    slots = {}
    for path, (cls, key, is_auto) in parts.items():
        prefix = _disk_prefix(path, built[cls], facts)
        kind = _auto_kind(cls, built[cls].model_type, auto) if is_auto else ""
        slot = {"class": cls, "config": list(key), "auto": kind, "disk": prefix}
        slots[path] = {k: v for k, v in slot.items() if (v != f"{path}." if k == "disk" else v)}
        for run_time in _named(built[cls]):
            disk[f"{path}.{run_time}"] = [
                prefix + n for n in built[cls].disk.get(run_time, [run_time])
            ]
    own_disk = {n: facts.disk.get(n, [n]) for n in {*facts.disk, *disk}}
    out = {
        "type": facts.model_type,
        "prefix": facts.prefix,
        "parts": slots,
        "input": _reference(facts.input, "input", parts, built),
        "output": _reference(facts.output, "output", parts, built),
        "disk": {n: own_disk[n] for n in sorted(own_disk) if own_disk[n] != disk.get(n, [n])},
        "stacks": {
            n: o
            for n, o in sorted(facts.stacks.items())
            if not any(n in w.stacks for w in whole.values())
        },
        "ties": [
            [*pair, *([list(place), default] for place, default in sorted(places.items()))]
            for pair, places in sorted(facts.ties.items())
            if not any(
                pair in w.ties and w.ties[pair].keys() == places.keys() for w in whole.values()
            )
        ],
    }
    for key in (
        "tensors",
        "embeddings",
        "transposed",
        "matrices",
        "buffers",
        "may_miss",
        "unsaved",
    ):
        out[key] = sorted(
            getattr(facts, key) - set().union(*(getattr(w, key) for w in whole.values()))
        )
    out["labels"] = sorted(facts.labels)
    out["vocabulary"] = {
        n: list(keys)
        for n, keys in sorted(facts.vocabulary.items())
        if not any(w.vocabulary.get(n) == keys for w in whole.values())
    }
    return {k: v for k, v in out.items() if v or k == "type"}


def _parts(name: str, facts: Facts, built: Mapping[str, Facts]) -> dict[str, Model]:
    """The outermost models within a class that have entries of their own, which say what this one says of them."""
    found: dict[str, Model] = {}
    for path, model in sorted(facts.models.items(), key=lambda item: item[0].count(".")):
        inside = any(path.startswith(f"{p}.") for p in found)
        numbered = any(part.isdigit() for part in path.split("."))
        if inside or numbered or model.name == name or model.name not in built:
            continue
        if _says(path, facts, _within(path, built[model.name], model.place)):
            found[path] = model
    return dict(sorted(found.items()))


def _within(path: str, part: Facts, key: tuple[str, ...]) -> Facts:
    """A part's facts as those of the model around it."""

    def names(found: Iterable[str]) -> set[str]:
        return {f"{path}.{n}" for n in found}

    ties = {
        (f"{path}.{a}", f"{path}.{b}"): {
            (*key, *place): default for place, default in places.items()
        }
        for (a, b), places in part.ties.items()
    }
    return Facts(
        part.model_type,
        part.prefix,
        names(part.tensors),
        {f"{path}.{n}": (*key, *keys) for n, keys in part.vocabulary.items()},
        embeddings=names(part.embeddings),
        transposed=names(part.transposed),
        stacks={f"{path}.{n}": o for n, o in part.stacks.items()},
        matrices=names(part.matrices),
        buffers=names(part.buffers),
        ties=ties,
        may_miss=part.may_miss,
        unsaved=names(part.unsaved),
    )


def _says(path: str, facts: Facts, part: Facts) -> bool:
    """Whether a part's own entry holds for it here: its buffers and ties are those, of the rest nothing is missing."""

    def here(found: Iterable[str]) -> set[str]:
        return {n for n in found if n.startswith(f"{path}.")}

    more = ("embeddings", "transposed", "matrices")
    ties = {pair for pair in facts.ties if len(here(pair)) == 2}
    return (
        all(here(getattr(facts, kind)) <= getattr(part, kind) for kind in more)
        and here(facts.buffers) == part.buffers
        and ties == part.ties.keys()
        and all(
            part.stacks.get(n) == o for n, o in facts.stacks.items() if n.startswith(f"{path}.")
        )
    )


def _named(facts: Facts) -> set[str]:
    modules = {*facts.embeddings, *facts.transposed, *filter(None, (facts.input, facts.output))}
    return {
        *(f"{m}.weight" for m in modules),
        *facts.stacks,
        *facts.matrices,
        *facts.buffers,
        *facts.disk,
    }


def _disk_prefix(path: str, part: Facts, facts: Facts) -> str:
    """What stands on disk before the part's own names there, most often."""
    seen: dict[str, int] = {f"{path}.": 0}
    for name in _named(part):
        mine = facts.disk.get(f"{path}.{name}", [f"{path}.{name}"])
        theirs = part.disk.get(name, [name])
        if len(mine) == len(theirs) == 1 and mine[0].endswith(theirs[0]):
            prefix = mine[0].removesuffix(theirs[0])
            seen[prefix] = seen.get(prefix, 0) + 1
    return max(sorted(seen), key=seen.__getitem__)


def _auto_kind(cls: str, model_type: str, auto: Mapping[str, Mapping[str, str]]) -> str:
    return next((kind for kind, table in auto.items() if table.get(model_type) == cls), "")


def _reference(
    module: str, kind: str, parts: Mapping[str, Model], built: Mapping[str, Facts]
) -> str:
    """A module's path, or ``@`` and the part whose own input or output embedding it is."""
    for path, (cls, _, _) in parts.items():
        inner = getattr(built[cls], kind)
        if inner and module == f"{path}.{inner}":
            return f"@{path}"
    return module
