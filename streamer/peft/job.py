"""Describe the mitigation of a live model's deltas in the same form as for files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from streamer.api.options import Judged
from streamer.detection.findings import Findings
from streamer.errors import MismatchError, UnsupportedError
from streamer.events import Monitor
from streamer.methods import Method, NullSpace, RegMean
from streamer.methods.fits import FactorSet
from streamer.methods.maps import InputMap
from streamer.output.job import FindingsToMake, GivenFindings, Job
from streamer.output.prepare import check_counts, lacking_inputs, refuse_other_base
from streamer.peft.detection import findings_for
from streamer.peft.plan import LivePlan


def live_job(
    live: LivePlan, method: Method, judged: Judged, findings: Findings | str | Path | None,
    device: torch.device, monitor: Monitor,
) -> tuple[Job, Findings | None]:  # fmt: skip
    """Run detection, or use the given findings, if the method needs them.

    Returns
    -------
    Job, Findings or None
        The findings use the names in memory; None if the method needs none.
    """
    monitor.warn(live.plan.warnings)
    if isinstance(method, RegMean):
        method = replace(method, coefficients=_named_in_memory(live, method.coefficients))
    if isinstance(method, NullSpace):
        method = replace(method, map=_map_in_memory(live, method.map, monitor))
    found = None
    if method.needs_detection:
        found = findings_for(live, findings, judged, device, monitor)
    detection = judged.options()
    source = FindingsToMake(detection) if found is None else GivenFindings(found)
    return Job(live.plan, method, detection, device, source), found


def _named_in_memory(live: LivePlan, coefficients: FactorSet) -> FactorSet:
    """Rename coefficients to the names in memory.

    Raises
    ------
    MismatchError
        If they do not cover exactly the adapter's matrices, with factors of their shapes.
    """
    names = {live.name_in_files(target.tensor): target.tensor for target in live.plan.targets}
    if names.keys() != coefficients.matrices.keys():
        known = next(iter(coefficients.matrices), "none")
        raise MismatchError(
            f"{coefficients.name}: coefficients cover {len(coefficients.matrices)} matrices, {known!r} first, but the adapter has "
            f"{len(names)}, {next(iter(names))!r} first; fit them to this adapter, or load the base from the directory that they "
            "were fitted on, so that its names are known"
        )
    named = replace(coefficients, matrices={names[name]: R for name, R in coefficients.matrices.items()})
    check_counts(live.plan, named)
    return named


def _map_in_memory(live: LivePlan, inputs: InputMap, monitor: Monitor) -> InputMap:
    """Rename a map to the names in memory, keeping only the adapter's matrices.

    Raises
    ------
    UnsupportedError
        If it is unknown from which files the base was loaded.
    MismatchError
        If the map is of another base.
    """
    here = live.files_identity
    if here is None:
        raise UnsupportedError(
            f"{inputs.name}: is a map of a base's files, but the files of this model are unknown; load the model from their directory"
        )
    theirs = {key: value for key, value in inputs.facts["base"].items() if key != "architecture"}
    refuse_other_base(inputs, theirs, here)
    names = {live.name_in_files(target.tensor): target.tensor for target in live.plan.targets}
    own = (replace(one, names=tuple(names[n] for n in one.names if n in names)) for one in inputs.inputs)
    named = replace(inputs, inputs=tuple(one for one in own if one.names))
    monitor.warn(lacking_inputs(live.plan, named))
    return named
