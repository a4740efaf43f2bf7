"""Make what a run needs from its options, in the form in which they are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from streamer.adapters.adapter_config import Stated
from streamer.adapters.finetuned import AdapterPaths, one_or_several
from streamer.detection.detect import choose_device
from streamer.detection.findings import Findings
from streamer.detection.options import DetectionOptions
from streamer.errors import UsageError
from streamer.events import Monitor
from streamer.linalg.torch_state import CPU
from streamer.options import Adapters, Computing, Judged, OfBase, Writing
from streamer.output.opening import FindingsOrPath, load_given
from streamer.remote.inputs import Remote
from streamer.run import Run
from streamer.units import parse_size
from streamer.workers import Workers


class Request(Writing, Computing, OfBase):
    """Options of a run on files; a subclass runs it or forecasts it. Without an output, results stay in memory."""

    def __post_init__(self) -> None:
        _ = self.memory
        if isinstance(self, Judged):
            detection_options(self)

    @property
    def file(self) -> Path | None:
        """Return the path of the output; None if there is none."""
        return None if self.output is None else Path(self.output)

    @property
    def memory(self) -> int | None:
        """Return the memory budget in bytes; None if there is none."""
        return None if self.max_memory is None else read_size("max_memory", self.max_memory)

    @property
    def stated(self) -> Stated:
        """Return what the user states about the adapters."""
        return take(Stated, vars(self))

    def located(self, monitor: Monitor, peek: bool = False) -> Remote:
        """Return the finder of inputs, which may be addresses; `peek` says that only headers will be read."""
        return Remote(self.remote, peek, monitor)

    def opened(
        self, adapter: str | Path, findings: FindingsOrPath, monitor: Monitor, peek: bool = False
    ) -> tuple[Path, Path, Findings | None, Run]:
        """Find base and adapter, load the findings, and resolve the run, for one adapter."""
        base, adapter = map(Path, self.located(monitor, peek).paths(self.base, adapter))
        (loaded,) = load_given(findings, AdapterPaths.of_one(adapter))
        return base, adapter, loaded, self.make_run(monitor)

    def make_run(self, monitor: Monitor, workers: Workers | None = None) -> Run:
        """Resolve the devices, and join them with the monitor and the workers.

        ``auto`` runs models on the CPU, because no GPU has been tried for them.
        """
        device = choose_device(self.device)
        return take(
            Run,
            vars(self),
            device=device,
            model_device=CPU if self.device == "auto" else device,
            stated=self.stated,
            monitor=monitor,
            workers=workers,
        )


def read_size(name: str, size: int | str, unit: int = 1024) -> int:
    """Read the size that an option gives, in bytes or as a text; see `parse_size`."""
    if isinstance(size, int):
        return size
    try:
        return parse_size(size, unit)
    except ValueError as e:
        raise UsageError(f"{name}: {e}") from None


Made = TypeVar("Made")


def take(kind: type[Made], options: Mapping[str, Any], **changes: Any) -> Made:
    """Make a dataclass from the options that are its fields, and from the changes."""
    names = {f.name for f in fields(cast(Any, kind))}
    return kind(**{name: options[name] for name in names & options.keys()} | changes)


def found_inputs(
    remote: Remote, base: str | Path, adapter: Adapters
) -> tuple[str | Path, AdapterPaths]:
    """Find base and adapters, and determine whether one adapter or several are given."""
    base = remote.path(base)
    if isinstance(adapter, str | Path):
        return base, one_or_several(remote.path(adapter))
    return base, one_or_several(remote.paths(*adapter))


def detection_options(
    judged: Judged, max_memory: int | None = None, findings: Findings | None = None
) -> DetectionOptions:
    """Make the options of detection; missing ones come from the findings, or are the defaults. The memory always is this run's."""
    default = DetectionOptions() if findings is None else findings.options
    stated = {f.name: getattr(judged, f.name) for f in fields(Judged)}
    given = {name: value for name, value in stated.items() if value is not None}
    return replace(default, max_memory=max_memory, **given)
