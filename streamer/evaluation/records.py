"""Check whether an evaluation's file is complete, was begun, or lacks variants."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from streamer.detection.detection_memory import detection_estimates
from streamer.evaluation.evaluation import Evaluation, load_evaluation
from streamer.evaluation.prepare import Prepared
from streamer.measuring.identity import differences, with_digest
from streamer.measuring.result_file import ResultFile, State, of_others
from streamer.measuring.statistics import SINCE
from streamer.measuring.variants import BASE_ROW
from streamer.plan.memory_estimate import check_budget
from streamer.storage.output_checks import is_taken
from streamer.units import listed

ONE = "an evaluation"


def result_file(prepared: Prepared, output: Path) -> ResultFile:
    """Describe the file of an evaluation."""
    # The journal does not contain what earlier runs measured, so it must belong to this version of their file.
    earlier = hashlib.sha256(output.read_bytes()).hexdigest() if is_taken(output) and output.is_file() else ""
    bits = f"{'' if prepared.findings is None else prepared.findings.digest()} {earlier}".strip()
    o, memory = prepared.options, prepared.detection.max_memory
    variants = [[v.name, v.mitigation and v.mitigation.as_dict()] for v in o.variants]
    facts = with_digest(prepared.facts, variants=variants, max_memory=memory)
    return ResultFile(output, ONE, "this very evaluation", "evaluation.json", prepared.plan, prepared.run, facts,
                      lambda path: not prepared.expected(_load(prepared, path)), bits)  # fmt: skip


def measured_before(prepared: Prepared, output: Path) -> Evaluation | None:
    """Load the evaluation to which this run adds variants; None if the file is new or will be replaced."""
    return _load(prepared, output) if is_taken(output) and not prepared.run.overwrite else None


def _load(prepared: Prepared, path: Path) -> Evaluation:
    """Load an evaluation; refuse it if its variants cannot be compared with this run's variants."""
    standing = load_evaluation(path)
    differing = differences(prepared.facts, standing.facts)
    if lacking := [name for name in SINCE if np.isnan(getattr(standing.task, name)[BASE_ROW]).any()]:
        differing.append(f"no {listed(lacking)}, as of an earlier version")
    if differing:
        raise of_others(path, ONE, differing)
    return standing


def inspect(prepared: Prepared, output: Path) -> State:
    """Check, without writing, that an evaluation can be written to a file, and whether it is complete there or was begun."""
    plan, file = prepared.plan, result_file(prepared, output)
    file.check_path()
    prepared.passes(2)  # raises if the budget does not hold one sequence
    if prepared.needs_findings and prepared.findings is None:
        check_budget(detection_estimates(plan, prepared.detection, prepared.resident), prepared.detection.max_memory)
    return file.state()
