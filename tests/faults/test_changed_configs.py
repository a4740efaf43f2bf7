"""Runs of models whose inputs change meanwhile or between two runs: refused, or measured anew; resumed, they give the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import stopping_at
from learned import make_learned
from transformers import AutoConfig

import streamer
from streamer.errors import InputChangedError, Interrupted, OutputExistsError
from streamer.events import Event, Monitor

NORM = {"rms_norm_eps": 0.01}
ROPE = {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_learned(tmp_path_factory.mktemp("configs"), 48, 16)


@pytest.fixture
def home(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "home"))


def edit(path: Path, **values: Any) -> None:
    """Change values, and write the file in another order and on one line."""
    tree = json.loads(path.read_text()) | values
    path.write_text(json.dumps(dict(reversed(tree.items()))))


def evaluate(
    home: Path, output: Path, lambdas: tuple[float, ...] = (0.5,), **options: Any
) -> streamer.Evaluation:
    given = {"methods": ["shrink"], "lambdas": lambdas, "sequences": 24, "keep": 1.0}
    return streamer.evaluate_variants(
        home / "base", home / "adapter", output, **texts(home), **given, **options
    )


def repair(home: Path, output: Path, **options: Any) -> None:
    streamer.repair_adapter(
        home / "base", home / "adapter", output, **texts(home), sequences=48, **options
    )


def make_map(home: Path, output: Path, text: str = "general", **options: Any) -> None:
    streamer.map_inputs(home / "base", output, general=home / f"{text}.npy", vectors=4, **options)


def texts(home: Path) -> dict[str, Path]:
    return {"general": home / "general.npy", "task": home / "task.npy"}


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "norm": (
        lambda home: edit(home / "base" / "config.json", **NORM),
        "the base's config: rms_norm_eps",
    ),
    "rope": (
        lambda home: edit(home / "base" / "config.json", **ROPE),
        "the base's config: rope_parameters",
    ),
    "alpha": (
        lambda home: edit(home / "adapter" / "adapter_config.json", lora_alpha=8),
        "the adapter's config: lora_alpha",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_variants_of_another_model_are_not_added(home: Path, change: str) -> None:
    output = home / "e.json"
    evaluate(home, output, monitor=Monitor())
    before = output.read_bytes()
    make, words = CHANGES[change]
    make(home)
    for lambdas in ((0.5,), (0.3,)):
        with pytest.raises(
            OutputExistsError, match=rf"\({words}\); choose another output, or pass --overwrite$"
        ) as error:
            evaluate(home, output, lambdas, monitor=Monitor())
        assert len(str(error.value).removeprefix(str(output))) < 300
    assert output.read_bytes() == before
    evaluate(home, output, overwrite=True, monitor=Monitor())
    evaluate(home, home / "fresh.json", monitor=Monitor())
    assert output.read_bytes() == (home / "fresh.json").read_bytes() != before


def test_an_evaluation_without_configs_is_not_added_to(home: Path) -> None:
    output = home / "e.json"
    evaluate(home, output, monitor=Monitor())
    tree = json.loads(output.read_text())
    del tree["configs"]
    output.write_text(json.dumps(tree))
    assert streamer.load_evaluation(output).variants
    with pytest.raises(OutputExistsError, match=r"the base.s config: "):
        evaluate(home, output, (0.3,), monitor=Monitor())


def spell_differently(home: Path) -> None:
    """Save the config by transformers, then in another order; change what does not determine losses."""
    AutoConfig.from_pretrained(home / "base").save_pretrained(home / "base")
    edit(
        home / "base" / "config.json",
        transformers_version="5.0.0",
        use_cache=False,
        _name_or_path="x/y",
    )
    (home / "base" / "generation_config.json").write_text('{"top_k": 3}')


def test_another_spelling_changes_nothing(home: Path) -> None:
    for lambdas in ((0.5,), (0.5, 0.3)):
        added = evaluate(home, home / "e.json", lambdas, monitor=Monitor())
        fresh = evaluate(home, home / "fresh.json", lambdas, overwrite=True, monitor=Monitor())
        for name in ("base", "adapter", *(f"shrink {lam}" for lam in lambdas)):
            assert added[name]["general"]["loss"] == pytest.approx(
                fresh[name]["general"]["loss"], rel=1e-6
            )
        spell_differently(home)
        edit(
            home / "adapter" / "adapter_config.json",
            inference_mode=False,
            revision="main",
            new_key=None,
        )


RESUMED = {
    "evaluate": ("evaluate", evaluate, "o.json"),
    "repair": ("fit", repair, "o"),
}


@pytest.mark.parametrize("command", RESUMED)
def test_an_interrupted_run_goes_on_with_its_own_config_alone(home: Path, command: str) -> None:
    stage, run, name = RESUMED[command]
    for place in ("out", "fresh"):
        (home / place).mkdir()
    with pytest.raises(Interrupted):
        run(home, home / "out" / name, monitor=stopping_at(2, stage))
    own = (home / "base" / "config.json").read_text()
    edit(home / "base" / "config.json", **NORM)
    with pytest.raises(
        OutputExistsError,
        match=r"interrupted run .* \(the base's config: rms_norm_eps\) has its journal",
    ):
        run(home, home / "out" / name, monitor=Monitor())
    (home / "base" / "config.json").write_text(own)
    spell_differently(home)
    run(home, home / "out" / name, monitor=(monitor := Monitor()))
    assert "resumed" in monitor.outputs.values()
    run(home, home / "fresh" / name, monitor=Monitor())
    assert files(home / "out") == files(home / "fresh")


@pytest.mark.parametrize(("run", "beside"), [(repair, ".fit.safetensors"), (make_map, "")])
def test_a_result_of_another_model_is_refused(
    home: Path, run: Callable[..., None], beside: str
) -> None:
    output = home / "o.safetensors"
    run(home, output, monitor=Monitor())
    spell_differently(home)
    run(home, output, monitor=Monitor())
    edit(home / "base" / "config.json", **ROPE)
    with pytest.raises(
        OutputExistsError,
        match=rf"^{output}{beside}: holds .* \(the base's config: rope_parameters\)",
    ):
        run(home, output, monitor=Monitor())


def test_a_config_that_changes_while_a_map_is_made_is_told(home: Path) -> None:
    def change(event: Event) -> None:
        if event.stage == "map":
            edit(home / "base" / "config.json", **NORM)

    with pytest.raises(InputChangedError, match=r"config\.json: changed since the run began"):
        make_map(home, home / "m.safetensors", on_event=change)
    assert not (home / "m.safetensors").exists()


@pytest.mark.long
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    (tmp_path / "whole").mkdir()
    repair(whole, tmp_path / "whole" / "out", on_event=events.append)
    fit, write = (sum(event.stage == stage for event in events) for stage in ("fit", "write"))
    for stage, number in (("fit", 1), ("fit", fit - 1), ("write", write // 2)):
        place = tmp_path / f"{stage}-{number}"
        place.mkdir()
        with pytest.raises(Interrupted):
            repair(whole, place / "out", monitor=stopping_at(number, stage))
        assert not (place / "out" / "streamer.json").exists()
        repair(whole, place / "out", monitor=Monitor())
        assert files(place) == files(tmp_path / "whole"), (stage, number)
