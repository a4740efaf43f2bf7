"""What is downloaded from addresses is one version, whole, and below the cache."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from range_server import Handler, RangeServer, serving

from streamer.api import shown
from streamer.errors import InputChangedError
from streamer.events import Monitor
from streamer.remote.inputs import DEAD_SECONDS, Listing, Remote, Url
from streamer.storage.remote_source import RANGE_BYTES, RemoteFile, cache_directory, stat_remote

SIZE = 3 * RANGE_BYTES


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "model.safetensors").write_bytes(os.urandom(SIZE))
    return tmp_path / "cache"


def served(state: RangeServer) -> RemoteFile:
    url = f"{state.address}/model.safetensors"
    file = stat_remote(url, url)
    assert file is not None
    return file


def listed(file: RemoteFile) -> Listing:
    return Listing(file.shown, Path("there"), {}, {"model.safetensors": file}, "")


class OldTag(Handler):
    """Ranges bear the version that was first asked for, as those behind an address that leads on bear none."""

    def do_GET(self) -> None:
        state = self.server.state
        name = self.path.lstrip("/")
        if self.headers["Range"] == "bytes=0-0":
            state.tags.pop(name, None)
            state.first = getattr(state, "first", state.tag(state.root / name, name))
        else:
            state.tags[name] = state.first
        super().do_GET()


def test_a_file_that_changes_while_it_is_downloaded_is_not_kept(tmp_path: Path) -> None:
    with serving(tmp_path / "site", OldTag) as state:
        file = served(state)
        path = tmp_path / "site" / "model.safetensors"

        def change(name: str, before: int) -> None:
            if before == 2:
                path.write_bytes(os.urandom(SIZE))

        state.fault = change
        listing = listed(file)
        with pytest.raises(InputChangedError, match="changed since the run began"):
            listing.download(listing.files, Monitor())
        assert list(listing.directory("files").iterdir()) == []


def test_two_that_download_the_same_file_at_once_do_not_write_into_one(tmp_path: Path) -> None:
    with serving(tmp_path / "site", rate=60e6) as state, ThreadPoolExecutor(2) as pool:
        listing = listed(served(state))
        there, same = pool.map(lambda _: listing.download(listing.files, Monitor()), range(2))
        assert there == same
        assert (there / "model.safetensors").read_bytes() == (
            tmp_path / "site" / "model.safetensors"
        ).read_bytes()
        assert {path.name for path in there.iterdir()} == {
            "model.safetensors",
            ".streamer.remote.json",
        }


def test_what_a_killed_download_left_is_removed(tmp_path: Path) -> None:
    with serving(tmp_path / "site") as state:
        listing = listed(served(state))
        there = listing.directory("files")
        there.mkdir(parents=True)
        dead = there / f".a.{0:016}.partial"
        living = there / f".a.{1:016}.partial"
        for path in (dead, living):
            path.write_bytes(b"x")
        os.utime(dead, (0, time.time() - DEAD_SECONDS - 60))
        listing.download(listing.files, Monitor())
    assert (dead.exists(), living.exists()) == (False, True)


def test_small_files_that_are_gone_are_put_there_again(tmp_path: Path) -> None:
    """They lie elsewhere in the cache, where one may remove them; if they are there, they are not downloaded again."""
    (tmp_path / "site" / "config.json").write_text("{}")
    with serving(tmp_path / "site") as state:
        for downloaded in (1, 0, 1):
            state.reset()
            config = Path(Remote().path(state.address)) / "config.json"
            assert config.read_text() == "{}"
            # The size, the file to look for code, and again for each download, after which the size is asked for once more.
            assert (
                sum(request.path == "config.json" for request in state.requests)
                == 2 + 2 * downloaded
            )
            if not downloaded:
                config.resolve().unlink()


@pytest.mark.parametrize(
    "address",
    [
        "https://h/a/..%2F..%2Fevil",
        "https://h/a/%2Ftmp%2Fx",
        "s3://b/..",
        "https://h/.hidden",
        "https://h/a%0Ab",
    ],
)
def test_an_address_names_no_directory_outside_of_the_cache(address: str) -> None:
    name = Url(address, address).name
    assert name == "model"
    where = Listing(address, Path(name), {}, {}, "").directory("files")
    assert where.resolve().is_relative_to(cache_directory().resolve())
    assert Url("https://h/a/llama-3_8B.v1/", "https://h/a/llama-3_8B.v1/").name == "llama-3_8B.v1"


def test_suggested_commands_have_no_secrets(tmp_path: Path) -> None:
    assert shown("https://user:word@host/base?X-Signature=1") == "https://host/base"
    assert shown(str(tmp_path)) == str(tmp_path)
