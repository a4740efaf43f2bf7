"""Warn about loss when a mitigated delta is projected onto a rank that is too small for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from streamer.output.lora_writer import refusal
from streamer.output.output_spec import OutputSpec
from streamer.output.records import MitigatedMatrix

MOST_LOST = 0.01
"""Largest share of a mitigated delta's Frobenius norm that may be lost without a warning."""


def truncation_warnings(matrices: Sequence[MitigatedMatrix], remedy: Callable[[], str]) -> list[str]:
    """Report how many matrices lose more than `MOST_LOST`, and which loses most; return an empty list if none does.

    Parameters
    ----------
    remedy
        Describes what to do instead.
    """
    lost = [m for m in matrices if m["dropped"] > MOST_LOST]
    if not lost:
        return []
    worst = max(lost, key=lambda m: m["dropped"])
    return [
        f"lost in projection: more than {100 * MOST_LOST:g} % of the delta in {len(lost)} of "
        f"{len(matrices)} matrices, most in {worst['tensor']!r} ({100 * worst['dropped']:.2f} %); {remedy()}"
    ]


def output_warnings(spec: OutputSpec, matrices: Sequence[MitigatedMatrix]) -> list[str]:
    """Warn about losses of an output on disk.

    The paper's method adds a direction for each intruder that it scales, so a delta of rank r with q intruders needs a rank of r + q.
    The method ``project`` stays within the adapter's own columns.
    """
    job = spec.job
    if isinstance(spec.to_lora, float):  # the requested share of the energy states what may be lost
        return []

    def remedy() -> str:
        if not all(t.module.low_rank for t in job.plan.targets):
            return "a larger --to-lora loses less, and `streamer merge` nothing"
        paper = not job.method.keeps_rank
        q = {m["tensor"]: len(m["intruders"]) if paper else 0 for m in matrices}
        rank = max(t.module.rank + q.get(t.tensor, 0) for t in job.plan.targets)
        ways = ["`--method project`"] if paper and spec.to_lora is None else []
        if not refusal(job):
            ways.append(f"`--to-lora {rank}`")
        return f"{', '.join(ways)} or `streamer merge` loses nothing".removeprefix(" or ")

    return truncation_warnings(matrices, remedy)
