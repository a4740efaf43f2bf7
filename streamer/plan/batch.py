"""Group plans on one base that are executed together.

Estimate a run's memory from headers alone: the part that remains between two steps, and a module's tensors.

The estimate is an upper bound of anonymous memory: the interpreter and torch, the tables of all tensors, and the largest step, as one step
runs at a time. Mapped files do not count: the system drops their pages when it needs memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from streamer.adapters.adapter_config import NOTHING_STATED, Stated
from streamer.errors import UsageError
from streamer.plan.plan import Plan, file_order, make_plans
from streamer.plan.targets import Target
from streamer.storage.checkpoint import Checkpoint
from streamer.storage.remote_source import AHEAD_BYTES
from streamer.storage.tensor_file import IOMode


class Assignment(NamedTuple):
    """A matrix that one plan of a batch changes: the plan's index and its target."""

    plan: int
    target: Target


class SharedGroup(tuple[Assignment, ...]):
    """Assignments, at least one, whose matrices are the same bytes of the base and are read once for all."""

    __slots__ = ()


@dataclass(frozen=True)
class AdapterBatch:
    """Plans of one or more adapters on one base; each tensor of the base is read once for all of them.

    Attributes
    ----------
    base
        The base, opened once.
    plans
        One plan for each adapter, in the order given.
    """

    base: Checkpoint
    plans: tuple[Plan, ...]

    @property
    def adapter_tensor_count(self) -> int:
        """Count the tensors of all adapters."""
        return sum(len(plan.adapter.tensors) for plan in self.plans)

    @property
    def remote_count(self) -> int:
        """Count the models whose tensors are read from a URL by ranges."""
        models = [tuple(self.base.files.values()), *(plan.adapter.files for plan in self.plans)]
        return sum(any(file.remote for file in files) for files in models)

    @property
    def matrix_count(self) -> int:
        """Count the matrices that the adapters change; a matrix that several adapters change counts for each of them."""
        return sum(len(plan.targets) for plan in self.plans)

    @property
    def warnings(self) -> list[str]:
        """Collect the warnings of all plans."""
        return [warning for plan in self.plans for warning in plan.warnings]

    def matrices(self, wanted: Callable[[Assignment], bool] = lambda _: True) -> list[SharedGroup]:
        """List the wanted matrices in the base's file order.

        Two adapters on ``q_proj`` form one group of two. An adapter that saves its own ``q_proj``, to which its delta is added, forms a
        group of its own.
        """
        found: dict[tuple[Any, ...], list[Assignment]] = {}
        for i, plan in enumerate(self.plans):
            order = file_order(plan.weights)
            for assignment in filter(wanted, (Assignment(i, target) for target in plan.targets)):
                target = assignment.target
                tensors = plan.weights[target.tensor].tensors.values()
                where = tuple((str(stored.file.path), stored.info.start, stored.info.end) for stored in tensors)
                found.setdefault((order(target), target.tensor, where), []).append(assignment)
        return [SharedGroup(found[key]) for key in sorted(found, key=lambda key: key[0])]


def make_batch(base_path: str | Path, adapters: Sequence[str | Path], io: IOMode = "mmap", stated: Stated = NOTHING_STATED,
               architecture: str | None = None) -> AdapterBatch:  # fmt: skip
    """Open a base once and match each adapter, at least one, with it; see `make_plans`."""
    plans = make_plans(base_path, adapters, io, stated, architecture)
    return AdapterBatch(plans[0].base, plans)


PROCESS_BYTES = (350 if torch.version.cuda or torch.version.hip else 200) << 20
"""Anonymous memory of a process that has only imported torch and read an adapter.

Measured: 150 MB with torch for the CPU, 150 MB more with torch for CUDA, and up to 50 MB for modules that are imported later; a test
measures the installed build. The running process is not measured: a Python program may hold data of its own, which the budget excludes.
"""

TENSOR_BYTES = 1500
"""Memory of a tensor's entries in the plan. Measured: 15,360 modules of three tensors each (base, lora_A, lora_B) took 4.2 kB each."""

ADAPTER_BYTES = 100_000
"""Memory of an adapter's plan in addition to its tensors' entries. Measured with configs alone: 12 kB."""

OUTPUT_BYTES = 1000
"""Memory of a merged model's tensor in the plan and header. Measured: 24 models of 6,000 tensors took 0.7 kB each."""

MATRIX_BYTES = 20_000
"""Memory of a matrix's findings and figures while they are computed and written. Measured with 3,840 matrices: 16 kB each."""


@dataclass(frozen=True)
class MemoryEstimate:
    """A step, named by its tensor or, without a shape, described in words; and the peak memory of the process during that step."""

    tensor: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def what(self) -> str:
        """Describe the step."""
        return f"tensor {self.tensor!r} ({'x'.join(map(str, self.shape))})" if self.shape else self.tensor


def check_budget(needs: Iterable[MemoryEstimate], max_memory: int | None, cure: str = "") -> None:
    """Refuse a budget that is too small for some step.

    Parameters
    ----------
    cure
        End of the message, which says what needs less.

    Raises
    ------
    UsageError
        Names the step that needs most, and the smallest sufficient budget.
    """
    if max_memory is None:
        return
    most = max(needs, key=lambda need: need.nbytes)
    if most.nbytes > max_memory:
        raise UsageError(
            f"max_memory: {max_memory >> 20}M is not enough for {most.what}; it needs {-(-most.nbytes >> 20)}M{cure}"
        )


def resident_bytes(batch: AdapterBatch, output_tensors: int = 0) -> int:
    """Estimate the memory used between any two steps, including the tables of all adapters.

    Parameters
    ----------
    output_tensors
        Number of tensors to write, over all merged models.
    """
    tables = TENSOR_BYTES * (len(batch.base.weight_map) + batch.adapter_tensor_count) + ADAPTER_BYTES * len(batch.plans)
    ahead = AHEAD_BYTES * batch.remote_count
    return PROCESS_BYTES + ahead + tables + OUTPUT_BYTES * output_tensors + MATRIX_BYTES * batch.matrix_count


def factor_bytes(plan: Plan, target: Target, itemsize: int) -> int:
    """Return the memory of a module's tensors: stored bytes if not mapped, plus copies that a step keeps in the computing dtype."""
    tensors = [plan.adapter.tensors[name] for name in target.module.tensor_names]
    resident = sum(stored.info.nbytes for stored in tensors if stored.file.io == "pread")
    return resident + target.module.copied_bytes(itemsize)
