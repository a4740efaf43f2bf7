"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: threads that spin while they wait hold the cores that other jobs, and other tests, want.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the oracles of numpy: as for torch below
os.environ.pop("COLUMNS", None)  # tables would fit a width of the test runner's

import helpers
import pytest
import torch
from hypothesis import HealthCheck, settings

# Matrices of tests are small: a second thread takes processor time and gives none back. Commands in processes of their own choose for
# themselves; OMP_NUM_THREADS says otherwise.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)

# How long an example takes says nothing on a busy machine.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the name of its folder."""
    for item in items:
        item.add_marker(item.path.relative_to(Path(__file__).parent).parts[0])


@pytest.fixture
def job(tmp_path: Path) -> tuple[Path, Path]:
    """A sharded base and its adapter."""
    return helpers.three_shards(tmp_path)


@pytest.fixture
def single(tmp_path: Path) -> tuple[Path, Path]:
    """A base of one file and its adapter."""
    return helpers.one_file(tmp_path)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sharded base and its adapter, which no test changes."""
    return helpers.three_shards(tmp_path_factory.mktemp("inputs"))
