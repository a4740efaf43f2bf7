"""Open and check all inputs of outputs, and plan the outputs; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamer.adapters.one_or_several import One, Several
from streamer.detection.findings import Findings, load_findings
from streamer.detection.fingerprints import lacking, matched_findings
from streamer.detection.options import DetectionOptions, Run
from streamer.errors import MismatchError, UsageError
from streamer.methods import Method, NullSpace, RegMean
from streamer.methods.fits import FactorSet
from streamer.methods.maps import InputMap
from streamer.output.adapter_writer import AdapterWriter
from streamer.output.job import Job
from streamer.output.lora_writer import LoraWriter
from streamer.output.model_writer import ModelWriter
from streamer.output.output_spec import Writer
from streamer.output.write import batch_of
from streamer.plan.batch import make_batch
from streamer.plan.plan import Plan
from streamer.storage.identities import difference
from streamer.units import counted, listed

FindingsOrPath = Findings | Mapping[str, Findings] | str | Path | None
"""Findings as a user gives them: for one adapter, or for several by name, as objects or as the path of their file or directory."""


@dataclass(frozen=True)
class OutputOptions:
    """Options that determine the form of outputs, models or adapters; the others are keywords in `api`, which explains them."""

    merges: bool
    to_lora: int | float | None = None
    dequantize: bool = False
    model_card: bool = True
    measured: tuple[str, ...] = ()


def prepare_outputs(base_path: str | Path, adapters: One | Several, output: Path, findings: Sequence[Findings | None],
                    method: Method, detection: DetectionOptions, form: OutputOptions, run: Run) -> list[Writer]:  # fmt: skip
    """Plan the output of each adapter, and pass on the warnings of the inputs.

    Parameters
    ----------
    output
        The output of one adapter, or the directory for the outputs of several.
    findings
        See `open_jobs`.
    """
    jobs = open_jobs(base_path, adapters, findings, method, detection, form, run)
    writers: list[Writer] = []
    for job, path in zip(jobs, adapters.directories(output), strict=True):
        if form.merges:
            writers.append(ModelWriter(job, path))
        else:
            writers.append(AdapterWriter(job, path) if form.to_lora is None else LoraWriter(job, path, form.to_lora))
    run.monitor.warn(batch_of(writers).warnings)
    return writers


def open_jobs(base_path: str | Path, adapters: One | Several, findings: Sequence[Findings | None], method: Method,
              detection: DetectionOptions, form: OutputOptions, run: Run) -> list[Job]:  # fmt: skip
    """Open and check all inputs of mitigations.

    Parameters
    ----------
    findings
        Findings for each adapter, see `load_given`; None if the job detects.
    """
    if isinstance(method, RegMean) and isinstance(adapters, Several) and len(adapters.paths) > 1:
        raise UsageError(
            f"{method.coefficients.name}: coefficients belong to one adapter, found {len(adapters.paths)}: "
            f"{listed(adapters.by_name)}; take them one at a time, each with its own"
        )
    batch = make_batch(base_path, adapters.paths, run.io, run.stated, run.architecture)
    fitting = []
    for plan, found in zip(batch.plans, findings, strict=True):
        fitting.append(None if found is None else fitting_findings(plan, found, detection))
        run.monitor.warn(() if found is None else found.warnings)
        if isinstance(method, RegMean):
            check_coefficients(plan, method.coefficients)
        if isinstance(method, NullSpace):
            run.monitor.warn(check_map(plan, method.map))
    return [
        Job(plan, method, detection, run.device, found, form.dequantize, form.model_card, form.measured)
        for plan, found in zip(batch.plans, fitting, strict=True)
    ]


def load_given(findings: FindingsOrPath, adapters: One | Several) -> list[Findings | None]:
    """Load the findings for each adapter; None for each if none are given.

    Raises
    ------
    UsageError
        If some are missing or have the wrong form.
    """
    if findings is None:
        return [None for _ in adapters.paths]
    if isinstance(adapters, One):
        if isinstance(findings, Mapping):
            raise UsageError(
                f"findings: expected findings on one adapter, found a dict of {len(findings)}; give one of them"
            )
        return [findings if isinstance(findings, Findings) else load_findings(findings)]
    if isinstance(findings, Mapping):
        lacking = [name for name in adapters.by_name if name not in findings]
        if lacking:
            raise UsageError(f"findings: has none for adapter {lacking[0]!r}; run detect on it")
        return [findings[name] for name in adapters.by_name]
    if isinstance(findings, Findings) or not Path(findings).is_dir():
        where = "findings" if isinstance(findings, Findings) else findings
        raise UsageError(f"{where}: expected findings on several adapters: the directory that detect wrote for them")
    return [load_findings(Path(findings) / f"{name}.safetensors") for name in adapters.by_name]


def check_coefficients(plan: Plan, coefficients: FactorSet) -> None:
    """Refuse coefficients that were fitted to another base or adapter, or not to all of its matrices.

    Raises
    ------
    MismatchError
        Names the one that differs, and how.
    UsageError
        If they are not valid coefficients; see `FactorSet.check`.
    """
    coefficients.check()
    name, facts = coefficients.name, coefficients.facts
    for what, here in (("base", {**plan.base_identity}), ("adapter", {**plan.adapter_identity})):
        if not isinstance(facts.get(what), dict):
            raise MismatchError(
                f"{name}: coefficients do not say which {what} they were fitted to; fit them to this one"
            )
        if facts[what] != here:
            raise MismatchError(
                f"{name}: coefficients of another {what} ({difference(facts[what], here)}); fit them to this one with `streamer fit`"
            )
    check_counts(plan, coefficients)


def check_counts(plan: Plan, coefficients: FactorSet) -> None:
    """Refuse coefficients for other matrices than an adapter's, or of other shapes.

    Raises
    ------
    MismatchError
        States how many matrices they do not fit, and the first.
    """
    ranks = {t.tensor: (t.module.shape[1], t.module.factor_rank) if t.module.low_rank else None for t in plan.targets}
    shapes = {tensor: tuple(factor.shape) for tensor, factor in coefficients.matrices.items()}
    wrong = [tensor for tensor in {**ranks, **shapes} if tensor not in ranks or ranks[tensor] != shapes.get(tensor, ())]
    if wrong:
        raise MismatchError(
            f"{coefficients.name}: coefficients do not fit {len(wrong)} of the adapter's matrices, {wrong[0]!r} first; fit them to this "
            "adapter with `streamer fit`"
        )


def check_map(plan: Plan, inputs: InputMap) -> list[str]:
    """Refuse a map of another base, and warn of matrices that it lacks, whose deltas stay.

    Raises
    ------
    MismatchError
        If it maps another base, or has none of the adapter's matrices.
    """
    refuse_other_base(inputs, inputs.facts["base"], {**plan.base_identity})
    return lacking_inputs(plan, inputs)


def refuse_other_base(inputs: InputMap, theirs: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a map of another base, by both identities."""
    if theirs != here:
        raise MismatchError(
            f"{inputs.name}: is a map of another base ({difference(theirs, here)}); make one of this base with `streamer map`"
        )


def lacking_inputs(plan: Plan, inputs: InputMap) -> list[str]:
    """Warn of matrices whose inputs a map lacks; refuse the map if it lacks all."""
    lacks = [t.tensor for t in plan.targets if inputs.find(t.tensor, t.module.shape[1]) is None]
    if not lacks:
        return []
    names = listed(map(repr, lacks))
    if len(lacks) == len(plan.targets):
        raise MismatchError(f"{inputs.name}: has the inputs of none of the adapter's matrices, {names}")
    return [f"the map has no inputs of {counted(len(lacks), 'matrix')}, {names}: what the adapter adds there stays"]


def fitting_findings(plan: Plan, findings: Findings, options: DetectionOptions) -> Findings:
    """Check that findings cover the matrices of a plan; findings for a model in memory get the names of the base's files."""
    name = findings.name
    if findings.base.get("in_memory"):
        findings = matched_findings(plan, findings, name)
    findings.check_matches(plan.base_identity, plan.adapter_identity, options)
    shapes = {m.tensor: m.shape for m in findings}
    missing = [t.tensor for t in plan.targets if shapes.get(t.tensor) != t.module.shape]
    if missing:
        raise lacking(name, len(missing), len(plan.targets), repr(missing[0]))
    return findings
