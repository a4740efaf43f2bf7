"""Real training, once a run and shared: two adapters on the pretrained MiniLM, and their findings."""

from __future__ import annotations

from pathlib import Path

import minilm
import pytest
import quantized
from minilm import Trained

import streamer


@pytest.fixture(
    scope="session", params=[8, pytest.param(1, marks=pytest.mark.long)], ids=["r8", "r1"]
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp(f"minilm-r{request.param}")
    lr = {8: 6e-3, 1: 1e-2}[request.param]
    adapter = minilm.train(directory / "adapter", request.param, lr=lr)
    findings, certified = (
        streamer.detect_intruder_dimensions(
            minilm.BASE, adapter, directory / f"{solver}.safetensors", solver=solver
        )
        for solver in ("auto", "certified")
    )
    return Trained(request.param, adapter, findings, certified)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A 16-bit Llama, and an adapter that PEFT trained on it: what bases are quantized from."""
    directory = tmp_path_factory.mktemp("plain")
    quantized.llama().save_pretrained(directory / "base")
    return directory / "base", quantized.train_adapter(directory / "adapter", quantized.llama())
