"""A fit that is stopped or killed: resumed, it gives the same factors to the bit; what stands at its place is not lost."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from forks import KILL, TORN, Server
from learned import make_learned
from safetensors.numpy import load_file, save_file
from stops import stopping_at

import streamer
from streamer.errors import (
    InputChangedError,
    Interrupted,
    LockedError,
    NumericError,
    OutputError,
    OutputExistsError,
    UnsupportedError,
)
from streamer.events import Event, Monitor
from streamer.linalg.torch_state import threads
from streamer.storage.lock import locked

KEEP = (0.9, 0.6)


class Job(NamedTuple):
    """Inputs of a fit, and the bytes that an undisturbed one writes."""

    home: Path
    whole: bytes

    def run(self, output: Path | None, **options: Any) -> streamer.Coefficients:
        home = self.home
        given = {"general": home / "general.npy", "task": home / "task.npy", "keep": KEEP, "sequences": 16, "length": 8}
        return streamer.fit_coefficients(home / "base", home / "adapter", output, **{**given, **options})

    def line(self, output: Path) -> list[object]:
        home = self.home
        return ["fit", home / "base", home / "adapter", "--general", home / "general.npy", "--task", home / "task.npy", "-o", output,
                "--keep", ",".join(map(str, KEEP)), "--sequences", 16, "--length", 8]  # fmt: skip


def few_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("streamer.measuring.pass_memory.ROWS", 80)
    patch.setattr("streamer.fitting.fit_memory.ROWS", 54)


FEW_ROWS = "import streamer.measuring.pass_memory as e, streamer.fitting.fit_memory as f; e.ROWS, f.ROWS = 80, 54"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    home = make_learned(tmp_path_factory.mktemp("fit"))
    with pytest.MonkeyPatch.context() as patch:
        few_rows(patch)
        Job(home, b"").run(home / "whole.safetensors", on_event=lambda event: None)
    return Job(home, (home / "whole.safetensors").read_bytes())


@pytest.fixture(autouse=True)
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows at a time, so that there are several passes and chunks."""
    few_rows(monkeypatch)


@pytest.mark.long
def test_resumed_from_anywhere_it_gives_the_same_bytes(job: Job, tmp_path: Path) -> None:
    events: list[Event] = []
    job.run(tmp_path / "again.safetensors", on_event=events.append)
    assert (tmp_path / "again.safetensors").read_bytes() == job.whole
    steps = [e for e in events if e.stage == "fit"]
    assert [e.done for e in steps] == sorted(e.done for e in steps)
    assert steps[-1].done == steps[-1].total
    assert steps[-1].items == steps[-1].of > 8
    for number in (2, len(steps) // 2, len(steps) - 2):
        output = tmp_path / f"{number}.safetensors"
        with pytest.raises(Interrupted):
            job.run(output, monitor=stopping_at(number, "fit"))
        assert not output.exists()
        monitor = Monitor(events.append)
        events.clear()
        job.run(output, monitor=monitor)
        assert output.read_bytes() == job.whole
        assert monitor.outputs[output] == "resumed"
        notes = [e.name for e in events if e.stage == "note" and e.name.startswith("resuming: ")]
        assert len(notes) == (number > 2), "measures are in the journal; the passes that collect inputs run again"
        assert sorted(p.name for p in tmp_path.glob(f"*{number}.safe*")) == [output.name]
    assert {e.items for e in events if e.stage == "fit"} < {e.items for e in steps}, "little was left to do"


def test_in_memory_it_gives_the_same(job: Job) -> None:
    found, stands = (
        job.run(None, on_event=lambda event: None),
        streamer.load_coefficients(job.home / "whole.safetensors"),
    )
    assert found.facts == stands.facts
    for mine, theirs in zip(found.sets, stands.sets, strict=True):
        assert (mine.keep, mine.digest) == (theirs.keep, theirs.digest)


@pytest.mark.long
def test_killed_while_it_writes(job: Job, server: Server, tmp_path: Path) -> None:
    calls = server.run(*job.line(tmp_path / "a.safetensors"), before=FEW_ROWS).calls
    assert (tmp_path / "a.safetensors").read_bytes() == job.whole
    for at, code in (
        (len(calls) // 3, TORN),
        (2 * len(calls) // 3, KILL),
        (len(calls) - 3, KILL),
        (len(calls) - 1, KILL),
    ):
        output = tmp_path / f"{at}.safetensors"
        assert server.run(*job.line(output), before=FEW_ROWS, at=at, code=code).code == -signal.SIGKILL
        assert not output.exists() or output.read_bytes() == job.whole
        assert server.run(*job.line(output), before=FEW_ROWS).code == 0
        assert output.read_bytes() == job.whole
        assert [p.name for p in tmp_path.iterdir() if str(at) in p.name] == [output.name]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(job: Job, server: Server, tmp_path: Path, signum: signal.Signals) -> None:
    output = tmp_path / "c.safetensors"
    ask = f"os.kill(os.getpid(), {int(signum)}); time.sleep(0.1)"
    stopped = server.run(*job.line(output), before=FEW_ROWS, at=9, code=ask)
    assert stopped.code == 128 + signum
    assert stopped.err.splitlines()[-1] == f"streamer: stopped by signal {int(signum)}; the same command resumes"
    assert server.run(*job.line(output), before=FEW_ROWS).code == 0
    assert output.read_bytes() == job.whole


def test_finished_ones_stay(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "c.safetensors"
    output.write_bytes(job.whole)
    monitor = Monitor()
    assert job.run(output, monitor=monitor).keeps == list(KEEP)
    assert monitor.outputs[output] == "present"
    with pytest.raises(OutputExistsError, match="holds coefficients of other inputs or options"):
        job.run(output, seed=1)
    assert output.read_bytes() == job.whole
    assert job.run(output, seed=1, keep=0.5, overwrite=True, on_event=lambda event: None).keeps == [0.5]
    assert streamer.load_coefficients(output).keeps == [0.5]


def test_an_interrupted_run_of_other_options(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "c.safetensors"
    with pytest.raises(Interrupted):
        job.run(output, monitor=stopping_at(30, "fit"))
    with pytest.raises(OutputExistsError, match="an interrupted run with other inputs or options"):
        job.run(output, seed=1)
    job.run(output, seed=1, overwrite=True, on_event=lambda event: None)
    with pytest.raises(OutputExistsError, match="holds coefficients of other inputs or options"):
        job.run(output)


def test_chunks_of_another_torch_are_not_mixed_with_those_to_come(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "c.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("torch.__version__", "2.0.0")
        with pytest.raises(Interrupted):
            job.run(output, monitor=stopping_at(30, "fit"))
    monitor = Monitor()
    job.run(output, monitor=monitor)
    assert monitor.outputs[output] == "written"
    assert output.read_bytes() == job.whole


def test_it_goes_on_with_its_threads(job: Job, tmp_path: Path) -> None:
    output, count = tmp_path / "c.safetensors", torch.get_num_threads()
    with pytest.raises(Interrupted):
        job.run(output, monitor=stopping_at(30, "fit"))
    events: list[Event] = []
    with threads(count + 1):
        job.run(output, on_event=events.append)
        assert torch.get_num_threads() == count + 1
    assert output.read_bytes() == job.whole
    word = "thread" if count == 1 else "threads"
    assert f"goes on with {count} {word}, as it began; --no-resume starts over" in [e.name for e in events]


@pytest.mark.parametrize(("prepare", "error", "message"), [
    (lambda path: path.write_text("notes"), OutputExistsError, "exists and is not coefficients"),
    (Path.mkdir, OutputError, "is a directory; name a file in it"),
    (lambda path: path.symlink_to("elsewhere"), OutputError, "is a symlink"),
])  # fmt: skip
def test_what_is_not_its_own_is_never_replaced(prepare: Callable[[Path], None], error: type[Exception], message: str, job: Job,
                                               tmp_path: Path) -> None:  # fmt: skip
    prepare(tmp_path / "c.safetensors")
    with pytest.raises(error, match=message):
        job.run(tmp_path / "c.safetensors", overwrite=True)


def test_inputs_are_not_replaced(job: Job) -> None:
    with pytest.raises(OutputError, match=r"is the input|exists and is not coefficients"):
        job.run(job.home / "adapter" / "adapter_model.safetensors", overwrite=True)


def test_two_runs_on_one_output(job: Job, tmp_path: Path) -> None:
    with locked(tmp_path / ".c.safetensors.lock"), pytest.raises(LockedError, match="another run is writing here"):
        job.run(tmp_path / "c.safetensors")


def test_an_input_that_changes_on_the_way(job: Job, tmp_path: Path) -> None:
    weights = job.home / "adapter" / "adapter_model.safetensors"

    def on_event(event: Event) -> None:
        if event.stage == "fit" and event.items == 2:
            weights.touch()

    with pytest.raises(InputChangedError, match=r"adapter_model.safetensors: changed since the run began"):
        job.run(tmp_path / "c.safetensors", on_event=on_event)
    assert not (tmp_path / "c.safetensors").exists()


def test_a_config_that_vanishes_on_the_way(job: Job, server: Server, tmp_path: Path) -> None:
    config = job.home / "base" / "config.json"
    os.link(config, tmp_path / "aside")
    done = server.run(*job.line(tmp_path / "c.safetensors"), before=FEW_ROWS, at=2, code=f"os.remove({str(config)!r})")
    os.link(tmp_path / "aside", config)
    assert done.code == 8, done.err
    assert "config.json: changed since the run began" in done.err
    assert not (tmp_path / "c.safetensors").exists()


def spoilt(job: Job, adapter: Path, spoil: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """Copy the adapter with other values."""
    shutil.copytree(job.home / "adapter", adapter)
    values = load_file(adapter / "adapter_model.safetensors")
    spoil(values)
    save_file(values, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return adapter


def test_losses_that_are_nan(job: Job, tmp_path: Path) -> None:
    def much(values: dict[str, np.ndarray]) -> None:
        values.update({name: value * np.float32(1e19) for name, value in values.items()})

    adapter = spoilt(job, tmp_path / "adapter", much)
    with pytest.raises(NumericError, match="NaN or Inf"):
        streamer.fit_coefficients(job.home / "base", adapter, tmp_path / "c.safetensors", general=job.home / "general.npy",
                                  task=job.home / "task.npy", sequences=16, length=8, on_event=lambda event: None)  # fmt: skip
    assert not (tmp_path / "c.safetensors").exists()


def test_an_adapter_that_holds_nan_or_nothing(job: Job, tmp_path: Path) -> None:
    def hole(values: dict[str, np.ndarray]) -> None:
        next(iter(values.values()))[0, 0] = np.nan

    def nothing(values: dict[str, np.ndarray]) -> None:
        values.update({name: np.zeros_like(value) for name, value in values.items()})

    for name, spoil, error, message in (("a", hole, NumericError, "holds NaN or Inf; check the adapter"),
                                        ("b", nothing, UnsupportedError, "all of its deltas are zero")):  # fmt: skip
        adapter = spoilt(job, tmp_path / name, spoil)
        with pytest.raises(error, match=message):
            streamer.fit_coefficients(job.home / "base", adapter, general=job.home / "general.npy",
                                      task=job.home / "task.npy", sequences=16, length=8)  # fmt: skip
