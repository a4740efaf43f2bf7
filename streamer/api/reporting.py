"""Offer reports on coefficients as a function of the library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from streamer.adapters.stated import LoraBLayout, Stated
from streamer.api.keywords import read_coefficients
from streamer.detection.findings import Findings, load_findings
from streamer.detection.findings_records import FindingsRecord
from streamer.events import Monitor, OnEvent, warn
from streamer.methods.coefficients import Coefficients
from streamer.output.intruder_coefficients import findings_means, with_means
from streamer.plan.plan import make_plan
from streamer.remote.inputs import Remote, RemoteMode
from streamer.storage.tensor_file import IOMode


def report_coefficients(
    findings: Findings | str | Path,
    base: str | Path,
    adapter: str | Path,
    coefficients: Coefficients | str | Path,
    *,
    keep: float | None = None,
    io: IOMode = "mmap",
    base_is_residual: bool = False,
    lora_b_layout: LoraBLayout | None = None,
    ignore_keys: Sequence[str] = (),
    architecture: str | None = None,
    remote: RemoteMode | None = None,
    on_event: OnEvent | None = None,
    monitor: Monitor | None = None,
) -> FindingsRecord:
    """Say what coefficients leave of the intruders, and of the whole delta, for each matrix and in all.

    Each is a mean of the coefficients of the delta's own singular directions. A direction counts by its energy, ``s_i²``, and in an
    intruder by the energy that it puts there, ``(s_i u_jᵀU_i)²``, where u_j is the intruder's left singular vector. Where the fit takes
    intruders for what is to go, less is left of them than of the whole.

    Parameters
    ----------
    findings
        From `detect_intruder_dimensions`, or the path of their file.
    base, adapter
        Those that findings and coefficients are of.
    coefficients, keep
        From `fit_coefficients`, or the path of their file, and which set of them.
    io, base_is_residual, lora_b_layout, ignore_keys, architecture, remote
        How tensors are read, what the base is, its class, and how inputs at addresses are read, as `detect_intruder_dimensions` has them.
    on_event
        Called with an `Event` for each warning.
    monitor
        In place of `on_event`, a `Monitor`.

    Returns
    -------
    dict
        `Findings.record`, with ``coefficients`` in each of its matrices and in its totals.

    Raises
    ------
    MismatchError
        If findings or coefficients are of another base or adapter.
    """
    monitor = monitor or Monitor(on_event or warn)
    found = findings if isinstance(findings, Findings) else load_findings(findings)
    chosen = read_coefficients(coefficients).select(keep)
    base, adapter = Remote(remote, monitor=monitor).pair(base, adapter)
    plan = make_plan(base, adapter, io, Stated(base_is_residual, lora_b_layout, ignore_keys), architecture)
    monitor.warn(plan.warnings)
    return with_means(found.record(), chosen, findings_means(plan, found, chosen))
