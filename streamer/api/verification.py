"""Offer verification of an output as a function of the library."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Unpack

from streamer.api.keywords import WatchKeywords, explained, read_size, watched
from streamer.remote.inputs import Remote
from streamer.verification.result import Verification
from streamer.verification.verify import verify


@explained(WatchKeywords)
def verify_output(
    output: str | Path,
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    sample: int | Literal["all"] = 3,
    max_memory: int | str | None = None,
    coefficients: str | Path | None = None,
    map: str | Path | None = None,  # noqa: A002
    **options: Unpack[WatchKeywords],
) -> Verification:
    """Check an output against its record and, if its inputs are given, against a recomputation by independent code.

    Files are hashed, opened with the safetensors library and compared with ``streamer.json`` and the index; findings are compared
    with their own digest. If base and adapter are given, configs, copied files and the record's rows are compared with them, and a
    sample of matrices is recomputed in float64 by numpy and scipy. With ``sample="all"``, every tensor is compared.

    Parameters
    ----------
    output
        Directory of a merged model or a mitigated adapter, or a findings file.
    base, adapter
        Inputs of the output; give both or neither.
    sample
        Number of matrices to recompute, spread over their kinds; the same output always gives the same sample. ``all`` recomputes every
        matrix and compares all other tensors byte by byte.
    max_memory
        Limit in bytes, or as a size like ``"4G"``; matrices that need more memory are not recomputed.
    coefficients
        File of the fit that made the output, if it gave new factors (method ``regmean``); the output contains only their digest.
    map
        File of the map that made the output (method ``nullspace``).

    Returns
    -------
    Verification
        What was compared, and which matrices could not be recomputed and why.

    Raises
    ------
    VerificationError
        If anything differs; its `verification` is the same object, with the differences.
    StreamerError
        If the output has no record, or was made from other inputs (see `streamer.errors`).
    """
    with watched(options) as monitor:
        inputs = Remote("cache", monitor=monitor)  # the verifying code reads only local files
        base, adapter = (None if given is None else inputs.path(given) for given in (base, adapter))
        return verify(output, base, adapter, sample, read_size(max_memory), monitor, coefficients, map)
