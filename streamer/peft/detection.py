"""Detect intruders in a live model."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import torch
from torch import nn

from streamer.api.keywords import LiveDetectKeywords, explained, watched
from streamer.api.options import Judged, Settings, take
from streamer.detection.findings import Findings
from streamer.detection.findings_file import FindingsHead
from streamer.detection.matrices import detect_matrix
from streamer.detection.options import DetectionOptions
from streamer.events import Event, Monitor
from streamer.peft.plan import LivePlan, plan_live
from streamer.plan.batch import AdapterBatch
from streamer.plan.memory_estimate import resident_bytes


@explained(LiveDetectKeywords, Settings, Judged)
def detect_intruder_dimensions(peft_model: nn.Module, adapter_name: str = "default", top_k: int | float | None = None,
                               threshold_epsilon: float | None = None,
                               **options: Unpack[LiveDetectKeywords]) -> Findings:  # fmt: skip
    """Find the intruder dimensions of every matrix that an adapter of a live model changes; the model stays unchanged.

    Parameters
    ----------
    adapter_name
        The adapter, active or not; others are ignored.

    Returns
    -------
    Findings
        As from files. `Findings.save` writes them. Mitigate and merge on files accept them if base and adapter are the same; `diff`, and
        reports with coefficients or an evaluation, do not.

    Raises
    ------
    MissingPackageError
        If PEFT is not installed.
    StreamerError
        Of the class for the kind of error (see `streamer.errors`).
    """
    judged, settings = take(Judged, options, top_k=top_k, threshold_epsilon=threshold_epsilon), take(Settings, options)
    with watched(options) as monitor:
        live = plan_live(peft_model, adapter_name, settings.ignore_keys)
        monitor.warn(live.plan.warnings)
        device = settings.make_run(monitor).device
        return named_as_files(live, detect_live(live, judged.options(), device, monitor))


def detect_live(live: LivePlan, options: DetectionOptions, device: torch.device, monitor: Monitor) -> Findings:
    """Detect in one matrix after another; the findings use the names in memory."""
    plan = live.plan
    total, done, matrices = sum(options.cost(target.module.shape) for target in plan.targets), 0, []
    resident = resident_bytes(AdapterBatch(plan.base, (plan,)))
    for items, target in enumerate(plan.targets):
        monitor.checkpoint()
        monitor.emit(Event("detect", live.name_in_files(target.tensor), done, total, items, len(plan.targets)))
        matrices.append(detect_matrix(plan, target, options, device, resident, monitor=monitor))
        live.release()
        done += options.cost(target.module.shape)
    monitor.emit(Event("detect", "", total, total, len(plan.targets), len(plan.targets)))
    findings = Findings.of(FindingsHead.of(plan, options), matrices)
    monitor.warn(findings.warnings)
    return findings


def named_as_files(live: LivePlan, findings: Findings) -> Findings:
    """Rename findings on a live model to the names in the base's files."""
    return replace(findings, matrices=tuple(replace(m, tensor=live.name_in_files(m.tensor)) for m in findings))
