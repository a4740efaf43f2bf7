"""What a forecast says against what a run took: written bytes exactly, findings and memory as upper bounds, time as a number."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import bench_merge
import helpers
import pytest
import torch
from command_line import with_method
from forks import Outcome, server
from helpers import write_adapter, write_sharded
from seeds import vary

import streamer
from streamer.detection.detect import detection_estimates
from streamer.detection.options import DetectionOptions
from streamer.events import Monitor
from streamer.forecast import Forecast, Rates, forecast_detection, measure_rates
from streamer.output.record import MOST_FACTS
from streamer.plan.plan import AdapterBatch, Plan, make_plan, resident_bytes

NAMES = {
    "peak_memory_bytes", "escalated_memory_bytes", "read_bytes", "network_bytes", "write_bytes", "temporary_bytes", "seconds",
    "threads", "device_memory_bytes",
}  # fmt: skip
CPU = torch.device("cpu")
RATES = Rates(3e10, 1e9)
Job = tuple[Path, Path]


def resident(plan: Plan) -> int:
    return resident_bytes(AdapterBatch(plan.base, (plan,)))


def forecast_of(plan: Plan, options: DetectionOptions, device: torch.device = CPU) -> Forecast:
    return forecast_detection(plan, options, device, resident(plan), RATES)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return helpers.three_shards(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def findings(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("findings") / "findings.safetensors"
    assert run("detect", *job, "-o", out, "--quiet").code == 0
    return out


def model(directory: Path, layers: int, m: int = 2048, n: int = 1024) -> Job:
    """Matrices for the certified solver, of noise and a decaying part."""
    g = torch.Generator().manual_seed(vary(0))
    shards = []
    factors = {}
    for layer in range(layers):
        top = torch.randn(m, 32, generator=g) @ (
            torch.arange(1, 33).pow(-0.7)[:, None] * torch.randn(32, n, generator=g)
        )
        name = f"model.layers.{layer}.mlp.up_proj"
        shards.append(
            {f"{name}.weight": (top / 1500 + torch.randn(m, n, generator=g) / 1000).bfloat16()}
        )
        factors[name] = helpers.intruding_factors(m, n, 4, seed=layer)
    return write_sharded(directory / "base", shards), write_adapter(
        directory / "adapter", factors, 4
    )


def run(*argv: object) -> Outcome:
    return server().run(*argv)


def dry_run(*command: object) -> dict:
    done = run(*command, "--dry-run", "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.parametrize("command", ["merge", "mitigate"])
def test_written_bytes_are_exact(job: Job, findings: Path, command: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tree = dry_run(command, *job, "-o", out, "--findings", findings)
    assert not out.exists()
    assert run(command, *job, "-o", out, "--findings", findings).code == 0
    written = sum(
        p.stat().st_size for p in out.rglob("*") if p.is_file() and p.name != "streamer.json"
    )
    assert tree["forecast"]["write_bytes"] == tree["bytes"]
    # Exact, but for the card, whose figures and advice are known at the end: it is given a constant beside its input's.
    card, original = ((home / "README.md") for home in (out, job[command == "mitigate"]))
    spare = MOST_FACTS + (original.stat().st_size if original.exists() else 0) - card.stat().st_size
    assert tree["bytes"] - written == spare > 0
    plain = tmp_path / "plain"
    tree = dry_run(command, *job, "-o", plain, "--findings", findings, "--no-card")
    assert run(command, *job, "-o", plain, "--findings", findings, "--no-card").code == 0
    written = sum(
        p.stat().st_size for p in plain.rglob("*") if p.is_file() and p.name != "streamer.json"
    )
    assert tree["forecast"]["write_bytes"] == tree["bytes"] == written
    assert tree["forecast"]["temporary_bytes"] == 0


@pytest.mark.parametrize("options", [(), ("--epsilon", "1"), ("--top-k", "0.5", "--epsilon", "1")])
def test_findings_are_no_larger_and_not_much_smaller(
    job: Job, options: tuple[str, ...], tmp_path: Path
) -> None:
    """At ε = 1 every direction is an intruder: the bound is for that."""
    out = tmp_path / "findings.safetensors"
    most = dry_run("detect", *job, "-o", out, *options)["forecast"]["write_bytes"]
    assert run("detect", *job, "-o", out, *options).code == 0
    assert out.stat().st_size <= most
    if options:
        assert most < 1.1 * out.stat().st_size + 600 * 9 + 10_000


@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("detect", ()),
        ("detect", ("--solver", "dense")),
        ("merge", ()),
        ("merge", ("--method", "shrink")),
        ("mitigate", ()),
    ],
)
def test_no_more_memory_than_forecast(
    command: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    base, adapter = model(tmp_path, 2)
    out = tmp_path / "out.safetensors"
    forecast = dry_run(command, base, adapter, "-o", out, *options)["forecast"]
    line = [
        sys.executable,
        "-m",
        "streamer",
        *with_method([command, base, adapter, "-o", out, "--quiet", *options]),
    ]
    peak = bench_merge.watched(line).anonymous
    assert out.exists()
    assert 0.4 * forecast["peak_memory_bytes"] < peak <= forecast["peak_memory_bytes"], (
        peak,
        forecast,
    )
    assert forecast["peak_memory_bytes"] <= forecast["escalated_memory_bytes"]


def test_a_budget_is_the_most_that_is_forecast(tmp_path: Path) -> None:
    plan = make_plan(*model(tmp_path, 1, 4096, 2048))
    budget = max(
        need.nbytes for need in detection_estimates([plan], DetectionOptions(), resident(plan))
    )
    free, tight = (forecast_of(plan, DetectionOptions(max_memory=b)) for b in (None, budget))
    assert tight.peak_memory_bytes == tight.escalated_memory_bytes == budget
    assert budget < free.peak_memory_bytes <= free.escalated_memory_bytes
    assert tight.seconds is not None
    assert tight.seconds > 0


def test_a_dry_run_names_what_it_forecasts(job: Job, findings: Path, tmp_path: Path) -> None:
    for command in ("detect", "mitigate", "merge"):
        own = dry_run(command, *job, "-o", tmp_path / f"{command}.safetensors")
        assert set(own["forecast"]) == NAMES
        assert own["free_bytes"] > 0
    alone, both = (
        dry_run("merge", *job, "-o", tmp_path / "m", *options)["forecast"]
        for options in (("--findings", findings), ())
    )
    assert both["read_bytes"] > alone["read_bytes"]
    assert both["temporary_bytes"] > alone["temporary_bytes"] == 0
    text = run("merge", *job, "-o", tmp_path / "m", "--dry-run").out
    assert "forecast: memory " in text
    assert " free; time about " in text
    assert ", writes at most " not in text
    assert (
        ", writes at most "
        in run("detect", *job, "-o", tmp_path / "d.safetensors", "--dry-run").out
    )
    assert list(tmp_path.iterdir()) == []


def test_a_finished_output_has_no_forecast(job: Job, findings: Path) -> None:
    assert dry_run("detect", *job, "-o", findings)["forecast"] is None


def test_inspect_says_what_is_refused(job: Job, tmp_path: Path) -> None:
    """A fine-tuned model in the adapter's place cannot be written back as one, and its merge is not timed."""
    base = job[0]
    tuned = helpers.three_shards(tmp_path)[0]
    done = run("inspect", base, tuned)
    why = f"{tuned}: is a model, and no adapter that could be written back; "
    assert re.search(rf"^mitigate is refused: {why}.*--to-lora RANK ", done.out, re.MULTILINE), (
        done.out
    )
    tree = json.loads(run("inspect", base, tuned, "--json").out)
    assert tree["refused"].keys() == {"mitigate"}
    assert tree["refused"]["mitigate"].startswith(why)
    assert (
        dry_run("merge", base, tuned, "-o", tmp_path / "m", "--method", "shrink")["forecast"][
            "seconds"
        ]
        is None
    )
    assert (
        "not estimated"
        in run("merge", base, tuned, "-o", tmp_path / "m", "--method", "shrink", "--dry-run").out
    )


def test_a_gpu_is_not_estimated(job: Job) -> None:
    assert forecast_of(make_plan(*job), DetectionOptions(), torch.device("cuda")).seconds is None


@pytest.mark.long
def test_a_time_is_within_a_factor_of_five(tmp_path: Path) -> None:
    """Of processor time on one thread, which other work disturbs less; the docs say three, on an idle machine."""
    base, adapter = model(tmp_path, 4)
    plan = make_plan(base, adapter)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(time, "perf_counter", time.process_time)
        rates = measure_rates(plan.base, Monitor())
    forecast = forecast_detection(plan, DetectionOptions(), CPU, 0, rates)
    began = time.process_time()
    streamer.detect_intruder_dimensions(base, adapter)
    assert forecast.seconds is not None
    assert 0.2 < forecast.seconds / (time.process_time() - began) < 5
