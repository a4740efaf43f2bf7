"""--base-index: what is kept of a base serves every adapter on it, and changes no decision."""

from __future__ import annotations

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forks import Outcome, server
from helpers import intruding_factors, names, spectrum_matrix, tree_digest, write_adapter, write_sharded
from safetensors.torch import load_file, save_file

import streamer
from streamer.linalg.torch_state import threads

SHAPES = [(500, 600), (600, 500)]


def falling(p: int) -> torch.Tensor:
    """Singular values ``j^-0.7`` over a bulk."""
    return torch.cat([torch.arange(1, 41).pow(-0.7), torch.linspace(0.03, 0.01, p - 40)])


class Home:
    """A base of two matrices, two adapters on it, their findings without an index, and with one."""

    def __init__(self, home: Path) -> None:
        self.home, self.index = home, home / "index"
        tensors = {f"a.{i}.weight": spectrum_matrix(*s, falling(500), i).bfloat16() for i, s in enumerate(SHAPES)}
        self.base = write_sharded(home / "base", [tensors])
        self.adapters = []
        for seed in (0, 7):
            factors = {f"a.{i}": intruding_factors(*s, 4, seed + i) for i, s in enumerate(SHAPES)}
            self.adapters.append(write_adapter(home / f"adapter-{seed}", factors, 4))
        self.plain = [self.detect(i, home / f"plain-{i}.safetensors", "") for i in (0, 1)]
        self.made = self.detect(0, home / "made.safetensors")
        self.digest = tree_digest(self.index)
        self.found = self.detect(1, home / "found.safetensors")

    def run(self, i: int, out: Path, *options: object) -> Outcome:
        return server().run("detect", self.base, self.adapters[i], "-o", out, "--threads", 1, *options)

    def detect(self, i: int, out: Path, index: Path | str | None = None, *options: object) -> streamer.Findings:
        """Detect, by default with the index."""
        index = self.index if index is None else index
        done = self.run(i, out, "--solver", "certified", *options, *(["--base-index", index] if index else []))
        assert done.code == 0, done.err
        return streamer.load_findings(out)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("index"))


def test_each_matrix_has_a_file_that_serves_the_next_adapter(made: Home) -> None:
    files = sorted(made.index.iterdir())
    assert [f.name.split(".weight.")[0] for f in files] == ["a.0", "a.1"]
    assert tree_digest(made.index) == made.digest
    for file, (m, n) in zip(files, SHAPES, strict=True):
        arrays = load_file(file)
        q = len(arrays["S"])
        assert q >= 30
        assert {k: tuple(t.shape) for k, t in arrays.items()} == {"U": (m, q), "S": (q,), "V": (n, q)}


def test_decisions_are_those_without_at_less_cost(made: Home) -> None:
    for plain, found in zip(made.plain, (made.made, made.found), strict=True):
        for a, b in zip(plain, found, strict=True):
            assert (a.detection.intruders, b.detection.certified) == (b.detection.intruders, True)
            assert len(b.detection.intruders) == 1
            assert b.detection.products < a.detection.products
            removed = [(d.U * d.S) @ d.Vh for d in (a.detection, b.detection)]
            torch.testing.assert_close(*removed, rtol=0, atol=1e-5)


def test_findings_are_the_same_bytes_whether_it_is_there_or_made_on_the_way(made: Home, tmp_path: Path) -> None:
    made.detect(0, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (made.home / "made.safetensors").read_bytes()


def test_workers_and_the_library_use_it_too(made: Home, tmp_path: Path) -> None:
    expected = (made.home / "found.safetensors").read_bytes()
    made.detect(1, tmp_path / "processes.safetensors", tmp_path / "new", "--workers", 2)
    assert (tmp_path / "processes.safetensors").read_bytes() == expected
    assert tree_digest(tmp_path / "new") == made.digest
    with ThreadPoolExecutor(2) as pool, threads(1):
        streamer.detect_intruder_dimensions(made.base, made.adapters[1], tmp_path / "threads.safetensors",
                                            solver="certified", executor=pool, base_index=str(made.index))  # fmt: skip
    assert (tmp_path / "threads.safetensors").read_bytes() == expected


def test_adapters_that_share_products_share_it_as_well(made: Home, tmp_path: Path) -> None:
    third = write_adapter(
        tmp_path / "adapter-9", {f"a.{i}": intruding_factors(*s, 4, 9) for i, s in enumerate(SHAPES)}, 4
    )
    options = ["--solver", "certified", "--threads", 1, "--base-index", tmp_path / "index"]
    done = server().run("detect", made.base, *made.adapters, third, "-o", tmp_path / "found", *options)
    assert done.code == 0, done.err
    assert tree_digest(tmp_path / "index") == made.digest
    for adapter, plain in zip(made.adapters, made.plain, strict=True):
        found = streamer.load_findings(tmp_path / "found" / f"{adapter.name}.safetensors")
        for a, b in zip(plain, found, strict=True):
            assert (a.detection.intruders, b.detection.certified) == (b.detection.intruders, True)
            assert b.detection.products < a.detection.products


def test_a_base_that_has_changed_has_files_of_its_own(made: Home, tmp_path: Path) -> None:
    shutil.copytree(made.base, tmp_path / "base")
    file = next((tmp_path / "base").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["a.0.weight"] *= 2
    save_file(tensors, file)
    shutil.copytree(made.index, tmp_path / "index")
    streamer.detect_intruder_dimensions(tmp_path / "base", made.adapters[0], solver="certified", base_index=tmp_path / "index")  # fmt: skip
    assert [f.split(".weight.")[0] for f in names(tmp_path / "index")] == ["a.0", "a.0", "a.1"]
    assert made.digest.items() < tree_digest(tmp_path / "index").items()


def test_small_matrices_and_a_dry_run_leave_none(made: Home, tmp_path: Path) -> None:
    out, index = tmp_path / "f.safetensors", tmp_path / "index"
    done = made.run(0, out, "--solver", "certified", "--base-index", index, "--dry-run")
    assert (done.code, names(tmp_path)) == (0, [])
    assert made.run(0, out, "--base-index", index).code == 0
    assert names(tmp_path) == ["f.safetensors"]  # full SVDs are cheaper there


@pytest.mark.parametrize(
    "broken", ["garbage", "short", "other arrays", "other shape", "another sign", "not orthonormal", "not finite"]
)
def test_a_file_that_is_none_is_named(made: Home, tmp_path: Path, broken: str) -> None:
    shutil.copytree(made.index, tmp_path / "index")
    first, second = sorted((tmp_path / "index").iterdir())
    arrays, metadata = load_file(first), {"schema": "streamer.base-index/1"}
    if broken == "garbage":
        first.write_bytes(b"x" * 100)
    elif broken == "short":
        first.write_bytes(first.read_bytes()[:-4])
    elif broken == "other shape":
        shutil.copy(second, first)
    elif broken == "other arrays":
        save_file({"U": arrays["U"]}, first, metadata)
    elif broken == "another sign":
        save_file(arrays | {"V": -arrays["V"]}, first, metadata)
    else:
        if broken == "not finite":
            arrays["V"][3, 4] = float("nan")
        else:
            arrays["V"] = torch.cat([arrays["V"][:, :1], arrays["V"][:, :-1]], 1)
        metadata["sha256"] = hashlib.sha256(b"".join(arrays[key].numpy().tobytes() for key in "USV")).hexdigest()
        save_file(arrays, first, metadata)
    out = tmp_path / "f.safetensors"
    done = made.run(0, out, "--solver", "certified", "--base-index", tmp_path / "index", "-q")
    assert (done.code, done.out, out.exists()) == (3, "", False)
    said = {"garbage": "", "short": "", "other arrays": "is no part of a base index"}.get(
        broken, "holds no singular triplets"
    )
    assert done.err.startswith(f"streamer: {first}: {said}")
    assert done.err.count("\n") == 1


def test_triplets_of_another_matrix_change_no_decision(made: Home, tmp_path: Path) -> None:
    other = {f"a.{i}.weight": spectrum_matrix(*s, falling(500), 50 + i).bfloat16() for i, s in enumerate(SHAPES)}
    base = write_sharded(tmp_path / "base", [other])
    streamer.detect_intruder_dimensions(base, made.adapters[0], solver="certified", base_index=tmp_path / "index")
    for file, name in zip(sorted((tmp_path / "index").iterdir()), sorted(made.index.iterdir()), strict=True):
        file.rename(file.with_name(name.name))
    found = made.detect(0, tmp_path / "f.safetensors", tmp_path / "index")
    assert [m.detection.intruders for m in found] == [m.detection.intruders for m in made.plain[0]]
    assert all(m.detection.certified for m in found)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("where", ["base", "base/inside", "a file"])
def test_it_lies_apart_from_the_inputs(made: Home, tmp_path: Path, where: str, dry: list[str]) -> None:
    index = made.home / where
    if where == "a file":
        index = tmp_path / "taken"
        index.write_text("x")
    done = made.run(0, tmp_path / "f.safetensors", "--base-index", index, "-q", *dry)
    assert (done.code, done.err.count("\n")) == (4, 1), done.err
    assert done.err.startswith(f"streamer: {index}: ")
