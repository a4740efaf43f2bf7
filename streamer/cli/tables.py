"""Findings, plans and records as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from streamer.findings import Findings


def findings_table(findings: Findings) -> str:
    """What was found, a line a matrix."""
    rows = []
    for m in findings:
        d = m.detection
        rows.append([
            m.tensor, "x".join(map(str, m.shape)), str(m.rank), str(len(d.intruders)),
            " ".join(str(j + 1) for j in d.intruders) or "-", f"{min(d.similarity):.3f}",
            f"{d.singular_values[0]:.4g}", f"{d.delta_norm:.4g}", f"{100 * d.intruder_energy:.1f}%",
            f"{100 * d.dropped_at_zero:.1f}%", d.solver + ("" if d.certified else " (not certified)"),
        ])  # fmt: skip
    head = [
        "matrix",
        "shape",
        "r",
        "intruders",
        "ranks",
        "least sim",
        "sigma_1",
        "|delta|",
        "energy",
        "cut at 0",
        "solver",
    ]
    o = findings.options
    certified = sum(m.detection.certified for m in findings)
    summary = (
        f"{findings.intruders} intruders in {sum(bool(m.detection.intruders) for m in findings)} of {len(findings)} matrices "
        f"(top_k={o.top_k}, epsilon={o.threshold_epsilon}); {certified} of {len(findings)} certified"
    )
    legend = (
        "ranks: which singular directions of base + delta, 1 = largest; energy: the intruders' share of |delta|^2;\n"
        "cut at 0: what back-projection to rank r would drop at lambda 0 with --method paper"
    )
    return f"{table(head, rows, left=1)}\n\n{summary}\n{legend}"


def record_table(record: Mapping[str, Any], where: str) -> str:
    """What was written."""
    t = record["totals"]
    lines = [
        f"wrote {where}: {len(record['files'])} files, {size(t['bytes'])}",
        f"method {record['method']}, scale {record['scale']}, lambda {record['mitigation_lambda']}: "
        f"{t['changed']} of {t['matrices']} matrices changed, {t['intruders']} intruders scaled",
        f"|delta| {t['delta_norm']:.4g} -> {t['delta_norm_after']:.4g}; a uniform shrink of the whole adapter by "
        f"{t['equal_norm_shrink']:.4f} has the same norm: the baseline for any claim",
    ]
    if record["left_out"]:
        names = ", ".join(record["left_out"][:4]) + (", …" if len(record["left_out"]) > 4 else "")
        lines.append(f"not taken along: {names} (weights or training state that would be stale)")
    if record["carried"]:
        lines.append(
            f"carried along: {len(record['carried'])} tensors that are no factors, {record['carried'][0]['tensor']} first"
        )
    if record["command"] == "mitigate":
        lines.append(f"back-projection dropped at most {100 * t['dropped_max']:.2f}% of a matrix's mitigated delta")
    return "\n".join(lines)


def inspect_table(tree: Mapping[str, Any]) -> str:
    """The plan, a line a matrix."""
    t = tree["totals"]
    carried = [[c["tensor"], c["change"], c["by"]] for c in tree["carried"]]
    also = "\n\n" + table(["carried along: tensor", "change", "by"], carried, left=3) if carried else ""
    rows = [
        [m["tensor"], m["module"], "x".join(map(str, m["shape"])) + (" (stored transposed)" if m["transposed"] else ""),
         m["dtype"], str(m["rank"]), f"{m['scale']:.4g}", m["matched"]]
        for m in tree["matrices"]
    ]  # fmt: skip
    return (
        table(["base tensor", "adapter module", "out x in", "dtype", "r", "scale", "matched"], rows, left=2)
        + also
        + f"\n\n{t['matrices']} matrices of {t['tensors']} tensors; base {size(t['base_bytes'])}, adapted {size(t['adapted_bytes'])}; "
        f"largest matrix {t['largest_matrix']} ({size(t['largest_matrix_bytes'])})"
        + "".join(f"\n{n['modules']} matched by {n['rule']}: {n['why']}" for n in tree["names"])
        + f"\n\n{_forecast_table(tree['forecast'])}"
    )


def _forecast_table(forecasts: Mapping[str, Mapping[str, Any] | None]) -> str:
    """What each command would take, a line a command."""
    rows = []
    for command, f in forecasts.items():
        if f is None:
            rows.append([command, "refused: `--dry-run` says why", "", "", ""])
            continue
        most = "at most " if command == "detect" else ""
        rows.append([command, _memory(f), size(f["read_bytes"]), most + size(f["write_bytes"]), duration(f["seconds"])])
    return (
        table(["forecast", "memory", "read", "written", "time"], rows, left=1)
        + "\nmitigate and merge: with findings; time: from a short probe of this machine, as busy as it is, on "
        + f"{_threads(next((f for f in forecasts.values() if f), None))}, if the disk keeps up and\n"
        "bounds settle what they are tried on; `--dry-run` shows the free disk"
    )


def forecast_text(command: str, forecast: Mapping[str, Any], free: int) -> str:
    """What one command would take, in a line."""
    beside = f" and at most {size(forecast['temporary_bytes'])} for a while" if forecast["temporary_bytes"] else ""
    most = "at most " if command == "detect" else ""
    return (
        f"forecast: memory {_memory(forecast)}; "
        f"reads {size(forecast['read_bytes'])}, writes {most}{size(forecast['write_bytes'])}{beside}; "
        f"{size(free)} free; time {duration(forecast['seconds'])}, "
        f"on {_threads(forecast)}, with the processors as busy as now and if the disk keeps up"
    )


def _threads(forecast: Mapping[str, Any] | None) -> str:
    count = 1 if forecast is None else forecast["threads"]
    return "1 thread" if count == 1 else f"{count} threads"


def _memory(forecast: Mapping[str, Any]) -> str:
    usual, most = forecast["peak_memory_bytes"], forecast["escalated_memory_bytes"]
    return size(usual) + (f", {size(most)} where the dense solver must decide" if most > usual else "")


def duration(seconds: float | None) -> str:
    """Seconds for people."""
    if seconds is None:
        return "not estimated"
    if seconds < 100:
        return f"about {seconds:.1f} s" if seconds < 10 else f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"


def dtype_table(base_files: Iterable[tuple[str, Sequence[tuple[str, int]]]]) -> str:
    """Files of a base: tensors, bytes and dtypes of each."""
    rows = []
    for name, tensors in base_files:
        by_dtype: dict[str, int] = {}
        for dtype, nbytes in tensors:
            by_dtype[dtype] = by_dtype.get(dtype, 0) + nbytes
        rows.append([name, str(len(tensors)), size(sum(by_dtype.values())),
                     ", ".join(f"{d} {size(n)}" for d, n in by_dtype.items())])  # fmt: skip
    return table(["file", "tensors", "size", "dtypes"], rows, left=1)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Plain columns; the first `left` are set flush left, the others right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, ["-" * w for w in widths], *rows):
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def size(nbytes: float) -> str:
    """Bytes for people, in powers of 1000 as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
