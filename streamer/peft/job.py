"""Describe the mitigation of a live model's deltas in the same form as for files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from streamer.api.options import Judged
from streamer.detection.findings import Findings, load_findings
from streamer.detection.fingerprints import matched_findings
from streamer.errors import UnsupportedError
from streamer.events import Monitor
from streamer.methods import Method, NullSpace, RegMean
from streamer.output.job import Job
from streamer.output.prepare import check_counts, lacking_inputs, refuse_other_base
from streamer.peft.detection import detect_live
from streamer.peft.plan import LivePlan


def live_job(
    live: LivePlan, method: Method, judged: Judged, findings: Findings | str | Path | None,
    device: torch.device, monitor: Monitor,
) -> tuple[Job, Findings | None]:  # fmt: skip
    """Run detection, or use the given findings, if the method needs them; give findings, factors and maps the names in memory.

    Raises
    ------
    UnsupportedError
        If a map is given, but it is unknown from which files the base was loaded.
    MismatchError
        If findings, factors or a map belong to another base or adapter, or findings were made with different options.

    Returns
    -------
    Job, Findings or None
        The findings use the names in memory; None if the method needs none.
    """
    plan = live.plan
    monitor.warn(plan.warnings)
    found, named = None, isinstance(method, RegMean | NullSpace)
    names = {live.name_in_files(target.tensor): target.tensor for target in plan.targets if named}
    if isinstance(method, RegMean):
        matrices = {names.get(name, name): R for name, R in method.coefficients.matrices.items()}
        method = replace(method, coefficients=replace(method.coefficients, matrices=matrices))
        check_counts(plan, method.coefficients)
    if isinstance(method, NullSpace):
        inputs = method.map
        if live.files is None:
            raise UnsupportedError(
                f"{inputs.name}: is a map of a base's files, but the model's files are unknown; load the model from their directory"
            )
        theirs = {key: value for key, value in inputs.facts["base"].items() if key != "architecture"}
        refuse_other_base(inputs, theirs, {**live.files.identity()})
        mine = (replace(one, names=tuple(names[n] for n in one.names if n in names)) for one in inputs.inputs)
        inputs = replace(inputs, inputs=tuple(one for one in mine if one.names))
        monitor.warn(lacking_inputs(plan, inputs))
        method = replace(method, map=inputs)
    if method.needs_detection and findings is None:
        found = detect_live(live, judged.options(), device, monitor)
    elif method.needs_detection and findings is not None:
        loaded = findings if isinstance(findings, Findings) else load_findings(findings)
        found = matched_findings(plan, loaded, loaded.name)
        live.release()
        found.check_matches(plan.base_identity, plan.adapter_identity, judged.options(None, loaded))
    return Job(plan, method, judged.options(), device, found), found
