"""Several adapters on one base: byte for byte what each alone gives, and the base is read once."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import helpers
import jobs
import pytest
import safetensors
from forks import KILL, server
from helpers import tree_digest

import streamer
from streamer.adapters.batch import holds_adapters, named_adapters
from streamer.cli.main import run as streamer_command
from streamer.detection.findings_size import findings_bytes
from streamer.detection.options import DetectionOptions
from streamer.errors import StorageError, UsageError
from streamer.linalg.torch_state import threads
from streamer.plan.plan import make_batch
from streamer.storage.lock import locked
from streamer.units import format_size

NAMES = ["dora", "lora", "saved"]
WAYS = ["detect", "merge --lambda 0.5", "merge --lambda 0.5 --findings"]


def run(*argv: object, code: int = 0) -> str:
    """Run a command; what it prints, or the error."""
    done = server().run(*argv)
    assert done.code == code, done.err
    return done.out if code == 0 else done.err


class Inputs:
    """A base, a directory of three adapters of different kinds, and what each alone gives, by way and name."""

    def __init__(self, home: Path) -> None:
        self.base, self.adapters = jobs.several(home)
        self.single, self.home = home / "single", home
        self.findings = home / "findings"
        (self.single / "detect").mkdir(parents=True)
        self.findings.mkdir()
        for name in NAMES:
            run("detect", self.base, self.adapters / name, "-o", self.findings / f"{name}.safetensors")
        shutil.copytree(self.findings, self.single / "detect", dirs_exist_ok=True)
        for way in WAYS[1:]:
            verb, *options = way.split()
            for name in NAMES:
                given = [self.findings / f"{name}.safetensors"] if "--findings" in options else []
                run(verb, self.base, self.adapters / name, *options, *given, "-o", self.single / way / name)

    def line(self, way: str, out: Path, *adapters: Path) -> list[object]:
        """The command line for all."""
        verb, *options = way.split()
        given = [self.findings] if "--findings" in options else []
        return [verb, self.base, *(adapters or [self.adapters]), *options, *given, "-o", out]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("several"))


@pytest.mark.parametrize("way", WAYS)
def test_together_they_give_what_each_gives_alone(inputs: Inputs, way: str, tmp_path: Path) -> None:
    expected = tree_digest(inputs.single / way)
    assert len(expected) >= len(NAMES)
    run(*inputs.line(way, tmp_path / "directory"))
    assert tree_digest(tmp_path / "directory") == expected
    # In any order, from anywhere, and however the pages are read.
    paths = [inputs.adapters / name for name in reversed(NAMES)]
    run(*inputs.line(way, tmp_path / "list", *paths), "--io", "pread")
    assert tree_digest(tmp_path / "list") == expected
    # Again there is nothing to do; with one of them gone, that one is made again.
    shutil.rmtree(tmp_path / "list" / "lora") if way != "detect" else (tmp_path / "list/lora.safetensors").unlink()
    for _ in range(2):
        run(*inputs.line(way, tmp_path / "list"))
        assert tree_digest(tmp_path / "list") == expected


def test_a_directory_of_one_adapter_gives_a_directory(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    shutil.copytree(inputs.adapters / "lora", tmp_path / "some" / "lora")
    (tmp_path / "some" / "logs").mkdir()
    run("detect", inputs.base, tmp_path / "some", "-o", tmp_path / "found")
    assert tree_digest(tmp_path / "found") == {
        "lora.safetensors": tree_digest(inputs.findings)["lora.safetensors"],
    }


@pytest.mark.parametrize("way", WAYS)
def test_a_run_killed_anywhere_is_finished_by_the_same_command(inputs: Inputs, way: str, tmp_path: Path) -> None:
    expected = tree_digest(inputs.single / way)
    calls = len(server().run(*inputs.line(way, tmp_path / "whole")).calls)
    for n in range(3, calls, calls // 7):
        out = tmp_path / str(n)
        assert server().run(*inputs.line(way, out), at=n, code=KILL).code == -signal.SIGKILL
        standing = {k: v for k, v in tree_digest(out).items() if not Path(k).name.startswith(".")}
        assert standing.items() <= expected.items()
        run(*inputs.line(way, out))
        assert tree_digest(out) == expected


def test_shards_that_one_output_has_already_are_kept(inputs: Inputs, tmp_path: Path) -> None:
    """A killed merge of one adapter is taken up by a merge of all, which are then at different shards."""
    way, out = WAYS[2], tmp_path / "out"
    alone = inputs.line(way, out / "lora", inputs.adapters / "lora")
    alone[alone.index(inputs.findings)] = inputs.findings / "lora.safetensors"
    shards = sorted(n for n in tree_digest(inputs.single / way / "lora") if n.startswith("model-"))
    for n in range(20, 500, 3):
        assert server().run(*alone, at=n, code=KILL).code == -signal.SIGKILL
        if (out / "lora" / shards[1]).exists():
            break
        shutil.rmtree(out)
    kept = (out / "lora" / shards[0]).stat().st_ino
    assert not (out / "lora" / shards[2]).exists()
    run(*inputs.line(way, out))
    assert tree_digest(out) == tree_digest(inputs.single / way)
    assert (out / "lora" / shards[0]).stat().st_ino == kept


def test_each_output_is_locked(inputs: Inputs, tmp_path: Path) -> None:
    for way, lock in ((WAYS[1], "saved/.streamer.lock"), ("detect", ".saved.safetensors.lock")):
        out = tmp_path / way.split()[0]
        (out / lock).parent.mkdir(parents=True)
        with locked(out / lock):
            assert "another run is writing here" in run(*inputs.line(way, out), code=5)
        run(*inputs.line(way, out))
        assert tree_digest(out) == tree_digest(inputs.single / way)


def test_one_that_is_locked_leaves_the_others_as_they_were(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(*inputs.line(WAYS[1], out))
    before = tree_digest(out)
    with locked(out / "saved" / ".streamer.lock"):
        error = run(*inputs.line("merge --lambda 0.25 --overwrite", out), code=5)
    assert "saved: another run is writing here" in error
    assert tree_digest(out) == before


@pytest.mark.parametrize("way", WAYS)
def test_an_output_that_is_a_link_is_not_followed(inputs: Inputs, way: str, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for target in ("real", "nowhere"):
        (tmp_path / "link").symlink_to(tmp_path / target)
        assert "link: is a symlink, and writing never follows one" in run(*inputs.line(way, tmp_path / "link"), code=4)
        (tmp_path / "link").unlink()
    assert list((tmp_path / "real").iterdir()) == []


def test_an_output_stays_out_of_the_inputs_of_the_others(inputs: Inputs, tmp_path: Path) -> None:
    inside = tmp_path / "out" / "lora" / "dora"
    shutil.copytree(inputs.adapters / "dora", inside)
    error = run(*inputs.line(WAYS[1], tmp_path / "out", inputs.adapters / "lora", inside), code=4)
    assert f"lora: contains the input {inside}" in error
    assert tree_digest(tmp_path / "out") == {f"lora/dora/{k}": v for k, v in tree_digest(inside).items()}


def test_two_of_one_name_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    again = tmp_path / "lora"
    shutil.copytree(inputs.adapters / "lora", again)
    for way in WAYS:
        error = run(*inputs.line(way, tmp_path / "out", inputs.adapters, again), code=2)
        assert f"{again}: has the same name as {inputs.adapters / 'lora'}" in error
    assert not (tmp_path / "out").exists()


def test_one_that_is_given_twice_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(inputs.adapters)
    for again in (inputs.adapters / "lora", tmp_path / "link" / "lora"):
        error = run(*inputs.line("detect", tmp_path / "out", inputs.adapters, again), code=2)
        assert f"{again}: is given twice; name it once" in error


@pytest.mark.parametrize("lacking", ["adapter_config.json", "adapter_model.safetensors"])
def test_one_of_a_directory_that_is_not_whole_is_refused_by_name(inputs: Inputs, lacking: str, tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    shutil.copytree(inputs.adapters, adapters)
    (adapters / "notes").mkdir()
    (adapters / "notes" / "readme.md").write_text("of no adapter")
    (adapters / "dora" / lacking).unlink()
    assert list(named_adapters([adapters])) == NAMES
    error = run(*inputs.line("detect", tmp_path / "out", adapters), code=3)
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


def test_too_long_a_name_is_refused_before_a_byte_is_written(inputs: Inputs, tmp_path: Path) -> None:
    for length in (250, 230):  # too long for its lock, and only for the partial file at the very end
        long = tmp_path / ("n" * length)
        shutil.copytree(inputs.adapters / "lora", long)
        error = run(*inputs.line("detect", tmp_path / "out", inputs.adapters / "dora", long), code=4)
        assert f"{long.name}.safetensors: its name is too long" in error
    for way in WAYS:
        error = run(*inputs.line(way, tmp_path / ("o" * 256)), code=2)
        assert error.endswith("ooo: File name too long; choose a shorter name\n")
    assert not (tmp_path / "out").exists()


def test_what_to_do_where_descriptors_run_out(inputs: Inputs) -> None:
    lowest = os.dup(0)
    os.close(lowest)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 2, hard))
    try:
        with pytest.raises(
            StorageError, match="Too many open files; take fewer adapters at once, or raise `ulimit -n`"
        ):
            make_batch(inputs.base, [inputs.adapters / name for name in NAMES])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_model_in_a_directory_of_adapters_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    shutil.copytree(inputs.adapters, tmp_path / "adapters")
    shutil.copytree(inputs.base, tmp_path / "adapters" / "tuned")
    error = run(*inputs.line("detect", tmp_path / "out", tmp_path / "adapters"), code=2)
    assert f"{tmp_path / 'adapters'}: holds a model beside the adapters, 'tuned'" in error


@pytest.mark.parametrize("way", WAYS)
def test_of_several_the_output_is_no_file(inputs: Inputs, way: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for more in [], ["--dry-run"], ["--overwrite"]:
        error = run(*inputs.line(way, tmp_path / "out"), *more, code=4)
        assert f"{tmp_path / 'out'}: of several adapters -o is a directory, found a file" in error
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("way", WAYS)
def test_one_that_is_bad_stops_all_before_a_byte_is_written(inputs: Inputs, way: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(inputs.adapters / "lora", bad)
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**config, "alora_invocation_tokens": [1]}))
    shutil.copytree(inputs.findings, tmp_path / "findings")
    shutil.copy(tmp_path / "findings/lora.safetensors", tmp_path / "findings/bad.safetensors")
    line = [tmp_path / "findings" if a == inputs.findings else a for a in inputs.line(way, tmp_path / "out")]
    error = run(*line[:2], inputs.adapters / "lora", bad, *line[3:], code=3)
    assert f"{bad / 'adapter_config.json'}: refused" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", WAYS)
def test_an_output_in_an_input_or_in_anothers_place_is_refused(inputs: Inputs, way: str, tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    shutil.copytree(inputs.adapters, adapters)
    before = tree_digest(adapters)
    if way != "detect":
        assert "is the input" in run(*inputs.line(way, adapters, adapters), code=4)
    assert "lies inside the input" in run(*inputs.line(way, adapters / "lora", adapters), code=4)
    assert tree_digest(adapters) == before
    out = tmp_path / "out"
    foreign = out / ("saved.safetensors" if way == "detect" else "saved/model.safetensors.index.json")
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    run(*inputs.line(way, out, adapters), code=4)
    assert tree_digest(out).keys() == {str(foreign.relative_to(out))}


def test_findings_are_a_directory_with_those_on_each(inputs: Inputs, tmp_path: Path) -> None:
    way, out, some = WAYS[2], tmp_path / "out", tmp_path / "findings"
    shutil.copytree(inputs.findings, some)
    line = [some if a == inputs.findings else a for a in inputs.line(way, out)]
    (some / "saved.safetensors").unlink()
    assert f"{some / 'saved.safetensors'}: no such file" in run(*line, code=3)
    shutil.copy(some / "lora.safetensors", some / "saved.safetensors")
    assert "made with another adapter" in run(*line, code=3)
    line[line.index(some)] = some / "lora.safetensors"
    assert "expected findings on several adapters: the directory" in run(*line, code=2)
    line = ["merge", inputs.base, inputs.adapters / "lora", "--findings", some, "-o", out]
    assert f"{some}: expected a findings file, found a directory; name the findings file in it" in run(*line, code=3)
    assert not out.exists()


def test_inspect_and_mitigate_take_one(inputs: Inputs, tmp_path: Path) -> None:
    for line in (
        ("inspect", inputs.base, inputs.adapters),
        ("mitigate", inputs.base, inputs.adapters, "-o", tmp_path / "o"),
    ):
        assert f"{inputs.adapters}: expected adapter_config.json" in run(*line, code=3)
        assert "name one of the adapters in it: 'dora', 'lora', 'saved'" in run(*line, code=3)


@pytest.mark.parametrize("way", WAYS)
def test_json_holds_the_object_of_each(inputs: Inputs, way: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = json.loads(run(*inputs.line(way, out), "--dry-run", "--json"))
    assert not out.exists()
    tree = json.loads(run(*inputs.line(way, out), "--json"))
    assert planned["schema"] == tree["schema"] == "streamer.several/1"
    assert list(planned["adapters"]) == list(tree["adapters"]) == NAMES
    for name in NAMES:
        plan, done = planned["adapters"][name], tree["adapters"][name]
        assert (plan["schema"], plan["state"]) == ("streamer.dry-run/1", "new")
        assert plan["output"] == str(out / (f"{name}.safetensors" if way == "detect" else name))
        assert plan["matrices"] == done["totals"]["matrices"]
        if way != "detect":
            assert done["output"] == plan["output"]
            assert 0 <= plan["bytes"] - done["totals"]["bytes"] < 100  # the card's size is known to a few figures
    again = json.loads(run(*inputs.line(way, out), "--dry-run", "--json"))
    assert {plan["state"] for plan in again["adapters"].values()} == {"done"}
    assert again["forecast"] is None
    short = run(*inputs.line(way, tmp_path / "text"))
    assert [line.split()[0] for line in short.splitlines()[2:5]] == NAMES
    full = run(*inputs.line(way, tmp_path / "text"), "--all")
    assert [line for line in full.splitlines() if line in NAMES] == NAMES


def bytes_of_matrices(base: Path) -> int:
    found = 0
    for path in base.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as f:
            tensors = [f.get_tensor(name) for name in f.keys()]  # noqa: SIM118
        found += sum(t.nbytes for t in tensors if t.dim() == 2)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_the_forecast_of_all_has_the_base_once(inputs: Inputs, way: str, tmp_path: Path) -> None:
    names, out, findings = ["first", "second", "third"], tmp_path / "out", tmp_path / "findings"
    findings.mkdir()
    for name in names:
        shutil.copytree(inputs.adapters / "lora", tmp_path / name)
        shutil.copy(inputs.findings / "lora.safetensors", findings / f"{name}.safetensors")
    verb, base, *rest = inputs.line(way, out, *(tmp_path / name for name in names))
    line = [verb, base, *(findings if a == inputs.findings else a for a in rest)]
    tree = json.loads(run(*line, "--dry-run", "--json"))
    each = [tree["adapters"][name]["forecast"] for name in names]
    shared = 0 if verb == "detect" else sum(p.stat().st_size for p in inputs.base.glob("*.safetensors"))
    if way != WAYS[2]:
        shared += bytes_of_matrices(inputs.base)
    total = tree["forecast"]
    assert total["read_bytes"] == sum(f["read_bytes"] for f in each) - 2 * shared
    assert total["write_bytes"] == sum(f["write_bytes"] for f in each)
    assert total["temporary_bytes"] == sum(f["temporary_bytes"] for f in each)
    assert total["peak_memory_bytes"] == max(f["peak_memory_bytes"] for f in each)
    assert total["escalated_memory_bytes"] == max(f["escalated_memory_bytes"] for f in each)
    assert total["seconds"] == pytest.approx(sum(f["seconds"] for f in each))
    assert tree["free_bytes"] > 0
    text = run(*line, "--dry-run")
    assert text.count("forecast: ") == text.count(" free") == 1
    # What stands already takes nothing.
    given = [inputs.findings / "lora.safetensors"] if way == WAYS[2] else []
    run(verb, base, tmp_path / "first", *way.split()[1:], *given, "-o", tmp_path / "one.safetensors")
    out.mkdir()
    (tmp_path / "one.safetensors").rename(out / ("first.safetensors" if verb == "detect" else "first"))
    tree = json.loads(run(*line, "--dry-run", "--json"))
    assert tree["adapters"]["first"]["forecast"] is None
    others = [tree["adapters"][name]["forecast"] for name in names[1:]]
    assert tree["forecast"]["read_bytes"] == sum(f["read_bytes"] for f in others) - shared


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The last bits of findings depend on the number of threads; those of the commands to compare with are made on one."""
    with threads():
        yield


@pytest.mark.usefixtures("one_thread")
def test_the_library_gives_a_dict(inputs: Inputs, tmp_path: Path) -> None:
    paths = [inputs.adapters / name for name in NAMES]
    found = streamer.detect_intruder_dimensions(inputs.base, paths)
    written = streamer.detect_intruder_dimensions(inputs.base, [inputs.adapters], tmp_path / "found")
    assert list(found) == list(written) == NAMES
    assert [found[n].digest() for n in NAMES] == [written[n].digest() for n in NAMES]
    for name, path in zip(NAMES, paths, strict=True):
        alone = streamer.detect_intruder_dimensions(inputs.base, path)
        assert [m.figures() for m in alone] == [m.figures() for m in found[name]]
    records = streamer.merge_with_reduced_intruder_dimensions(
        inputs.base, paths, tmp_path / "merged", findings=found, mitigation_lambda=0.5
    )
    assert list(records) == NAMES
    for name in NAMES:
        mine = tree_digest(tmp_path / "merged" / name)
        assert mine == tree_digest(inputs.single / WAYS[2] / name)
        out = tmp_path / "merged" / name
        stands = json.loads((out / "streamer.json").read_text())
        assert records[name] == {**stands, "output": str(out), "state": "written"}
    del found["saved"]
    with pytest.raises(UsageError, match="findings: has none for adapter 'saved'; run detect on it"):
        streamer.merge_with_reduced_intruder_dimensions(inputs.base, paths, tmp_path / "no", findings=found)
    with pytest.raises(UsageError, match="expected at least one, found none"):
        streamer.detect_intruder_dimensions(inputs.base, [])


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b", "a", ".hidden"):
        helpers.write_adapter(tmp_path / "many" / name, {}, r=1)
    assert holds_adapters(tmp_path / "many")
    assert not holds_adapters(tmp_path / "many" / "a")
    assert not holds_adapters(tmp_path / "nothing")
    assert named_adapters(str(tmp_path / "many")) == {"": tmp_path / "many"}
    assert list(named_adapters([tmp_path / "many"])) == ["a", "b"]
    # A training run keeps its checkpoints inside: it is an adapter all the same.
    shutil.copy(tmp_path / "many/a/adapter_config.json", tmp_path / "many")
    assert not holds_adapters(tmp_path / "many")
    assert list(named_adapters([tmp_path / "many", tmp_path / "many" / "b" / ".." / "b"])) == ["many", "b"]
    monkeypatch.chdir(tmp_path / "many")
    assert list(named_adapters([".", "b"])) == ["many", "b"]


def test_all_outputs_must_fit_on_the_disk(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [inputs.adapters / name for name in NAMES]
    sizes = [
        sum(p.stat().st_size for p in (inputs.single / WAYS[1] / name).rglob("*") if p.is_file()) for name in NAMES
    ]
    free = sum(sizes) - max(sizes) // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    merge = streamer.merge_with_reduced_intruder_dimensions
    with pytest.raises(StorageError, match=rf"out: needs [\d.]+ kB, the disk has {re.escape(format_size(free))} free"):
        merge(inputs.base, paths, tmp_path / "out", mitigation_lambda=1)
    assert not (tmp_path / "out").exists()
    # What stands need not fit once more.
    merge(inputs.base, [paths[0]], tmp_path / "out", mitigation_lambda=1)
    merge(inputs.base, paths, tmp_path / "out", mitigation_lambda=1)
    assert sorted(os.listdir(tmp_path / "out")) == NAMES


def test_all_findings_must_fit_on_the_disk(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = make_batch(inputs.base, [inputs.adapters / name for name in NAMES]).plans
    needed = [sum(findings_bytes(plan, DetectionOptions())) for plan in plans]
    free = sum(needed) - 1
    assert free > max(needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    out = tmp_path / "out"
    for more in [], ["--dry-run"]:
        assert streamer_command(["detect", str(inputs.base), str(inputs.adapters), "-o", str(out), *more]) == 6
        assert f"{out}: needs up to {free + 1} B, the disk has {free} B free" in capsys.readouterr().err
        assert not out.exists()


def test_a_fine_tuned_model_goes_along(inputs: Inputs, tmp_path: Path) -> None:
    tuned = inputs.single / WAYS[1] / "lora"
    names = ["saved", "lora"]
    found = streamer.detect_intruder_dimensions(inputs.base, [inputs.adapters / "saved", tuned])
    assert list(found) == names
    alone = [streamer.detect_intruder_dimensions(inputs.base, path) for path in (inputs.adapters / "saved", tuned)]
    assert [found[n].digest() for n in names] == [findings.digest() for findings in alone]


READ = """
import sys, torch
torch.set_num_threads(1)
import streamer.cli.main, streamer.api, streamer.cli.json_report
def rchar(): return int(open("/proc/self/io").read().split()[1])
before = rchar()
assert streamer.cli.main.run(sys.argv[1:]) == 0
print(rchar() - before)
"""


def read_by(*argv: object) -> int:
    """Bytes that a command reads by system calls, as the kernel counts them."""
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, argv)], env=helpers.ENV, text=True, capture_output=True, check=True
    )
    return int(done.stdout.split()[-1])


def test_detection_reads_the_base_once(tmp_path: Path) -> None:
    base, adapter = helpers.three_shards(tmp_path, hidden=256)
    size = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    adapters = [adapter, *(Path(shutil.copytree(adapter, tmp_path / name)) for name in ("second", "third"))]
    options = ("--io", "pread", "--quiet", "--solver", "certified", "--top-k", "1")
    one = read_by("detect", base, adapter, "-o", tmp_path / "one.safetensors", *options)
    three = read_by("detect", base, *adapters, "-o", tmp_path / "three", *options)
    assert one > size
    assert three - one < size / 4 + 2 * 3 * sum(p.stat().st_size for p in adapter.iterdir())


def test_a_forecast_counts_what_is_read(tmp_path: Path) -> None:
    """Samples, headers and digests included; what a process reads besides, of its own modules, is an eighth of this base at most."""
    base, adapter = helpers.three_shards(tmp_path, hidden=256)
    size = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    line = ["merge", base, adapter, "-o", tmp_path / "out", "--lambda", "1", "--io", "pread"]
    forecast = json.loads(run(*line, "--dry-run", "--json"))["forecast"]["read_bytes"]
    assert forecast <= read_by(*line, "--quiet") < forecast + size / 8


class Cache:
    """The system's page cache, as it is told to read ahead and to drop: which pages come from the disk, and how often."""

    PAGE = 1 << 12

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = {p.stat().st_ino: p.stat().st_size for p in files}
        self.held: dict[int, set[int]] = {ino: set() for ino in self.files}
        self.from_disk = 0

    def read(self, fd: int, at: int, length: int) -> None:
        ino = os.fstat(fd).st_ino
        if ino in self.files:
            pages = set(range(at // self.PAGE, -(-min(at + length, self.files[ino]) // self.PAGE)))
            self.from_disk += len(pages - self.held[ino]) * self.PAGE
            self.held[ino] |= pages

    def advise(self, fd: int, at: int, length: int, what: int) -> None:
        ino = os.fstat(fd).st_ino
        if ino in self.files and what == os.POSIX_FADV_WILLNEED:
            self.read(fd, at, length)
        elif ino in self.files:
            self.held[ino] -= set(range(-(-at // self.PAGE), (at + length) // self.PAGE))


def test_merging_reads_the_base_once_and_lets_it_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = helpers.three_shards(tmp_path, hidden=1024)
    second = Path(shutil.copytree(adapter, tmp_path / "second"))
    files = sorted(base.glob("*.safetensors"))
    size = sum(p.stat().st_size for p in files)
    cache = Cache(files)
    preadv, fadvise = os.preadv, os.posix_fadvise

    def watched_preadv(fd: int, buffers: Sequence[memoryview], at: int) -> int:
        cache.read(fd, at, sum(map(len, buffers)))
        return preadv(fd, buffers, at)

    def watched_fadvise(fd: int, at: int, length: int, what: int) -> None:
        cache.advise(fd, at, length, what)
        fadvise(fd, at, length, what)

    monkeypatch.setattr(os, "preadv", watched_preadv)
    monkeypatch.setattr(os, "posix_fadvise", watched_fadvise)

    def merged(*adapters: Path) -> float:
        """Bytes from the disk, over the base's size."""
        cache.from_disk = 0
        out = tmp_path / f"out of {len(adapters)}"
        streamer.merge_with_reduced_intruder_dimensions(base, list(adapters), out, mitigation_lambda=1)
        return cache.from_disk / size

    alone = merged(adapter)
    assert alone < 1.1
    assert merged(adapter, second) < alone + 0.1
    # Of each file the last pages stay, which are fewer than one step.
    assert all(len(pages) * cache.PAGE < (1 << 20) + (2 << 12) for pages in cache.held.values())
    # One after the other, they read it twice.
    shutil.rmtree(tmp_path / "out of 1")
    assert merged(second) > 0.9
