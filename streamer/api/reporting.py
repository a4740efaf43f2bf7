"""Offer reports on coefficients as a function of the library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from streamer.api.keywords import ReadKeywords, explained, watched
from streamer.api.options import Settings, read_coefficients, take
from streamer.detection.findings import Findings, load_findings
from streamer.detection.findings_records import FindingsRecord
from streamer.errors import UsageError
from streamer.events import Monitor
from streamer.methods.coefficient_set import CoefficientSet
from streamer.methods.coefficients import Coefficients
from streamer.output.intruder_coefficients import findings_means, with_means
from streamer.plan.plan import make_plan


@dataclass(frozen=True)
class CoefficientsRequest:
    """A report on coefficients as it is asked for; see `report_coefficients`."""

    findings: Findings | str | Path
    base: str | Path
    adapter: str | Path
    coefficients: Coefficients | str | Path
    keep: float | None
    settings: Settings

    def run(self, monitor: Monitor) -> tuple[Findings, FindingsRecord]:
        """Return the findings, and their record with the means of the coefficients."""
        settings = self.settings
        found = self.findings if isinstance(self.findings, Findings) else load_findings(self.findings)
        chosen = read_coefficients(self.coefficients).select(self.keep)
        if not isinstance(chosen, CoefficientSet):
            raise UsageError(
                f"{chosen.name}: holds new factors, which leave no share of each direction; fit coefficients with --grain direction"
            )
        base, adapter = settings.located(monitor).pair(self.base, self.adapter)
        plan = make_plan(base, adapter, settings.io, settings.stated, settings.architecture)
        monitor.warn(plan.warnings)
        return found, with_means(found.record(), chosen, findings_means(plan, found, chosen))


@explained(ReadKeywords, Settings)
def report_coefficients(
    findings: Findings | str | Path,
    base: str | Path,
    adapter: str | Path,
    coefficients: Coefficients | str | Path,
    *,
    keep: float | None = None,
    **options: Unpack[ReadKeywords],
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

    Returns
    -------
    dict
        `Findings.record`, with ``coefficients`` in each of its matrices and in its totals.

    Raises
    ------
    MismatchError
        If findings or coefficients are of another base or adapter.
    """
    request = CoefficientsRequest(findings, base, adapter, coefficients, keep, take(Settings, options))
    with watched(options) as monitor:
        return request.run(monitor)[1]
