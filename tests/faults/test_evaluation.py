"""Evaluations and repairs that are stopped or killed: resumed, they give the same bytes; what stands at their place is not lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from faults import stopping_at
from forks import KILL, TORN, Server
from learned import make_learned, repaired
from safetensors.numpy import load_file, save_file

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
from streamer.storage.files import locked
from streamer.storage.transaction import lock_of


class Kind(NamedTuple):
    """A command: its function, keywords, options, the lines of a text and their length.

    Further: what another run of it asks for, what its file is called in messages, and a place in the middle, after a sweep if there are
    several.
    """

    run: Callable[..., Any]
    keywords: dict[str, Any]
    options: list[object]
    text: tuple[int, int]
    other: dict[str, Any]
    file: str
    middle: tuple[int, str]


KINDS = {
    "evaluate": Kind(
        streamer.evaluate_variants,
        {"methods": ("paper", "shrink"), "lambdas": (0.5,)},
        ["--method", "paper,shrink", "--lambda", "0.5"],
        (24, 12),
        {"lambdas": (0.25,)},
        "an evaluation",
        (4, "evaluate"),
    ),
    "repair": Kind(
        streamer.repair_adapter, {}, [], (48, 16), {"seed": 1}, "coefficients", (2, "fit")
    ),
}


class Job(NamedTuple):
    """Inputs of an evaluation or a repair, and the bytes that an undisturbed one writes."""

    command: str
    home: Path
    whole: bytes

    @property
    def kind(self) -> Kind:
        return KINDS[self.command]

    def file(self, output: Path) -> Path:
        """Return the path of the evaluation, or of the fit beside the output."""
        return (
            output
            if self.command == "evaluate"
            else output.with_name(f"{output.name}.fit.safetensors")
        )

    def run(self, output: Path, **options: Any) -> Any:
        home, (sequences, length) = self.home, self.kind.text
        given = {
            "general": home / "general.npy",
            "task": home / "task.npy",
            "sequences": sequences,
            "length": length,
        }
        given |= {"findings": home / "f.safetensors"} if self.command == "evaluate" else {}
        return self.kind.run(
            home / "base", home / "adapter", output, **{**given, **self.kind.keywords, **options}
        )

    def line(self, output: Path) -> list[object]:
        home, (sequences, length) = self.home, self.kind.text
        return [
            self.command,
            home / "base",
            home / "adapter",
            "--general",
            home / "general.npy",
            "--task",
            home / "task.npy",
            "-o",
            output,
            "--sequences",
            sequences,
            "--length",
            length,
            *self.kind.options,
            *(("--findings", home / "f.safetensors") if self.command == "evaluate" else ()),
        ]

    def stop(self, output: Path) -> None:
        """Run it to the middle."""
        with pytest.raises(Interrupted):
            self.run(output, monitor=stopping_at(*self.kind.middle))


@pytest.fixture(scope="module", params=KINDS)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    home = make_learned(tmp_path_factory.mktemp(request.param), *KINDS[request.param].text)
    streamer.detect_intruder_dimensions(
        home / "base", home / "adapter", home / "f.safetensors", on_event=str
    )
    job = Job(request.param, home, b"")
    job.run(home / "whole", on_event=str)
    return job._replace(whole=job.file(home / "whole").read_bytes())


evaluations = pytest.mark.parametrize("job", ["evaluate"], indirect=True)
repairs = pytest.mark.parametrize("job", ["repair"], indirect=True)


# Both -------------------------------------------------------------------------------------------------------------------


def kill_everywhere(
    job: Job, server: Server, home: Path, old: bytes | None, *options: object
) -> None:
    """Kill a run where nothing stands, or an old file, at some calls: that or the new one is there, and the command finishes."""

    def begin(name: str) -> Path:
        output = home / name
        if old is not None:
            output.write_bytes(old)
        return output

    calls = server.run(*job.line(begin("a")), *options).calls
    whole = (home / "a").read_bytes()
    for at, code in (
        (len(calls) // 3, TORN),
        (2 * len(calls) // 3, KILL),
        (len(calls) - 3, KILL),
        (len(calls) - 1, KILL),
    ):
        output = begin(str(at))
        assert server.run(*job.line(output), *options, at=at, code=code).code == -signal.SIGKILL
        assert (output.read_bytes() if output.exists() else None) in (old, whole)
        assert server.run(*job.line(output), *options).code == 0
        assert output.read_bytes() == whole
        assert [p.name for p in home.iterdir() if str(at) in p.name] == [output.name]


@evaluations
@pytest.mark.long
def test_an_evaluation_killed_while_it_adds_variants_resumes(
    job: Job, server: Server, tmp_path: Path
) -> None:
    kill_everywhere(job, server, tmp_path, job.whole, "--lambda", "0.25")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_evaluation_stopped_by_a_signal_resumes(
    job: Job, server: Server, tmp_path: Path, signum: signal.Signals
) -> None:
    output = tmp_path / "out"
    ask = f"os.kill(os.getpid(), {int(signum)}); time.sleep(0.1)"
    stopped = server.run(*job.line(output), at=6 if job.command == "evaluate" else 3, code=ask)
    assert stopped.code == 128 + signum
    assert (
        stopped.err.splitlines()[-1]
        == f"streamer: stopped by signal {int(signum)}; the same command resumes"
    )
    assert server.run(*job.line(output)).code == 0
    assert job.file(output).read_bytes() == job.whole


def test_sums_of_another_torch_are_not_mixed_with_those_to_come(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    monitor = Monitor()
    with monkeypatch.context() as patch:
        patch.setattr("torch.__version__", "2.0.0")
        job.stop(output)
    job.run(output, monitor=monitor)
    assert monitor.outputs[job.file(output)] == "written"
    assert job.file(output).read_bytes() == job.whole


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda path: path.write_text("notes"), OutputExistsError, "exists and is not {}"),
        (Path.mkdir, OutputError, "is a directory; name a file in it"),
        (lambda path: path.symlink_to("elsewhere"), OutputError, "is a symlink"),
    ],
)
def test_what_is_not_its_own_is_never_replaced(
    prepare: Callable[[Path], None], error: type[Exception], message: str, job: Job, tmp_path: Path
) -> None:
    prepare(job.file(tmp_path / "out"))
    with pytest.raises(error, match=message.format(job.kind.file)):
        job.run(tmp_path / "out", overwrite=True)


@evaluations
@pytest.mark.parametrize(
    "name", ["base/config.json", "adapter/adapter_model.safetensors", "general.npy"]
)
def test_inputs_are_not_replaced(job: Job, name: str) -> None:
    with pytest.raises(OutputError, match=rf"is the input|exists and is not {job.kind.file}"):
        job.run(job.home / name, overwrite=name != "general.npy")


def test_a_second_evaluation_into_one_file_is_refused(job: Job, tmp_path: Path) -> None:
    with (
        locked(lock_of(job.file(tmp_path / "out"))),
        pytest.raises(LockedError, match="another run is writing here"),
    ):
        job.run(tmp_path / "out")


def test_an_interrupted_run_of_other_options(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "out"
    job.stop(output)
    with pytest.raises(OutputExistsError, match="an interrupted run with other inputs or options"):
        job.run(output, **job.kind.other)
    job.run(output, **job.kind.other, overwrite=True, on_event=str)
    if job.command == "evaluate":
        assert "shrink 0.5" not in variants_of(output.read_bytes())
        return
    with pytest.raises(OutputExistsError, match="holds coefficients of other inputs or options"):
        job.run(output)


def test_an_input_that_changes_on_the_way(job: Job, tmp_path: Path) -> None:
    weights = job.home / (
        "base/model.safetensors" if job.command == "repair" else "adapter/adapter_model.safetensors"
    )

    def on_event(event: Event) -> None:
        if event.stage == job.kind.middle[1] and event.items == 2:
            weights.touch()

    with pytest.raises(InputChangedError, match=f"{weights.name}: changed since the run began"):
        job.run(tmp_path / "out", on_event=on_event)
    assert not job.file(tmp_path / "out").exists()


# Evaluations ------------------------------------------------------------------------------------------------------------


@evaluations
def test_resumed_from_anywhere_it_gives_the_same_bytes(job: Job, tmp_path: Path) -> None:
    events: list[Event] = []
    job.run(tmp_path / "again.json", on_event=events.append)
    assert (tmp_path / "again.json").read_bytes() == job.whole
    steps = [e for e in events if e.stage == "evaluate"]
    for number in (1, len(steps) // 2, len(steps) - 2):
        output = tmp_path / f"{number}.json"
        with pytest.raises(Interrupted):
            job.run(output, monitor=stopping_at(number, "evaluate"))
        assert not output.exists()
        events.clear()
        monitor = Monitor(events.append)
        job.run(output, monitor=monitor)
        assert output.read_bytes() == job.whole
        assert monitor.outputs[output] == "resumed"
        assert sorted(p.name for p in tmp_path.glob(f"*{number}.json*")) == [output.name]
    left = [e for e in events if e.stage == "evaluate"]
    assert len(left) < len(steps) / 2, "sweeps that were done are not repeated"
    assert (left[-1].done, left[-1].items) == (left[-1].total, left[-1].of)


@evaluations
def test_a_finished_evaluation_is_kept(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "e.json"
    output.write_bytes(job.whole)
    others = streamer.detect_intruder_dimensions(
        job.home / "base", job.home / "adapter", top_k=2, on_event=str
    )
    monitor = Monitor()
    assert job.run(output, monitor=monitor).to_dict() == json.loads(job.whole)
    assert monitor.outputs[output] == "present"
    with pytest.raises(
        OutputExistsError,
        match=r"holds an evaluation of other inputs or options \(general text: 3 sequences of 12 tokens, not 24",
    ):
        job.run(output, sequences=3)
    with pytest.raises(
        OutputExistsError,
        match=r"\(--projected, --top-k, findings\); choose another output, or pass --overwrite",
    ):
        job.run(output, projected=True, findings=others)
    assert output.read_bytes() == job.whole
    job.run(output, lambdas=(0.25,), overwrite=True)
    assert 0.5 not in {v["lambda"] for v in json.loads(output.read_bytes())["variants"]}


def variants_of(raw: bytes) -> dict[str, dict[str, Any]]:
    return {
        v["name"]: {text: v[text]["sums"] for text in ("general", "task")}
        for v in json.loads(raw)["variants"]
    }


@evaluations
def test_another_share_places_another_shrink_once(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "e.json"
    events = list[Event]()
    for attempt in range(2):
        output.write_bytes(output.read_bytes() if attempt else job.whole)
        events.clear()
        monitor = Monitor(events.append)
        job.run(output, keep=0.3, monitor=monitor)
        assert monitor.outputs[output] == ("present" if attempt else "written")
    assert {e.stage for e in events} == {"note"}
    old = variants_of(job.whole)
    new = variants_of(output.read_bytes())
    assert {name: new[name] for name in old} == old
    tree = json.loads(output.read_bytes())
    (placed,) = (variant for variant in tree["variants"] if variant["name"] not in old)
    off = {
        v["name"]: abs(v["kept"] - 0.3) for v in tree["variants"] if v["method"] in (None, "shrink")
    }
    assert min(off, key=lambda name: off[name]) == placed["name"]
    assert tree["suggestion"]["keep"] == 0.3
    assert list(tmp_path.iterdir()) == [output]


@evaluations
def test_variants_join_a_file_that_stands(job: Job, tmp_path: Path) -> None:
    """What is there stays, bit by bit; what joins is as if it had been measured with the rest; it resumes to the same bytes."""
    added = tmp_path / "added.json"
    output = tmp_path / "e.json"
    added.write_bytes(job.whole)
    events: list[Event] = []
    job.run(added, lambdas=(0.5, 0.25), on_event=events.append)
    old = variants_of(job.whole)
    new = variants_of(added.read_bytes())
    assert {name: new[name] for name in old} == old
    joined = new.keys() - old.keys()
    assert joined >= {"paper 0.25", "shrink 0.25"}
    assert len(joined) <= 3, "one is placed"
    assert [e.name for e in events if e.stage == "note"] == [
        f"{added}: adds to the {len(old)} variants in it"
    ]
    together = job.run(tmp_path / "together.json", lambdas=(0.5, 0.25))
    for name in ("paper 0.25", "shrink 0.25"):
        for text in ("general", "task"):
            np.testing.assert_allclose(
                new[name][text]["loss"], together[name][text]["sums"]["loss"], rtol=1e-6
            )
    for number in (len(events) // 3, len(events) * 2 // 3):
        output.write_bytes(job.whole)
        with pytest.raises(Interrupted):
            job.run(output, lambdas=(0.5, 0.25), monitor=stopping_at(number))
        assert output.read_bytes() == job.whole
        monitor = Monitor()
        job.run(output, lambdas=(0.5, 0.25), monitor=monitor)
        assert (monitor.outputs[output], output.read_bytes()) == ("resumed", added.read_bytes())
    monitor = Monitor()
    job.run(output, lambdas=(0.25,), monitor=monitor)
    assert monitor.outputs[output] == "present"


@evaluations
def test_an_interrupted_one_goes_on_for_another_share(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "e.json"
    monitor = Monitor()
    job.stop(output)
    job.run(output, keep=0.5, monitor=monitor)
    assert monitor.outputs[output] == "resumed"


# Repairs --------------------------------------------------------------------------------------------------------------


@repairs
def test_an_evaluation_resumes_with_its_number_of_threads(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "c"
    count = torch.get_num_threads()
    job.stop(output)
    events: list[Event] = []
    with threads(count + 1):
        job.run(output, on_event=events.append)
        assert torch.get_num_threads() == count + 1
    assert job.file(output).read_bytes() == job.whole
    word = "thread" if count == 1 else "threads"
    assert f"goes on with {count} {word}, as it began; --no-resume starts over" in [
        e.name for e in events
    ]


@repairs
def test_a_config_that_vanishes_on_the_way(job: Job, server: Server, tmp_path: Path) -> None:
    config = job.home / "base" / "config.json"
    os.link(config, tmp_path / "aside")
    done = server.run(*job.line(tmp_path / "c"), at=2, code=f"os.remove({str(config)!r})")
    os.link(tmp_path / "aside", config)
    assert done.code == 8, done.err
    assert "config.json: changed since the run began" in done.err
    assert not job.file(tmp_path / "c").exists()


def spoilt(job: Job, adapter: Path, spoil: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """Copy the adapter with other values."""
    shutil.copytree(job.home / "adapter", adapter)
    values = load_file(adapter / "adapter_model.safetensors")
    spoil(values)
    save_file(values, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return adapter


@repairs
def test_losses_that_are_nan_are_refused(job: Job, tmp_path: Path) -> None:
    def much(values: dict[str, np.ndarray]) -> None:
        values.update({name: value * np.float32(1e19) for name, value in values.items()})

    adapter = spoilt(job, tmp_path / "adapter", much)
    with pytest.raises(NumericError, match="NaN or Inf"):
        repaired(job.home, tmp_path / "c", adapter=adapter, sequences=48, length=16, on_event=str)
    assert not job.file(tmp_path / "c").exists()


@repairs
def test_an_adapter_that_holds_nan_or_nothing(job: Job, tmp_path: Path) -> None:
    def hole(values: dict[str, np.ndarray]) -> None:
        next(iter(values.values()))[0, 0] = np.nan

    def nothing(values: dict[str, np.ndarray]) -> None:
        values.update({name: np.zeros_like(value) for name, value in values.items()})

    for name, spoil, error, message in (
        ("a", hole, NumericError, "holds NaN or Inf; check the adapter"),
        ("b", nothing, UnsupportedError, "all of its deltas are zero"),
    ):
        adapter = spoilt(job, tmp_path / name, spoil)
        with pytest.raises(error, match=message):
            repaired(job.home, tmp_path / "c", adapter=adapter, sequences=48, length=16)
