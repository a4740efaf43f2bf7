"""Open the inputs of mitigations, and check that findings, coefficients and maps belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamer.adapters.finetuned import AdapterPaths
from streamer.detection.findings import Findings, lacking, load_findings, matched_findings
from streamer.detection.options import DetectionOptions
from streamer.errors import MismatchError, UsageError
from streamer.methods import Method, NullSpace, RegMean
from streamer.methods.files import Coefficients, InputMap
from streamer.output.mitigation import Mitigation
from streamer.plan.plan import Plan, make_batch
from streamer.run import Run
from streamer.storage.files import difference
from streamer.units import counted, listed

FindingsOrPath = Findings | Mapping[str, Findings] | str | Path | None
"""Findings as a user gives them: for one adapter, or for several by name, as objects or as the path of their file or directory."""


def open_mitigations(
    base_path: str | Path,
    adapters: AdapterPaths,
    findings: Sequence[Findings | None],
    method: Method,
    detection: DetectionOptions,
    run: Run,
) -> list[Mitigation]:
    """Open and check all inputs of the mitigation of each adapter.

    Parameters
    ----------
    findings
        Findings for each adapter, see `load_given`; None if the run detects.
    """
    if isinstance(method, RegMean) and len(adapters.paths) > 1:
        several = f"{len(adapters.paths)}: {listed(adapters.by_name)}"
        do = "take them one at a time, each with its own"
        raise UsageError(
            f"{method.coefficients.name}: coefficients belong to one adapter, found {several}; {do}"
        )
    batch = make_batch(base_path, adapters.paths, run.io, run.stated, run.architecture)
    mitigations = []
    for plan, given in zip(batch.plans, findings, strict=True):
        fitting = None
        if given is not None:
            fitting = fitting_findings(plan, given, detection)
            run.monitor.warn(given.warnings)
        if isinstance(method, RegMean):
            check_coefficients(plan, method.coefficients)
        if isinstance(method, NullSpace):
            run.monitor.warn(check_map(plan, method.map))
        mitigations.append(Mitigation(plan, method, detection, run.device, fitting))
    return mitigations


def load_given(findings: FindingsOrPath, adapters: AdapterPaths) -> list[Findings | None]:
    """Load the findings for each adapter; None for each if none are given.

    Raises
    ------
    UsageError
        If some are missing or have the wrong form.
    """
    if findings is None:
        return [None for _ in adapters.paths]
    if adapters.single:
        if isinstance(findings, Mapping):
            what = f"a dict of {len(findings)}"
            raise UsageError(
                f"findings: expected findings on one adapter, found {what}; give one of them"
            )
        return [findings if isinstance(findings, Findings) else load_findings(findings)]
    if isinstance(findings, Mapping):
        without = [name for name in adapters.by_name if name not in findings]
        if without:
            raise UsageError(f"findings: has none for adapter {without[0]!r}; run detect on it")
        return [findings[name] for name in adapters.by_name]
    if isinstance(findings, Findings) or not Path(findings).is_dir():
        where = "findings" if isinstance(findings, Findings) else findings
        raise UsageError(
            f"{where}: expected findings on several adapters: the directory that detect wrote for them"
        )
    return [load_findings(Path(findings) / f"{name}.safetensors") for name in adapters.by_name]


def check_coefficients(plan: Plan, coefficients: Coefficients) -> None:
    """Refuse coefficients that were fitted to another base or adapter, or not to all of its matrices.

    Raises
    ------
    MismatchError
        Names the one that differs, and how.
    UsageError
        If they are not valid coefficients; see `Coefficients.check`.
    """
    coefficients.check()
    name = coefficients.name
    identities = {"base": {**plan.base_identity}, "adapter": {**plan.adapter_identity}}
    for what, here in identities.items():
        fitted = coefficients.facts.get(what)
        if not isinstance(fitted, dict):
            why = f"do not say which {what} they were fitted to; make them with `streamer repair`"
            raise MismatchError(f"{name}: coefficients {why}")
        if fitted != here:
            do = f"give the {what} that `streamer repair` fitted them to"
            raise MismatchError(
                f"{name}: coefficients of another {what} ({difference(fitted, here)}); {do}"
            )
    check_counts(plan, coefficients)


def check_counts(plan: Plan, coefficients: Coefficients) -> None:
    """Refuse coefficients for other matrices than an adapter's, or of other shapes.

    Raises
    ------
    MismatchError
        States how many matrices they do not fit, and the first.
    """
    ranks = {
        t.tensor: (t.module.shape[1], t.module.factor_rank) if t.module.low_rank else None
        for t in plan.targets
    }
    shapes = {tensor: tuple(factor.shape) for tensor, factor in coefficients.matrices.items()}
    wrong = [
        tensor
        for tensor in {**ranks, **shapes}
        if tensor not in ranks or ranks[tensor] != shapes.get(tensor, ())
    ]
    if wrong:
        which = f"{len(wrong)} of the adapter's matrices, {wrong[0]!r} first"
        do = "fit them to this adapter with `streamer repair`"
        raise MismatchError(f"{coefficients.name}: coefficients do not fit {which}; {do}")


def check_map(plan: Plan, inputs: InputMap) -> list[str]:
    """Refuse a map of another base, and warn of matrices that it lacks, whose deltas stay.

    Raises
    ------
    MismatchError
        If it maps another base, or has none of the adapter's matrices.
    """
    refuse_other_base(inputs, inputs.facts["base"], {**plan.base_identity})
    return lacking_inputs(plan, inputs)


def refuse_other_base(inputs: InputMap, mapped: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a map of another base, by both identities."""
    if mapped != here:
        what = f"is a map of another base ({difference(mapped, here)})"
        raise MismatchError(f"{inputs.name}: {what}; make one of this base with `streamer map`")


def lacking_inputs(plan: Plan, inputs: InputMap) -> list[str]:
    """Warn of matrices whose inputs a map lacks; refuse the map if it lacks all."""
    lacks = [t.tensor for t in plan.targets if inputs.find(t.tensor, t.module.shape[1]) is None]
    if not lacks:
        return []
    names = listed(map(repr, lacks))
    if len(lacks) == len(plan.targets):
        raise MismatchError(
            f"{inputs.name}: has the inputs of none of the adapter's matrices, {names}"
        )
    return [
        f"the map has no inputs of {counted(len(lacks), 'matrix')}, {names}: what the adapter adds there stays"
    ]


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
