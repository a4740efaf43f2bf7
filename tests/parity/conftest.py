"""Real training, once a run and shared: two adapters on the pretrained MiniLM, and their findings."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import minilm
import pytest

import streamer


class Trained(NamedTuple):
    """A trained adapter, and what was detected in it by `auto` (dense, for matrices this small) and by the certified solver."""

    rank: int
    adapter: Path
    findings: streamer.Findings
    certified: streamer.Findings


@pytest.fixture(scope="session", params=[8, 1], ids=["r8", "r1"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp(f"minilm-r{request.param}")
    lr = {8: 4e-3, 1: 1e-2}[request.param]
    adapter = minilm.train(directory / "adapter", request.param, steps=100, lr=lr)
    findings, certified = (
        streamer.detect_intruder_dimensions(minilm.BASE, adapter, directory / f"{solver}.safetensors", solver=solver)
        for solver in ("auto", "certified")
    )
    return Trained(request.param, adapter, findings, certified)
