"""What memory a run takes, from headers alone, so that `--max-memory` is kept or refused before anything is done.

Counted is anonymous memory of the whole process, an upper estimate: what the interpreter and torch take, the tables of all tensors, and
the largest of the steps, of which one is under way at a time. Mapped files are not counted: the system drops their pages when it must.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from streamer.bases.weight import DECODED_BYTES, Coded, Weight
from streamer.dora import dora_bytes
from streamer.errors import UsageError
from streamer.intruders import PROCESS_BYTES, DetectionOptions
from streamer.merging import BLOCK_BYTES
from streamer.methods import METHODS
from streamer.modules import LoraModule, MethodModule, Module
from streamer.plan import Plan
from streamer.solvers import working_bytes
from streamer.targets import Target

TENSOR_BYTES = 1500
"""Memory of a tensor's entries in the plan. Measured: 15,360 modules of three tensors each (base, lora_A, lora_B) took 4.2 kB each."""

ADAPTER_BYTES = 100_000
"""Memory of an adapter's plan beside that of its tensors. Measured with configs alone: 12 kB."""

OUTPUT_BYTES = 1000
"""Memory of a tensor of a merged model, in its plan and header. Measured: 24 models of 6,000 tensors took 0.7 kB each."""

MATRIX_BYTES = 20_000
"""Memory of a matrix' findings and figures, while they are made and written. Measured with 3,840 matrices: 16 kB each."""

THIN = 48
"""Bytes for each row, column and rank of a mitigated delta: its factors in float64, those that it was made from, and their thin QRs."""

PROJECTED = 80
"""The same where it is also projected back, for which the singular vectors are formed."""

DECODED = 8
"""Rows in float32 that decoding a few rows takes at most, of which the rows themselves are one: codes and scales spread out to int32."""


@dataclass(frozen=True)
class Need:
    """A step, by the tensor that it is about, and the peak memory of the process while it runs."""

    tensor: str
    shape: tuple[int, ...]
    nbytes: int


def check_budget(needs: Iterable[Need], max_memory: int | None) -> None:
    """Refuse a budget that some step does not fit.

    Raises
    ------
    UsageError
        It names the step that needs most, and the smallest budget that would do.
    """
    if max_memory is None:
        return
    most = max(needs, key=lambda need: need.nbytes)
    if most.nbytes > max_memory:
        raise UsageError(
            f"max_memory: {max_memory >> 20}M is not enough for tensor {most.tensor!r} "
            f"({'x'.join(map(str, most.shape))}); it takes {-(-most.nbytes >> 20)}M"
        )


def resident_bytes(plan: Plan) -> int:
    """Memory between any two steps, the tables of all adapters included."""
    company = plan.company
    tables = TENSOR_BYTES * (len(plan.base.weight_map) + company.parts) + ADAPTER_BYTES * company.adapters
    return PROCESS_BYTES + tables + OUTPUT_BYTES * company.outputs + MATRIX_BYTES * company.matrices + company.kept


def detection_bytes(plan: Plan, target: Target, options: DetectionOptions) -> dict[str, int]:
    """Peak memory of detection in one matrix, by each way that the options leave; see `working_bytes`."""
    weight, module = plan.weights[target.tensor], target.module
    rank = factor_rank(module) if module.low_rank else None
    ways = working_bytes(module.shape, options.directions(module.shape), rank, weight.compute.itemsize)
    if options.solver == "dense":
        ways = {"dense": ways["dense"]}
    read = 2 * weight.held_bytes  # the tensor's own bytes, and those of the next one
    always = read if isinstance(weight, Coded) else 0
    resident, making = resident_bytes(plan) + _factor_bytes(plan, target), _making_bytes(plan, target)
    return {way: resident + max(size, making) + (always if way == "blocks" else read) for way, size in ways.items()}


def kept_bytes(plan: Plan, target: Target, options: DetectionOptions) -> int:
    """Memory of a matrix' findings that are not written: the vectors, every direction an intruder."""
    m, n = target.module.shape
    return options.directions((m, n)) * (m + n) * plan.weights[target.tensor].compute.itemsize


def best_way(plan: Plan, target: Target, options: DetectionOptions) -> str:
    """The first of ``dense``, ``whole`` and ``blocks`` that fits the memory allowed."""
    if options.max_memory is None:
        return "dense"
    ways = detection_bytes(plan, target, options)
    return next(way for way, size in ways.items() if size <= options.max_memory)


def detection_needs(plan: Plan, options: DetectionOptions) -> Iterator[Need]:
    """The least that detection in each matrix takes."""
    return (Need(t.tensor, t.module.shape, min(detection_bytes(plan, t, options).values())) for t in plan.targets)


def mitigation_bytes(plan: Plan, target: Target, intruders: int, projected: bool = False) -> int:
    """Memory for Δ, Δ' and the norms of one matrix, beside what is resident.

    Parameters
    ----------
    intruders
        How many of them Δ' takes up.
    projected
        Whether Δ' is projected back onto the adapter's rank.
    """
    module = target.module
    m, n = module.shape
    if module.low_rank:
        size = (PROJECTED if projected else THIN) * (m + n) * (factor_rank(module) + intruders)
    else:
        # Δ, Δ', and one more where Δ is scaled.
        size = max(_making_bytes(plan, target), 3 * plan.weights[target.tensor].compute.itemsize * m * n)
    return size + _factor_bytes(plan, target)


def rows_bytes(weight: Weight) -> int:
    """Memory for making a weight anew a few rows at a time: what is read or decoded, summed, and rounded twice by turns."""
    m, n = weight.matrix
    row = max(1, n * weight.compute.itemsize)
    block = max(row, min(m * row, max(BLOCK_BYTES, DECODED_BYTES)))
    return (3 + (DECODED if isinstance(weight, Coded) else 1)) * block + weight.held_bytes


def _making_bytes(plan: Plan, target: Target) -> int:
    """Memory at its peak while a delta that is not of low rank is computed: W0, Δ, and what is between them."""
    module = target.module
    if module.low_rank:
        return 0
    itemsize = plan.weights[target.tensor].compute.itemsize
    if isinstance(module, LoraModule):
        return dora_bytes(module.shape, itemsize)
    return METHODS[module.method].matrices * itemsize * math.prod(module.shape)


def factor_rank(module: Module) -> int:
    """Columns of a module's factors, where its delta is of low rank."""
    if isinstance(module, MethodModule):
        return max(min(shape) for shape in module.shapes.values() if len(shape) == 2)
    return module.rank


def _factor_bytes(plan: Plan, target: Target) -> int:
    """Memory for a module's tensors: as they stand where they are not mapped, and in the computing dtype where `THIN` has them not."""
    module, itemsize = target.module, plan.weights[target.tensor].compute.itemsize
    names = module.tensors.values() if isinstance(module, MethodModule) else (module.a, module.b)
    parts = [plan.adapter.parts[name] for name in names]
    held = sum(part.info.nbytes for part in parts if part.file.io == "pread")
    if isinstance(module, LoraModule):
        return held
    return held + sum(math.prod(part.info.shape) * max(4, itemsize) for part in parts)
