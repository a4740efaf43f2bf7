"""A script that uses the library."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_a_script_sees_its_own_line(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    index = base / "model.safetensors.index.json"
    index.write_text(re.sub(r'"total_size": \d+', '"total_size": 1', index.read_text()))
    script = tmp_path / "mine.py"
    script.write_text(f"import streamer\n\nstreamer.detect_intruder_dimensions({str(base)!r}, {str(adapter)!r})\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.startswith(f"{script}:3: StreamerWarning: {index}: total_size says 1, ")
