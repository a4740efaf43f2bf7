"""Findings whose saving is killed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults import failing

import streamer
from streamer.errors import StorageError


def test_a_full_disk_leaves_no_journal(job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "some" / "f.safetensors"
    monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    with pytest.raises(StorageError, match="No space left on device"):
        streamer.detect_intruder_dimensions(*job, out, top_k=6)
    assert [p.name for p in out.parent.iterdir()] == []


@pytest.mark.long
def test_a_killed_save_leaves_the_old_file(job: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed at each call that changes something on disk; the next save clears up."""
    path, out = tmp_path / "all.safetensors", tmp_path / "some" / "f"
    findings = streamer.detect_intruder_dimensions(*job, path, top_k=6)
    out.parent.mkdir()
    findings[:3].save(out)
    old = out.read_bytes()
    program = (
        "import os, signal, sys\n"
        "from streamer.detection.findings import load_findings\n"
        "findings, n = load_findings(sys.argv[1]), [0]\n"
        "def at(name, real):\n"
        "    def call(*args, **kwargs):\n"
        "        n[0] += 1\n"
        "        if n[0] == k: os._exit(9)\n"
        "        return real(*args, **kwargs)\n"
        "    return call\n"
        "for name in ('write', 'pwrite', 'fsync', 'rename', 'replace', 'unlink'): setattr(os, name, at(name, getattr(os, name)))\n"
        "for k in range(1, 99):\n"
        "    n[0] = 0\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        findings.save(sys.argv[2], overwrite=True)\n"
        "        os._exit(0)\n"
        "    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
        "    data = open(sys.argv[2], 'rb').read()\n"
        "    assert data in (old, new), k\n"
        "    if code == 0: break\n"
        "else: raise SystemExit('never finished')\n"
        "assert k > 3 and data == new\n"
    )
    program = program.replace(
        "findings, n", "old, new = open(sys.argv[2], 'rb').read(), open(sys.argv[1], 'rb').read()\nfindings, n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(out)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [p.name for p in out.parent.iterdir()] == ["f"]
    assert out.read_bytes() == path.read_bytes() != old
