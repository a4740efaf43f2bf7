"""Run the whole job on a small generated model with planted intruders, in a directory of the caller's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypedDict

from streamer.api import detect_intruder_dimensions, merge_with_reduced_intruder_dimensions, reduce_intruder_dimension
from streamer.cli.layout import Column, Screen, fit, table
from streamer.cli.synthetic import make_demo
from streamer.cli.tables import NO_LIMIT
from streamer.detection.findings import load_findings
from streamer.detection.options import DetectionOptions
from streamer.events import Monitor
from streamer.json_types import Amount, Count, TensorName
from streamer.methods.method import Method
from streamer.plan.name_order import natural
from streamer.storage.checkpoint import open_checkpoint


# fmt: off
class _DemoTotals(TypedDict):
    matrices: Annotated[Count, "Matrices that the adapter changes."]
    planted: Annotated[Count, "Intruders that the generated adapter brings."]
    found: Annotated[Count, "Intruders found."]
    left: Annotated[Count, "Intruders found in the mitigated adapter."]
    gone: Annotated[Count, "Those found before and not after."]

class DemoMatrix(TypedDict):
    """A matrix."""
    tensor: TensorName
    planted: Annotated[Count, "Intruders that the adapter brings into it."]
    found: Annotated[Count, "Intruders found."]
    left: Annotated[Count, "Intruders found in the mitigated adapter."]
    gone: Annotated[Count, "Those found before and not after."]
    sigma_before: Annotated[Amount | None, "Singular value of the largest intruder found; null where none is."]
    sigma_after: Annotated[Amount | None, "The same in the mitigated adapter."]

DemoRecord = TypedDict("DemoRecord", {
    "schema": Literal["streamer.demo/1"],
    "lambda": Annotated[float, "Share of an intruder that is kept: 1 changes nothing, 0 removes it."],
    "totals": Annotated[_DemoTotals, "Sums over matrices."],
    "matrices": Annotated[list[DemoMatrix], "The matrices with a planted or found intruder."],
    "directory": Annotated[str | None, "Where everything was written, as --output names it; null without --output: then nothing is kept."],
})
DemoRecord.__doc__ = "What `streamer demo --json` prints."
# fmt: on


def run_demo(directory: Path, mitigation: Method, monitor: Monitor) -> DemoRecord:
    """Detect, mitigate, merge, and detect again on what is left of the adapter."""
    model = make_demo(directory)
    findings_path, adapter_path, merged_path = (
        directory / name for name in ("findings.safetensors", "mitigated", "merged")
    )
    found = detect_intruder_dimensions(model.base, model.adapter, findings_path, monitor=monitor)
    findings = load_findings(findings_path)
    assert mitigation.mitigation_lambda is not None
    lam, method, amplify = mitigation.mitigation_lambda, mitigation.name, mitigation.amplify
    reduce_intruder_dimension(model.base, model.adapter, adapter_path, findings=findings, monitor=monitor,
                              mitigation_lambda=lam, method=method, amplify=amplify)  # fmt: skip
    merge_with_reduced_intruder_dimensions(model.base, model.adapter, merged_path, findings=findings, monitor=monitor,
                                           mitigation_lambda=lam, method=method, amplify=amplify)  # fmt: skip
    open_checkpoint(merged_path)  # a strict reader takes the result
    left = detect_intruder_dimensions(model.base, adapter_path, monitor=monitor).by_tensor
    rows: list[DemoMatrix] = []
    for m in found:
        planted, ranks = model.planted.get(m.tensor, 0), m.detection.intruders
        if planted or ranks:
            after = left[m.tensor].detection
            rows.append({
                "tensor": m.tensor, "planted": planted, "found": len(ranks), "left": len(after.intruders),
                "gone": max(0, len(ranks) - len(after.intruders)),
                "sigma_before": m.detection.singular_values[ranks[0]] if ranks else None,
                "sigma_after": after.singular_values[after.intruders[0]] if after.intruders else None,
            })  # fmt: skip
    return {
        "schema": "streamer.demo/1",
        "lambda": lam,
        "totals": {"matrices": len(found), "planted": sum(r["planted"] for r in rows), "found": sum(r["found"] for r in rows),
                   "left": sum(r["left"] for r in rows), "gone": sum(r["gone"] for r in rows)},
        "matrices": rows,
        "directory": str(directory),
    }  # fmt: skip


NEXT = """\
next: streamer inspect BASE ADAPTER   shows what would be done with yours, and
      streamer detect BASE ADAPTER -o findings.safetensors   finds its intruders"""


def demo_table(result: DemoRecord, screen: Screen = NO_LIMIT) -> str:
    """Format the demo's result for people."""

    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.3f}"

    t, strength, top_k = result["totals"], result["lambda"], DetectionOptions().top_k
    rows = sorted(result["matrices"], key=lambda r: natural(r["tensor"]))
    counts: dict[Literal["planted", "found", "gone"], str] = {
        "planted": "intruders that the generated adapter brings into this matrix",
        "found": f"intruders among the {top_k} largest directions, by `streamer detect`",
        "gone": f"no longer found in the adapter that `streamer mitigate --method project --lambda {strength:g}` wrote",
    }
    columns = [
        Column("matrix", [r["tensor"] for r in rows], left=True, names=True, foot=f"all {t['matrices']} matrices")
    ]
    for key, about in counts.items():
        columns.append(Column(key, [str(r[key]) for r in rows], about, keep=9, foot=str(t[key])))
    before = [number(r["sigma_before"]) for r in rows]
    columns.append(Column("sigma", before, "singular value of the largest one; the base's own largest is 1", keep=3))
    if t["left"]:
        after = [number(r["sigma_after"]) for r in rows]
        columns.append(
            Column("sigma left", after, "the same of what is found in the new adapter, `-` where none is", keep=5)
        )
    meaning = (
        "lambda 0 removes an intruder"
        if strength == 0
        else f"lambda {strength:g}: that share of an intruder's singular value is kept"
    )
    told = f"{t['planted']} planted, {t['found']} found, {t['gone']} gone, {t['left']} left; {meaning}"
    return "\n\n".join((table(columns, screen), fit(told, screen.width), fit(NEXT, screen.width, 6)))
