"""Commands that must end well, and commands that must be refused: in one line, by the documented code, before anything is written."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from forks import server
from helpers import tree_digest
from safetensors.torch import load_file, save_file

WRITING = ("detect", "merge", "mitigate")


def refuse(command: str, base: Path, adapter: Path, home: Path, code: int, *options: object) -> str:
    """Run a command that must be refused: its one line, the exit code checked, and that nothing at all was written."""
    out = home / "out.safetensors"  # a name for findings, and for a directory too
    before = tree_digest(home)
    done = server().run(command, base, adapter, "-o", out, *options)
    assert (done.code, done.out, done.calls) == (code, "", []), done
    assert done.err.startswith("streamer: ")
    assert done.err.count("\n") == 1
    assert len(re.sub(rf"{re.escape(str(home))}[^\s:;,']*", "", done.err)) <= 300, (
        done.err
    )  # paths apart
    assert not out.exists()
    assert tree_digest(home) == before
    return done.err


def refuse_everywhere(base: Path, adapter: Path, home: Path, code: int, *words: str) -> None:
    """Every writing command refuses, and `inspect`, in the same words; all of the given ones are among them."""
    said = {refuse(command, base, adapter, home, code) for command in WRITING}
    assert len(said) == 1
    line = said.pop()
    for word in words:
        assert word in line, line
    done = server().run("inspect", base, adapter)
    assert (done.code, done.err) == (code, line)


# Adapters and bases that do not fit, or are broken --------------------------------------------------------------------


def edit_adapter(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def target(home: Path, command: str) -> Path:
    return home / ("f.safetensors" if command == "detect" else "out")


def ok(*argv: object) -> dict:
    done = server().run(*argv, "--json")
    assert done.code == 0, done
    return json.loads(done.out)
