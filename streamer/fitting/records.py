"""Find out whether a fit's file exists or was begun, and name the results of its chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from streamer.fitting.prepare import PreparedFit
from streamer.measuring.result_file import ResultFile, State, stands
from streamer.methods.coefficient_set import Floats
from streamer.methods.coefficients import load_coefficients
from streamer.methods.coefficients_file import FIT
from streamer.plan.memory_estimate import check_budget


def result_file(prepared: PreparedFit, output: Path) -> ResultFile:
    """Describe the coefficients file that a fit writes."""
    return ResultFile(output, FIT.what, "this very fit", "coefficients.safetensors", prepared.plan, prepared.run, prepared.facts,
                      lambda path: stands(path, FIT, prepared.facts, load_coefficients))  # fmt: skip


def inspect(prepared: PreparedFit, output: Path) -> State:
    """Check, without writing, whether a fit can be written to a file, and whether the file exists or was begun."""
    file = result_file(prepared, output)
    file.check_path()
    check_budget([prepared.least], prepared.max_memory, ", and less with fewer --sequences")
    return file.state()


def key(request: int, chunk: int, asked: Iterable[Floats]) -> str:
    """Name the result of a request's chunk: by their numbers and a digest of the parameters in question."""
    digest = hashlib.sha256()
    for theta in asked:
        digest.update(theta.astype("<f8").tobytes())
    return f"{request}.{chunk} {digest.hexdigest()[:32]}"
