"""Format findings, plans and records as tables for people."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamer.api.views import input_options, is_repeated, natural, record_lines, takes_findings
from streamer.cli.forecast_table import forecast_table
from streamer.cli.layout import Column, Screen, fit, shorten, table
from streamer.units import format_size, listed

if TYPE_CHECKING:
    from streamer.detection.findings import Findings
    from streamer.detection.matrix_finding import MatrixFinding

MANY, SHOWN = 20, 10
"""A table with more than `MANY` rows shows the `SHOWN` most important ones, unless `--all` is given."""

NO_LIMIT = Screen()


def findings_table(
    findings: Findings, screen: Screen = NO_LIMIT, written: Path | None = None, state: str = "written"
) -> str:
    """Format findings: one line for each matrix, or the ten with the most intruder energy; totals; and the file written."""
    every = sorted(findings, key=lambda m: natural(m.tensor))
    chosen, cut = _most(every, lambda m: (m.detection.intruder_energy, len(m.detection.intruders)), screen)
    found = [m.detection for m in chosen]
    decided = [_decided(m) for m in chosen]
    columns = [
        Column("matrix", [m.tensor for m in chosen], left=True, names=True, among=[m.tensor for m in every]),
        Column("shape", ["x".join(map(str, m.shape)) for m in chosen], "rows x columns", priority=1),
        Column("r", [str(m.rank or "-") for m in chosen], "rank of the adapter's factors", priority=2),
        Column("intruders", [str(len(d.intruders)) for d in found], "leading directions that resemble none of the base's",
               priority=9),
        Column("ranks", [_ranks(d.intruders) for d in found], "ranks of the intruders in base + adapter; 1 is the largest", priority=6),
        Column("similarity", [f"{min(d.similarity):.3f}" for d in found],
               f"lowest of a direction to the base, from 0 to 1; below {findings.options.threshold_epsilon:g} is an intruder", priority=4),
        Column("sigma", [f"{d.singular_values[0]:#.4g}" for d in found], "largest singular value of base + adapter", priority=0),
        Column("|delta|", [f"{d.delta_norm:#.4g}" for d in found], "Frobenius norm of the delta", priority=3),
        Column("energy", [f"{100 * d.intruder_energy:.1f}%" for d in found], "the intruders' share of |delta|^2", priority=8),
        Column("lost", [f"{100 * d.dropped_at_zero:.1f}%" for d in found],
               "share lost in projection onto rank r by `mitigate --lambda 0 --method paper`", priority=5),
    ]  # fmt: skip
    if len({_decided(m) for m in findings}) > 1:
        columns.append(
            Column(
                "decided",
                decided,
                "the solver; float64 if float32 left a direction open; open if nothing settled it",
                priority=7,
            )
        )
    o = findings.options
    certified = sum(m.detection.certified for m in findings)
    summary = (
        f"{findings.intruders} intruders in {sum(bool(m.detection.intruders) for m in findings)} of {len(findings)} matrices "
        f"(top_k={o.top_k}, epsilon={o.threshold_epsilon}); {certified} of {len(findings)} certified"
    )
    if turned := sum(bool(m.transposed) for m in findings):
        summary += f"\n{turned} stored as columns x rows (embeddings, Conv1D); decisions still use the output side"
    if open_ones := [m.tensor for m in every if not m.detection.certified]:
        open_ones[:3] = shorten(open_ones[:3], (screen.width or 10**6) - 4)
        summary += f"\nnot certified: {listed(open_ones)}"
        summary += "; an open direction does not count as an intruder; another --epsilon may settle it"
        if short := sum(_wants_memory(m) for m in findings):
            summary += f"\n{short} of these for lack of memory: with a larger --max-memory, a full SVD or float64 may settle them"
    if written is not None:
        summary += f"\n{stood(written, state)}: {format_size(written.stat().st_size)}"
    return _sections(
        table(columns, screen), _cut(cut, len(findings), "most energy", screen), fit(summary, screen.width)
    )


def stood(where: object, state: str) -> str:
    """State whether a run wrote an output, found it there, or only reads it."""
    return {"read": f"{where}", "present": f"{where} exists already"}.get(state, f"wrote {where}")


def next_step(findings: Findings, where: object, screen: Screen, base: str = "BASE", adapter: str = "ADAPTER") -> str:
    """Give the commands that make the adapter forget less: with texts a repair, which also measures what the findings do; else a shrink."""
    options = input_options({"base": findings.base, "adapter": findings.adapter})
    repair = [
        "repair",
        base,
        adapter,
        "--general",
        "TEXT",
        "--task",
        "TEXT",
        "-o",
        "OUTPUT",
        "--findings",
        str(where),
        *options,
    ]
    shrink = ["mitigate", base, adapter, "--method", "shrink", "--lambda", "0.75", "-o", "OUTPUT", *options]
    if any("/" in file["file"] for file in findings.base.get("files", ())):  # a pipeline, which repair does not run
        return fit(f"next: streamer {shlex.join(shrink)}", screen.width)
    lines = f"next: streamer {shlex.join(repair)}", f"or, without text: streamer {shlex.join(shrink)}"
    return "\n".join(fit(line, screen.width) for line in lines)


def _wants_memory(m: MatrixFinding) -> bool:
    """Test whether lack of memory kept an open matrix from the dense solver or from a second run in float64."""
    d = m.detection
    return not d.certified and (d.solver == "certified" or (d.precision == "float32" and is_repeated(m.shape)))


def _decided(m: MatrixFinding) -> str:
    d = m.detection
    again = ["float64"] if d.precision == "float64" and m.dtype != "F64" else []
    return ", ".join([d.solver, *again, *([] if d.certified else ["open"])])


def _ranks(ranks: Sequence[int]) -> str:
    """Format 0-based ranks as 1-based; runs of more than two are abbreviated."""
    runs: list[list[int]] = []
    for j in ranks:
        if runs and j == runs[-1][1] + 1:
            runs[-1][1] = j
        else:
            runs.append([j, j])
    parts = [f"{a + 1}" if a == b else f"{a + 1} {b + 1}" if b == a + 1 else f"{a + 1}-{b + 1}" for a, b in runs]
    return " ".join(parts) or "-"


def record_table(record: Mapping[str, Any], where: str, screen: Screen = NO_LIMIT) -> str:
    """Format a record: totals and matrices, or the ten matrices that changed most if there are many."""
    matrices = sorted(record["matrices"], key=lambda m: natural(m["tensor"]))
    chosen, cut = _most(matrices, _removed, screen)
    columns = [Column("matrix", [m["tensor"] for m in chosen], left=True, names=True), *_norms(chosen, priority=1)]
    if takes_findings(record["method"]):
        scaled = [str(len(m["intruders"])) for m in chosen]
        columns.insert(1, Column("scaled", scaled, "intruders that were scaled", priority=2))
    if record["command"] == "mitigate":
        about = "lost in projection: share of the mitigated delta that the adapter's rank cannot hold"
        columns.append(Column("lost", [f"{100 * m['dropped']:.2f}%" for m in chosen], about, priority=4))
    lines = record_lines(record, stood(where, record["state"]))
    return _sections(table(columns, screen) if chosen else "", _cut(cut, len(matrices), "largest change", screen),
                     "\n".join(fit(line, screen.width) for line in lines))  # fmt: skip


def adapters_table(trees: Mapping[str, Mapping[str, Any]], screen: Screen = NO_LIMIT) -> str:
    """Format results for several adapters, one line for each, from the objects that `--json` prints."""
    t = [tree["totals"] for tree in trees.values()]
    columns = [Column("adapter", list(trees), left=True, names=True, foot="all together"),
               _summed("matrices", [x["matrices"] for x in t], "", 1)]  # fmt: skip
    if all("method" in tree for tree in trees.values()):
        columns.append(
            _summed("mitigated", [x["changed"] for x in t], "matrices whose delta differs from the adapter's", 3)
        )
        if any(takes_findings(tree["method"]) for tree in trees.values()):
            columns.append(_summed("scaled", [x["intruders"] for x in t], "intruders that were scaled", 5))
        columns += [
            *_norms(t, priority=2),
            Column("size", [format_size(x["bytes"]) for x in t], "", 6, foot=format_size(sum(x["bytes"] for x in t))),
        ]
    else:
        some = [sum(bool(m["intruders"]) for m in tree["matrices"]) for tree in trees.values()]
        columns += [
            _summed("with any", some, "matrices with intruders", 3),
            _summed("intruders", [x["intruders"] for x in t], "leading directions that resemble none of the base's", 5),
            _summed("certified", [x["certified"] for x in t], "matrices in which every decision is proven", 4),
        ]
    return _sections(table(columns, screen), fit("--all shows each adapter's matrices", screen.width))


def _summed(head: str, numbers: Sequence[int], about: str, priority: int) -> Column:
    return Column(head, [str(n) for n in numbers], about, priority, foot=str(sum(numbers)))


def _norms(rows: Sequence[Mapping[str, Any]], priority: int) -> list[Column]:
    """Make the columns of a delta's norm before and after mitigation."""
    before, after = ([f"{row[key]:#.4g}" for row in rows] for key in ("delta_norm", "delta_norm_after"))
    return [Column("|delta|", before, "Frobenius norm of the delta", priority),
            Column("after", after, "Frobenius norm of the written delta", priority + 2)]  # fmt: skip


def _removed(matrix: Mapping[str, Any]) -> tuple[float, float]:
    return abs(matrix["delta_norm"] ** 2 - matrix["delta_norm_after"] ** 2), matrix["delta_norm"]


def inspect_table(tree: Mapping[str, Any], screen: Screen = NO_LIMIT) -> str:
    """Format a plan: one line for each matrix, or if there are many, for each group whose names differ only in numbers."""
    t = tree["totals"]
    matrices = sorted(tree["matrices"], key=lambda m: natural(m["tensor"]))
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    grouped = len(matrices) > MANY and not screen.every
    for m in matrices:
        alike = m["shape"], m["transposed"], m["dtype"], m["rank"], m["scale"], m["matched"]
        key = (re.sub(r"(?<=[.\[])\d+(?=[.\]])", "*", m["tensor"]) if grouped else m["tensor"], *map(str, alike))
        groups.setdefault(key, []).append(m)
    rows = list(groups.items())
    shown, rest = (rows[: 4 * SHOWN], rows[4 * SHOWN :]) if grouped else (rows, [])
    first = [same[0] for _, same in shown]
    transposed = any(m["transposed"] for m in first)
    columns = [
        Column("base tensor", [key[0] for key, _ in shown], "* stands for any number" if grouped else "", left=True, names=True),
    ]  # fmt: skip
    if grouped:
        columns.append(Column("matrices", [str(len(same)) for _, same in shown], priority=9))
    else:
        modules = [m["module"] for m in first]
        columns.append(Column("module", modules, "its name in the adapter", priority=1, left=True, names=True))
    columns += [
        Column("out x in", ["x".join(map(str, m["shape"])) for m in first], priority=6),
        Column("dtype", [m["dtype"] for m in first], priority=5),
        Column("r", [str(m["rank"] or "-") for m in first], "rank of the adapter's factors", priority=7),
        Column("scale", [f"{m['scale']:.4g}" for m in first], "factor of B A, from the adapter's alpha and rank", priority=3),
        Column("matched", [m["matched"] for m in first], "the rule that found its module in the base; see below", priority=4),
    ]  # fmt: skip
    if transposed:
        columns.append(Column("stored", ["in x out" if m["transposed"] else "out x in" for m in first],
                              "the order of its sides in the base's file", priority=2))  # fmt: skip
    carried = ""
    if tree["carried"]:
        kept = sorted(tree["carried"], key=lambda c: natural(c["tensor"]))
        some = kept if screen.every or len(kept) <= MANY else kept[:SHOWN]
        carried = table([
            Column("carried along", [c["tensor"] for c in some], "tensors that are not factors", left=True, names=True),
            Column("change", [c["change"] for c in some], priority=2, left=True),
            Column("by", [c["by"] for c in some], "the adapter's tensor", priority=1, left=True, names=True),
        ], screen)  # fmt: skip
        carried = _sections(carried, _cut(len(kept) - len(some), len(kept), "", screen))
    lines = [
        f"{t['matrices']} matrices of {t['tensors']} tensors; base {format_size(t['base_bytes'])}, "
        f"adapted {format_size(t['adapted_bytes'])}; "
        f"largest matrix {t['largest_matrix']} ({format_size(t['largest_matrix_bytes'])})",
        *(f"{n['modules']} matched by {n['rule']}: {n['why']}" for n in tree["names"]),
    ]
    more = f"{sum(len(same) for _, same in rest)} matrices of {len(rest)} more kinds are not shown" if rest else ""
    note = f"{more}; --all shows each matrix".removeprefix("; ") if grouped else ""
    refused = "\n".join(fit(f"{command} is refused: {why}", screen.width) for command, why in tree["refused"].items())
    return _sections(table(columns, screen), fit(note, screen.width), carried,
                     "\n".join(fit(line, screen.width) for line in lines), forecast_table(tree["forecast"], screen), refused)  # fmt: skip


def dtype_table(base_files: Iterable[tuple[str, Sequence[tuple[str, int]]]], screen: Screen = NO_LIMIT) -> str:
    """Format a base's files with tensors, bytes and dtypes; of many files, the first ones."""
    rows = []
    for name, tensors in base_files:
        by_dtype: dict[str, int] = {}
        for dtype, nbytes in tensors:
            by_dtype[dtype] = by_dtype.get(dtype, 0) + nbytes
        rows.append([name, str(len(tensors)), format_size(sum(by_dtype.values())),
                     ", ".join(f"{d} {format_size(n)}" for d, n in by_dtype.items())])  # fmt: skip
    some = rows if screen.every or len(rows) <= MANY else rows[:SHOWN]
    cells = list(zip(*some, strict=True)) if some else [()] * 4
    columns = [
        Column("file", cells[0], left=True, names=True), Column("tensors", cells[1], priority=2), Column("size", cells[2], priority=3),
        Column("dtypes", cells[3], priority=1, left=True),
    ]  # fmt: skip
    total = f"{len(rows)} files, {sum(int(row[1]) for row in rows)} tensors"
    return _sections(table(columns, screen), _cut(len(rows) - len(some), len(rows), "", screen, "files"), total)


def _most(items: Sequence[Any], weight: Any, screen: Screen) -> tuple[list[Any], int]:
    """Choose the items to show and count the others: all in order, or those with the largest weight, largest first."""
    if screen.every or len(items) <= MANY:
        return list(items), 0
    return sorted(items, key=weight, reverse=True)[:SHOWN], len(items) - SHOWN


def _cut(count: int, of: int, by: str, screen: Screen, what: str = "matrices") -> str:
    """State how many rows a table leaves out."""
    if not count:
        return ""
    which = f"with the {by}, of {of} {what}" if by else f"first ones of {of}"
    return fit(f"the {of - count} {which}; --all shows every one", screen.width)


def _sections(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)
