"""Bases and adapters at addresses: outputs are those of the same files on the disk, and no more is read than is needed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import helpers
import pytest
import remote_jobs
from forks import server
from range_server import PEEK, RangeServer, serving
from remote_jobs import cached, contents, run, run_all

import streamer


@pytest.mark.parametrize("mode", ["stream", "cache"])
def test_outputs_are_those_of_the_files(
    served: Path, local: dict[str, str], tmp_path: Path, mode: str
) -> None:
    with serving(served) as site:
        base = f"{site.address}/base"
        adapter = f"{site.address}/adapter"
        home = run_all(base, adapter, tmp_path / "out", "--remote", mode)
        assert contents(home) == local
        record = json.loads((home / "model" / "streamer.json").read_text())
        assert (record["base"]["address"], record["adapter"]["address"]) == (base, adapter)
        checked = server().run(
            "verify", home / "model", base, adapter, before=cached(tmp_path / "out-cache")
        )
        assert checked.code == 0, checked


def bytes_of(site: RangeServer, command: str, home: Path, *options: object) -> int:
    """Bytes of data that a command asks for."""
    site.reset()
    done = run(command, f"{site.address}/base", f"{site.address}/adapter", home, *options)
    assert done.code == 0, done
    return sum(r.sent for r in site.requests if r.path.startswith("base/model-"))


def test_what_crosses_the_network(tmp_path: Path) -> None:
    """By detect the adapted matrices, by mitigate from findings none, by merge each tensor once; forecasts read none, and say so."""
    served = remote_jobs.world(tmp_path, hidden=256)
    base = served / "base"
    adapter = served / "adapter"
    factors = {
        f"model.layers.{i}.self_attn.q_proj": helpers.intruding_factors(256, 256, 4, seed=i)
        for i in range(3)
    }
    shutil.rmtree(adapter)
    helpers.write_adapter(adapter, factors, r=4)
    size = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    adapted = 3 * 256 * 256 * 2
    with serving(served) as site:
        small = 3 * 5 * 4096 + 3 * 1000  # samples, headers and the first byte
        home = tmp_path / "out"
        dry = run(
            "detect", f"{site.address}/base", f"{site.address}/adapter", home, "--dry-run", "--json"
        )
        told = json.loads(dry.out)["forecast"]["network_bytes"]
        assert sum(r.sent for r in site.requests if r.path.startswith("base/model-")) < small
        detected = bytes_of(site, "detect", home)
        assert adapted < detected < adapted + small
        assert abs(told - detected) < 100
        assert bytes_of(site, "mitigate", home) < small
        assert size < bytes_of(site, "merge", home) < size + small
        cached_home = tmp_path / "cached"
        dry = run(
            "detect",
            f"{site.address}/base",
            f"{site.address}/adapter",
            cached_home,
            "--remote",
            "cache",
            "--dry-run",
            "--json",
        )
        assert json.loads(dry.out)["forecast"]["network_bytes"] >= size
        assert bytes_of(site, "detect", cached_home, "--remote", "cache") >= size
        assert bytes_of(site, "merge", cached_home, "--remote", "cache") < 10


def test_one_file_at_an_address(single: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = single
    with serving(tmp_path) as site:
        far = f"{site.address}/{base.name}/model.safetensors?signature=secret"
        run_all(base / "model.safetensors", adapter, tmp_path / "local")
        home = run_all(far, adapter, tmp_path / "far")
        assert contents(home) == contents(tmp_path / "local")
        assert "secret" not in (home / "model" / "streamer.json").read_text()


def test_python_functions_accept_addresses(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    events = []
    with serving(served) as site:
        base = f"{site.address}/base"
        adapter = f"{site.address}/adapter"
        found = streamer.detect_intruder_dimensions(
            base, adapter, remote="cache", on_event=events.append
        )
        assert {event.stage for event in events} == {"download", "detect"}
        names = [
            name for name, _ in streamer.iter_merged(base, adapter, findings=found, remote="stream")
        ]
        several = streamer.detect_intruder_dimensions(base, [adapter], remote="stream")
    assert len(names) == 15
    assert list(several) == ["adapter"]


@pytest.mark.parametrize(
    ("place", "code", "words"),
    [
        (
            "nothing",
            3,
            "nothing: expected a model or an adapter, found neither model.safetensors, model.safetensors.index.json nor",
        ),
        ("base/other.safetensors", 3, "base/other.safetensors: no such file; check the address"),
    ],
)
def test_addresses_where_nothing_is(
    served: Path, tmp_path: Path, place: str, code: int, words: str
) -> None:
    with serving(served) as site:
        done = run("detect", f"{site.address}/{place}", served / "adapter", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (code, 1)
    assert words in done.err


@pytest.mark.parametrize("asked", ["peek", "data"])
@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "tokenizer.json"])
def test_what_is_compressed_on_the_way_is_refused(
    served: Path, tmp_path: Path, asked: str, name: str
) -> None:
    """It would be copied as weights, or as a tokenizer."""

    def encoded(path: str, part: str) -> bool:
        return path == f"base/{name}" and (part == PEEK) == (asked == "peek")

    with serving(served, encoded=encoded) as site:
        done = run("detect", f"{site.address}/base", f"{site.address}/adapter", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (3, 1), done
    assert (
        f"{site.address}/base/{name}: the server sent this file compressed (gzip), expected it uncompressed; "
        in done.err
    )
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert not list((tmp_path / "out-cache").rglob("tokenizer.json")) or name != "tokenizer.json"


PAGE = ("text/html; charset=utf-8", b"<!doctype html><title>Not found</title>")


def test_a_page_in_place_of_what_is_absent_is_none(
    served: Path, local: dict[str, str], tmp_path: Path
) -> None:
    with serving(served, page=PAGE) as site:
        assert (
            contents(run_all(f"{site.address}/base", f"{site.address}/adapter", tmp_path / "far"))
            == local
        )
        done = run("detect", f"{site.address}/nothing", served / "adapter", tmp_path / "out")
        assert (
            done.code,
            "nothing: expected a model or an adapter, found neither" in done.err,
        ) == (3, True)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        (
            "model.safetensors.index.json",
            b"<html>",
            "expected JSON, found something else ('Expecting value: line 1",
        ),
        (
            "model.safetensors.index.json",
            b"[]",
            "expected a JSON object, found list; check the address",
        ),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "../x"}}',
            "weight_map names '../x': expected a plain",
        ),
        ("config.json", b"<html>", "expected JSON, found something else ("),
        ("tokenizer.json", b"{", "expected JSON, found something else ("),
        ("README.md", None, "expected at most 200.0 MB for such a file, found "),
    ],
)
def test_small_files_that_are_none(
    served: Path, tmp_path: Path, name: str, data: bytes | None, words: str
) -> None:
    """The message names the address: no file of a cache, nor one that is gone."""
    root = Path(shutil.copytree(served, tmp_path / "served"))
    with (root / "base" / name).open("wb") as f:
        f.write(data or b"")
        f.truncate(300_000_000 if data is None else len(data))
    with serving(root) as site:
        done = run("detect", f"{site.address}/base", served / "adapter", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (3, 1), done
    assert f"streamer: {site.address}/base/{name}: {words}" in done.err
    assert sum(request.sent for request in site.requests if request.path == "base/README.md") <= 1


def test_manifests_elsewhere_are_not_read(served: Path, tmp_path: Path) -> None:
    """A model that was downloaded may hold one that leads to any address."""
    with serving(served) as site:
        run("detect", f"{site.address}/base", served / "adapter", tmp_path / "out")
        (shadow,) = (tmp_path / "out-cache" / "streamer" / "ranges").glob("*/base")
        shutil.copytree(shadow, tmp_path / "copy")
        site.reset()
        done = run("detect", tmp_path / "copy", served / "adapter", tmp_path / "other")
        assert (done.code, site.requests) == (3, [])
        assert os.stat(shadow / ".streamer.remote.json").st_mode & 0o077 == 0
