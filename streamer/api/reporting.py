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
    """A requested report on coefficients; see `report_coefficients`."""

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
                f"{chosen.name}: holds new factors instead of coefficients of directions; fit coefficients with --grain direction"
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
    """Report how much coefficients keep of the intruders, and of the whole delta, for each matrix and in total.

    Each figure is a weighted mean of the coefficients of the delta's own singular directions. For the whole delta, the weight of direction
    i is its energy, ``s_i²``; for an intruder with the left singular vector u_j, it is the energy that the direction adds there,
    ``(s_i u_jᵀU_i)²``. If the fit removes mainly intruders, less is kept of them than of the whole.

    Parameters
    ----------
    findings
        Findings from `detect_intruder_dimensions`, or the path of their file.
    base, adapter
        Base and adapter of the findings and the coefficients.
    coefficients, keep
        Coefficients from `fit_coefficients`, or the path of their file, and the share of the set to use.

    Returns
    -------
    dict
        `Findings.record`, with ``coefficients`` in each matrix and in the totals.

    Raises
    ------
    MismatchError
        If findings or coefficients belong to another base or adapter.
    """
    request = CoefficientsRequest(findings, base, adapter, coefficients, keep, take(Settings, options))
    with watched(options) as monitor:
        return request.run(monitor)[1]
