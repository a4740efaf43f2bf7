"""Several adapters on one base: byte for byte what each alone gives, and the base is read once; an error names its adapter."""

import gc
import json
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from forks import server
from helpers import intruding_factors, power_law, tree_digest, write_adapter, write_sharded
from safetensors.torch import load_file, save_file
from several import NAMES, WAYS, Several, run
from test_schemas import faults

import streamer
from streamer.adapters.finetuned import named_adapters
from streamer.detection.findings import Findings
from streamer.errors import NumericError, StorageError, UsageError
from streamer.linalg.torch_state import threads
from streamer.plan.plan import make_batch


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Several:
    return Several(tmp_path_factory.mktemp("several"))


@pytest.mark.parametrize("way", WAYS)
def test_together_they_give_what_each_gives_alone(
    several: Several, way: str, tmp_path: Path
) -> None:
    expected = tree_digest(several.alone(way))
    assert len(expected) >= len(NAMES)
    run(*several.line(way, tmp_path / "directory"))
    assert tree_digest(tmp_path / "directory") == expected
    # In any order, from anywhere, and however the pages are read.
    paths = [several.adapters / name for name in reversed(NAMES)]
    run(*several.line(way, tmp_path / "list", *paths), "--io", "pread")
    assert tree_digest(tmp_path / "list") == expected
    # Again there is nothing to do; with one of them gone, that one is made again.
    shutil.rmtree(tmp_path / "list" / "lora") if way != "detect" else (
        tmp_path / "list/lora.safetensors"
    ).unlink()
    for _ in range(2):
        run(*several.line(way, tmp_path / "list"))
        assert tree_digest(tmp_path / "list") == expected


def test_a_directory_of_one_adapter_gives_a_directory(several: Several, tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    shutil.copytree(several.adapters / "lora", tmp_path / "some" / "lora")
    (tmp_path / "some" / "logs").mkdir()
    run("detect", several.base, tmp_path / "some", "-o", tmp_path / "found")
    assert tree_digest(tmp_path / "found") == {
        "lora.safetensors": tree_digest(several.findings)["lora.safetensors"]
    }


@pytest.mark.parametrize("way", WAYS)
def test_an_output_that_is_a_link_is_not_followed(
    several: Several, way: str, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    for target in ("real", "nowhere"):
        (tmp_path / "link").symlink_to(tmp_path / target)
        assert "link: is a symlink, and writing never follows one" in run(
            *several.line(way, tmp_path / "link"), code=4
        )
        (tmp_path / "link").unlink()
    assert list((tmp_path / "real").iterdir()) == []


def test_an_output_stays_out_of_the_inputs_of_the_others(several: Several, tmp_path: Path) -> None:
    inside = tmp_path / "out" / "lora" / "dora"
    shutil.copytree(several.adapters / "dora", inside)
    error = run(*several.line(WAYS[1], tmp_path / "out", several.adapters / "lora", inside), code=4)
    assert f"lora: contains the input {inside}" in error
    assert tree_digest(tmp_path / "out") == {
        f"lora/dora/{k}": v for k, v in tree_digest(inside).items()
    }


def test_two_of_one_name_are_refused(several: Several, tmp_path: Path) -> None:
    again = tmp_path / "lora"
    shutil.copytree(several.adapters / "lora", again)
    for way in WAYS:
        error = run(*several.line(way, tmp_path / "out", several.adapters, again), code=2)
        assert f"{again}: has the same name as {several.adapters / 'lora'}" in error
    assert not (tmp_path / "out").exists()


def test_one_that_is_given_twice_is_refused(several: Several, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(several.adapters)
    for again in (several.adapters / "lora", tmp_path / "link" / "lora"):
        error = run(*several.line("detect", tmp_path / "out", several.adapters, again), code=2)
        assert f"{again}: is given twice; name it once" in error


@pytest.mark.parametrize("lacking", ["adapter_config.json", "adapter_model.safetensors"])
def test_one_of_a_directory_that_is_not_whole_is_refused_by_name(
    several: Several, lacking: str, tmp_path: Path
) -> None:
    adapters = tmp_path / "adapters"
    shutil.copytree(several.adapters, adapters)
    (adapters / "notes").mkdir()
    (adapters / "notes" / "readme.md").write_text("of no adapter")
    (adapters / "dora" / lacking).unlink()
    assert list(named_adapters([adapters])) == NAMES
    error = run(*several.line("detect", tmp_path / "out", adapters), code=3)
    assert f"{adapters / 'dora'}" in error
    assert lacking in error
    # As a pickle, or as a link into a cache that is gone.
    (adapters / "dora" / "adapter_config.json").unlink(missing_ok=True)
    (adapters / "dora" / "adapter_model.safetensors").unlink(missing_ok=True)
    assert list(named_adapters([adapters])) == NAMES[1:]
    for name in ("adapter_model.bin", "adapter_config.json"):
        (adapters / "dora" / name).symlink_to(tmp_path / "gone")
        assert list(named_adapters([adapters])) == NAMES
        (adapters / "dora" / name).unlink()


def test_too_long_a_name_is_refused_before_a_byte_is_written(
    several: Several, tmp_path: Path
) -> None:
    for length in (
        250,
        230,
    ):  # too long for its lock, and only for the partial file at the very end
        long = tmp_path / ("n" * length)
        shutil.copytree(several.adapters / "lora", long)
        error = run(
            *several.line("detect", tmp_path / "out", several.adapters / "dora", long), code=4
        )
        assert f"{long.name}.safetensors: its name is too long" in error
    for way in WAYS:
        error = run(*several.line(way, tmp_path / ("o" * 256)), code=2)
        assert error.endswith("ooo: File name too long; choose a shorter name\n")
    assert not (tmp_path / "out").exists()


def test_what_to_do_where_descriptors_run_out(several: Several) -> None:
    gc.collect()  # or files that earlier tests left in cycles are closed on the way, and make room
    lowest = os.dup(0)
    os.close(lowest)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 2, hard))
    try:
        with pytest.raises(
            StorageError,
            match="Too many open files; take fewer adapters at once, or raise `ulimit -n`",
        ):
            make_batch(several.base, [several.adapters / name for name in NAMES])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_model_in_a_directory_of_adapters_is_refused(several: Several, tmp_path: Path) -> None:
    shutil.copytree(several.adapters, tmp_path / "adapters")
    shutil.copytree(several.base, tmp_path / "adapters" / "tuned")
    error = run(*several.line("detect", tmp_path / "out", tmp_path / "adapters"), code=2)
    assert f"{tmp_path / 'adapters'}: holds a model beside the adapters, 'tuned'" in error


@pytest.mark.parametrize("way", WAYS)
def test_of_several_the_output_is_no_file(several: Several, way: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for more in [], ["--dry-run"], ["--overwrite"]:
        error = run(*several.line(way, tmp_path / "out"), *more, code=4)
        assert f"{tmp_path / 'out'}: for several adapters -o is a directory, found a file" in error
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("way", WAYS)
def test_one_that_is_bad_stops_all_before_a_byte_is_written(
    several: Several, way: str, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(several.adapters / "lora", bad)
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**config, "alora_invocation_tokens": [1]}))
    shutil.copytree(several.findings, tmp_path / "findings")
    shutil.copy(tmp_path / "findings/lora.safetensors", tmp_path / "findings/bad.safetensors")
    line = [
        tmp_path / "findings" if a == several.findings else a
        for a in several.line(way, tmp_path / "out")
    ]
    error = run(*line[:2], several.adapters / "lora", bad, *line[3:], code=3)
    assert f"{bad / 'adapter_config.json'}: refused" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", WAYS)
def test_an_output_in_an_input_or_in_anothers_place_is_refused(
    several: Several, way: str, tmp_path: Path
) -> None:
    adapters = tmp_path / "adapters"
    shutil.copytree(several.adapters, adapters)
    before = tree_digest(adapters)
    if way != "detect":
        assert "is the input" in run(*several.line(way, adapters, adapters), code=4)
    assert "lies inside the input" in run(*several.line(way, adapters / "lora", adapters), code=4)
    assert tree_digest(adapters) == before
    out = tmp_path / "out"
    foreign = out / (
        "saved.safetensors" if way == "detect" else "saved/model.safetensors.index.json"
    )
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    run(*several.line(way, out, adapters), code=4)
    assert tree_digest(out).keys() == {str(foreign.relative_to(out))}


def test_findings_are_a_directory_with_those_on_each(several: Several, tmp_path: Path) -> None:
    way = WAYS[2]
    out = tmp_path / "out"
    some = tmp_path / "findings"
    shutil.copytree(several.findings, some)
    line = [some if a == several.findings else a for a in several.line(way, out)]
    (some / "saved.safetensors").unlink()
    assert f"{some / 'saved.safetensors'}: no such file" in run(*line, code=3)
    shutil.copy(some / "lora.safetensors", some / "saved.safetensors")
    assert "made with another adapter" in run(*line, code=3)
    line[line.index(some)] = some / "lora.safetensors"
    assert "expected findings on several adapters: the directory" in run(*line, code=2)
    line = ["merge", several.base, several.adapters / "lora", "--findings", some, "-o", out]
    assert (
        f"{some}: expected a findings file, found a directory; name the findings file in it"
        in run(*line, code=3)
    )
    assert not out.exists()


def test_what_is_lost_in_projection_is_said_of_each(several: Several, tmp_path: Path) -> None:
    twice = tmp_path / "twice"
    for name in ("first", "second"):
        shutil.copytree(several.adapters / "lora", twice / name)
    done = server().run(
        "mitigate", several.base, twice, "-o", tmp_path / "out", "--lambda", "0", "-q"
    )
    lost = [
        line
        for line in (done.err + done.last).splitlines()
        if line.startswith("streamer: warning: lost in projection")
    ]
    assert [line.partition(" loses nothing ")[2] for line in lost] == [
        "(adapter 'first')",
        "(adapter 'second')",
    ]


def test_inspect_takes_one(several: Several) -> None:
    line = run("inspect", several.base, several.adapters, code=3)
    assert (
        f"{several.adapters}: expected adapter_config.json, found dora, lora, saved; name an adapter"
        in line
    )


@pytest.mark.parametrize("way", WAYS)
def test_json_holds_the_object_of_each(several: Several, way: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = json.loads(run(*several.line(way, out), "--dry-run", "--json"))
    assert not out.exists()
    tree = json.loads(run(*several.line(way, out), "--json"))
    assert planned["schema"] == tree["schema"] == "streamer.several/1"
    assert faults(planned) == faults(tree) == []
    assert list(planned["adapters"]) == list(tree["adapters"]) == NAMES
    for name in NAMES:
        plan = planned["adapters"][name]
        done = tree["adapters"][name]
        assert (plan["schema"], plan["state"], plan["matrices"]) == (
            "streamer.dry-run/1",
            "new",
            done["totals"]["matrices"],
        )
        assert plan["output"] == str(out / (f"{name}.safetensors" if way == "detect" else name))
    again = json.loads(run(*several.line(way, out), "--dry-run", "--json"))
    assert {plan["state"] for plan in again["adapters"].values()} == {"done"}
    assert again["forecast"] is None
    short = run(*several.line(way, tmp_path / "text"))
    assert [line.split()[0] for line in short.splitlines()[2:5]] == NAMES
    full = run(*several.line(way, tmp_path / "text"), "--all")
    assert [line for line in full.splitlines() if line in NAMES] == NAMES


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The last bits of findings depend on the number of threads; those of the commands to compare with are made on one."""
    with threads():
        yield


@pytest.mark.usefixtures("one_thread")
def test_the_library_gives_a_dict(several: Several, tmp_path: Path) -> None:
    paths = [several.adapters / name for name in NAMES]
    found = streamer.detect_intruder_dimensions(several.base, paths)
    written = streamer.detect_intruder_dimensions(
        several.base, [several.adapters], tmp_path / "found"
    )
    assert list(found) == list(written) == NAMES
    assert [found[n].digest() for n in NAMES] == [written[n].digest() for n in NAMES]
    for name, path in zip(NAMES, paths, strict=True):
        alone = streamer.detect_intruder_dimensions(several.base, path)
        assert [m.figures() for m in alone] == [m.figures() for m in found[name]]
    records = streamer.merge_with_reduced_intruder_dimensions(
        several.base, paths, tmp_path / "merged", findings=found, mitigation_lambda=0.5
    )
    assert list(records) == NAMES
    for name in NAMES:
        mine = tree_digest(tmp_path / "merged" / name)
        assert mine == tree_digest(several.alone(WAYS[2]) / name)
        out = tmp_path / "merged" / name
        stands = json.loads((out / "streamer.json").read_text())
        assert records[name] == {**stands, "output": str(out), "state": "written"}
    reduced = streamer.reduce_intruder_dimension(
        several.base,
        [several.adapters],
        tmp_path / "reduced",
        findings=found,
        mitigation_lambda=0.5,
        to_lora=3,
    )
    assert list(reduced) == NAMES
    assert tree_digest(tmp_path / "reduced") == tree_digest(several.alone(WAYS[3]))
    del found["saved"]
    with pytest.raises(
        UsageError, match="findings: has none for adapter 'saved'; run detect on it"
    ):
        streamer.merge_with_reduced_intruder_dimensions(
            several.base, paths, tmp_path / "no", findings=found
        )
    with pytest.raises(UsageError, match="expected at least one, found none"):
        streamer.detect_intruder_dimensions(several.base, [])


def test_a_fine_tuned_model_goes_along(several: Several, tmp_path: Path) -> None:
    tuned = several.alone(WAYS[1]) / "lora"
    names = ["saved", "lora"]
    found = streamer.detect_intruder_dimensions(several.base, [several.adapters / "saved", tuned])
    assert list(found) == names
    alone = [
        streamer.detect_intruder_dimensions(several.base, path)
        for path in (several.adapters / "saved", tuned)
    ]
    assert [found[n].digest() for n in names] == [findings.digest() for findings in alone]


SHAPES = {"a.0": (260, 200), "a.1": (200, 260)}
"""Modules: a tall matrix and a wide one."""

OPTIONS = {"solver": "certified"}
"""They are small: the dense solver would be cheaper."""


def make_base(home: Path) -> Path:
    """A base of `SHAPES`."""
    tensors = {
        f"{name}.weight": power_law(*shape, seed=i).bfloat16()
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return write_sharded(home / "base", [tensors])


def make_adapter(path: Path, seed: int, modules: Sequence[str] = tuple(SHAPES)) -> Path:
    """An adapter on some modules."""
    factors = {
        name: intruding_factors(*SHAPES[name], 4, seed=seed, sigma=0.7 + 0.05 * seed)
        for name in modules
    }
    return write_adapter(path, factors, 4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("adapters")
    return [make_adapter(home / f"n{seed}", seed) for seed in range(4)]


def detect(base: Path, adapters: list[Path], *args: Any, **options: Any) -> dict[str, Findings]:
    return streamer.detect_intruder_dimensions(base, adapters, *args, **{**OPTIONS, **options})


@pytest.mark.usefixtures("one_thread")
def test_progress_names_each_adapter_and_seconds_add_up(base: Path, adapters: list[Path]) -> None:
    events = []
    found = streamer.detect_intruder_dimensions(base, adapters, on_event=events.append, **OPTIONS)
    steps = [e for e in events if e.stage == "detect"]
    names = [(f"{module}.weight", adapter.name) for module in SHAPES for adapter in adapters]
    assert [(e.name, e.adapter) for e in steps[:-1]] == names
    assert [e.items for e in steps] == list(range(len(names) + 1))
    assert [e.done for e in steps] == sorted(e.done for e in steps)
    assert all(m.seconds for findings in found.values() for m in findings)


@pytest.mark.usefixtures("one_thread")
def test_an_error_names_its_adapter(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    bad = Path(shutil.copytree(adapters[1], tmp_path / "bad"))
    tensors = load_file(bad / "adapter_model.safetensors")
    tensors["base_model.model.a.1.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, bad / "adapter_model.safetensors", metadata={"format": "pt"})
    events = []
    out = tmp_path / "out"
    with pytest.raises(NumericError, match=r"module 'a.1': lora_A holds NaN or Inf") as e:
        detect(base, [adapters[0], bad, adapters[2]], out, on_event=events.append)
    assert str(e.value).startswith(
        f"{bad / 'adapter_model.safetensors'}: tensor 'a.1.weight' with "
    )
    assert [(e.name, e.adapter) for e in events][-2:] == [
        ("a.1.weight", "n0"),
        ("a.1.weight", "bad"),
    ]
    assert not list(out.glob("*.safetensors"))


@pytest.mark.usefixtures("one_thread")
def test_an_error_of_the_base_names_the_base(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    bad = Path(shutil.copytree(base, tmp_path / "bad"))
    (shard,) = bad.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["a.1.weight"][0, 0] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    for several in (adapters[:3], adapters[:1]):
        with pytest.raises(
            NumericError, match=rf"^{shard}: tensor 'a.1.weight' .* the base matrix"
        ):
            detect(bad, several)
