"""Completion, the man page, abbreviations."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ENV
from forks import server
from paths import TOOLS

# The parser -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_completion_script(shell: str, tmp_path: Path) -> None:
    done = server().run("--print-completion", shell)
    assert (done.code, done.err) == (0, "")
    assert "mitigate" in done.out
    assert "to-lora" in done.out
    if shell == "bash":
        script = tmp_path / "streamer.bash"
        script.write_text(done.out)
        (tmp_path / "adapter-dir").mkdir()
        ask = (
            f"source {script}; cd {tmp_path}; COMP_WORDS=({{words}}); COMP_CWORD={{at}}; "
            "$(complete -p streamer | sed 's/.*-F \\([^ ]*\\).*/\\1/') streamer; echo ${{COMPREPLY[@]}}"
        )

        def complete(*words: str) -> list[str]:
            text = ask.format(words=" ".join(words), at=len(words) - 1)
            return subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True).stdout.split()

        assert complete("streamer", "mit") == ["mitigate"]
        assert "--lambda" in complete("streamer", "merge", "--l")
        assert "adapter-dir" in complete("streamer", "mitigate", "adapter-")


def test_completion_without_its_library() -> None:
    code = "import sys; sys.modules['shtab'] = None; from streamer.cli.main import run; run(['--print-completion', 'bash'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=False)
    assert done.returncode == 2
    assert (
        "needs shtab, which is not installed: pip install 'intruder-streamer[completion]'"
        in done.stderr.splitlines()[-1]
    )


def test_abbreviations_are_not_taken() -> None:
    """A new option would make them mean something else."""
    assert server().run("merge", "b", "a", "-o", "x", "--lam", "0.5").code == 2


def test_a_man_page(tmp_path: Path) -> None:
    pytest.importorskip("argparse_manpage")
    tool = TOOLS / "make_man_page.py"
    page = tmp_path / "streamer.1"
    subprocess.run([sys.executable, tool, "-o", page], check=True, env=ENV)
    text = page.read_text()
    for words in ("streamer merge", r"\-\-to\-lora", "exit codes", r"streamer report findings.safetensors \-\-json"):
        assert words in text, words
    if shutil.which("groff"):
        done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", page], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert "allow a lambda outside" in " ".join(done.stdout.split())
