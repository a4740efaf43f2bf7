"""Build a base's model from its config as transformers does, without its weights, and translate the errors of its code."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from streamer.errors import (
    FormatError,
    MissingInputError,
    StreamerError,
    UnsupportedError,
)
from streamer.packages import require_package
from streamer.plan.plan import Plan
from streamer.storage.files import storage_error
from streamer.weights.model_config import MODEL_CONFIG

LOGGERS = ("transformers", "torchao", "bitsandbytes", "torch.utils._pytree")
"""Loggers of transformers and of libraries that it imports if they are installed, whether or not a model needs them."""

ERROR_LENGTH = 120
"""Most characters of another library's message that ours quotes."""


def require_transformers() -> Any:
    """Import transformers; see `require_package`."""
    return require_package(
        "transformers", (5,), "evaluate and repair need transformers 5", "evaluate"
    )


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its class if the message is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def refused_errors(path: Path, model: nn.Module) -> Iterator[None]:
    """Turn an error that a model's own code raises inside the context into one line that names the module.

    Parameters
    ----------
    path
        The base, for the message.

    Raises
    ------
    UnsupportedError
        If the error comes from outside this package and is neither a lack of memory nor a failure to read a file.
    MemoryError
        If torch runs out of memory; torch reports this as a `RuntimeError`, on the CPU without a class of its own.
    """
    try:
        yield
    except (StreamerError, OSError, MemoryError):
        raise
    except Exception as e:  # the model's own modules may raise anything
        frames = [frame for frame, _ in traceback.walk_tb(e.__traceback__)]
        if (
            frames[-1].f_globals.get("__name__", "").startswith("streamer.")
        ):  # our own bugs keep their traceback
            raise
        if "DefaultCPUAllocator" in str(e) or isinstance(e, torch.cuda.OutOfMemoryError):
            raise MemoryError(first_line(e)) from e
        names = {id(module): name for name, module in model.named_modules()}
        where = next(
            (
                names[at]
                for frame in reversed(frames)
                if (at := id(frame.f_locals.get("self"))) in names
            ),
            "",
        )
        raise UnsupportedError(
            f"{path}: {f'module {where!r} of ' if where else ''}{type(model).__name__} raises {type(e).__name__}: "
            f"{first_line(e)[:ERROR_LENGTH]}; try a smaller --length, or measure merged models"
        ) from e


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence warnings, and messages below errors, of transformers and what it imports: a library must not print, or stop at them.

    An import warns of deprecations, which ``-W error`` would turn into exceptions.
    """
    with contextlib.ExitStack() as undo, warnings.catch_warnings(action="ignore"):
        for logger in map(logging.getLogger, LOGGERS):
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


def unreadable(path: Path, what: str, e: Exception) -> StreamerError:
    """Make the error for a file that transformers cannot read: its contents are at fault, or the system refused to read it.

    transformers may raise another error in place of the system's; the tokenizers library states the system's number in its message alone.
    """
    cause: BaseException | None = e
    while cause is not None:
        number = re.search(r"\(os error (\d+)\)", str(cause))
        error = OSError(int(number[1]), os.strerror(int(number[1]))) if number else cause
        if (
            isinstance(error, OSError)
            and error.errno
            and not isinstance(error, FileNotFoundError | IsADirectoryError)
        ):
            return storage_error(path, "read", error)
        cause = cause.__cause__ or cause.__context__
    return FormatError(f"{path}: {what}: {first_line(e)}")


def build_skeleton(plan: Plan, device: torch.device) -> Any:
    """Build the base's model as transformers does, without its weights.

    Returns
    -------
    nn.Module
        The model in evaluation mode. Parameters are on the meta device, in float32; buffers are on the given device and hold what the class
        computes from the config.

    Raises
    ------
    FormatError, StorageError
        If transformers or the system cannot read the config.
    InputChangedError
        If an input changed since the plan was made.
    UnsupportedError
        If the class is not one of transformers', or does not predict the next token of a text, or if the adapter changes the vocabulary.
    """
    require_transformers()
    from transformers.initialization import no_init_weights

    path = _config_path(plan)
    with quiet_transformers():
        cls = _class_of(plan, path)
        config = _read_config(plan, path)
        if config.is_encoder_decoder or not _predicts_next(cls.__name__):
            raise UnsupportedError(
                f"{path}: {cls.__name__} does not predict the next token of a text; evaluate and repair need a causal language model"
            )
        try:
            with _parameters_on_meta(), no_init_weights():
                model = cls(config)
        except Exception as e:  # a class may raise anything for a config that does not suit it
            why = first_line(e)[:ERROR_LENGTH]
            raise UnsupportedError(
                f"{path}: transformers cannot build {cls.__name__} from it: {why}"
            ) from e
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model.eval()


def _config_path(plan: Plan) -> Path:
    """Return the path of the base's config; refuse a plan whose model cannot be built from it."""
    if plan.edits.vocabulary is not None:
        raise UnsupportedError(
            f"{plan.adapter.path}: changes the vocabulary to {plan.edits.vocabulary} tokens; evaluate and repair need an adapter that "
            "keeps the base's vocabulary"
        )
    if plan.config.pipeline:
        raise UnsupportedError(
            f"{plan.base.path}: is a diffusers pipeline; evaluate, repair and map need a language model"
        )
    plan.check_unchanged()  # a config that vanished since then is not one that never existed
    directory = plan.base.directory
    if directory is None or not (directory / MODEL_CONFIG).exists():
        raise MissingInputError(
            f"{plan.base.path}: has no {MODEL_CONFIG}, which names the model's class; give the directory of a language model",
            MODEL_CONFIG,
        )
    return directory / MODEL_CONFIG


def _class_of(plan: Plan, path: Path) -> Any:
    """Return transformers' class of the base; this imports it, with every package that transformers finds."""
    transformers = require_transformers()
    name = plan.config.architecture or next(iter(plan.config.architectures), None)
    try:
        cls = getattr(transformers, name, None) if isinstance(name, str) else None
    except Exception as e:  # those packages may raise anything
        if sys.flags.optimize > 1:
            hint = "run Python without -OO, which removes docstrings"
        elif isinstance(e, UnicodeError):
            hint = "set PYTHONUTF8=1"
        else:
            hint = "mend the package, or remove it"
        what = f"{name}: {type(e).__name__}: {first_line(e)[:ERROR_LENGTH]}"
        raise UnsupportedError(
            f"{plan.base.path}: transformers cannot import {what}; {hint}"
        ) from e
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls
    if not name:
        raise UnsupportedError(
            f"{path}: names no class; name it with --architecture, such as LlamaForCausalLM"
        )
    raise UnsupportedError(
        f"{path}: names the class {name!r}, which transformers {transformers.__version__} does not have; "
        "evaluate and repair build the model with transformers' own classes"
    )


def _read_config(plan: Plan, path: Path) -> Any:
    """Read the base's config as transformers does, for a model that runs without a cache, one expert at a time."""
    try:
        config = require_transformers().AutoConfig.from_pretrained(
            path.parent, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as e:
        plan.check_unchanged()
        raise unreadable(path, "transformers cannot read it", e) from e
    config._experts_implementation = "eager"  # loops over experts, so that one is in memory
    config.use_cache = False
    return config


def _predicts_next(name: str) -> bool:
    from transformers.models.auto import modeling_auto as auto

    tables = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return any(name == cls or name in cls for table in tables for cls in table.values())


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device when a module registers it, before it is filled."""

    def on_meta(module: nn.Module, name: str, parameter: Tensor | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]  # torch's stub allows no result
    try:
        yield
    finally:
        handle.remove()


def layer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """List by path the layers of a transformers model that its authors declare safe to run again; nested layers are left out."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(
            path.startswith(f"{outer}.") for outer in layers
        ):
            layers[path] = module
    return layers
