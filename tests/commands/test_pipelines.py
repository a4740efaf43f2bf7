"""Workflow systems on real files: make, twice and in parallel, and after an input was touched; Snakemake."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
from command_line import ENV
from helpers import tree_digest
from paths import ROOT

STREAMER = f"{sys.executable} -m streamer"
PAGE = (ROOT / "docs" / "shell.md").read_text()


def block(language: str, before: str) -> str:
    """The block of a language in docs/shell.md, which runs here as it stands there, but for how the command is called."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert f"{before}streamer " in text
    return text.replace(f"{before}streamer ", f"{before}{STREAMER} ")


# Targets of both kinds: a file of an output, and its directory.
MAKEFILE = block("make", "\t")
SNAKEFILE = block("python", 'shell: "')

OUTPUTS = ("build", "merged-0.5", "merged-0.25", "adapter-0.5")
"""Of both; what one does not make has no files."""
QUIET = {**ENV, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def digests(home: Path) -> dict[str, dict[str, str]]:
    return {name: tree_digest(home / name) for name in OUTPUTS}


def touch(path: Path) -> None:
    time.sleep(0.02)  # a tick of the file system's clock
    os.utime(path)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_runs_what_is_needed_and_then_nothing(tmp_path: Path) -> None:
    def make() -> int:
        """How many commands `make -j2` ran."""
        line = ["make", "-j2", "--no-print-directory"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=QUIET, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout.count(STREAMER)

    helpers.three_shards(tmp_path)
    (tmp_path / "Makefile").write_text(MAKEFILE)
    assert make() == 3
    made = digests(tmp_path)
    assert make() == 0
    touch(tmp_path / "adapter" / "adapter_config.json")
    assert make() == 3  # each finds its output there and gives it the time of now
    assert make() == 0
    assert digests(tmp_path) == made
    (tmp_path / "merged-0.5" / "model.safetensors.index.json").unlink()
    assert make() == 1  # a target that was removed is made again
    assert digests(tmp_path) == made


@pytest.mark.slow
def test_snakemake_runs_what_is_needed_and_then_nothing(tmp_path: Path) -> None:
    pytest.importorskip("snakemake")

    def snakemake(*options: str) -> str:
        line = [sys.executable, "-m", "snakemake", "--cores", "2", *options]
        env = {**QUIET, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    helpers.three_shards(tmp_path)
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    assert "This was a dry-run" in snakemake("-n")
    assert not (tmp_path / "build").exists()
    snakemake()
    made = digests(tmp_path)
    assert "Nothing to be done" in snakemake("-n")
    snakemake("--forceall")
    assert "Nothing to be done" in snakemake("-n")
    assert digests(tmp_path) == made
