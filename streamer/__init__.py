"""Find and scale down LoRA intruder dimensions, one weight matrix at a time, without building the model.

Detect once, look at the findings, and write a mitigated adapter or a merged model::

    import streamer

    findings = streamer.detect_intruder_dimensions("BASE", "ADAPTER", "findings.safetensors", progress=True)
    print(findings.table())
    streamer.reduce_intruder_dimension("BASE", "ADAPTER", "mitigated", findings=findings, mitigation_lambda=0.5)
    streamer.merge_with_reduced_intruder_dimensions("BASE", "ADAPTER", "merged", findings=findings, mitigation_lambda=0.5)

BASE and ADAPTER are the directories of a model and of a PEFT adapter, or their names on the hub. Measure on your own texts what each method
keeps and forgets, or repair the adapter::

    evaluation = streamer.evaluate_variants("BASE", "ADAPTER", general="general.txt", task="task.jsonl")
    print(evaluation.table())
    streamer.repair_adapter("BASE", "ADAPTER", "repaired", general="general.txt", task="task.jsonl")

All errors raised on purpose are `StreamerError`. `streamer.peft` has the same functions for a model in memory. Call ``help`` on a function
for its parameters.

The rest is for readers of the code. The folders follow the data, and a module imports only from folders above its own in this list::

    errors, events, json_types, tables, units, packages
    storage/       bytes             safetensors in, crash-safe files out
    linalg/        mathematics       operators, Krylov processes, certified bounds
    weights/       logical weights   a base's tensors as float matrices, plain or quantized
    adapters/      deltas            a PEFT adapter or a fine-tuned model, module by module
    plan/          matching          the base tensor that each module changes; all refusals
    workers        tasks             work in other processes
    detection/     decisions         the leading directions of each matrix, and the findings file
    methods/       mitigated deltas  the methods with their options, and the files of fits and maps
    options        options           every option, declared once
    output/        results           output tensors, files, records
    streaming/     the model         run from its files in one sweep over its layers, for several variants and texts at once
    measuring/     sums              losses of variants on texts, in sweeps over the base, and the journal of their sums
    verification/  witnesses         an output checked against its record and inputs by independent code
    evaluation/    judgements        what each variant keeps and forgets, and the suggestion
    fitting/       fits              factors fitted to the user's texts; maps of a base
    report/        pictures          a page of findings and measurements
    remote/        addresses         hub names, buckets and https addresses become directories
    forecast       forecasts         memory, bytes and time of a command, before it runs
    api/           the library       one request and one function for each command
    peft           in memory         the same for a loaded PEFT model
    cli/           commands          arguments, progress, tables

>>> import streamer
>>> streamer.DetectionOptions(top_k=0.1).directions((4096, 1024))
102
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Public names by their modules. A name is resolved on first use, so that importing streamer does not load torch.
_NAMES = {
    "api.intruders": (
        "detect_intruder_dimensions",
        "iter_merged",
        "merge_with_reduced_intruder_dimensions",
        "reduce_intruder_dimension",
    ),
    "api.texts": ("evaluate_variants", "map_inputs", "repair_adapter"),
    "api.report": ("write_report",),
    "api.tensors": ("read_tensors", "write_safetensors"),
    "api.verification": ("verify_output",),
    "detection.findings": ("Findings", "MatrixFinding", "load_findings"),
    "detection.intruders": ("Detection",),
    "detection.options": ("DetectionOptions",),
    "errors": ("StreamerError", "StreamerWarning", "VerificationError"),
    "evaluation.evaluation": ("Evaluation", "load_evaluation"),
    "events": ("Event", "Monitor"),
    "methods.files": ("Coefficients", "InputMap", "load_coefficients", "load_map"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "Coefficients",
    "Detection",
    "DetectionOptions",
    "Evaluation",
    "Event",
    "Findings",
    "InputMap",
    "MatrixFinding",
    "Monitor",
    "StreamerError",
    "StreamerWarning",
    "VerificationError",
    "detect_intruder_dimensions",
    "evaluate_variants",
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
    from streamer.api.intruders import (
        detect_intruder_dimensions,
        iter_merged,
        merge_with_reduced_intruder_dimensions,
        reduce_intruder_dimension,
    )
    from streamer.api.report import write_report
    from streamer.api.tensors import read_tensors, write_safetensors
    from streamer.api.texts import evaluate_variants, map_inputs, repair_adapter
    from streamer.api.verification import verify_output
    from streamer.detection.findings import Findings, MatrixFinding, load_findings
    from streamer.detection.intruders import Detection
    from streamer.detection.options import DetectionOptions
    from streamer.errors import StreamerError, StreamerWarning, VerificationError
    from streamer.evaluation.evaluation import Evaluation, load_evaluation
    from streamer.events import Event, Monitor
    from streamer.methods.files import Coefficients, InputMap, load_coefficients, load_map


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'streamer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"streamer.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
