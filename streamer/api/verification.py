"""Offer verification of an output as a function of the library."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Unpack

from streamer.api.keywords import WatchKeywords, explained, read_size, watched
from streamer.remote.inputs import Remote
from streamer.verification.result import Verification
from streamer.verification.run import verify


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
    """Compare an output with its record and, given its inputs, with what they give, by other code than wrote it.

    Files are hashed, opened with the safetensors library and compared with ``streamer.json`` and the index; findings are compared
    with the digest that they hold. Given base and adapter, configs, copied files and the record's rows are compared with them, and a
    sample of matrices is recomputed in float64 by numpy and scipy; with ``sample="all"`` every tensor is compared.

    Parameters
    ----------
    output
        Directory of a merged model or a mitigated adapter, or a findings file.
    base, adapter
        What it was made from; both, or neither.
    sample
        How many matrices to recompute, spread over their kinds, the same of the same output; ``all``: every one of them, and all other
        tensors byte by byte.
    max_memory
        Matrices that take more memory, in bytes or as a size like ``"4G"``, are not recomputed.
    coefficients
        File of the fit that it was made with, if that gave new factors (method ``regmean``): the output has their digest alone.
    map
        File of the map that it was made with (method ``nullspace``).

    Returns
    -------
    Verification
        What was compared, and which matrices could not be recomputed, and why.

    Raises
    ------
    VerificationError
        If anything differs: its `verification` has the same object, with the differences.
    StreamerError
        If the output has no record, or the inputs are others than it was made from (see `streamer.errors`).
    """
    with watched(options) as monitor:
        inputs = Remote("cache", monitor=monitor)  # it reads files, by code that knows no addresses
        base, adapter = (None if given is None else inputs.path(given) for given in (base, adapter))
        return verify(output, base, adapter, sample, read_size(max_memory), monitor, coefficients, map)
