"""Several adapters on one base: what they are called, and so where the output of each goes.

An adapter that is given alone has the name "", and its output is what the user names; with several, or with a directory of adapters, that
is a directory, and each output in it has the name of its adapter's directory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from streamer.adapter import CONFIG_NAME
from streamer.errors import UsageError
from streamer.storage.place import refuse_symlink
from streamer.tuned import is_model


def holds_adapters(path: str | Path) -> bool:
    """Whether a path is a directory of adapters: no adapter itself, nor a model, but there are adapters in it."""
    path = Path(path)
    return not (path / CONFIG_NAME).exists() and not is_model(path) and bool(_inside(path))


def named_adapters(adapters: str | Path | Sequence[str | Path]) -> dict[str, Path]:
    """Adapters by name, in the order given; in a list, a directory of adapters stands for those in it, sorted.

    Raises
    ------
    UsageError
        If there are none, or two have one name.
    """
    if isinstance(adapters, str | Path):
        return {"": Path(adapters)}
    found: dict[str, Path] = {}
    for given in map(Path, adapters):
        for path in _inside(given) if holds_adapters(given) else [given]:
            name = Path(os.path.abspath(path)).name
            if name in found:
                raise UsageError(
                    f"{path}: has the same name as {found[name]}, and so would their outputs; rename one, or take it alone"
                )
            found[name] = path
    if not found:
        raise UsageError("adapters: expected at least one, found none")
    return found


def model_of(output: str | Path, name: str) -> Path:
    """Where `merge` writes the model of an adapter.

    Raises
    ------
    OutputError
        If the directory for the models of several is a symlink.
    """
    if name:
        refuse_symlink(Path(output))
    return Path(output) / name


def findings_of(output: str | Path, name: str) -> Path:
    """Where `detect` writes the findings on an adapter."""
    return Path(output) / f"{name}.safetensors" if name else Path(output)


def _inside(path: Path) -> list[Path]:
    return sorted(c.parent for c in path.glob(f"*/{CONFIG_NAME}") if not c.parent.name.startswith("."))
