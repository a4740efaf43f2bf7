"""Compare what a record lists with what the adapter contains: a row for each module that it changes, an entry for each other tensor.

An adapter's tensor is a factor of a module, or it edits one tensor of the model: ``saved`` replaces it, ``lora_bias`` is added to it times
the module's scaling, ``tokens`` replaces some of its rows. Without this comparison, a row that someone removed would never be recomputed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from streamer.verification.formulas import AdapterFiles
from streamer.verification.result import Outcome
from streamer.verification.tensors import Array, TensorFiles, same_bytes

STACKED = re.compile(r"(.+)\[(\d+)\]")
"""Name of one matrix of a stack: the stack's name and the index."""


def stored_name(name: str) -> str:
    """Return the name of the tensor that stores a matrix: the stack for an expert's matrix, else its own."""
    return STACKED.sub(r"\1", name)


_ADAPTER = r"(?:\.[^.]+)?"
_FACTORS = r"lora_(?:embedding_)?[ABE]|lora_magnitude_vector|ranknum|hada_\w+|lokr_\w+|vera_lambda_[bd]|oft_(?:embedding_)?R|boft_[Rs]"
_ROLES = tuple(
    (role, re.compile(pattern))
    for role, pattern in (
        ("shared", r"(.+)\.vera_[AB]"),
        ("lora_bias", rf"(.+)\.lora_B{_ADAPTER}\.bias"),
        ("factor", rf"(.+)\.(?:{_FACTORS}){_ADAPTER}(?:\.weight)?"),
        ("tokens", rf"(.+)\.token_adapter\.trainable_tokens_delta{_ADAPTER}"),
        ("original", r"(.+)\.(?:trainable_tokens_original|original_module)(?:\..+)?"),
        ("saved", r"(.+?)\.modules_to_save(?:\.[^.]+(?=\..))?\.(.+)"),
        ("saved", r"(.+?)(?:\.token_adapter)?\.base_layer\.([^.]+)"),
    )
)  # fmt: skip


class Part(NamedTuple):
    """A tensor of the adapter: its role, and its module (for a factor) or the model's tensor that it affects."""

    role: str
    target: str
    source: str


def parts(adapter: AdapterFiles) -> Iterator[Part]:
    """Yield every tensor of an adapter with its role; a fine-tuned model's tensors are all ``saved``."""
    for source in (name for names in adapter.files.names.values() for name in names):
        plain = source if adapter.is_model else adapter.plain_name(source)
        found = ((role, pattern.fullmatch(plain)) for role, pattern in _ROLES if not adapter.is_model)
        role, match = next(((role, match) for role, match in found if match), ("saved", None))
        target = plain if match is None else match[1]
        if match is not None and role == "saved":
            target = f"{match[1]}.{match[2]}"
        yield Part(role, target + {"lora_bias": ".bias", "tokens": ".weight"}.get(role, ""), source)


class _Names:
    """Match names that are equal except for a prefix that only one of them has."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._by_end: defaultdict[str, set[str]] = defaultdict(set)
        for name in self._names:
            for end in _ends(name):
                self._by_end[end].add(name)

    def like(self, name: str) -> set[str]:
        return self._by_end.get(name, set()) | {end for end in _ends(name) if end in self._names}

    def fit(self, name: str, other: str) -> bool:
        """Test whether `other`, one of the names, may stand for `name`; for renamed tensors, compare layer numbers."""
        if like := self.like(name):
            return other in like
        numbers = sorted(([c for c in re.split(r"[.\[\]]", n) if c.isdigit()] for n in (name, other)), key=len)
        longer = iter(numbers[1])
        return all(number in longer for number in numbers[0])


def _ends(name: str) -> list[str]:
    pieces = name.split(".")
    return [".".join(pieces[i:]) for i in range(len(pieces))]


def check_rows(
    rows: list[dict[str, Any]], adapter: AdapterFiles, base: TensorFiles, path: Path, outcome: Outcome
) -> None:
    """Compare the rows of a record or of findings at `path` with the modules that the adapter changes."""
    modules: defaultdict[str, list[str]] = defaultdict(list)
    for part in parts(adapter):
        if part.role == "factor":
            modules[part.target].append(part.source)
    stacks: defaultdict[str, list[str]] = defaultdict(list)
    for module in modules:
        stacks[re.sub(r"(\.base_layer)+$", "", module)].append(module)
    names, stored = _Names({f"{module}.weight" for module in modules}), _Names(base.all_names)
    seen: set[str] = set()
    matrices: defaultdict[str, defaultdict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        tensor, module = row["tensor"], row["module"]
        if tensor in seen:
            outcome.differ(path, "one row of this name", "several", tensor)
        seen.add(tensor)
        stacked = STACKED.fullmatch(module)
        if stacked is not None and stacked[1].rpartition(".")[0] in stacks:
            matrices[stacked[1].rpartition(".")[0]][stacked[1]].add(int(stacked[2]))
        elif not adapter.is_model and not (
            module in modules
            and names.fit(tensor, f"{module}.weight")
            and tensor in (stored.like(f"{module}.weight") or {tensor})
        ):
            outcome.differ(path, "a row of the adapter's module that changes it", repr(module), tensor)
    if adapter.is_model:
        _check_kinds(rows, adapter, base, path, outcome)
        return
    for module in modules.keys() - {row["module"] for row in rows}:
        owner = re.sub(r"(\.base_layer)+$", "", module)
        if owner in matrices:
            _check_stack(owner, matrices[owner], [modules[m] for m in stacks[owner]], adapter, path, outcome)
        elif not (
            adapter.config.get("ensure_weight_tying") and is_mirror(module, {row["module"] for row in rows}, adapter)
        ):
            outcome.differ(path, f"a row for {module!r}, which the adapter changes", "none")


def _check_kinds(
    rows: list[dict[str, Any]], adapter: AdapterFiles, base: TensorFiles, path: Path, outcome: Outcome
) -> None:
    """Compare rows with a fine-tuned model's matrices: a changed one needs a row if the same matrix of another layer has one."""
    listed = {stored_name(row["tensor"]) for row in rows}
    kinds = {re.sub(r"\d+", "N", name) for name in listed}
    for name in sorted(adapter.files.all_names - listed):
        matrix = name in base and base.stored(name) == adapter.files.stored(name) and len(base.stored(name).shape) == 2
        if matrix and (not rows or re.sub(r"\d+", "N", name) in kinds) and not _is_in(base, name, adapter):
            outcome.differ(path, "a row of this matrix, which the fine-tuned model changes", "none", name)


def _check_stack(
    module: str,
    found: dict[str, set[int]],
    factors: list[list[str]],
    adapter: AdapterFiles,
    path: Path,
    outcome: Outcome,
) -> None:
    """Compare the rows of stacked experts with their factors: each A belongs to one parameter and covers all experts."""
    heights = {adapter.files.stored(name).shape[0] for names in factors for name in names if ".lora_A" in name}
    whole = (n == set(range(len(n))) and len(n) * adapter.rank(name) in heights for name, n in found.items())
    if len(found) != len(factors) or not all(whole):
        held = ", ".join(f"{len(indices)} of {parameter!r}" for parameter, indices in found.items())
        outcome.differ(path, f"a row for each matrix of the experts that the adapter changes in {module!r}", held)


def check_mirrors(rows: list[dict[str, Any]], files: AdapterFiles, path: Path, outcome: Outcome) -> None:
    """Check that a head tied to an embedding, which has no row of its own, has the embedding's factors."""
    outer = {part.target for part in parts(files) if part.role == "factor" and not re.search(r"\d", part.target)}
    listed = {row["module"] for row in rows if not re.search(r"\d", row["module"])}
    names = _Names(listed)
    more = {module for module in outer if not names.like(module)}
    for module in sorted(more if len(outer) > len(listed) else ()):
        if not is_mirror(module, outer - {module}, files):
            outcome.differ(path, "the factors of the embedding that it is tied to", "others", module)


def is_mirror(module: str, listed: set[str], adapter: AdapterFiles) -> bool:
    """Test whether a module repeats the factors of a listed module, transposed, as PEFT ties a head to its embedding."""

    def factors(of: str) -> list[Array]:
        return [
            adapter.files.whole(name) for role, name in adapter.modules.get(of, {}).items() if role.startswith("lora_")
        ]

    mine, others = factors(module), map(factors, listed)
    return any(
        len(mine) == len(other) == 2
        and (all(any(np.array_equal(a.T, b) for b in other) for a in mine) or all(map(np.array_equal, mine, other)))
        for other in others
    )


def check_carried(
    record: dict[str, Any], adapter: AdapterFiles, base: TensorFiles, outcome: Outcome
) -> dict[str, list[Part]]:
    """Compare the record's list of other tensors with the adapter's.

    Returns
    -------
    dict
        The model's tensor → the adapter's tensors that edit it, replacements first. A head that is written separately from the
        embedding to which it was tied comes from the base, with the role ``tied``.
    """
    brought = {p.source: p for p in parts(adapter) if p.role in ("saved", "lora_bias", "tokens")}
    names = _Names(part.target for part in brought.values())
    found: defaultdict[str, list[Part]] = defaultdict(list)
    for entry in record["carried"]:
        tensor, change, by = entry["tensor"], entry["change"], entry["by"]
        if change == "dropped":
            continue
        part = brought.get(by)
        if part is None and by in base and tensor not in base:
            part = Part("tied", by, by)
        elif (
            part is None
            or not names.fit(tensor, part.target)
            or {p.role for p in found[tensor]} & {part.role, "lora_bias", "tokens"}
        ):
            outcome.misrecorded("the adapter's tensor that changes it", repr(by), tensor)
            continue
        elif change != (wanted := _change(part, tensor in base, adapter)):
            outcome.misrecorded(f"{wanted!r} by {by!r}", repr(change), tensor)
        found[tensor].append(part)
    listed = {part.source for edits in found.values() for part in edits}
    if adapter.is_model:
        rows = {stored_name(row["module"]) for row in record["matrices"]}
        listed |= {name for name in brought if name in rows or name.removesuffix(".weight") in rows}
    done = {(brought[source].role, brought[source].target) for source in listed & brought.keys()}
    for part in brought.values():
        if (part.role, part.target) in done or (adapter.is_model and _is_in(base, part.source, adapter)):
            continue
        copies = (brought[source] for source in listed & brought.keys() if brought[source].role == part.role)
        if not any(same_bytes(adapter.files, copy.source, adapter.files, part.source) for copy in copies):
            outcome.misrecorded(f"an entry for {part.source!r}, which the adapter has", "none", part.target)
    return dict(found)


def _is_in(base: TensorFiles, name: str, adapter: AdapterFiles) -> bool:
    return name in base and same_bytes(base, name, adapter.files, name)


def _change(part: Part, in_base: bool, adapter: AdapterFiles) -> str:
    if part.role == "lora_bias":
        return f"plus {adapter.bias_scaling(part.target):g} times"
    if part.role == "tokens":
        return f"{len(adapter.token_rows(part.target))} rows replaced"
    return "replaced" if in_base else "new"
