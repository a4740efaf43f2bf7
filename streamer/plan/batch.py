"""Plans on one base that are carried out together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamer.adapters.stated import NOTHING_STATED, Stated
from streamer.plan.plan import Plan, make_plans
from streamer.plan.targets import Target
from streamer.storage.checkpoint import Checkpoint
from streamer.storage.tensor_file import IOMode

Use = tuple[int, Target]
"""A target, with the number of its plan in the batch."""


@dataclass(frozen=True)
class Batch:
    """Plans of one or several adapters on one base, each tensor of which is read once for all of them.

    Attributes
    ----------
    base
        The base, opened once.
    plans
        One for each adapter, in the order given.
    """

    base: Checkpoint
    plans: tuple[Plan, ...]

    @property
    def adapter_tensor_count(self) -> int:
        """Count the tensors of all adapters."""
        return sum(len(plan.adapter.tensors) for plan in self.plans)

    @property
    def remote_count(self) -> int:
        """Count the models whose tensors are read from an address by ranges."""
        models = [tuple(self.base.files.values()), *(plan.adapter.files for plan in self.plans)]
        return sum(any(file.remote for file in files) for files in models)

    @property
    def matrix_count(self) -> int:
        """Count the matrices that the adapters change, one that several change for each of them."""
        return sum(len(plan.targets) for plan in self.plans)

    @property
    def warnings(self) -> list[str]:
        """Collect what a user should know of any of the plans."""
        return [warning for plan in self.plans for warning in plan.warnings]

    def matrices(self) -> list[list[Use]]:
        """List the matrices in the base's file order, each with the targets that are these bytes and the numbers of their plans.

        Two adapters on ``q_proj`` give one entry, ``[(0, target), (1, target)]``; an adapter that saves a ``q_proj`` of its own to add
        its delta to gives an entry of its own.
        """
        found: dict[tuple[Any, ...], list[Use]] = {}
        for i, plan in enumerate(self.plans):
            for target in plan.targets:
                tensors = plan.weights[target.tensor].tensors.values()
                where = tuple((str(stored.file.path), stored.info.start, stored.info.end) for stored in tensors)
                found.setdefault((plan.file_order(target), target.tensor, where), []).append((i, target))
        return [found[key] for key in sorted(found, key=lambda key: key[0])]


def make_batch(base: str | Path, adapters: Sequence[str | Path], io: IOMode = "mmap", stated: Stated = NOTHING_STATED,
               architecture: str | None = None) -> Batch:  # fmt: skip
    """Open a base, once, and match each adapter with it, at least one; see `make_plans`."""
    plans = make_plans(base, adapters, io, stated, architecture)
    return Batch(plans[0].base, plans)
