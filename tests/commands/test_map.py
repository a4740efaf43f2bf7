"""`streamer map` from outside: its lines, its JSON, its forecast, what uses its file, and a line for each thing that is wrong."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import process_mib
from fitted import random_map
from forks import Outcome, Server
from learned import make_learned
from test_schemas import check

import streamer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_learned(tmp_path_factory.mktemp("map"))


def run(
    server: Server, home: Path, output: object, *options: object, text: str = "general.npy"
) -> Outcome:
    return server.run("map", home / "base", "--general", home / text, "-o", output, *options)


def test_a_map_and_what_it_is_for(server: Server, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "m.safetensors"
    base = home / "base"
    adapter = home / "adapter"
    dry = check(run(server, home, file, "--dry-run", "--json"), "streamer.dry-run/1")
    assert (dry["command"], dry["state"], dry["files"]) == ("map", "new", 1)
    assert dry["forecast"]["peak_memory_bytes"] > 200 << 20
    assert not file.parent.exists()
    tree = check(run(server, home, file, "--json"), "streamer.map/1")
    assert (tree["state"], tree["vectors"], tree["lacking"]) == ("written", 16, [])
    assert dry["forecast"]["write_bytes"] >= 0.5 * file.stat().st_size
    found = streamer.load_map(file)
    assert (tree["inputs"], tree["sha256"]) == (len(found.inputs), found.digest)
    assert str(tmp_path) not in json.dumps(dict(found.facts))
    again = run(server, home, file)
    assert again.out.splitlines()[-1] == f"{file} exists already"
    assert again.last.startswith("streamer: map: exists already, in ")
    assert again.out.splitlines()[0].startswith("16 leading vectors of ")
    (line,) = [line for line in again.out.splitlines() if line.startswith("next, for any adapter")]
    made = tmp_path / "made"
    line = (
        line.partition(": streamer ")[2]
        .replace("ADAPTER", str(adapter))
        .replace("OUTPUT", str(made))
    )
    done = server.run(*line.split())
    assert done.code == 0
    assert "method nullspace, lambda 0.3: " in done.out
    assert "each by its energy on general inputs" in done.out
    record = json.loads((made / "streamer.json").read_text())
    assert (record["map"], record["file"]) == (
        {"vectors": 16, "sha256": found.digest},
        "m.safetensors",
    )
    card = (made / "README.md").read_text()
    assert "--lambda 0.3 --method nullspace --map m.safetensors" in card
    assert (
        f"streamer verify OUTPUT {base.name} {adapter.name} --sample all --map m.safetensors"
        in card
    )
    assert f"| map | digest `{found.digest[:16]}` |" in card
    done = server.run("verify", made, base, adapter, "--map", file, "--sample", "all")
    assert (done.code, "each within its rounding" in done.out) == (0, True)
    assert server.run("report", made).code == 0
    for option in ("--coefficients", "--map"):
        done = server.run("verify", made, base, adapter, option, file)
        assert (done.code == 0) == (option == "--map")


def test_an_evaluation_measures_a_map(server: Server, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    other = tmp_path / "o.safetensors"
    run(server, home, file)
    run(server, home, other, "--vectors", 3)
    line = ["evaluate", home / "base", home / "adapter", "-o", tmp_path / "e.json"]
    line += [word for name in ("general", "task") for word in (f"--{name}", home / f"{name}.npy")]
    tree = check(
        server.run(*line, "--method", "shrink", "--lambda", "0.7", "--json"),
        "streamer.evaluation/1",
    )
    assert "map" not in tree
    more = check(
        server.run(*line, "--method", "nullspace", "--lambda", "0.7,0.3", "--map", file, "--json"),
        "streamer.evaluation/1",
    )
    names = [variant["name"] for variant in more["variants"]]
    assert {"shrink 0.7", "nullspace 0.7", "nullspace 0.3"} <= {*names}
    assert more["map"]["vectors"] == 16
    both = streamer.evaluate_variants(
        home / "base",
        home / "adapter",
        general=home / "general.npy",
        task=home / "task.npy",
        methods=("shrink",),
        lambdas=(0.7,),
        map=file,
    )
    assert {"shrink 0.7", "nullspace 0.7"} <= {v.name for v in both.variants}
    done = server.run(*line, "--method", "nullspace", "--lambda", "0.5", "--map", other)
    assert (done.code, "other inputs or options (map)" in done.err) == (4, True)
    done = server.run(*line, "--method", "nullspace")
    assert (done.code, "method 'nullspace' needs a map of the base's inputs" in done.err) == (
        2,
        True,
    )


def test_a_text_that_is_short_for_the_inputs_is_told(home: Path) -> None:
    for sequences, told in (
        (
            2,
            "general.npy: has 6 tokens, fewer than the 16 vectors that are kept of each input; give more text",
        ),
        (
            6,
            "general.npy: has 18 tokens, fewer than the 48 inputs of the widest matrix: of what it does not show, the map keeps the mean",
        ),
        (16, None),
    ):
        warned: list[str] = []
        streamer.map_inputs(
            home / "base",
            general=home / "general.npy",
            sequences=sequences,
            length=3,
            on_event=lambda event, to=warned: (
                to.append(event.name) if event.stage == "warning" else None
            ),
        )
        assert len(warned) == (told is not None), warned
        assert told is None or warned[0].startswith(told)


def test_the_help_offers_nothing_of_adapters(server: Server) -> None:
    for command in ("map", "repair"):
        offered = server.run(command, "--help-all").out
        for option in ("--base-is-residual", "--lora-b-layout", "--ignore-key"):
            assert (option in offered) == (command == "repair")
        assert "--architecture" in offered


def wrong(home: Path, place: Path) -> Iterator[tuple[list[object], int, str]]:
    """Lines of words after `map` that are wrong: exit code, and what is said."""
    np.save(place / "far.npy", np.full((4, 8), 10**6))
    random_map(home / "base", home / "adapter").save(place / "map.safetensors")
    base = home / "base"
    general = ["--general", home / "general.npy"]
    out = ["-o", place / "m.safetensors"]
    yield [base, *general, *out, "--vectors", 0], 2, "expected a whole number from 1"
    yield (
        [base, *general, *out, "--sequences", 1],
        2,
        "--sequences: expected a whole number from 2, found 1",
    )
    yield [base, "--general", place / "absent.npy", *out], 3, "absent.npy: no such file"
    yield [base, "--general", place / "far.npy", *out], 3, "expected token ids from 0 to"
    yield (
        [home / "adapter", *general, *out],
        3,
        "expected model.safetensors, found README.md, adapter_config.json, adapter_model.safetensors; name",
    )
    yield (
        [base, *general, "-o", base / "model.safetensors"],
        4,
        "is not a map, and no other file is replaced",
    )
    yield (
        [base, base, *out],
        2,
        "BASE: expected one; to map several texts, join them in one file, found [",
    )
    yield [place / "map.safetensors", *out], 2, "is a map; name the base to map"
    yield (
        [base, *general, *out, "--max-memory", f"{process_mib() + 20}M"],
        2,
        "is not enough for a sweep of 192 tokens",
    )


def test_a_line_for_each_thing_that_is_wrong(server: Server, home: Path, tmp_path: Path) -> None:
    for words, code, message in wrong(home, tmp_path):
        done = server.run("map", *words)
        assert (done.code, done.out) == (code, ""), (message, done.err)
        assert message in done.err.splitlines()[-1]
    assert not (tmp_path / "m.safetensors").exists()
    (tmp_path / "c.txt").write_text("notes")
    done = run(server, home, tmp_path / "c.txt")
    assert (done.code, "exists and is not a map, and no other file is replaced" in done.err) == (
        4,
        True,
    )
    run(server, home, tmp_path / "m.safetensors")
    done = run(server, home, tmp_path / "m.safetensors", "--vectors", 3)
    assert (done.code, "holds a map of other inputs or options" in done.err) == (4, True)
    line = ("mitigate", home / "base", home / "adapter", "-o", tmp_path / "out")
    for options, message in (
        (
            ["--map", home / "base" / "model.safetensors"],
            "expected a map (streamer.map/2), found another safetensors file",
        ),
        (
            ["--map", tmp_path / "m.safetensors", "--method", "shrink"],
            "--map: method 'shrink' has no such option",
        ),
        (
            ["--map", tmp_path / "m.safetensors", "--lambda", 1.5, "--amplify"],
            "--amplify: method 'nullspace' has no such option",
        ),
        (["--method", "nullspace"], "make one with `streamer map`"),
    ):
        done = server.run(*line, *options)
        assert done.code in (2, 3)
        assert message in done.err
    other = tmp_path / "base"
    other.mkdir()
    for path in (home / "base").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    save_file(
        {name: tensor * 1.5 for name, tensor in tensors.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    done = server.run(line[0], other, *line[2:], "--map", tmp_path / "m.safetensors")
    assert (
        done.code,
        "is a map of another base (the content of model.safetensors differs)" in done.err,
    ) == (3, True)
