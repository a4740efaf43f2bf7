"""Outputs with cards and stamps, killed anywhere."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from forks import KILL, server
from helpers import tree_digest


@pytest.mark.long
@pytest.mark.parametrize("command", ["mitigate", "merge"])
def test_killed_anywhere_the_card_and_the_stamp_are_the_same_bytes(
    single: tuple[Path, Path], command: str, tmp_path: Path
) -> None:
    """Of a base of one file the card is written while the file, the commit point, has all its bytes and not yet its name."""
    line = (command, *single, "--top-k", 2)
    whole = server().run(*line, "-o", tmp_path / "whole")
    expected = tree_digest(tmp_path / "whole")
    assert "README.md" in expected
    for n in range(3, len(whole.calls), 2):
        out = tmp_path / str(n)
        assert server().run(*line, "-o", out, at=n, code=KILL).code == -signal.SIGKILL
        if command == "merge" and (out / "model.safetensors").exists():
            assert (out / "README.md").exists()
        done = server().run(*line, "-o", out)
        assert done.code == 0, done.err
        assert tree_digest(out) == expected, n
