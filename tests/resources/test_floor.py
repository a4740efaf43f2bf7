"""The memory that a process takes before any matrix: a figure of the installed build of torch, not of the program that asks."""

from __future__ import annotations

import subprocess
import sys

import pytest
from command_line import ENV

READ = """
import re
from pathlib import Path

from streamer.plan.memory_estimate import PROCESS_BYTES
import streamer.cli.commands, streamer.api.writing

print(PROCESS_BYTES, re.search(r"RssAnon:\\s*([0-9]+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_floor_is_what_this_build_of_torch_takes_whatever_the_program_holds() -> None:
    """Not less than a fresh process holds, nor so much more that small budgets are refused for nothing."""
    fresh, full = (
        [int(n) for n in subprocess.check_output([sys.executable, "-c", code], text=True, env=ENV).split()]
        for code in (READ, f"data = bytearray(b'x') * (700 << 20)\n{READ}")
    )
    assert fresh[0] == full[0]
    assert full[1] << 10 > 700 << 20
    assert 0.6 * fresh[0] < fresh[1] << 10 < fresh[0]
