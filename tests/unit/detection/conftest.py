"""Fixtures of the tests of findings."""

from pathlib import Path

import helpers
import pytest

import streamer
from streamer.detection.findings import Findings


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Findings]:
    """Base, adapter, the findings file, and the findings in memory."""
    home = tmp_path_factory.mktemp("view")
    base, adapter = helpers.three_shards(home)
    path = home / "findings.safetensors"
    streamer.detect_intruder_dimensions(base, adapter, path, top_k=6)
    return base, adapter, path, streamer.detect_intruder_dimensions(base, adapter, top_k=6)


@pytest.fixture(scope="session")
def findings(made: tuple[Path, Path, Path, Findings]) -> Findings:
    return made[3]
