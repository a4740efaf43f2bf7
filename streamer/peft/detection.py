"""Detect in a live model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from streamer.adapters.stated import NOTHING_STATED
from streamer.api.keywords import detection_options, run_options
from streamer.detection.findings import Findings, load_findings
from streamer.detection.findings_size import findings_head
from streamer.detection.fingerprints import matched_findings
from streamer.detection.matrices import cost, detect_matrix
from streamer.detection.options import DetectionOptions
from streamer.events import Event, Monitor, OnEvent
from streamer.peft.plan import LivePlan, plan_live
from streamer.plan.batch import Batch
from streamer.plan.memory import resident_bytes
from streamer.progress import monitoring


def detect_intruder_dimensions(
    peft_model: nn.Module,
    adapter_name: str = "default",
    top_k: int | float = 10,
    threshold_epsilon: float = 0.5,
    *,
    solver: str = "auto",
    device: str = "auto",
    ignore_keys: Sequence[str] = (),
    on_event: OnEvent | None = None,
    progress: bool | None = None,
) -> Findings:
    """Find the intruder dimensions of every matrix that an adapter of a live model changes; the model stays as it is.

    Parameters
    ----------
    peft_model
        A `PeftModel`, or a model with injected adapters (PEFT's ``inject_adapter_in_model``, which transformers' ``add_adapter`` calls).
    adapter_name
        The adapter, active or not; others are passed over.
    top_k
        Leading singular directions of each matrix that are judged: a count from 1, or a share of min(rows, columns), a float in (0, 1].
    threshold_epsilon
        An intruder is a direction whose similarity, its largest |cosine| to a left singular vector of the base, is below this, in (0, 1].
    solver
        ``certified``, ``dense`` or ``auto``, as `streamer.detect_intruder_dimensions` has them.
    device
        That is computed on, wherever the model is: ``cpu``, ``cuda``, ``cuda:i``, or ``auto``: CUDA where there is one.
    ignore_keys
        Keys of the adapter's config that are not known, as those of a later PEFT, and have no effect, as you say.
    on_event
        Called with an `Event` at each step, warnings included. Without it warnings go through the `warnings` module.
    progress
        True draws tqdm bars. None draws them in a notebook if there is no `on_event`.

    Returns
    -------
    Findings
        As from files. `Findings.save` writes them, and mitigate and merge of files take
        them where base and adapter are the same; `diff` and reports with coefficients or an evaluation do not.

    Raises
    ------
    MissingPackageError
        If PEFT is not installed.
    StreamerError
        Of the class that says what kind of fault it is (see `streamer.errors`).
    """
    with monitoring(on_event, None, progress) as monitor:
        run = run_options(device, "mmap", NOTHING_STATED, None, monitor)
        live = plan_live(peft_model, adapter_name, ignore_keys)
        run.monitor.warn(live.plan.warnings)
        return named_as_files(
            live, detect_live(live, detection_options(top_k, threshold_epsilon, solver, None), run.device, run.monitor)
        )


def detect_live(live: LivePlan, options: DetectionOptions, device: torch.device, monitor: Monitor) -> Findings:
    """Detect in one matrix after the other; the findings have the names in memory."""
    plan = live.plan
    total, done, matrices = sum(cost(target, options) for target in plan.targets), 0, []
    resident = resident_bytes(Batch(plan.base, (plan,)))
    for items, target in enumerate(plan.targets):
        monitor.checkpoint()
        monitor.emit(Event("detect", live.name_in_files(target.tensor), done, total, items, len(plan.targets)))
        matrices.append(detect_matrix(plan, target, options, device, resident, monitor=monitor))
        live.release()
        done += cost(target, options)
    monitor.emit(Event("detect", "", total, total, len(plan.targets), len(plan.targets)))
    findings = replace(findings_head(plan, options), matrices=tuple(matrices))
    monitor.warn(findings.warnings)
    return findings


def findings_for(live: LivePlan, findings: Findings | str | Path | None, options: DetectionOptions, device: torch.device,
                 monitor: Monitor) -> Findings:  # fmt: skip
    """Check given findings against the model, or detect; the result has the names in memory.

    Raises
    ------
    MismatchError
        If given findings are not on this model and adapter, or were made with other options.
    """
    if findings is None:
        return detect_live(live, options, device, monitor)
    loaded = findings if isinstance(findings, Findings) else load_findings(findings)
    matched = matched_findings(live.plan, loaded, loaded.name)
    live.release()
    matched.check_matches(live.plan.base_identity, live.plan.adapter_identity, options)
    return matched


def named_as_files(live: LivePlan, findings: Findings) -> Findings:
    """Give findings on a live model the names that the base's files have."""
    return replace(findings, matrices=tuple(replace(m, tensor=live.name_in_files(m.tensor)) for m in findings))
