"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: threads that spin while they wait hold the cores that other jobs, and other tests, want.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the oracles of numpy: as for torch below
os.environ.pop("COLUMNS", None)  # tables would fit a width of the test runner's
os.environ["STREAMER_CHECK_BUFFERS"] = (
    "1"  # read by streamer.storage.atomic_file: who uses a released buffer fails
)

import streamer.plan.plan  # noqa: F401 - before what else the tests need: it measures the process that imports it

# isort: split
import helpers
import pytest
import seeds
import torch
from hypothesis import HealthCheck, settings

# Matrices of tests are small: a second thread takes processor time and gives none back. Commands in processes of their own choose for
# themselves; OMP_NUM_THREADS says otherwise.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)

# The time that an example takes says nothing on a busy machine. No example is remembered, and none is fixed, as Hypothesis does by itself
# if CI is set: a run depends on its seed alone.
settings.register_profile(
    "seeded",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
    derandomize=False,
)
settings.load_profile("seeded")


HEAVY = (
    "parity/test_matrix.py",
    "parity/test_architectures_table.py",
    "parity/test_ties.py",
    "parity/test_evaluation.py",
    "parity/test_repaired.py",
    "parity/test_sweep.py",
    "faults/test_survival.py",
    "faults/test_remote.py",
    "faults/test_evaluation.py",
    "project/test_benchmarks.py",
    "parity/test_peft.py",
    "faults/test_crash.py",
    "parity/test_kinds.py",
    "parity/test_task_heads.py",
    "resources/test_memory.py",
    "resources/test_forecast.py",
    "resources/test_budget.py",
    "parity/test_quantized_bases.py",
    "commands/test_verify.py",
    "commands/test_workers.py",
    "project/test_tools.py",
    "commands/test_notebook.py",
    "commands/test_screens.py",
    "property/test_gallery.py",
    "project/test_docs.py",
)
"""Files that take longest, at the head of the queue of a parallel run: one that begins last would be waited for alone."""

FOLDERS = ("parity", "property", "resources", "project", "faults", "commands", "unit")
"""The other files, by what one of a folder takes."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that seeds all random numbers."""
    parser.addoption(
        "--seed",
        type=int,
        default=0,
        help="seed of all random numbers that the tests draw (default: %(default)s)",
    )


@pytest.hookimpl(tryfirst=True)  # before Hypothesis reads its own option
def pytest_configure(config: pytest.Config) -> None:
    """Set the seed, and keep the order of collection in a parallel run: xdist would begin with the files that have the most tests."""
    seeds.RUN = config.getoption("seed")
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(seeds.RUN)
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test with the name of its folder, and order the files of a parallel run."""
    rank = {name: i for i, name in enumerate(HEAVY)}
    paths = {item: item.path.relative_to(Path(__file__).parent) for item in items}
    for item, path in paths.items():
        item.add_marker(path.parts[0])
    if hasattr(config, "workerinput"):  # set by xdist in its workers
        items.sort(
            key=lambda item: (
                rank.get(str(paths[item]), len(HEAVY)),
                FOLDERS.index(paths[item].parts[0]),
            )
        )


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of garbage collection, a tenth of the time of tests that build models."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> None:
    """Seed a fixture that several tests share by its own name: it draws the same, whichever test asks for it first."""
    if fixturedef.scope != "function":
        seeds.seed_everything(f"{fixturedef.baseid} {fixturedef.argname} {request.param_index}")


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Seed the global generators of a test by its name."""
    seeds.seed_everything(request.node.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Print the seed with a failure."""
    report = yield
    if report.failed:
        report.sections.append(("seed", f"--seed {seeds.RUN} draws the same random numbers"))
    return report


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
