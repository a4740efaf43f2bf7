"""An evaluation that is stopped or killed: resumed, it gives the same bytes; what stands at its place is not lost."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from forks import KILL, TORN, Server
from learned import make_learned
from stops import check_resuming, stopping_at

import streamer
from streamer.errors import InputChangedError, Interrupted, LockedError, OutputError, OutputExistsError
from streamer.events import Event, Monitor
from streamer.storage.lock import locked


class Job(NamedTuple):
    """Inputs of an evaluation, and the bytes that an undisturbed one writes."""

    home: Path
    whole: bytes

    def run(self, output: Path, **options: Any) -> streamer.Evaluation:
        home = self.home
        inputs = {
            "general": home / "general.npy",
            "task": home / "task.npy",
            "methods": ("paper", "shrink"),
            "lambdas": (0.5,),
        }
        given = {**inputs, "sequences": 6, "length": 12, "max_memory": "4G", **options}
        return streamer.evaluate_variants(home / "base", home / "adapter", output, **given)

    def line(self, output: Path) -> list[object]:
        home = self.home
        return ["evaluate", home / "base", home / "adapter", "--general", home / "general.npy", "--task", home / "task.npy", "-o", output,
                "--method", "paper,shrink", "--lambda", "0.5", "--sequences", 6, "--length", 12, "--max-memory", "4G"]  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    home = tmp_path_factory.mktemp("evaluation")
    make_learned(home, sequences=6, length=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamer.measuring.pass_memory.ROWS", 40)
        Job(home, b"").run(home / "whole.json")
    return Job(home, (home / "whole.json").read_bytes())


@pytest.fixture(autouse=True)
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows at a time: each pass has one sequence under two variants."""
    monkeypatch.setattr("streamer.measuring.pass_memory.ROWS", 40)


FEW_ROWS = "import streamer.measuring.pass_memory as m; m.ROWS = 40"


def test_resumed_from_anywhere_it_gives_the_same_bytes(job: Job, tmp_path: Path) -> None:
    events: list[Event] = []
    job.run(tmp_path / "again.json", on_event=events.append)
    assert (tmp_path / "again.json").read_bytes() == job.whole
    passes = {e.items for e in events if e.stage == "evaluate"}
    assert len(passes) in range(49, 134, 12), (
        "steps after the first place the shrink and the other method, up to four each"
    )
    first = next(i for i, e in enumerate(events, 1) if e.stage == "evaluate")
    for number in (first, len(events) // 2, len(events) - 2):
        output = tmp_path / f"{number}.json"
        with pytest.raises(Interrupted):
            job.run(output, monitor=stopping_at(number))
        assert not output.exists()
        monitor = Monitor(events.append)
        events.clear()
        job.run(output, monitor=monitor)
        assert output.read_bytes() == job.whole
        assert monitor.outputs[output] == "resumed"
        check_resuming(events, "evaluate", "passes")
        assert sorted(p.name for p in tmp_path.glob(f"*{number}.json*")) == [output.name]
    assert {e.items for e in events if e.stage == "evaluate"} < passes


def test_a_race_resumed_drops_the_same(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamer.evaluation.race.FEWEST", 1)
    events: list[Event] = []
    job.run(tmp_path / "e.json", on_event=events.append)
    whole = json.loads((tmp_path / "e.json").read_bytes())
    assert {v["task"]["sequences"] for v in whole["variants"] if v["dropped"]} <= {2, 3}
    assert any(v["dropped"] for v in whole["variants"])
    output = tmp_path / "again.json"
    for number in (len(events) // 3, len(events) // 2):
        with pytest.raises(Interrupted):
            job.run(output, monitor=stopping_at(number))
    job.run(output)
    assert output.read_bytes() == (tmp_path / "e.json").read_bytes()
    job.run(output, race=False)
    assert not any(
        v["dropped"] for v in json.loads(output.read_bytes())["variants"] if v["name"] in ("paper 0.5", "shrink 0.5")
    )


@pytest.mark.long
def test_killed_while_it_writes(job: Job, server: Server, tmp_path: Path) -> None:
    calls = server.run(*job.line(tmp_path / "a.json"), before=FEW_ROWS).calls
    assert (tmp_path / "a.json").read_bytes() == job.whole
    for at, code in ((len(calls) // 2, TORN), (len(calls) - 3, KILL), (len(calls) - 1, KILL)):
        output = tmp_path / f"{at}.json"
        assert server.run(*job.line(output), before=FEW_ROWS, at=at, code=code).code == -signal.SIGKILL
        assert not output.exists() or output.read_bytes() == job.whole
        assert server.run(*job.line(output), before=FEW_ROWS).code == 0
        assert output.read_bytes() == job.whole
        assert [p.name for p in tmp_path.iterdir() if str(at) in p.name] == [output.name]


def test_interrupted_from_the_keyboard(job: Job, server: Server, tmp_path: Path) -> None:
    output = tmp_path / "e.json"
    ask = "os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)"
    stopped = server.run(*job.line(output), before=FEW_ROWS, at=6, code=ask)
    assert stopped.code == 128 + signal.SIGINT
    assert stopped.err.splitlines()[-1] == "streamer: stopped by signal 2; the same command resumes"
    assert server.run(*job.line(output), before=FEW_ROWS).code == 0
    assert output.read_bytes() == job.whole


def test_a_finished_one_stays(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "e.json"
    output.write_bytes(job.whole)
    monitor = Monitor()
    assert job.run(output, monitor=monitor).to_dict() == json.loads(job.whole)
    assert monitor.outputs[output] == "present"
    with pytest.raises(
        OutputExistsError,
        match=r"holds an evaluation of other inputs or options \(general text: 3 sequences of 12 tokens, not 6",
    ):
        job.run(output, sequences=3)
    with pytest.raises(
        OutputExistsError, match=r"\(--projected, --top-k\); choose another output, or pass --overwrite"
    ):
        job.run(output, projected=True, top_k=2)
    assert output.read_bytes() == job.whole
    job.run(output, lambdas=(0.25,), overwrite=True)
    assert 0.5 not in {v["lambda"] for v in json.loads(output.read_bytes())["variants"]}


def variants_of(raw: bytes) -> dict[str, dict[str, Any]]:
    return {v["name"]: {text: v[text]["sums"] for text in ("general", "task")} for v in json.loads(raw)["variants"]}


def test_another_share_places_another_shrink(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "e.json"
    output.write_bytes(job.whole)
    job.run(output, keep=0.5)
    before, after = json.loads(job.whole), json.loads(output.read_bytes())
    assert (before["suggestion"]["keep"], after["suggestion"]["keep"]) == (0.9, 0.5)
    old, new = variants_of(job.whole), variants_of(output.read_bytes())
    assert {name: new[name] for name in old} == old
    assert {"shrink"} <= {name.split()[0] for name in new.keys() - old.keys()} <= {"shrink", "paper"}
    # Where a shrink keeps the share already, the suggestion alone is made again.
    shrink = next(v for v in after["variants"] if v["method"] == "shrink")
    events: list[Event] = []
    monitor = Monitor(events.append)
    job.run(output, keep=shrink["kept"] - 0.001, methods=("shrink",), monitor=monitor)
    assert monitor.outputs[output] == "written"
    assert {e.stage for e in events} == {"note"}
    assert "only the suggestion is updated" in events[0].name
    assert variants_of(output.read_bytes()) == new
    assert json.loads(output.read_bytes())["suggestion"]["keep"] == shrink["kept"] - 0.001
    assert list(tmp_path.iterdir()) == [output]


def test_variants_join_a_file_that_stands(job: Job, tmp_path: Path) -> None:
    """What is there stays, bit by bit; what joins is as if it had been measured with the rest; it resumes to the same bytes."""
    added, output = tmp_path / "added.json", tmp_path / "e.json"
    added.write_bytes(job.whole)
    events: list[Event] = []
    job.run(added, lambdas=(0.5, 0.25), on_event=events.append)
    old, new = variants_of(job.whole), variants_of(added.read_bytes())
    assert {name: new[name] for name in old} == old
    assert new.keys() - old.keys() == {"paper 0.25", "shrink 0.25"}
    assert [e.name for e in events if e.stage == "note"] == [f"{added}: adds to the {len(old)} variants in it"]
    together = job.run(tmp_path / "together.json", lambdas=(0.5, 0.25))
    for name in ("paper 0.25", "shrink 0.25"):
        for text in ("general", "task"):
            np.testing.assert_allclose(new[name][text]["loss"], together[name][text]["sums"]["loss"], rtol=1e-6)
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


@pytest.mark.long
def test_killed_while_it_adds(job: Job, server: Server, tmp_path: Path) -> None:
    first = tmp_path / "a.json"
    first.write_bytes(job.whole)
    calls = server.run(*job.line(first), "--lambda", "0.25", before=FEW_ROWS).calls
    for at, code in ((len(calls) // 2, TORN), (len(calls) - 3, KILL), (len(calls) - 1, KILL)):
        output = tmp_path / f"{at}.json"
        output.write_bytes(job.whole)
        assert (
            server.run(*job.line(output), "--lambda", "0.25", before=FEW_ROWS, at=at, code=code).code == -signal.SIGKILL
        )
        assert output.read_bytes() in (job.whole, first.read_bytes())
        assert server.run(*job.line(output), "--lambda", "0.25", before=FEW_ROWS).code == 0
        assert output.read_bytes() == first.read_bytes()
        assert [p.name for p in tmp_path.iterdir() if str(at) in p.name] == [output.name]


def test_an_interrupted_one_goes_on_for_another_share(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "e.json"
    with pytest.raises(Interrupted):
        job.run(output, monitor=stopping_at(120))
    monitor = Monitor()
    job.run(output, keep=0.5, monitor=monitor)
    assert monitor.outputs[output] == "resumed"


def test_passes_of_another_torch_are_not_mixed_with_those_to_come(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "e.json"
    with monkeypatch.context() as patch:
        patch.setattr("torch.__version__", "2.0.0")
        with pytest.raises(Interrupted):
            job.run(output, monitor=stopping_at(120))
    monitor = Monitor()
    job.run(output, monitor=monitor)
    assert monitor.outputs[output] == "written"
    assert output.read_bytes() == job.whole


def a_text(path: Path) -> None:
    path.write_text("notes")


@pytest.mark.parametrize(("prepare", "error", "message"), [
    (a_text, OutputExistsError, "exists and is not an evaluation"),
    (Path.mkdir, OutputError, "is a directory; name a file in it"),
    (lambda path: path.symlink_to("elsewhere"), OutputError, "is a symlink"),
])  # fmt: skip
def test_what_is_not_its_own_is_never_replaced(prepare: Callable[[Path], None], error: type[Exception], message: str, job: Job,
                                               tmp_path: Path) -> None:  # fmt: skip
    prepare(tmp_path / "e.json")
    with pytest.raises(error, match=message):
        job.run(tmp_path / "e.json", overwrite=True)


def test_inputs_are_not_replaced(job: Job) -> None:
    with pytest.raises(OutputExistsError, match="exists and is not an evaluation"):
        job.run(job.home / "general.npy")
    with pytest.raises(OutputError, match=r"is the input|exists and is not an evaluation"):
        job.run(job.home / "base" / "config.json", overwrite=True)


def test_two_runs_on_one_output(job: Job, tmp_path: Path) -> None:
    with locked(tmp_path / ".e.json.lock"), pytest.raises(LockedError, match="another run is writing here"):
        job.run(tmp_path / "e.json")


def test_an_interrupted_run_of_other_options(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "e.json"
    with pytest.raises(Interrupted):
        job.run(output, monitor=stopping_at(120))
    with pytest.raises(OutputExistsError, match="an interrupted run with other inputs or options"):
        job.run(output, lambdas=(0.25,))
    job.run(output, lambdas=(0.25,), overwrite=True)
    assert "shrink 0.5" not in variants_of(output.read_bytes())


def test_an_input_that_changes_on_the_way(job: Job, tmp_path: Path) -> None:
    weights = job.home / "adapter" / "adapter_model.safetensors"

    def on_event(event: Event) -> None:
        if event.stage == "evaluate" and event.items == 2:
            weights.touch()

    with pytest.raises(InputChangedError, match=r"adapter_model.safetensors: changed since the run began"):
        job.run(tmp_path / "e.json", on_event=on_event)
    assert not (tmp_path / "e.json").exists()
