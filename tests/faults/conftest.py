"""Fixtures of faults in commands."""

from __future__ import annotations

import pytest
from forks import model_server, server
from jobs import Bench
from remote_jobs import local, served

__all__ = ["bench", "local", "model_server", "served"]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The commands, each with an uninterrupted run to compare with."""
    return Bench(tmp_path_factory.mktemp("bench"), server())
