"""Findings on a small model, detected once."""

from pathlib import Path

import helpers
import pytest

import streamer
from streamer.detection.findings import Findings


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return helpers.three_shards(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="session")
def findings(pair: tuple[Path, Path]) -> Findings:
    return streamer.detect_intruder_dimensions(*pair)
