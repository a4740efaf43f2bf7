"""Offer verification of an output as a function of the library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from streamer.api.calls import call, explained
from streamer.events import Monitor
from streamer.options import VerifyOptions
from streamer.remote.inputs import Remote
from streamer.verification.verify import Verification, verify

if TYPE_CHECKING:
    from streamer.api.keywords import VerifyKeywords


class VerifyRequest(VerifyOptions):
    """A requested verification."""

    def run(self, monitor: Monitor) -> Verification:
        """Run the verification."""
        remote = Remote("cache", monitor=monitor)  # the verifying code reads only local files
        base = None if self.base is None else remote.path(self.base)
        adapter = None if self.adapter is None else remote.path(self.adapter)
        method_files = {"coefficients": self.coefficients, "map": self.map}
        return verify(self.output, (base, adapter), self.sample, monitor, method_files)


@explained(VerifyOptions)
def verify_output(
    output: str | Path,
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    **options: Unpack[VerifyKeywords],
) -> Verification:
    """Check an output against its record and, if its inputs are given, against a recomputation by independent code.

    Files are compared with the digests in ``streamer.json``. If base and adapter are given, a sample of matrices is recomputed in float64
    by numpy and scipy. With ``sample="all"``, every tensor is compared.

    Parameters
    ----------
    output
        Directory of a merged model or a mitigated adapter.
    base, adapter
        Inputs of the output; give both or neither.
    sample
        Number of matrices to recompute, spread over their kinds; the same output always gives the same sample. ``all`` recomputes every
        matrix and compares all other tensors byte by byte.
    coefficients
        File of the fit that made the output (method ``regmean``). By default, the file of the recorded name beside the output.
    map
        File of the map that made the output (method ``nullspace``), with the same default.

    Returns
    -------
    Verification
        What was compared, and which matrices could not be recomputed and why.

    Raises
    ------
    VerificationError
        If anything differs, or cannot be recomputed or compared as requested; its `verification` is the same object.
    StreamerError
        If the output has no record, or was made from other inputs (see `streamer.errors`).
    """
    return call(VerifyRequest(output=output, base=base, adapter=adapter, **options))
