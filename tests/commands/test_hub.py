"""Names on the hub, by its own client against a server that speaks its API: its cache, its token, its offline switch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import remote_jobs
from forks import Outcome, server
from hub_server import COMMIT, TOKEN, HubHandler
from range_server import RangeServer, serving
from remote_jobs import argv, contents, run_all


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = remote_jobs.world(tmp_path_factory.mktemp("hub"))
    (root / "owner").mkdir()
    for name in ("base", "adapter"):
        (root / name).rename(root / "owner" / name)
    (root / "owner" / "base" / "pytorch_model.bin").write_bytes(b"old")
    shutil.copytree(root / "owner" / "adapter", root / "owner" / "several" / "one")
    return root


@pytest.fixture(scope="module")
def local(served: Path) -> dict[str, str]:
    """What is written from paths, in directories as the hub's cache has them, which tell model and commit."""
    cache = served.parent / "cache"
    base, adapter = (
        cache / f"models--owner--{name}" / "snapshots" / COMMIT for name in ("base", "adapter")
    )
    shutil.copytree(served / "owner" / "base", base, ignore=shutil.ignore_patterns("*.bin"))
    shutil.copytree(served / "owner" / "adapter", adapter)
    return contents(run_all(base, adapter, served.parent / "local"))


def hub_run(
    site: RangeServer,
    home: Path,
    command: str,
    base: str,
    adapter: str,
    *options: object,
    offline: bool = False,
) -> Outcome:
    home.mkdir(exist_ok=True)
    before = (
        f"os.environ.update(XDG_CACHE_HOME={str(home / 'cache')!r}, HF_HOME={str(home / 'hf')!r}, HF_ENDPOINT={site.address!r}, "
        f"HF_TOKEN={TOKEN!r}, HF_HUB_DISABLE_XET='1', HF_HUB_OFFLINE={str(int(offline))!r}, STREAMER_REMOTE_TIMEOUT='2')"
    )
    out = home / "out"
    out.mkdir(exist_ok=True)
    return server().run(*argv(command, base, adapter, out, *options), before=before)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["cache", "stream"])
def test_outputs_of_names_on_the_hub(
    served: Path, local: dict[str, str], tmp_path: Path, mode: str
) -> None:
    with serving(served, HubHandler) as site:
        for command in remote_jobs.COMMANDS:
            done = hub_run(
                site, tmp_path, command, "owner/base@v1", "owner/adapter", "--remote", mode
            )
            assert done.code == 0, done
            assert "secret" not in done.err + done.out
        record = json.loads((tmp_path / "out" / "model" / "streamer.json").read_text())
        assert (record["base"]["model_id"], record["base"]["revision"]) == ("owner/base", COMMIT)
        assert contents(tmp_path / "out") == local
        assert "pytorch_model.bin" not in {
            request.path.rpartition("/")[2] for request in site.requests
        }
        storage = [r for r in site.requests if r.path.startswith("owner/")]
        assert storage
        assert not any("authorization" in r.headers for r in storage)
        assert any(r.headers.get("authorization") == f"Bearer {TOKEN}" for r in site.requests)
        whole = sum(p.stat().st_size for p in (served / "owner" / "base").glob("*.safetensors"))
        read = sum(r.sent for r in storage if "/base/" in r.path)
        assert (read == whole) if mode == "cache" else (read > whole)
        if mode == "cache":  # a second run, and offline
            site.reset()
            done = hub_run(site, tmp_path, "detect", "owner/base@v1", "owner/adapter", offline=True)
            assert (done.code, site.requests) == (0, []), done
    if mode == "cache":  # the server is gone
        done = hub_run(site, tmp_path, "detect", "owner/base@v1", "owner/adapter")
        assert (
            done.code,
            "owner/base@v1: the hub cannot be reached; its cache is used" in done.err,
        ) == (0, True), done


def test_a_directory_in_a_repository(served: Path, tmp_path: Path) -> None:
    with serving(served, HubHandler) as site:
        done = hub_run(
            site, tmp_path, "detect", "hf://owner/base", "owner/several/one", "--dry-run", "--json"
        )
        assert done.code == 0, done
        assert json.loads(done.out)["forecast"]["network_bytes"] > 0
        whole = sum(p.stat().st_size for p in (served / "owner" / "base").glob("*.safetensors"))
        assert json.loads(done.out)["forecast"]["network_bytes"] == whole
        assert not list((tmp_path / "hf").rglob("model-0*"))


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("owner/none", 3, "no such path, and the hub has no model owner/none, or it is private"),
        ("owner/base@v9", 3, "the hub has no model owner/base of revision 'v9'"),
        (
            "owner/base/nothing",
            3,
            "owner/base/nothing: expected a model or an adapter, found neither model.safetensors, model.safetensors.index.json nor",
        ),
    ],
)
def test_what_the_hub_does_not_have(
    served: Path, tmp_path: Path, name: str, code: int, words: str
) -> None:
    with serving(served, HubHandler) as site:
        done = hub_run(site, tmp_path, "detect", name, str(served / "owner" / "adapter"))
    assert (done.code, done.err.count("\n")) == (code, 1), done
    assert words in done.err


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "tokenizer.json"])
def test_a_small_file_that_is_large_is_not_downloaded(
    served: Path, tmp_path: Path, name: str
) -> None:
    root = Path(shutil.copytree(served, tmp_path / "served"))
    with (root / "owner" / "base" / name).open("wb") as f:
        f.truncate(300_000_000)
    with serving(root, HubHandler) as site:
        done = hub_run(site, tmp_path, "detect", "owner/base", str(served / "owner" / "adapter"))
    assert (done.code, done.err.count("\n")) == (3, 1), done
    assert f"owner/base/{name}: expected at most 200.0 MB for such a file, found " in done.err
    assert not any(request.path.endswith(name) for request in site.requests)


def test_a_token_that_is_refused(served: Path, tmp_path: Path) -> None:
    with serving(
        served, HubHandler, fault=lambda path, n: "401" if path.startswith("info") else None
    ) as site:
        done = hub_run(site, tmp_path, "detect", "owner/base", str(served / "owner" / "adapter"))
    assert (done.code, done.err.count("\n")) == (3, 1), done
    assert "log in" in done.err
    assert TOKEN not in done.err
