"""Runs whose adapters share products, killed anywhere: which findings are written already changes no bit of the others."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from forks import KILL, server
from helpers import tree_digest
from sharing import make_adapters, make_base

import streamer
from streamer.detection.findings_file import journal_of
from streamer.linalg.torch_state import threads
from streamer.storage.journal import Journal

NAMES = ["n0", "n1", "n2", "n3"]


class Shared:
    """Inputs, the command, and what it writes. In float64 the last bits do depend on who shares."""

    def __init__(self, home: Path) -> None:
        self.base = make_base(home, torch.float64)
        make_adapters(home / "adapters", len(NAMES))
        self.line = ["detect", self.base, home / "adapters", "--solver", "certified"]
        done = server().run(*self.line, "-o", home / "whole")
        assert done.code == 0, done.err
        self.calls, self.whole = len(done.calls), tree_digest(home / "whole")
        self.adapters = home / "adapters"

    def kill(self, out: Path, n: int) -> list[int]:
        """Kill the command at a call; how many records are then in each journal, with the one that begins it."""
        assert server().run(*self.line, "-o", out, at=n, code=KILL).code == -signal.SIGKILL
        paths = [journal_of(out / f"{name}.safetensors") for name in NAMES]
        return [len(Journal(path)) if path.exists() else 0 for path in paths]

    def finish(self, out: Path, *options: object) -> None:
        """Run the command on what is there, and compare."""
        done = server().run(*self.line, "-o", out, *options)
        assert done.code == 0, done.err
        assert tree_digest(out) == self.whole


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(tmp_path_factory.mktemp("shared"))


def test_last_bits_depend_on_who_shares(shared: Shared, tmp_path: Path) -> None:
    """Or the tests below would show nothing."""
    with threads():
        streamer.detect_intruder_dimensions(
            shared.base, shared.adapters / "n1", tmp_path / "n1.safetensors", solver="certified"
        )
    if tree_digest(tmp_path)["n1.safetensors"] == shared.whole["n1.safetensors"]:
        pytest.skip("this processor's kernels give a column the same bits, whoever is beside it")


@pytest.mark.long
def test_killed_anywhere_the_same_command_finishes(shared: Shared, tmp_path: Path) -> None:
    for n in range(3, shared.calls, shared.calls // 11):
        shared.kill(tmp_path / str(n), n)
        shared.finish(tmp_path / str(n))


def test_killed_between_two_records_of_a_matrix_it_is_done_again_whole(shared: Shared, tmp_path: Path) -> None:
    n, records = 3, [0]
    while min(records) == 0 or len(set(records)) == 1:
        n += 1
        records = shared.kill(tmp_path / str(n), n)
    assert min(records) == 1  # an adapter without a record goes on with the threads of those that have one
    for i, options in enumerate([(), ("--workers", 1, "--threads", 1), ("--threads", 2)]):
        out = Path(shutil.copytree(tmp_path / str(n), tmp_path / f"out{i}"))
        shared.finish(out, *options)
