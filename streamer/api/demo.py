"""Run detection, mitigation and merging on a small generated model with planted intruders."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from streamer.api.detection import detect_intruder_dimensions
from streamer.api.synthetic import make_demo
from streamer.api.writing import merge_with_reduced_intruder_dimensions, reduce_intruder_dimension
from streamer.detection.findings import load_findings
from streamer.errors import OutputExistsError
from streamer.events import Monitor
from streamer.json_types import Amount, Count, TensorName
from streamer.methods import Project
from streamer.storage.checkpoint import open_checkpoint


# fmt: off
class _DemoTotals(TypedDict):
    matrices: Annotated[Count, "Matrices that the adapter changes."]
    planted: Annotated[Count, "Intruders that the generated adapter was given."]
    found: Annotated[Count, "Intruders found."]
    left: Annotated[Count, "Intruders found in the mitigated adapter."]
    gone: Annotated[Count, "Intruders found before and not after."]

class DemoMatrix(TypedDict):
    """A matrix."""
    tensor: TensorName
    planted: Annotated[Count, "Intruders that the adapter was given in it."]
    found: Annotated[Count, "Intruders found."]
    left: Annotated[Count, "Intruders found in the mitigated adapter."]
    gone: Annotated[Count, "Intruders found before and not after."]
    sigma_before: Annotated[Amount | None, "Singular value of the largest intruder found; null if there is none."]
    sigma_after: Annotated[Amount | None, "The same in the mitigated adapter."]

DemoRecord = TypedDict("DemoRecord", {
    "schema": Literal["streamer.demo/1"],
    "lambda": Annotated[float, "Share of the adapter's part of an intruder to keep: 1 changes nothing, 0 removes it."],
    "totals": Annotated[_DemoTotals, "Sums over matrices."],
    "matrices": Annotated[list[DemoMatrix], "The matrices with a planted or found intruder."],
    "directory": Annotated[str | None, "Directory of all files, as given with --output; null without --output, when nothing is kept."],
})
DemoRecord.__doc__ = "What `streamer demo --json` prints."
# fmt: on


@dataclass(frozen=True)
class DemoRequest:
    """A requested demo.

    Attributes
    ----------
    output
        Directory to write, which must not exist; None uses a temporary directory.
    """

    mitigation_lambda: float
    amplify: bool
    output: Path | None

    def run(self, monitor: Monitor) -> DemoRecord:
        """Detect, mitigate, merge, and detect again in the mitigated adapter."""
        method = Project(self.mitigation_lambda, amplify=self.amplify)
        if self.output is None:
            with tempfile.TemporaryDirectory(prefix="streamer-demo-") as directory:
                return {**_run(Path(directory), method, monitor), "directory": None}
        if os.path.lexists(self.output):
            raise OutputExistsError(f"{self.output}: exists; name a directory that does not", self.output)
        return _run(self.output, method, monitor)


def _run(directory: Path, mitigation: Project, monitor: Monitor) -> DemoRecord:
    model = make_demo(directory)
    findings_path, adapter_path, merged_path = (
        directory / name for name in ("findings.safetensors", "mitigated", "merged")
    )
    found = detect_intruder_dimensions(model.base, model.adapter, findings_path, monitor=monitor)
    findings = load_findings(findings_path)
    lam, method, amplify = mitigation.mitigation_lambda, mitigation.name, mitigation.amplify
    reduce_intruder_dimension(model.base, model.adapter, adapter_path, findings=findings, monitor=monitor,
                              mitigation_lambda=lam, method=method, amplify=amplify)  # fmt: skip
    merge_with_reduced_intruder_dimensions(model.base, model.adapter, merged_path, findings=findings, monitor=monitor,
                                           mitigation_lambda=lam, method=method, amplify=amplify)  # fmt: skip
    open_checkpoint(merged_path)  # a strict reader must accept the result
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
