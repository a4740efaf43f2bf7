"""What relies on a key that the user ignores says so, wherever the result is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forks import server

WARNING = (
    "'use_tomorrow', 'use_hyper' of adapter_config.json are ignored: the result relies on them not changing the delta"
)
IGNORE = ("--ignore-key", "use_tomorrow", "--ignore-key", "use_hyper")


@pytest.fixture
def inputs(job: tuple[Path, Path]) -> tuple[Path, Path]:
    config = job[1] / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_tomorrow": True, "use_hyper": 2}))
    return job


def run(*args: object) -> dict[str, Any]:
    """Run a command that ignores both keys, and look for the one warning; with -q it is on stderr, with -qq nothing is."""
    done = server().run(*args, *IGNORE, "--json", "-q")
    assert (done.code, done.err, done.last) == (0, f"streamer: warning: {WARNING}\n", "")
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_ignored_keys_are_a_warning(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    assert WARNING in run("inspect", base, adapter)["warnings"]
    findings, output = tmp_path / "f.safetensors", tmp_path / "output"
    assert run("detect", base, adapter, "-o", findings)["adapter"]["ignored_keys"] == ["use_tomorrow", "use_hyper"]
    for command in ("merge", "mitigate"):
        made = output / command
        assert WARNING in run(command, base, adapter, "-o", made, "--method", "shrink")["warnings"]
        assert WARNING in json.loads((made / "streamer.json").read_text())["warnings"]
    silent = server().run("inspect", base, adapter, *IGNORE, "-qq")
    assert (silent.code, silent.err + silent.last) == (0, "")
