"""Commands on inputs at addresses, beside the same ones on paths; and fixtures, which conftest.py of a folder imports."""

import json
import shutil
from pathlib import Path

import helpers
import pytest
from forks import Outcome, server

COMMANDS = ("detect", "mitigate", "merge")


def world(home: Path, hidden: int = 48) -> Path:
    """A directory to serve, with a base in three shards, and an adapter."""
    base, _ = helpers.three_shards(home / "served", hidden=hidden)
    shutil.rmtree(base / "1_Pooling")  # a server by https lists no files
    return home / "served"


def argv(command: str, base: object, adapter: object, home: Path, *options: object) -> list[object]:
    """The arguments of a command that writes into `home`; all but `detect` take its findings."""
    out = home / {"detect": "found.safetensors", "mitigate": "adapter", "merge": "model"}[command]
    findings = [] if command == "detect" else ["--findings", home / "found.safetensors"]
    return [command, base, adapter, "-o", out, *findings, *options]


def cached(home: Path) -> str:
    """Code that gives a run a cache of its own."""
    return (
        f"os.environ['XDG_CACHE_HOME'] = {str(home)!r}; os.environ['STREAMER_REMOTE_TIMEOUT'] = '1'"
    )


def run(
    command: str,
    base: object,
    adapter: object,
    home: Path,
    *options: object,
    at: int = 0,
    code: str = "",
) -> Outcome:
    """Run a command, its cache beside its output."""
    home.mkdir(exist_ok=True)
    before = cached(home.parent / f"{home.name}-cache")
    return server().run(
        *argv(command, base, adapter, home, *options), before=before, at=at, code=code
    )


def run_all(base: object, adapter: object, home: Path, *options: object) -> Path:
    """Detect, mitigate and merge."""
    for command in COMMANDS:
        done = run(command, base, adapter, home, *options)
        assert done.code == 0, done
    return home


def contents(home: Path) -> dict[str, str]:
    """Digests of what was written, addresses apart."""
    digests = helpers.tree_digest(home)
    for record in home.rglob("streamer.json"):
        tree = json.loads(record.read_text())
        del tree["sha256"]  # of the record itself
        for source in (tree["base"], tree["adapter"]):
            source.pop("address", None)
        digests[str(record.relative_to(home))] = json.dumps(tree)
    return digests


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to serve, which no test changes: a base in three shards, and its adapter."""
    return world(tmp_path_factory.mktemp("remote"))


@pytest.fixture(scope="session")
def local(served: Path) -> dict[str, str]:
    """What is written from these files by their paths."""
    return contents(run_all(served / "base", served / "adapter", served.parent / "local"))
