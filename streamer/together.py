"""What a command takes for several adapters: what it takes for each, but that the base is read once for all."""

from __future__ import annotations

from collections.abc import Sequence

from streamer.apply import Sink
from streamer.forecast import Forecast
from streamer.pipeline import matrices_of
from streamer.plan import Plan


def together(forecasts: Sequence[Forecast], shared: int = 0) -> Forecast | None:
    """The forecast of all; None if there is nothing to do.

    The steps of different outputs take turns, and each forecast counts the tables of all adapters: so the memory is the largest.

    Parameters
    ----------
    shared
        Bytes that several of them count, beyond the first.
    """
    if not forecasts:
        return None
    seconds = [f.seconds for f in forecasts if f.seconds is not None]
    return Forecast(
        peak_memory_bytes=max(f.peak_memory_bytes for f in forecasts),
        escalated_memory_bytes=max(f.escalated_memory_bytes for f in forecasts),
        read_bytes=sum(f.read_bytes for f in forecasts) - shared,
        write_bytes=sum(f.write_bytes for f in forecasts),
        temporary_bytes=sum(f.temporary_bytes for f in forecasts),
        seconds=sum(seconds) if len(seconds) == len(forecasts) else None,
    )


def shared_by_detections(plans: Sequence[Plan]) -> int:
    """Bytes of the matrices that several plans change, for each plan but the first."""
    uses = matrices_of(plans)
    return sum(plans[i].weights[target.tensor].nbytes for same in uses for i, target in same[1:])


def shared_by_merges(sinks: Sequence[Sink]) -> int:
    """Bytes of the base's files, for each output but the first, and what detection shares."""
    base = sum(file.header.file_bytes for sink in sinks[1:] for file in sink.job.plan.base.files.values())
    return base + shared_by_detections([sink.job.plan for sink in sinks if sink.job.detects])
