"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest


@pytest.fixture
def job(tmp_path: Path) -> tuple[Path, Path]:
    """A sharded base and its adapter."""
    return helpers.three_shards(tmp_path)
