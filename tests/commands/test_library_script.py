"""A script that uses the library."""

from __future__ import annotations

import re
from pathlib import Path

from forks import server


def test_a_script_sees_its_own_line(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    index = base / "model.safetensors.index.json"
    index.write_text(re.sub(r'"total_size": \d+', '"total_size": 1', index.read_text()))
    script = tmp_path / "mine.py"
    script.write_text(f"import streamer\n\nstreamer.detect_intruder_dimensions({str(base)!r}, {str(adapter)!r})\n")
    done = server().run("--version", before=f"import runpy; runpy.run_path({str(script)!r}); sys.exit(0)")
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith(f"{script}:3: StreamerWarning: {index}: total_size says 1, ")
