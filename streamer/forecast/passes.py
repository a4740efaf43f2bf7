"""Forecast what an evaluation and a fit need: the time of their passes comes from a short probe of this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable

from streamer.evaluation.evaluation import Evaluation
from streamer.evaluation.prepare import Prepared
from streamer.evaluation.steps import MOST_PLACED
from streamer.events import Event
from streamer.fitting.groups import expected_costs
from streamer.fitting.mapping import HEADER_BYTES, PreparedMap
from streamer.fitting.prepare import PreparedFit
from streamer.forecast.forecast import Forecast, network_bytes
from streamer.forecast.probe import measure_pace
from streamer.linalg.allocation import CPU
from streamer.measuring.pass_memory import TRANSFORMERS_BYTES, measured_bytes
from streamer.measuring.passes import checked_tokens
from streamer.measuring.sequences import TextSequences
from streamer.measuring.statistics import MEASURES
from streamer.plan.batch import AdapterBatch
from streamer.plan.memory_estimate import resident_bytes
from streamer.streaming.values import VariantSet

START_SECONDS = 0.5
"""Time before a run's first pass and after its last, in addition to a dry run's: the check of the logits, files."""

VALUE_BYTES, VARIANT_BYTES = 26, 8000
"""Largest JSON size in bytes of a sequence's sum, and of a variant's other figures, most of which count its divergences."""

SET_BYTES, TENSOR_BYTES = 2500, 120
"""Largest size in bytes of a set's figures in the file, and of an array's header entry without the matrix's name."""

RECORD_BYTES, PASS_BYTES = 300, 4000
"""Approximate size in bytes of a journal record, and of a pass' sums."""


def forecast_evaluation(prepared: Prepared, known: Evaluation | None) -> Forecast:
    """Forecast what an evaluation needs; a short probe times the products, and a detection that runs first is not included.

    Parameters
    ----------
    known
        Earlier results, which are not measured again.
    """
    size, passes = prepared.model.size, prepared.expected(known)
    checked = checked_tokens(map(prepared.group, passes))
    runs = len(passes) + 2 * (checked > 0)
    products = [*map(prepared.cost, passes), checked * sum(size.products.values())]
    seconds = _seconds(prepared, prepared.texts.values(), products)
    variants = len(prepared.options.variants) + MOST_PLACED + (0 if known is None else len(known.variants))
    sequences = sum(len(text.ids) for text in prepared.texts.values())
    writes = VARIANT_BYTES * (variants + 2) + VALUE_BYTES * (len(MEASURES) * variants + 1) * sequences
    writes += len(json.dumps(prepared.facts, indent=1))
    read = size.read * runs
    peak = measured_bytes(passes, prepared.texts, size, prepared.resident)
    return _forecast(prepared.model.job, peak, read, writes, writes, seconds)


def _forecast(job: VariantSet, peak: int, read: int, writes: int, temporary: int, seconds: float | None) -> Forecast:
    """Assemble a forecast; a device holds everything except the memory between steps, and its time is not estimated."""
    network = network_bytes(job.plan, read)
    if job.device == CPU:
        return Forecast(peak, peak, read, network, writes, temporary, seconds)
    there = peak - TRANSFORMERS_BYTES - resident_bytes(AdapterBatch(job.plan.base, (job.plan,)))
    return Forecast(peak, peak, read, network, writes, temporary, None, device_memory_bytes=there)


def _seconds(
    prepared: Prepared | PreparedFit | PreparedMap, texts: Iterable[TextSequences], costs: Iterable[int]
) -> float | None:
    """Forecast the time of passes from a probe of the model; None on a device, or if the weights would cross the network.

    Parameters
    ----------
    costs
        Numbers of multiplications; see `pass_cost`.
    """
    job, monitor = prepared.model.job, prepared.run.monitor
    if job.device != CPU or job.plan.base.remote:
        return None
    monitor.emit(Event("probe", "a layer of the model", 0, 1))
    seconds = measure_pace(job, texts) * sum(costs)
    monitor.emit(Event("probe", "", 1, 1))
    # The run needs the time that this process has used so far, mostly for imports, as well.
    return time.process_time() + START_SECONDS + seconds


def forecast_fit(prepared: PreparedFit) -> Forecast:
    """Forecast what a fit needs if it does all the expected work; a short probe times the products."""
    size, costs = prepared.model.size, expected_costs(prepared)
    peak = prepared.peak_bytes(costs.variants)
    checked = checked_tokens(prepared.groups)
    runs = len(costs.groups) + len(costs.passes) + 2 * (checked > 0)
    read, products = size.read * runs, [*costs.groups, *costs.passes, checked * sum(size.products.values())]
    sets = len(prepared.options.keep)
    names = sum(2 * (len(target.tensor) + TENSOR_BYTES) for target in prepared.plan.targets)
    facts = len(json.dumps(prepared.facts)) + SET_BYTES * sets
    journal = len(costs.passes) * (RECORD_BYTES + PASS_BYTES)
    writes = 4 * sets * prepared.right_values + names + facts
    seconds = _seconds(prepared, (text.whole for text in prepared.texts.values()), products)
    return _forecast(prepared.model.job, peak, read, writes, journal + prepared.spool_bytes, seconds)


def forecast_map(prepared: PreparedMap) -> Forecast:
    """Forecast what a map needs; a short probe times the products."""
    size, tokens = prepared.model.size, prepared.tokens
    seconds = _seconds(prepared, [prepared.text], map(prepared.cost, prepared.groups))
    writes = sum(2 * n * prepared.options.vectors + HEADER_BYTES for n in prepared.widths)
    spooled = 4 * tokens * (size.layer_width + 2 * size.hidden)
    read = size.read * len(prepared.groups)
    return _forecast(prepared.model.job, prepared.peak_bytes, read, writes, writes + spooled, seconds)
