"""Decide whether one adapter or several on one base are given, and where each output goes.

For one adapter, the output is the path that the user names. For several, that path is a directory, and each output in it is named after its
adapter's directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from streamer.adapters.adapter_config import CONFIG_NAME, LORA_NAME, WEIGHTS_NAME
from streamer.adapters.finetuned import is_model
from streamer.errors import OutputExistsError, UsageError
from streamer.storage.output_checks import refuse_symlink

FILES = (CONFIG_NAME, WEIGHTS_NAME, "adapter_model.bin", LORA_NAME)
"""A directory that has any of these files is an adapter, complete or not."""

T = TypeVar("T")
R = TypeVar("R")


class ByName(dict[str, T]):
    """Results for several adapters, by name."""


@dataclass(frozen=True)
class One:
    """One adapter."""

    path: Path

    @property
    def paths(self) -> list[Path]:
        """List its path."""
        return [self.path]

    def directories(self, output: Path) -> list[Path]:
        """List the directory for its model or adapter."""
        return [output]

    def findings_files(self, output: Path) -> list[Path]:
        """List the file for its findings."""
        return [output]

    def collected(self, results: Sequence[T]) -> T:
        """Return the only result."""
        (result,) = results
        return result


@dataclass(frozen=True)
class Several:
    """Several adapters, by name and in order; possibly only one."""

    by_name: Mapping[str, Path]

    @property
    def paths(self) -> list[Path]:
        """List their paths."""
        return list(self.by_name.values())

    def directories(self, output: Path) -> list[Path]:
        """List the directory for each adapter's model or adapter.

        Raises
        ------
        OutputError
            If the output path is a file or a symlink.
        """
        refuse_symlink(output)
        if output.exists() and not output.is_dir():
            raise OutputExistsError(
                f"{output}: for several adapters -o is a directory, found a file; name a directory", output
            )
        return [output / name for name in self.by_name]

    def findings_files(self, output: Path) -> list[Path]:
        """List the file for each adapter's findings, all in one directory; see `directories`."""
        return [path.with_name(f"{path.name}.safetensors") for path in self.directories(output)]

    def collected(self, results: Sequence[T]) -> ByName[T]:
        """Return the results by name."""
        return ByName(zip(self.by_name, results, strict=True))


def one_or_several(given: str | Path | Sequence[str | Path]) -> One | Several:
    """Decide by the argument: a list, or a directory of adapters, means several."""
    if isinstance(given, str | Path) and not holds_adapters(given):
        return One(Path(given))
    return Several(named_adapters([given] if isinstance(given, str | Path) else given))


def each(results: T | ByName[T], change: Callable[[T], R]) -> R | ByName[R]:
    """Apply `change` to the result for one adapter, or to each result for several."""
    if isinstance(results, ByName):
        return ByName({name: change(result) for name, result in results.items()})
    return change(results)


def holds_adapters(path: str | Path) -> bool:
    """Test whether a path is a directory of adapters: neither an adapter nor a model, but with adapters inside."""
    path = Path(path)
    return not _is_adapter(path) and not is_model(path) and bool(_inside(path))


def named_adapters(adapters: Sequence[str | Path]) -> dict[str, Path]:
    """List adapters by name, in the order given; a directory of adapters stands for all adapters in it, sorted.

    Incomplete adapters are included: opening one reports what is missing. Other directories are skipped.

    Raises
    ------
    UsageError
        If there are none, one is given twice, two have the same name, or a directory of adapters contains a model.
    """
    found: dict[str, Path] = {}
    for given in map(Path, adapters):
        several = holds_adapters(given)
        # The user may mean a model as a fine-tuned model, or it may be the base.
        if several and (models := sorted(p.name for p in _directories(given) if is_model(p) and not _is_adapter(p))):
            raise UsageError(f"{given}: holds a model beside the adapters, {models[0]!r}; list the adapters one by one")
        for path in _inside(given) if several else [given]:
            name = Path(os.path.abspath(path)).name.removesuffix(".safetensors")
            if name in found and os.path.realpath(path) == os.path.realpath(found[name]):
                raise UsageError(f"{path}: is given twice; name it once")
            if name in found:
                raise UsageError(
                    f"{path}: has the same name as {found[name]}, so their outputs would collide; rename one, or run it separately"
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
    """Test whether any of an adapter's files exists, even as a broken link."""
    return any(os.path.lexists(path / name) for name in FILES)
