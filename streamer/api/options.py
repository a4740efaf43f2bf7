"""Convert options of the library's functions from the form in which they are given; each is validated when it is made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from streamer.adapters.adapter_config import LoraBLayout, Stated
from streamer.adapters.finetuned import One, Several, one_or_several
from streamer.api.keywords import read_size
from streamer.detection.findings import Findings
from streamer.detection.matrices import choose_device
from streamer.detection.options import DetectionOptions, Run
from streamer.errors import UsageError
from streamer.events import Monitor
from streamer.json_types import Selection
from streamer.linalg.torch_state import CPU
from streamer.methods import Method, MethodName, make_method
from streamer.methods.files import Coefficients, InputMap, load_coefficients, load_map
from streamer.remote.inputs import Remote, RemoteMode
from streamer.storage.tensor_file import IOMode
from streamer.workers import Workers


@dataclass(frozen=True)
class Inputs:
    """Base, and one adapter or several, as given."""

    base: str | Path
    adapter: Adapters

    def located(self, remote: Remote) -> tuple[str | Path, One | Several]:
        """Find base and adapters, and determine whether one adapter or several are given."""
        base = remote.path(self.base)
        if isinstance(self.adapter, str | Path):
            return base, one_or_several(remote.path(self.adapter))
        return base, one_or_several(remote.paths(*self.adapter))


SeveralAdapters = Sequence[Path] | list[str] | list[str | Path] | tuple[str | Path, ...]
"""Adapters on one base; a directory of adapters means all adapters in it."""

Adapters = str | Path | SeveralAdapters
"""One adapter, or several."""


@dataclass(frozen=True)
class Settings:
    """How inputs are read, which device and memory a run uses, and what it may replace: keywords of `DetectKeywords`, as given."""

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
        """Return the memory budget in bytes; None if there is none."""
        return read_size(self.max_memory)

    @property
    def stated(self) -> Stated:
        """Return what the user states about the adapters."""
        return Stated(self.base_is_residual, self.lora_b_layout, self.ignore_keys)

    def located(self, monitor: Monitor, peek: bool = False) -> Remote:
        """Return the finder of inputs, which may be addresses; `peek` says that only headers will be read."""
        return Remote(self.remote, peek, monitor)

    def make_run(self, monitor: Monitor, workers: Workers | None = None) -> Run:
        """Resolve the devices, and join them with the monitor and the workers.

        ``auto`` runs models on the CPU, because no GPU has been tried for them.
        """
        device = choose_device(self.device)
        models = CPU if self.device == "auto" else device
        resolved = {"device": device, "model_device": models, "stated": self.stated}
        return take(Run, vars(self), **resolved, monitor=monitor, workers=workers)


@dataclass(frozen=True)
class Judged:
    """What counts as an intruder, as given; None means the value in the findings, or the default."""

    top_k: int | float | None = None
    threshold_epsilon: float | None = None
    solver: str | None = None

    def __post_init__(self) -> None:
        self.options()

    def options(self, max_memory: int | None = None, findings: Findings | None = None) -> DetectionOptions:
        """Make the options of detection; missing ones come from the findings, or are the defaults. The memory always is this run's."""
        default = DetectionOptions() if findings is None else findings.options
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(default, max_memory=max_memory, **{k: v for k, v in given.items() if v is not None})


@dataclass(frozen=True)
class MethodChoice:
    """A mitigation method, as given."""

    mitigation_lambda: float | None = None
    method: MethodName | None = None
    select: Selection = "all"
    coefficients: Coefficients | str | Path | None = None
    keep: float | None = None
    amplify: bool = False
    map: InputMap | str | Path | None = None

    def make(self) -> Method:
        """Make the method, and read its coefficients or its map.

        Raises
        ------
        UsageError
            If coefficients are combined with a λ or another method, if a share to keep is given without coefficients, or if λ is refused.
        """
        if self.coefficients is None and self.keep is not None:
            raise UsageError(
                f"keep: chooses among coefficients, found {self.keep!r} but no coefficients; give them, or omit keep"
            )
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        if self.coefficients is not None:
            given["coefficients"] = read_coefficients(self.coefficients).select(given.pop("keep", None))
        if self.map is not None:
            given["map"] = read_map(self.map)
        return make_method(given.pop("method", None), **given)


Options = TypeVar("Options")


def take(kind: type[Options], keywords: Mapping[str, Any], **named: Any) -> Options:
    """Make a dataclass from the keywords that are its fields, and from the named values."""
    own = [f.name for f in fields(cast(Any, kind)) if f.name in keywords]
    return kind(**{**{name: keywords[name] for name in own}, **named})


def given_workers(keywords: Mapping[str, Any]) -> Workers | None:
    """Return the workers of the executor in the keywords; None if there is none."""
    executor = keywords.get("executor")
    return None if executor is None else Workers.of(executor)


def read_coefficients(coefficients: Coefficients | str | Path) -> Coefficients:
    """Return coefficients, read from their file if a path is given."""
    return coefficients if isinstance(coefficients, Coefficients) else load_coefficients(coefficients)


def read_map(given: InputMap | str | Path) -> InputMap:
    """Return a map of a base's inputs, read from its file if a path is given."""
    return given if isinstance(given, InputMap) else load_map(given)


def read_path(name: str, value: str | Path) -> Path:
    """Convert the value of the keyword of this name to a path.

    Raises
    ------
    UsageError
        If it is not a path.
    """
    if not isinstance(value, str | os.PathLike):
        raise UsageError(f"{name}: expected a path, found {value!r}")
    return Path(value)
