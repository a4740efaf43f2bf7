"""Advise what would be better than what a run was asked for, known when it is done; a line each."""

from __future__ import annotations

from collections.abc import Sequence

from streamer.output.lora_writer import refusal
from streamer.output.output_spec import OutputSpec
from streamer.output.records import MitigatedMatrix

MOST_TRUNCATED = 0.01
"""Relative norm that a projection onto an adapter's rank may drop of a matrix before anything is said."""


def advise(spec: OutputSpec, matrices: Sequence[MitigatedMatrix]) -> list[str]:
    """Say how nothing would be dropped, where the rank of a mitigated adapter drops more than a percent of some matrix.

    The paper's method adds a direction of its own for each intruder that it scales, so that a delta of rank r with q of them fits a
    rank of r + q. The method ``project`` stays within the adapter's own columns.
    """
    error = max((m["dropped"] for m in matrices), default=0.0)
    if error <= MOST_TRUNCATED:
        return []
    job = spec.job
    says = f"back-projection dropped up to {100 * error:.1f} % of a matrix's mitigated delta; nothing is dropped"
    if not all(t.module.low_rank for t in job.plan.targets):
        return [f"{says} by `streamer merge`, and less with a larger --to-lora"]
    q = {m["tensor"]: len(m["intruders"]) if job.options.method == "paper" else 0 for m in matrices}
    rank = max(t.module.rank + q.get(t.tensor, 0) for t in job.plan.targets)
    ways = ["with `--method project`"] if job.options.method == "paper" and spec.to_lora is None else []
    if not refusal(job):
        ways.append(f"with `--to-lora {rank}`")
    return [f"{says} {' or '.join(ways or ['by `streamer merge`'])}"]
