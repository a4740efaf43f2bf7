"""Decide whether one adapter or several on one base are given, and where the output of each goes.

The output of one is what the user names. That of several is a directory, in which each output has the name of its adapter's directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from streamer.adapters.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from streamer.adapters.finetuned import is_model
from streamer.errors import OutputExistsError, UsageError
from streamer.storage.output_checks import refuse_symlink

FILES = (CONFIG_NAME, WEIGHTS_NAME, "adapter_model.bin")
"""By any of them a directory is an adapter's, whole or not."""

T = TypeVar("T")
R = TypeVar("R")


class ByName(dict[str, T]):
    """Results for several adapters, by their names."""


@dataclass(frozen=True)
class One:
    """One adapter."""

    path: Path

    @property
    def paths(self) -> list[Path]:
        """List its path alone."""
        return [self.path]

    def directories(self, output: Path) -> list[Path]:
        """List the directory that its model or adapter is written to."""
        return [output]

    def findings_files(self, output: Path) -> list[Path]:
        """List the file that findings on it are written to."""
        return [output]

    def collected(self, results: Sequence[T]) -> T:
        """Return the only result."""
        (result,) = results
        return result


@dataclass(frozen=True)
class Several:
    """Several adapters, by name and in order; there may be one of them only."""

    by_name: Mapping[str, Path]

    @property
    def paths(self) -> list[Path]:
        """List their paths."""
        return list(self.by_name.values())

    def directories(self, output: Path) -> list[Path]:
        """List the directory that each one's model or adapter is written to.

        Raises
        ------
        OutputError
            If what is to be the directory of all is a file, or a symlink.
        """
        refuse_symlink(output)
        if output.exists() and not output.is_dir():
            raise OutputExistsError(
                f"{output}: of several adapters -o is a directory, found a file; name a directory", output
            )
        return [output / name for name in self.by_name]

    def findings_files(self, output: Path) -> list[Path]:
        """List the file that findings on each are written to, in a directory; see `directories`."""
        return [path.with_name(f"{path.name}.safetensors") for path in self.directories(output)]

    def collected(self, results: Sequence[T]) -> ByName[T]:
        """Return the results by name."""
        return ByName(zip(self.by_name, results, strict=True))


def one_or_several(given: str | Path | Sequence[str | Path]) -> One | Several:
    """Decide by what is given: several adapters are a list, or a directory of adapters."""
    if isinstance(given, str | Path) and not holds_adapters(given):
        return One(Path(given))
    return Several(named_adapters([given] if isinstance(given, str | Path) else given))


def each(results: T | ByName[T], change: Callable[[T], R]) -> R | ByName[R]:
    """Change the result for one adapter, or each of those for several."""
    if isinstance(results, ByName):
        return ByName({name: change(result) for name, result in results.items()})
    return change(results)


def holds_adapters(path: str | Path) -> bool:
    """Say whether a path is a directory of adapters: no adapter itself, nor a model, but there are adapters in it."""
    path = Path(path)
    return not _is_adapter(path) and not is_model(path) and bool(_inside(path))


def named_adapters(adapters: Sequence[str | Path]) -> dict[str, Path]:
    """List adapters by name, in the order given; a directory of adapters means all of those in it, sorted.

    One that is not whole is among them, so that opening it says what it lacks. Other directories beside them are passed over.

    Raises
    ------
    UsageError
        If there are none, one is given twice, two have one name, or there is a model in a directory of adapters.
    """
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
                    f"{path}: has the same name as {found[name]}, and so would their outputs; rename one, or run it separately"
                )
            found[name] = path
    if not found:
        raise UsageError("adapters: expected at least one, found none")
    return found


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
            f"{path}: holds a model beside the adapters, {models[0]!r}; give the adapters that you mean one by one"
        )
