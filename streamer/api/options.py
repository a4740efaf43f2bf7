"""Options of the library's functions as given, and what they become; each is validated when it is made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from streamer.adapters.stated import LoraBLayout, Stated
from streamer.api.keywords import read_size
from streamer.detection.device import choose_device
from streamer.detection.findings import Findings
from streamer.detection.options import DetectionOptions, Run
from streamer.detection.selection import Selection
from streamer.errors import UsageError
from streamer.events import Monitor
from streamer.linalg.allocation import CPU
from streamer.methods import Method, MethodName, make_method
from streamer.methods.coefficients import Coefficients, load_coefficients
from streamer.methods.input_map import InputMap, load_map
from streamer.remote.inputs import Remote, RemoteMode
from streamer.storage.tensor_file import IOMode
from streamer.workers.engine import Workers

SeveralAdapters = Sequence[Path] | list[str] | list[str | Path] | tuple[str | Path, ...]
"""Adapters on one base; a directory of adapters among them means all of those in it."""

Adapters = str | Path | SeveralAdapters
"""One adapter, or several."""


@dataclass(frozen=True)
class Settings:
    """How inputs are read, what a run computes on, and what it may replace: the keywords of `DetectKeywords` as given."""

    max_memory: int | str | None = None
    device: str = "auto"
    io: IOMode = "mmap"
    base_is_residual: bool = False
    lora_b_layout: LoraBLayout | None = None
    ignore_keys: Sequence[str] = ()
    architecture: str | None = None
    remote: RemoteMode | None = None
    resume: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.io not in get_args(IOMode):
            raise UsageError(f"io: expected one of {', '.join(get_args(IOMode))}, found {self.io!r}")
        if self.architecture is not None and not isinstance(self.architecture, str):
            raise UsageError(f"architecture: expected the name of a class, found {self.architecture!r}")
        _ = self.memory, self.stated, self.located(Monitor())

    @property
    def memory(self) -> int | None:
        """Return the budget in bytes; None if there is none."""
        return read_size(self.max_memory)

    @property
    def stated(self) -> Stated:
        """Return what the user states of the adapters."""
        return Stated(self.base_is_residual, self.lora_b_layout, self.ignore_keys)

    def located(self, monitor: Monitor, peek: bool = False) -> Remote:
        """Return what finds inputs, which may be addresses; `peek` if only their headers will be read."""
        return Remote(self.remote, peek, monitor)

    def run_options(self, monitor: Monitor, workers: Workers | None = None) -> Run:
        """Resolve the devices, and put a run's options and who watches it together.

        ``auto`` runs models on the CPU: they have not been run on a GPU.
        """
        device = choose_device(self.device)
        models = CPU if self.device == "auto" else device
        return Run(
            device, self.io, self.stated, self.architecture, self.resume, self.overwrite, models, monitor, workers
        )


@dataclass(frozen=True)
class Judged:
    """What counts as an intruder, as given: None leaves it to findings, or to the default."""

    top_k: int | float | None = None
    threshold_epsilon: float | None = None
    solver: str | None = None

    def __post_init__(self) -> None:
        self.options()

    def options(self, max_memory: int | None = None, findings: Findings | None = None) -> DetectionOptions:
        """Make the options of detection; what is not given is the findings', or the default. The memory is this run's alone."""
        default = DetectionOptions() if findings is None else findings.options
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(default, max_memory=max_memory, **{k: v for k, v in given.items() if v is not None})


@dataclass(frozen=True)
class MethodChoice:
    """A method of mitigation, as given."""

    mitigation_lambda: float | None = None
    method: MethodName | None = None
    scale: Selection = "all"
    coefficients: Coefficients | str | Path | None = None
    keep: float | None = None
    amplify: bool = False
    map: InputMap | str | Path | None = None

    def make(self) -> Method:
        """Make the method, and read its coefficients or its map.

        Raises
        ------
        UsageError
            If a λ or another method comes with coefficients, a share to keep comes without them, or λ is refused.
        """
        if self.coefficients is None and self.keep is not None:
            raise UsageError(
                f"keep: chooses among coefficients, found {self.keep!r} and none; give them, or leave it out"
            )
        fitted = None if self.coefficients is None else read_coefficients(self.coefficients).select(self.keep)
        mapped = None if self.map is None else read_map(self.map)
        return make_method(self.method, self.mitigation_lambda, self.scale, fitted, self.amplify, mapped)


Options = TypeVar("Options")


def take(kind: type[Options], keywords: Mapping[str, Any], **named: Any) -> Options:
    """Make a dataclass of those of the keywords that are its fields, and of others by name."""
    own = [f.name for f in fields(cast(Any, kind)) if f.name in keywords]
    return kind(**{**{name: keywords[name] for name in own}, **named})


def given_workers(keywords: Mapping[str, Any]) -> Workers | None:
    """Return the workers of an executor among keywords; None without one."""
    executor = keywords.get("executor")
    return None if executor is None else Workers.of(executor)


def read_coefficients(coefficients: Coefficients | str | Path) -> Coefficients:
    """Return coefficients, read if a path is given."""
    return coefficients if isinstance(coefficients, Coefficients) else load_coefficients(coefficients)


def read_map(given: InputMap | str | Path) -> InputMap:
    """Return a map of a base's inputs, read if a path is given."""
    return given if isinstance(given, InputMap) else load_map(given)


def read_path(name: str, value: str | Path) -> Path:
    """Read a path, of the keyword of this name.

    Raises
    ------
    UsageError
        If it is none.
    """
    if not isinstance(value, str | os.PathLike):
        raise UsageError(f"{name}: expected a path, found {value!r}")
    return Path(value)
