"""Detection on workers of every kind, and in parts: byte for byte what one process gives."""

import json
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import jobs
import pytest
from command_line import run_cli
from worker_runs import (
    BENCHES,
    WorkerBench,
    contents,
    dask_scheduler,
    dask_workers,
    merge_bench,
    ray_cluster,
    worker_bench,
)

import streamer
from streamer.events import Event
from streamer.linalg.torch_state import threads


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> WorkerBench:
    return worker_bench(tmp_path_factory.mktemp("workers"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> WorkerBench:
    """Where no memory is divided and nothing has to last, size adds nothing."""
    return worker_bench(tmp_path_factory.mktemp("small"), shape=(150, 170))


def on_engine(bench: WorkerBench, home: Path, engine: str) -> None:
    """Run the command with an engine that runs."""
    home.mkdir()
    out = home / bench.name
    with bench.start(out, "--executor", engine, "-qq") as process:
        _, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr) == (0, "")
    assert contents(out.parent) == bench.files


def test_threads_give_the_same_bytes(small: WorkerBench, tmp_path: Path) -> None:
    events: list[Event] = []
    with ThreadPoolExecutor(3) as pool, threads(1):
        streamer.detect_intruder_dimensions(
            small.base,
            small.adapter,
            tmp_path / "f.safetensors",
            solver="certified",
            executor=pool,
            on_event=events.append,
        )
        inside = streamer.detect_intruder_dimensions(
            small.base, small.adapter, solver="certified", executor=pool
        )
    assert (tmp_path / "f.safetensors").read_bytes() == small.alone
    assert inside.digest() == streamer.load_findings(tmp_path / "f.safetensors").digest()
    steps = [e for e in events if e.stage == "detect"]
    assert [e.done for e in steps] == sorted(e.done for e in steps)
    assert (steps[-1].done, steps[-1].items) == (steps[-1].total, 10)


@pytest.mark.long
def test_a_merge_on_threads_has_the_same_bytes(tmp_path: Path) -> None:
    bench = merge_bench(tmp_path, 4, (150, 170))
    out = tmp_path / "out"
    out.mkdir()
    with ThreadPoolExecutor(2) as pool, threads(1):
        bench.here(out / bench.name, executor=pool)
    assert contents(out) == bench.files
    assert not [path for path in out.rglob(".*") if path.is_file()]


@pytest.mark.long
def test_processes_give_the_same_bytes(small: WorkerBench, tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool, threads(1):
        streamer.detect_intruder_dimensions(
            small.base, small.adapter, tmp_path / "f.safetensors", solver="certified", executor=pool
        )
    assert (tmp_path / "f.safetensors").read_bytes() == small.alone


@pytest.mark.long
def test_workers_share_the_memory(bench: WorkerBench, tmp_path: Path) -> None:
    """Findings are those of one process that is allowed a worker's share, which is said in them; less than will do is refused."""
    out = tmp_path / "f.safetensors"
    line = ["detect", bench.base, bench.adapter, "--threads", 1]
    few = run_cli(*line, "-o", out, "--workers", 2, "--max-memory", "450M")
    assert few.returncode == 2
    assert (
        "streamer: --max-memory: 450M is not enough for tensor 'a.0.weight' (600x700); it needs"
        in few.stderr
    )
    least = few.stderr.split()[-1]
    assert run_cli(*line, "-o", out, "--workers", 2, "--max-memory", least, "-q").returncode == 0
    found = streamer.load_findings(out)
    share = found.options.max_memory or 0
    assert share < int(least[:-1]) << 19
    assert (
        run_cli(
            *line, "-o", tmp_path / "one.safetensors", "--max-memory", f"{share >> 20}M", "-q"
        ).returncode
        == 0
    )
    assert (tmp_path / "one.safetensors").read_bytes() == out.read_bytes()


def test_several_adapters_on_workers(tmp_path: Path) -> None:
    base, adapters = jobs.several(tmp_path / "in")
    with ThreadPoolExecutor(2) as pool:
        found = streamer.detect_intruder_dimensions(
            base, [adapters], tmp_path / "found", executor=pool
        )
    for name, findings in found.items():
        path = tmp_path / f"{name}.safetensors"
        streamer.detect_intruder_dimensions(base, adapters / name, path)
        assert path.read_bytes() == (tmp_path / "found" / path.name).read_bytes()
        assert findings.digest() == streamer.load_findings(path).digest()


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workers", "0"], "--workers: expected a number from 1, found 0"),
        (
            ["--executor", "slurm:1"],
            "--executor: expected dask:ADDRESS or ray:ADDRESS, found 'slurm:1'",
        ),
        (["--executor", "dask:127.0.0.1:9", "--workers", "2"], "give one of them"),
    ],
)
def test_options_that_make_no_sense(
    bench: WorkerBench, options: list[str], said: str, tmp_path: Path
) -> None:
    done = run_cli("detect", bench.base, bench.adapter, "-o", tmp_path / "f.safetensors", *options)
    assert done.returncode == 2
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


def test_findings_pickle_by_value(small: WorkerBench, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(small.alone)
    found = streamer.load_findings(path)
    assert pickle.loads(pickle.dumps(found)).digest() == found.digest()
    with pytest.raises(TypeError, match="is open, and a process cannot give that to another"):
        pickle.dumps(found._file)
    for matrix in found:
        data = pickle.dumps(matrix)
        assert len(data) < 20_000
        assert pickle.loads(data) == matrix


@pytest.mark.slow
@pytest.mark.parametrize("command", BENCHES)
def test_dask_gives_the_same_bytes(command: str, tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    file = tmp_path / "scheduler.json"
    with dask_scheduler(file), dask_workers(file):
        on_engine(BENCHES[command](tmp_path), tmp_path / "out", f"dask:{file}")


@pytest.mark.slow
@pytest.mark.parametrize("command", BENCHES)
def test_ray_gives_the_same_bytes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ray_cluster(monkeypatch, 2) as address:
        on_engine(BENCHES[command](tmp_path), tmp_path / "out", f"ray:{address}")


@pytest.mark.long
def test_a_dry_run_counts_all_workers(bench: WorkerBench, tmp_path: Path) -> None:
    line = [
        "detect",
        bench.base,
        bench.adapter,
        "-o",
        tmp_path / "f.safetensors",
        "--threads",
        1,
        "--dry-run",
        "--json",
    ]
    one, two = (
        json.loads(run_cli(*line, *more).stdout)["forecast"] for more in ([], ["--workers", 2])
    )
    assert 2 * one["peak_memory_bytes"] < two["peak_memory_bytes"] < 3 * one["peak_memory_bytes"]
    assert two["read_bytes"] == one["read_bytes"]
    assert not list(tmp_path.iterdir())
