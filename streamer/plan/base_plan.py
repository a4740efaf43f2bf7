"""Plan a run on a base without an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from streamer.adapters.adapter import NoAdapter
from streamer.plan.architectures import with_architecture
from streamer.plan.plan import Plan, match_plan
from streamer.plan.targets import Orientation
from streamer.plan.transformers_renames import renames_for
from streamer.storage.checkpoint import open_checkpoint
from streamer.storage.files import file_stamp
from streamer.storage.tensor_file import IOMode
from streamer.weights.logical import open_weights
from streamer.weights.model_config import MODEL_CONFIG, read_model_config


def make_base_plan(base_path: str | Path, io: IOMode = "mmap", architecture: str | None = None) -> Plan:
    """Open a base alone; the plan has no targets. See `streamer.plan.plan.make_plan`."""
    checkpoint = open_checkpoint(base_path, io)
    path = checkpoint.path / MODEL_CONFIG
    stamps = {str(path): file_stamp(path.stat())} if path.exists() else {}
    config = with_architecture(read_model_config(checkpoint.directory), architecture)
    nothing, orientation = NoAdapter.at(checkpoint.path), Orientation.of(checkpoint, config)
    plan = match_plan(checkpoint, open_weights(checkpoint, config), config, orientation, nothing, renames_for(config))
    return replace(plan, inputs=(checkpoint.path,), extra_stamps=stamps)
