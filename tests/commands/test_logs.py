"""What a command prints into a log while it runs."""

from __future__ import annotations

import re
import subprocess
import sys

from command_line import ENV


def test_a_log_shows_life() -> None:
    """While one matrix takes long and no event comes: the time since the start, the stage, count, share and time left."""
    code = """
import time
from streamer.cli.progress import Progress
from streamer.events import Event
progress = Progress("plain", 0, "detect", logged=0.2)
progress(Event("detect", "a.weight", 0, 100, 0, 4, "poems"))
time.sleep(0.3)
progress(Event("detect", "b.weight", 50, 100, 2, 4, "poems"))
time.sleep(0.4)
progress(Event("detect", "", 100, 100, 4, 4))
progress.close()
progress.finish("4 matrices")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=True)
    first, *between, last = done.stderr.splitlines()
    assert re.fullmatch(r"streamer: detect: after 00:\d\d, 0 of 4 matrices, 0%, poems", first)
    halfway = [line for line in between if ", 2 of 4 matrices, 50%, poems, 00:" in line]
    assert len(halfway) >= 2  # one when an event came, and one when none did
    assert all(re.fullmatch(r"streamer: detect: after 00:\d\d, .* 00:\d\d left", line) for line in halfway)
    assert re.fullmatch(r"streamer: detect: 4 matrices, in [\d.]+ s", last)
