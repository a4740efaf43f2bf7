"""Make options of the keywords that the library's functions have in common."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TypedDict, get_args

from streamer.adapters.stated import LoraBLayout, Stated
from streamer.detection.device import choose_device
from streamer.detection.options import DetectionOptions, RunOptions, check_size
from streamer.detection.selection import Selection
from streamer.errors import UsageError
from streamer.events import Monitor, OnEvent
from streamer.methods import MethodName, make_method
from streamer.methods.coefficients import Coefficients
from streamer.methods.coefficients_file import load_coefficients
from streamer.methods.method import Method
from streamer.remote.inputs import RemoteMode
from streamer.storage.tensor_file import IOMode
from streamer.units import parse_size

Several = Sequence[Path] | list[str] | list[str | Path] | tuple[str | Path, ...]
"""Adapters on one base; a directory of adapters among them stands for those in it."""


class Running(TypedDict, total=False):
    """Keywords that detection and merging have in common."""

    top_k: int | float
    threshold_epsilon: float
    solver: str
    max_memory: int | str | None
    device: str
    io: IOMode
    base_is_residual: bool
    lora_b_layout: LoraBLayout | None
    ignore_keys: Sequence[str]
    architecture: str | None
    remote: RemoteMode | None
    resume: bool
    overwrite: bool
    on_event: OnEvent | None
    monitor: Monitor | None
    progress: bool | None


class Detecting(Running, total=False):
    """Keywords of `detect_intruder_dimensions`."""

    executor: Executor | None


class Mitigating(Running, total=False):
    """Keywords that mitigation and merging have in common."""

    mitigation_lambda: float | None
    amplify: bool
    method: MethodName | None
    scale: Selection
    coefficients: Coefficients | str | Path | None
    keep: float | None
    model_card: bool


class Merging(Mitigating, total=False):
    """Keywords of `merge_with_reduced_intruder_dimensions`."""

    dequantize: bool


class Reducing(Mitigating, total=False):
    """Keywords of `reduce_intruder_dimension`."""

    to_lora: int | float | None


def detection_options(
    top_k: int | float, threshold_epsilon: float, solver: str, max_memory: int | str | None
) -> DetectionOptions:
    """Make the options of detection, a budget read as the command line does."""
    return DetectionOptions(top_k, threshold_epsilon, solver, read_size(max_memory))


def mitigation_options(
    mitigation_lambda: float | None, method: MethodName | None, scale: Selection,
    coefficients: Coefficients | str | Path | None, keep: float | None, amplify: bool,
) -> Method:  # fmt: skip
    """Make the options of a mitigation, of coefficients or of a λ.

    Parameters
    ----------
    mitigation_lambda
        None: the method's own default.
    method
        None: see `make_method`.
    coefficients, keep
        Coefficients, or the path of their file, and which set of them; see `Coefficients.select`.
    amplify
        Allow λ outside [0, 1].

    Raises
    ------
    UsageError
        If a λ or another method comes with coefficients, a share to keep comes without them, or λ is refused.
    """
    if coefficients is None and keep is not None:
        raise UsageError(f"keep: chooses among coefficients, found {keep!r} and none; give them, or leave it out")
    fitted = None if coefficients is None else read_coefficients(coefficients).select(keep)
    return make_method(method, mitigation_lambda, scale, fitted, amplify)


def read_coefficients(coefficients: Coefficients | str | Path) -> Coefficients:
    """Return coefficients, read where a path is given."""
    return coefficients if isinstance(coefficients, Coefficients) else load_coefficients(coefficients)


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


def read_size(max_memory: int | str | None) -> int | None:
    """Read a budget as the command line does."""
    if not isinstance(max_memory, str):
        check_size(max_memory)
        return max_memory
    try:
        return parse_size(max_memory)
    except ValueError as e:
        raise UsageError(f"max_memory: {e}") from None


def run_options(device: str, io: IOMode, stated: Stated, architecture: str | None, monitor: Monitor,
                resume: bool = True, overwrite: bool = False) -> RunOptions:  # fmt: skip
    """Make the options of a run.

    Raises
    ------
    UsageError
        If a keyword is of another type.
    """
    if io not in get_args(IOMode):
        raise UsageError(f"io: expected one of {', '.join(get_args(IOMode))}, found {io!r}")
    if architecture is not None and not isinstance(architecture, str):
        raise UsageError(f"architecture: expected the name of a class, found {architecture!r}")
    return RunOptions(choose_device(device), io, stated, architecture, resume, overwrite, monitor)
