"""Findings and records → the JSON that scripts rely on, and tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streamer.findings import SCHEMA, Findings
from streamer.forecast import Forecast
from streamer.intruders import DetectionOptions
from streamer.pipeline import cost
from streamer.plan import Plan
from streamer.storage.place import free_bytes


def findings_json(findings: Findings) -> dict[str, Any]:
    """The object of `streamer report --json`; names are added, never changed. Seconds are null where a file was read."""
    matrices = []
    for m in findings:
        d = m.detection
        matrices.append(
            m.figures()
            | {
                "singular_values": list(d.singular_values),
                "similarity": list(d.similarity),
                "similarity_low": list(d.similarity_low),
                "similarity_high": list(d.similarity_high),
                "intruders": list(d.intruders),
                "degenerate": list(d.degenerate),
                "seconds": m.seconds,
            }
        )
    timed = [m.seconds for m in findings if m.seconds is not None]
    totals = {
        "matrices": len(findings),
        "intruders": findings.intruders,
        "certified": sum(m.detection.certified for m in findings),
        "escalated": sum(m.detection.escalated for m in findings),
        "degenerate": sum(bool(m.detection.degenerate) for m in findings),
        "seconds": sum(timed) if timed else None,
    }
    return {
        "schema": SCHEMA,
        "base": dict(findings.base),
        "adapter": dict(findings.adapter),
        "options": findings.options.as_dict(),
        "totals": totals,
        "matrices": matrices,
    }


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


def inspect_json(plan: Plan, forecasts: Mapping[str, Forecast | None]) -> dict[str, Any]:
    """What is there, and what a run would read, compute and take; null for a command that is refused."""
    matrices = [
        {"tensor": t.tensor, "module": t.module.name, "shape": list(t.module.shape), "dtype": plan.weights[t.tensor].label,
         "rank": t.module.rank, "scale": t.module.scale, "transposed": t.transposed, "matched": t.match.rule}
        for t in plan.targets
    ]  # fmt: skip
    largest = max(plan.targets, key=lambda t: plan.weights[t.tensor].nbytes)
    return {
        "schema": "streamer.plan/1",
        "base": plan.base_identity,
        "adapter": plan.adapter_identity,
        "totals": {
            "matrices": len(matrices),
            "tensors": len(plan.base.weight_map),
            "base_bytes": plan.base.data_bytes,
            "adapted_bytes": sum(plan.weights[t.tensor].nbytes for t in plan.targets),
            "largest_matrix": largest.tensor,
            "largest_matrix_bytes": plan.weights[largest.tensor].nbytes,
            "detection_cost": sum(cost(t, DetectionOptions()) for t in plan.targets),
        },
        "warnings": list(plan.warnings),
        "names": _names_json(plan),
        "matrices": matrices,
        "carried": plan.changes.listed(plan.base),
        "forecast": {command: None if f is None else asdict(f) for command, f in forecasts.items()},
    }


def _names_json(plan: Plan) -> list[dict[str, Any]]:
    """Each rule by which modules were found in the base: how many, and the first of them."""
    groups: dict[str, dict[str, Any]] = {}
    for t in plan.targets:
        group = groups.setdefault(
            t.match.rule,
            {"rule": t.match.rule, "modules": 0, "module": t.module.name, "tensor": t.tensor, "why": t.match.why},
        )
        group["modules"] += 1
    return list(groups.values())


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
        + "\nmitigate and merge: with findings; time: from a short probe of this machine, as busy as it is, if the disk keeps up and\n"
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
        "with the processors as busy as now and if the disk keeps up"
    )


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


def dry_run(command: str, output: Path, state: str, matrices: int, files: int, nbytes: int | None,
            forecast: Forecast | None) -> tuple[dict[str, Any], str]:  # fmt: skip
    """What a dry run found: the object, and the line without its forecast.

    Parameters
    ----------
    state
        ``new``, ``resume`` or ``done``.
    nbytes
        Of the output; None where they are not known.
    """
    says = {"new": "would write", "resume": "would resume", "done": "nothing to do: already stands"}[state]
    written = "" if nbytes is None else f", {size(nbytes)}"
    tree = {"schema": "streamer.dry-run/1", "command": command, "output": str(output), "state": state,
            "matrices": matrices, "files": files, "bytes": nbytes,
            "free_bytes": free_bytes(output), "forecast": None if forecast is None else asdict(forecast)}  # fmt: skip
    return tree, f"dry run: {says} {output}: {files} files{written}; {matrices} matrices"


def dry_runs(command: str, output: str, parts: Mapping[str, tuple[dict[str, Any], str]],
             forecast: Forecast | None) -> tuple[dict[str, Any], str]:  # fmt: skip
    """What dry runs found, by adapter, and what all of it would take."""
    free, tree = free_bytes(Path(output)), None if forecast is None else asdict(forecast)
    text = "" if tree is None else forecast_text(command, tree, free)
    if "" in parts:
        one, line = parts[""]
        return one, f"{line}\n{text}".rstrip()
    return of_several(parts, {"free_bytes": free, "forecast": tree}, text and f"all together\n{text}")


def of_several(
    parts: Mapping[str, tuple[dict[str, Any], str]], more: Mapping[str, Any] | None = None, last: str = ""
) -> tuple[dict[str, Any], str]:
    """The objects and texts on several adapters, by their names, in one; with `more` of all, and a `last` text."""
    tree = {
        "schema": "streamer.several/1",
        "adapters": {name: tree for name, (tree, _) in parts.items()},
        **(more or {}),
    }
    texts = [f"{name}\n{text}" for name, (_, text) in parts.items()]
    return tree, "\n\n".join([*texts, last] if last else texts)


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
