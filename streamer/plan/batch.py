"""Group plans on one base that are executed together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from streamer.adapters.adapter_config import NOTHING_STATED, Stated
from streamer.plan.plan import Plan, file_order, make_plans
from streamer.plan.targets import Target
from streamer.storage.checkpoint import Checkpoint
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
