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


HEAVY = (
    "parity/test_matrix.py",
    "parity/test_loadability.py",
    "parity/test_ties.py",
    "parity/test_evaluation.py",
    "faults/test_evaluation.py",
    "faults/test_fitting.py",
    "project/test_bench_evaluate.py",
    "parity/test_peft.py",
    "faults/test_crash.py",
    "parity/test_kinds.py",
    "parity/test_task_heads.py",
    "resources/test_memory.py",
    "resources/test_many_adapters.py",
    "resources/test_forecast.py",
    "resources/test_budget.py",
    "parity/test_quantized_bases.py",
    "project/test_tools.py",
    "commands/test_pipelines.py",
    "commands/test_screens.py",
    "property/test_gallery.py",
    "project/test_bench_detect.py",
    "project/test_bench_model.py",
    "project/test_docs.py",
)
"""Files that take longest, at the head of the queue of a parallel run: one that begins last would be waited for alone."""

FOLDERS = ("parity", "property", "resources", "project", "faults", "commands", "unit")
"""The other files, by what one of a folder takes."""


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order of collection in a parallel run; by itself xdist begins with the files of the most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test with the name of its folder, and order the files of a parallel run."""
    rank = {name: i for i, name in enumerate(HEAVY)}
    paths = {item: item.path.relative_to(Path(__file__).parent) for item in items}
    for item, path in paths.items():
        item.add_marker(path.parts[0])
    if hasattr(config, "workerinput"):  # set by xdist in its workers
        items.sort(key=lambda item: (rank.get(str(paths[item]), len(HEAVY)), FOLDERS.index(paths[item].parts[0])))


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
