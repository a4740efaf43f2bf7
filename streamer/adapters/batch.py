"""Name several adapters on one base, and the output of each.

An adapter that is given alone has the name "", and its output is what the user names; with several, or with a directory of adapters, that
is a directory, and each output in it has the name of its adapter's directory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from streamer.adapters.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from streamer.adapters.finetuned import is_model
from streamer.errors import OutputExistsError, UsageError
from streamer.storage.output_checks import refuse_symlink

FILES = (CONFIG_NAME, WEIGHTS_NAME, "adapter_model.bin")
"""By any of them a directory is an adapter's, whole or not."""


def holds_adapters(path: str | Path) -> bool:
    """Say whether a path is a directory of adapters: no adapter itself, nor a model, but there are adapters in it."""
    path = Path(path)
    return not _is_adapter(path) and not is_model(path) and bool(_inside(path))


def named_adapters(adapters: str | Path | Sequence[str | Path]) -> dict[str, Path]:
    """List adapters by name, in the order given; in a list, a directory of adapters stands for those in it, sorted.

    One that is not whole is among them, so that opening it says what it lacks. Other directories beside them are passed over.

    Raises
    ------
    UsageError
        If there are none, one is given twice, two have one name, or there is a model in a directory of adapters.
    """
    if isinstance(adapters, str | Path):
        return {"": Path(adapters)}
    found: dict[str, Path] = {}
    for given in map(Path, adapters):
        several = holds_adapters(given)
        if several:
            _refuse_models(given)
        for path in _inside(given) if several else [given]:
            name = Path(os.path.abspath(path)).name
            if name in found and os.path.realpath(path) == os.path.realpath(found[name]):
                raise UsageError(f"{path}: is given twice; name it once")
            if name in found:
                raise UsageError(
                    f"{path}: has the same name as {found[name]}, and so would their outputs; rename one, or take it alone"
                )
            found[name] = path
    if not found:
        raise UsageError("adapters: expected at least one, found none")
    return found


def model_of(output: str | Path, name: str) -> Path:
    """Return the directory that `merge` writes an adapter's model to.

    Raises
    ------
    OutputError
        If what is to be the directory for the models of several is a file, or a symlink.
    """
    return _directory(output) / name if name else Path(output)


def findings_of(output: str | Path, name: str) -> Path:
    """Return the file that `detect` writes the findings on an adapter to.

    Raises
    ------
    OutputError
        If what is to be the directory for those on several is a file, or a symlink.
    """
    return given_findings(_directory(output), name) if name else Path(output)


def given_findings(directory: str | Path, name: str) -> Path:
    """Return the file that `detect` has written the findings on one of several adapters to."""
    return Path(directory) / f"{name}.safetensors"


def _directory(output: str | Path) -> Path:
    """Return the output of several adapters, a directory."""
    path = Path(output)
    refuse_symlink(path)
    if path.exists() and not path.is_dir():
        raise OutputExistsError(f"{path}: of several adapters -o is a directory, found a file; name a directory", path)
    return path


def _inside(path: Path) -> list[Path]:
    return sorted(p for p in _directories(path) if _is_adapter(p))


def _directories(path: Path) -> list[Path]:
    return [p for p in path.glob("*") if p.is_dir() and not p.name.startswith(".")]


def _is_adapter(path: Path) -> bool:
    """Say whether any of an adapter's files is there, if only as a link that leads nowhere."""
    return any(os.path.lexists(path / name) for name in FILES)


def _refuse_models(path: Path) -> None:
    """Refuse models in a directory of adapters: one might be a fine-tuned one that is to go along, or the base."""
    models = sorted(p.name for p in _directories(path) if is_model(p) and not _is_adapter(p))
    if models:
        raise UsageError(
            f"{path}: holds a model beside the adapters, {models[0]!r}; name one by one those that are meant"
        )
