"""Memory of a gradient pass: that of one layer, however many there are, and below what is estimated."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import make_checkpoint
import numpy as np
from measure import watched
from paths import TOOLS
from shapes import KNOWN

from streamer.fitting.memory import gradient_bytes
from streamer.plan.batch import Batch
from streamer.plan.memory import resident_bytes
from streamer.plan.plan import make_plan
from streamer.streaming.gradients import GradientModel

LENGTH = 256
MODEL = replace(KNOWN["llama-3-8b"], hidden=256, intermediate=1024, heads=4, kv_heads=2, vocab=512)


def peak(home: Path, layers: int) -> tuple[int, int]:
    """Anonymous memory of two gradient passes on one sequence, and its estimate."""
    made = make_checkpoint.make_checkpoint(home / str(layers), replace(MODEL, layers=layers), "BF16", rank=4)
    np.save(home / "text.npy", np.random.default_rng(0).integers(MODEL.vocab, size=(2, LENGTH)))
    request = {"base": str(made.base), "adapter": str(made.adapter), "text": str(home / "text.npy"), "threads": 1, "kind": "gradient",
               "directory": str(home)}  # fmt: skip
    (home / "request.json").write_text(json.dumps(request))
    command = [sys.executable, *map(str, (TOOLS / "profile_fit.py", home / "request.json", home / "out.json"))]
    plan = make_plan(made.base, made.adapter)
    resident = resident_bytes(Batch(plan.base, (plan,)))
    return watched(command).anonymous, gradient_bytes(GradientModel(plan).size, resident, 2 * LENGTH, LENGTH)


def test_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    (few, estimate), (many, _) = peak(tmp_path, 2), peak(tmp_path, 6)
    # The activations of four layers more would be some 45 MB, their weights in float32 another 13.
    assert many - few < 15e6
    assert max(few, many) < estimate
