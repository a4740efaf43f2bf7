"""Forecast what an evaluation and a fit take: the time of their passes by a short probe of this machine."""

from __future__ import annotations

import json
import time

import torch

from streamer.evaluation.evaluation import Evaluation
from streamer.evaluation.options import ProductDtype
from streamer.evaluation.prepare import Prepared
from streamer.evaluation.steps import MOST_PLACED
from streamer.events import Event
from streamer.fitting.costs import GRADIENT, expected_costs
from streamer.fitting.mapping import HEADER_BYTES, PreparedMap
from streamer.fitting.options import WEIGHTS
from streamer.fitting.prepare import PreparedFit
from streamer.forecast.forecast import Forecast, network_bytes
from streamer.linalg.allocation import CPU
from streamer.linalg.second_moments import MORE, ROUNDS
from streamer.linalg.torch_state import bfloat16_products, full_float32
from streamer.measuring.memory import TRANSFORMERS_BYTES, measured_bytes
from streamer.measuring.passes import checked_tokens
from streamer.measuring.statistics import MEASURES
from streamer.plan.batch import Batch
from streamer.plan.memory import resident_bytes
from streamer.streaming.values import Job

OVERHEAD = 1.3
"""Time of a pass over that of its products: attention, norms, the softmax, and reading the weights."""

START_SECONDS = 0.5
"""Time that a run takes before its first pass and after its last, beside what a dry run takes: the check of the logits, files."""

READ_SECONDS = 4e-4
"""Time that each module's run takes beside its products, in each pass: where a model is small, it is most of it."""

VALUE_BYTES, VARIANT_BYTES = 26, 8000
"""Bytes in JSON of a sequence's sum, at most, and of a variant's other figures, most of them counts of its divergences."""

SET_BYTES, TENSOR_BYTES = 2500, 120
"""Bytes of the figures of a set of coefficients in the file, at most, and of an array's entry in its header beside the matrix' name."""

RECORD_BYTES, PASS_BYTES = 300, 4000
"""Bytes of a record of the journal beside its gradient, and of the sums of a pass, about."""


def forecast_evaluation(prepared: Prepared, known: Evaluation | None) -> Forecast:
    """Forecast what an evaluation takes; time for products by a short probe, a detection that runs first not counted.

    Parameters
    ----------
    known
        What was measured before, which is not measured again.
    """
    monitor, size, passes = prepared.run.monitor, prepared.model.size, prepared.expected(known)
    monitor.emit(Event("probe", "a matrix product", 0, 1))
    pace = products_pace(size.hidden, min(size.widest, 4096), prepared.options.dtype)
    checked = checked_tokens(map(prepared.group, passes))
    runs = len(passes) + 2 * (checked > 0)
    products = sum(map(prepared.cost, passes)) + checked * sum(size.products.values())
    seconds = pass_seconds(products, pace, len(prepared.model.modules) * runs)
    monitor.emit(Event("probe", "", 1, 1))
    variants = len(prepared.options.variants) + MOST_PLACED + (0 if known is None else len(known.variants))
    sequences = sum(len(text.ids) for text in prepared.texts.values())
    writes = VARIANT_BYTES * (variants + 2) + VALUE_BYTES * (len(MEASURES) * variants + 1) * sequences
    writes += len(json.dumps(prepared.facts, indent=1))
    read = size.read * runs
    peak = measured_bytes(passes, prepared.texts, size, prepared.resident)
    return _forecast(prepared.model.job, peak, read, writes, writes, seconds)


def _forecast(job: Job, peak: int, read: int, writes: int, temporary: int, seconds: float) -> Forecast:
    """Put a forecast together; on a device is all but what stays between two steps, and its pace is not known."""
    network = network_bytes(job.plan, read)
    if job.device == CPU:
        return Forecast(peak, peak, read, network, writes, temporary, seconds)
    there = peak - TRANSFORMERS_BYTES - resident_bytes(Batch(job.plan.base, (job.plan,)))
    return Forecast(peak, peak, read, network, writes, temporary, None, device_memory_bytes=there)


def pass_seconds(products: int, pace: float, runs: int) -> float:
    """Forecast the time of passes.

    Parameters
    ----------
    products
        Multiplications in all of them.
    pace
        Seconds for one.
    runs
        How often a module runs in all of them.
    """
    # What this process has taken so far, the imports above all, the run takes as well.
    return time.process_time() + START_SECONDS + OVERHEAD * pace * products + READ_SECONDS * runs


def products_pace(inputs: int, outputs: int, dtype: ProductDtype) -> float:
    """Measure the seconds for a multiplication in a product of a few hundred rows."""
    x, w = torch.randn(512, max(1, inputs)), torch.randn(max(1, outputs), max(1, inputs))
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 0.5:
        start = time.perf_counter()
        with bfloat16_products() if dtype == "bf16" else full_float32():
            torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return best / (len(x) * w.numel())


def forecast_fit(prepared: PreparedFit) -> Forecast:
    """Forecast what a fit takes that does all that is expected of it; time for products by a short probe."""
    monitor, size, costs = prepared.run.monitor, prepared.model.size, expected_costs(prepared)
    monitor.emit(Event("probe", "a matrix product", 0, 1))
    pace = products_pace(size.hidden, min(size.widest, 4096), prepared.options.dtype)
    monitor.emit(Event("probe", "", 1, 1))
    peak = prepared.peak_bytes(costs.variants)
    checked = checked_tokens(prepared.groups)
    runs = (1 if prepared.by_inputs else GRADIENT) * len(costs.gradients) + len(costs.passes) + 2 * (checked > 0)
    read, products = size.read * runs, sum([*costs.gradients, *costs.passes, checked * sum(size.products.values())])
    shapes, sets = [target.module.shape for target in prepared.plan.targets], len(prepared.options.keep)
    names = sum(2 * (len(target.tensor) + TENSOR_BYTES) for target in prepared.plan.targets)
    facts = len(json.dumps(prepared.facts)) + SET_BYTES * sets
    journal = len(costs.passes) * (RECORD_BYTES + PASS_BYTES)
    if prepared.by_inputs:
        tokens = sum(len(ids) for text in prepared.texts.values() for ids in text.fitted.ids)
        # In float64, half as fast: moments, and a Cholesky factor for each weight. Matrices that share inputs are counted each.
        products += sum(2 * tokens * n * n + len(WEIGHTS) * n**3 // 3 for _, n in shapes)
        writes = 4 * sets * sum(t.module.factor_rank * t.module.shape[1] for t in prepared.plan.targets) + names + facts
    else:
        count = sum(map(len, prepared.parameters.singular_values.values()))
        writes = 8 * count * (1 + sets) + names + facts
        journal += len(costs.gradients) * (RECORD_BYTES + 8 * prepared.parameters.count)
    seconds = pass_seconds(products, pace, len(prepared.model.modules) * runs)
    return _forecast(prepared.model.job, peak, read, writes, journal + prepared.spool_bytes, seconds)


def forecast_map(prepared: PreparedMap) -> Forecast:
    """Forecast what a map takes; time for products by a short probe."""
    monitor, size, tokens = prepared.run.monitor, prepared.model.size, prepared.tokens
    monitor.emit(Event("probe", "a matrix product", 0, 1))
    pace = products_pace(size.hidden, min(size.widest, 4096), prepared.options.dtype)
    monitor.emit(Event("probe", "", 1, 1))
    own = [t for _, module, own in prepared.model.modules for t in own.values() if len(t.shape) > 1]
    # Matrices that share inputs are counted each; of a matrix that is no head's the smaller side may be that of its inputs.
    widths = [t.shape[-1] for t in own for _ in range(t.shape[0] if t.stacked else 1)]
    products = sum(map(prepared.cost, prepared.groups))
    products += sum(2 * (ROUNDS + 1) * tokens * n * (prepared.options.vectors + MORE) for n in widths)
    seconds = pass_seconds(products, pace, len(prepared.model.modules) * len(prepared.groups))
    writes = sum(2 * n * prepared.options.vectors + HEADER_BYTES for n in widths)
    spooled = 4 * tokens * (size.layer_width + 2 * size.hidden)
    read = size.read * len(prepared.groups)
    return _forecast(prepared.model.job, prepared.peak_bytes, read, writes, writes + spooled, seconds)
