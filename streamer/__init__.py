"""Find and scale down LoRA intruder dimensions, one weight matrix at a time, without building the model.

Detect once, look at the findings, and write a mitigated adapter or a merged model::

    import streamer

    findings = streamer.detect_intruder_dimensions("BASE", "ADAPTER", "findings.safetensors", progress=True)
    print(findings)
    table = findings.to_pandas()
    streamer.reduce_intruder_dimension("BASE", "ADAPTER", "mitigated", findings=findings, mitigation_lambda=0.5)
    streamer.merge_with_reduced_intruder_dimensions("BASE", "ADAPTER", "merged", findings=findings, mitigation_lambda=0.5)

BASE and ADAPTER are the directories of a model and of a PEFT adapter, or their names on the hub. Measure on your own texts what each method
keeps and forgets, or fit the adapter to them::

    evaluation = streamer.evaluate_variants("BASE", "ADAPTER", general="general.txt", task="task.jsonl")
    print(evaluation.table())
    coefficients = streamer.fit_coefficients("BASE", "ADAPTER", general="general.txt", task="task.jsonl")
    streamer.reduce_intruder_dimension("BASE", "ADAPTER", "repaired", coefficients=coefficients)

All errors raised on purpose are `StreamerError`. `streamer.peft` has the same functions for a model in memory. Call ``help`` on a function
for its parameters.

The rest is for readers of the code. The folders follow the data, and a module imports only from folders above its own in this list::

    errors, events, json_types, units, packages
    storage/       bytes             safetensors in, crash-safe files out
    linalg/        mathematics       operators, Krylov processes, certified bounds
    weights/       logical weights   a base's tensors as float matrices, plain or quantized
    adapters/      deltas            a PEFT adapter or a fine-tuned model, module by module
    plan/          matching          the base tensor that each module changes; all refusals
    workers        tasks             work in other processes
    detection/     decisions         the leading directions of each matrix, and the findings file
    methods/       mitigated deltas  the methods with their options, and the files of fits and maps
    output/        results           output tensors, files, records
    streaming/     the model         run from its files: each weight is read when its module runs, for several variants at once
    measuring/     sums              losses of variants on texts, in passes over the base, and the journal of their sums
    verification/  witnesses         an output checked against its record and inputs by independent code
    evaluation/    judgements        what each variant keeps and forgets, and the suggestion
    fitting/       fits              factors fitted to the user's texts; maps of a base
    report/        pictures          a page of findings and measurements; comparison of findings
    remote/        addresses         hub names, buckets and https addresses become directories
    forecast       forecasts         memory, bytes and time of a command, before it runs
    api/           the library       one request and one function for each command
    peft/          in memory         the same for a loaded PEFT model
    cli/           commands          arguments, progress, tables

>>> import streamer
>>> streamer.DetectionOptions(top_k=0.1).directions((4096, 1024))
102
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Module of each public name. Names are resolved on first use, so that importing streamer does not load torch.
_HOMES = {
    "Coefficients": "methods.fits",
    "Detection": "detection.intruders",
    "DetectionOptions": "detection.options",
    "Evaluation": "evaluation.evaluation",
    "Event": "events",
    "Findings": "detection.findings",
    "FindingsDiff": "report.diff",
    "InputMap": "methods.maps",
    "MatrixFinding": "detection.findings_file",
    "Monitor": "events",
    "StreamerError": "errors",
    "StreamerWarning": "errors",
    "VerificationError": "errors",
    "add_map_files": "api.fitting",
    "detect_intruder_dimensions": "api.detection",
    "diff_findings": "report.diff",
    "evaluate_variants": "api.evaluation",
    "fit_coefficients": "api.fitting",
    "iter_merged": "api.writing",
    "load_coefficients": "methods.fits",
    "load_evaluation": "evaluation.evaluation",
    "load_findings": "detection.findings",
    "load_map": "methods.maps",
    "map_inputs": "api.fitting",
    "merge_with_reduced_intruder_dimensions": "api.writing",
    "read_tensors": "api.tensors",
    "reduce_intruder_dimension": "api.writing",
    "repair_adapter": "api.repair",
    "verify_output": "api.report",
    "write_report": "api.report",
    "write_safetensors": "api.tensors",
}

__all__ = [
    "Coefficients",
    "Detection",
    "DetectionOptions",
    "Evaluation",
    "Event",
    "Findings",
    "FindingsDiff",
    "InputMap",
    "MatrixFinding",
    "Monitor",
    "StreamerError",
    "StreamerWarning",
    "VerificationError",
    "add_map_files",
    "detect_intruder_dimensions",
    "diff_findings",
    "evaluate_variants",
    "fit_coefficients",
    "iter_merged",
    "load_coefficients",
    "load_evaluation",
    "load_findings",
    "load_map",
    "map_inputs",
    "merge_with_reduced_intruder_dimensions",
    "read_tensors",
    "reduce_intruder_dimension",
    "repair_adapter",
    "verify_output",
    "write_report",
    "write_safetensors",
]

if TYPE_CHECKING:
    from streamer.api.detection import detect_intruder_dimensions
    from streamer.api.evaluation import evaluate_variants
    from streamer.api.fitting import add_map_files, fit_coefficients, map_inputs
    from streamer.api.repair import repair_adapter
    from streamer.api.report import verify_output, write_report
    from streamer.api.tensors import read_tensors, write_safetensors
    from streamer.api.writing import iter_merged, merge_with_reduced_intruder_dimensions, reduce_intruder_dimension
    from streamer.detection.findings import Findings, load_findings
    from streamer.detection.findings_file import MatrixFinding
    from streamer.detection.intruders import Detection
    from streamer.detection.options import DetectionOptions
    from streamer.errors import StreamerError, StreamerWarning, VerificationError
    from streamer.evaluation.evaluation import Evaluation, load_evaluation
    from streamer.events import Event, Monitor
    from streamer.methods.fits import Coefficients, load_coefficients
    from streamer.methods.maps import InputMap, load_map
    from streamer.report.diff import FindingsDiff, diff_findings


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'streamer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"streamer.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
