"""What is downloaded from addresses is one version, whole, and below the cache."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from range_server import Handler, RangeServer, serving

from streamer.api.choices import shown
from streamer.errors import InputChangedError
from streamer.events import Monitor
from streamer.remote.addresses import Url
from streamer.remote.cache import DEAD_SECONDS, PIECE_BYTES, directory_for, download, shadow
from streamer.remote.listing import Listing
from streamer.storage.remote_manifest import RemoteFile, cache_directory
from streamer.storage.remote_retries import stat_remote

SIZE = 3 * PIECE_BYTES


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "model.safetensors").write_bytes(os.urandom(SIZE))
    return tmp_path / "cache"


def served(state: RangeServer) -> RemoteFile:
    url = f"{state.address}/model.safetensors"
    stat = stat_remote(url, url)
    assert stat is not None
    return RemoteFile(url, url, stat.size, stat.version)


class OldTag(Handler):
    """Ranges bear the version that was first asked for, as those behind an address that leads on bear none."""

    def do_GET(self) -> None:
        state, name = self.server.state, self.path.lstrip("/")
        if self.headers["Range"] == "bytes=0-0":
            state.tags.pop(name, None)
            state.first = getattr(state, "first", state.tag(state.root / name, name))
        else:
            state.tags[name] = state.first
        super().do_GET()


def test_a_file_that_changes_while_it_is_downloaded_is_not_kept(tmp_path: Path) -> None:
    with serving(tmp_path / "site", OldTag) as state:
        file, path = served(state), tmp_path / "site" / "model.safetensors"

        def change(name: str, before: int) -> None:
            if before == 2:
                path.write_bytes(os.urandom(SIZE))

        state.fault = change
        with pytest.raises(InputChangedError, match="changed since the run began"):
            download(tmp_path / "there", {"model.safetensors": file}, Monitor())
        assert list((tmp_path / "there").iterdir()) == []


def test_two_that_download_the_same_file_at_once_do_not_write_into_one(tmp_path: Path) -> None:
    with serving(tmp_path / "site", rate=60e6) as state, ThreadPoolExecutor(2) as pool:
        file, there = served(state), tmp_path / "there"
        runs = [pool.submit(download, there, {"model.safetensors": file}, Monitor()) for _ in range(2)]
        for run in runs:
            run.result()
        assert (there / "model.safetensors").read_bytes() == (tmp_path / "site" / "model.safetensors").read_bytes()
        assert [path.name for path in there.iterdir()] == ["model.safetensors"]


def test_what_a_killed_download_left_is_removed(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    dead, living = there / ".streamer.a.0.partial", there / ".streamer.a.1.partial"
    for path in (dead, living):
        path.write_bytes(b"x")
    os.utime(dead, (0, time.time() - DEAD_SECONDS - 60))
    with serving(tmp_path / "site") as state:
        download(there, {"model.safetensors": served(state)}, Monitor())
    assert (dead.exists(), living.exists()) == (False, True)


def test_small_files_that_are_gone_are_put_there_again(tmp_path: Path) -> None:
    listing, elsewhere, put = Listing("model", "org/model", {}, {}), tmp_path / "config.json", []
    directory = directory_for("ranges", listing)

    def put_small(directory: Path) -> None:
        put.append(directory)
        elsewhere.write_text("{}")
        if not (directory / "config.json").is_symlink():
            (directory / "config.json").symlink_to(elsewhere)

    for _ in range(2):
        shadow(listing, directory, put_small, small=["config.json"])
    elsewhere.unlink()
    shadow(listing, directory, put_small, small=["config.json"])
    assert len(put) == 2
    assert (directory / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    "address",
    ["https://h/a/..%2F..%2Fevil", "https://h/a/%2Ftmp%2Fx", "s3://b/..", "https://h/.hidden", "https://h/a%0Ab"],
)
def test_an_address_names_no_directory_outside_of_the_cache(address: str) -> None:
    name = Url(address, address).name
    assert name == "model"
    where = directory_for("files", Listing(name, address, {}, {}))
    assert where.resolve().is_relative_to(cache_directory().resolve())
    assert Url("https://h/a/llama-3_8B.v1/", "https://h/a/llama-3_8B.v1/").name == "llama-3_8B.v1"


def test_suggested_commands_have_no_secrets(tmp_path: Path) -> None:
    assert shown("https://user:word@host/base?X-Signature=1") == "https://host/base"
    assert shown(str(tmp_path)) == str(tmp_path)
