"""Describe how a run computes: its devices, its reads, who watches it and who computes for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from streamer.adapters.adapter_config import NOTHING_STATED, Stated
from streamer.events import Monitor
from streamer.linalg.torch_state import CPU
from streamer.plan.plan import AdapterBatch
from streamer.storage.checkpoint import IOMode
from streamer.workers import TaskInputs, Workers


@dataclass(frozen=True)
class Run:
    """Say how a run computes. Nothing of it changes a result, but for last bits; the memory allowed does, and is in `DetectionOptions`.

    Most are keywords of `api.detect_intruder_dimensions`, which explains them. Detection computes on `device`; models run on
    `model_device`; `monitor` watches the run, and `workers`, if any, compute instead of this process.
    """

    device: torch.device
    io: IOMode = "mmap"
    stated: Stated = NOTHING_STATED
    architecture: str | None = None
    resume: bool = True
    overwrite: bool = False
    model_device: torch.device = CPU
    monitor: Monitor = field(default_factory=Monitor)
    workers: Workers | None = None

    def task_inputs(self, batch: AdapterBatch) -> TaskInputs:
        """Describe the inputs of a batch, as workers open them."""
        return TaskInputs.of(batch, self.io, self.stated, self.architecture)
