"""Ranges of files at addresses: what passes is tried again, what does not is said in one line, and no version is mixed with another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextvars import copy_context
from pathlib import Path

import pytest
from range_server import Handler, RangeServer, serving

from streamer.detection.detect import read_ahead
from streamer.errors import (
    InputChangedError,
    Interrupted,
    StorageError,
    StreamerError,
    UnsupportedError,
)
from streamer.events import Monitor
from streamer.storage.remote_source import (
    RANGE_BYTES,
    RemoteFile,
    RemoteSource,
    heed,
    list_remote,
    read_range,
    stat_remote,
)

DATA = bytes(range(256)) * 16384


@pytest.fixture
def site(tmp_path: Path) -> Iterator[RangeServer]:
    (tmp_path / "file").write_bytes(DATA)
    with serving(tmp_path) as state:
        yield state


def opened(site: RangeServer, query: str = "") -> RemoteFile:
    url = f"{site.address}/file"
    file = stat_remote(url + query, url)
    assert file is not None
    return file


def read(file: RemoteFile, start: int, stop: int) -> bytes:
    out = bytearray(stop - start)
    read_range(file, memoryview(out), start)
    return bytes(out)


def once(kind: str) -> Callable[[str, int], str | None]:
    return lambda path, n: kind if n == 0 else None


def test_a_range(site: RangeServer) -> None:
    assert read(opened(site), 1000, 300_000) == DATA[1000:300_000]
    assert stat_remote(f"{site.address}/none", "none") is None


@pytest.mark.parametrize("kind", ["stall", "reset", "429", "500", "short"])
def test_transient_errors_are_retried(
    site: RangeServer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only what has not come is asked for again."""
    file = opened(site)
    site.fault = once(kind)
    if kind == "stall":
        monkeypatch.setenv("STREAMER_REMOTE_TIMEOUT", "0.3")
    assert read(file, 1000, 2_001_000) == DATA[1000:2_001_000]
    asked = [r for r in site.requests if r.range != "bytes=0-0"]
    assert len(asked) == 2 or (
        kind == "stall" and len(asked) > 2
    )  # a busy machine may be silent for as long, too
    if kind == "short":
        assert asked[1].range == "bytes=1001000-2000999"
        assert sum(r.sent for r in asked) == 2_000_000


def test_a_whole_file_once_in_place_of_a_range(site: RangeServer) -> None:
    file = opened(site)
    read(file, 5, 10)
    site.fault = lambda path, n: "whole" if n == 1 else None
    assert read(file, 1000, 2000) == DATA[1000:2000]


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        (
            "whole",
            UnsupportedError,
            "expected a part of the file, its server gives whole files only; download it",
        ),
        (
            "401",
            StorageError,
            "refuses to give it (status 401); check its user, password or signature",
        ),
        ("403", StorageError, "refuses to give it (status 403)"),
        ("changed", InputChangedError, "changed since the run began; start again"),
    ],
)
def test_lasting_errors_are_not_retried(
    site: RangeServer, kind: str, error: type[StreamerError], words: str
) -> None:
    file = opened(site, "?signature=secret")
    site.fault = lambda path, n: kind
    with pytest.raises(error) as caught:
        read(file, 1000, 2000)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len([r for r in site.requests if r.range != "bytes=0-0"]) == 1


def test_retries_without_progress_end(site: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamer.storage.remote_source.TRIES", 2)
    file = opened(site)
    site.fault = lambda path, n: "500"
    with pytest.raises(
        StorageError, match=r"cannot read in 2 attempts: status 500; run the same command again"
    ):
        read(file, 0, 10)


def test_another_version(site: RangeServer, tmp_path: Path) -> None:
    source = RemoteSource(opened(site))
    source.check_unchanged()
    (tmp_path / "file").write_bytes(DATA[::-1])
    with pytest.raises(InputChangedError, match="changed since the run began"):
        source.check_unchanged()
    (tmp_path / "file").unlink()
    with pytest.raises(InputChangedError, match="vanished during the run"):
        source.check_unchanged()


def test_users_are_named_to_their_own_server_alone(site: RangeServer) -> None:
    url = site.address.replace("//", "//user:word@") + "/file"
    assert stat_remote(url, "shown") is not None
    assert site.requests[-1].headers["authorization"] == "Basic dXNlcjp3b3Jk"


@pytest.mark.parametrize(("host", "named"), [("127.0.0.1", True), ("localhost", False)])
def test_where_an_address_leads_on_to_users_are_named_on_the_same_host_alone(
    site: RangeServer, host: str, named: bool
) -> None:
    site.redirect = site.address.replace("127.0.0.1", host)
    url = site.address.replace("//", "//user:word@") + "/file"
    file = stat_remote(url, "shown")
    assert file is not None
    assert read(file, 5, 10) == DATA[5:10]
    asked = [("authorization" in r.headers, r.path) for r in site.requests]
    assert asked == [(True, "file"), (named, "led/file")] * 2


def test_a_stop_ends_the_wait_that_a_server_asks_for(site: RangeServer) -> None:
    """In the threads that read, and in the one that reads ahead."""
    source = RemoteSource(opened(site))
    monitor = Monitor()

    def stop(path: str, before: int) -> str:
        monitor.request_stop(2)
        return "429"

    def view() -> None:
        heed(monitor)
        source.view(1000, 2000)

    def view_ahead() -> None:
        heed(monitor)
        list(read_ahead([0, 1, 2, 3], lambda i: source.view(i, 10)))

    site.fault = stop
    site.retry_after = 100
    for call in (view, view_ahead):
        site.reset()
        with pytest.raises(Interrupted):
            copy_context().run(call)
        assert len(site.requests) <= 2  # the second of those ahead may have begun


class Vague(Handler):
    """States no time to wait that one could understand, and a page in place of a range."""

    def plain(self, status: int, headers: dict[str, str] | None = None) -> None:
        super().plain(status, dict.fromkeys(headers or {}, "soon"))

    def answer(self, body: bool) -> None:
        if self.headers["Range"] == "bytes=7-8":
            return self.give_page("text/html", b"<html>")
        return super().answer(body)


def test_a_time_to_wait_that_is_none_and_a_page_in_place_of_a_range(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    with serving(tmp_path, Vague) as site:
        file = opened(site)
        site.fault = once("429")
        assert read(file, 1000, 2000) == DATA[1000:2000]
        with pytest.raises(InputChangedError, match="vanished or shrank during the run"):
            read(file, 7, 9)


def test_an_address_that_is_none() -> None:
    with pytest.raises(StorageError, match="shown: is no address that can be asked; check it"):
        stat_remote("https://[host/file", "shown")


def test_a_bucket_by_a_file_system_of_fsspec(tmp_path: Path) -> None:
    """The disk's own is one: it lists, gives ranges, and states times of change."""
    (tmp_path / "dir").mkdir()
    path = tmp_path / "dir" / "file"
    path.write_bytes(DATA)
    found = list_remote(f"file://{tmp_path}", "shown")
    assert found == {"dir/file": stat_remote(f"file://{path}", f"file://{path}")}
    file = found["dir/file"]
    assert (file.size, read(file, 1000, 300_000)) == (len(DATA), DATA[1000:300_000])
    assert [stat_remote(f"file://{tmp_path}/{name}", "shown") for name in ("dir", "none")] == [
        None,
        None,
    ]
    assert list_remote(f"file://{tmp_path}/none", "shown") == {}
    source = RemoteSource(file)
    source.check_unchanged()
    os.utime(path, (1, 1))
    with pytest.raises(InputChangedError, match="changed since the run began"):
        source.check_unchanged()
    path.unlink()
    with pytest.raises(InputChangedError, match="vanished during the run"):
        read(file, 0, 10)


def test_reading_from_front_to_back_sends_for_what_follows(
    site: RangeServer, tmp_path: Path
) -> None:
    """Bytes are those of the file, each is asked for once, and nothing beyond the end that was named."""
    data = DATA * 5
    (tmp_path / "file").write_bytes(data)
    source = RemoteSource(opened(site))
    piece = 1_000_000
    end = len(data) - 5000
    site.reset()
    got = bytearray()
    for at in range(0, end, piece):
        out = memoryview(bytearray(min(piece, end - at)))
        source.prefetch(at, at + len(out), end)
        source.read_into(out, at)
        got += out
    assert bytes(got) == data[:end]
    assert site.sent == end
    assert len(site.requests) == -(-end // RANGE_BYTES)
    source.prefetch(0, piece, end)
    assert bytes(source.view(500, 1000)) == data[500:1500]
    assert bytes(source.view(len(data) - 10, 10)) == data[-10:]
    source.close()
