"""A fit by inputs, and a repair, that are stopped: run again, they give the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from learned import make_learned
from stops import stopping_at

import streamer
from streamer.errors import InputChangedError, Interrupted
from streamer.events import Event, Monitor


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_learned(tmp_path_factory.mktemp("repair"), sequences=32)


def run(home: Path, output: Path, **options: Any) -> None:
    streamer.repair_adapter(
        home / "base", home / "adapter", output, general=home / "general.npy", task=home / "task.npy", **options
    )


def contents(output: Path) -> dict[str, bytes]:
    files = [*output.rglob("*"), output.with_name(f"{output.name}.fit.safetensors")]
    return {path.name.replace(output.name, "OUT"): path.read_bytes() for path in files if path.is_file()}


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(home: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    (tmp_path / "whole").mkdir()
    run(home, tmp_path / "whole" / "out", on_event=events.append)
    whole = contents(tmp_path / "whole" / "out")
    fit, write = (sum(event.stage == stage for event in events) for stage in ("fit", "write"))
    assert fit > 20
    assert write > 2
    for stage, number in [
        ("fit", 2),
        ("fit", fit // 2),
        ("fit", fit - 8),
        ("write", write // 2),
    ]:
        place = tmp_path / f"{stage}-{number}"
        place.mkdir()
        with pytest.raises(Interrupted):
            run(home, place / "out", monitor=stopping_at(number, stage))
        assert not (place / "out" / "streamer.json").exists()
        run(home, place / "out", monitor=Monitor())
        assert contents(place / "out") == whole, (stage, number)


def test_a_base_that_changes_meanwhile_is_told(home: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in (home / "base").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    seen = 0

    def change(event: Event) -> None:
        nonlocal seen
        seen += event.stage == "fit"
        if seen == 12:
            weights = base / "model.safetensors"
            weights.write_bytes(weights.read_bytes())

    with pytest.raises(InputChangedError):
        streamer.repair_adapter(base, home / "adapter", tmp_path / "out", general=home / "general.npy", task=home / "task.npy",
                                on_event=change)  # fmt: skip
    assert not (tmp_path / "out").exists()
