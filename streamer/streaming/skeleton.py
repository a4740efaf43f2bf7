"""Build a model from its ``config.json`` with transformers: parameters on the meta device, buffers with real values."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from streamer.errors import MissingInputError, UnsupportedError
from streamer.plan.plan import Plan
from streamer.streaming.extra import ERROR_LENGTH, first_line, quiet_transformers, require_transformers, unreadable
from streamer.weights.model_config import MODEL_CONFIG

UNREAD = "_name_or_path", "transformers_version", "use_cache"
"""Config keys that change no logits: a model runs without a cache."""


def build_skeleton(plan: Plan, device: torch.device) -> nn.Module:
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
        If the class is not one of transformers', or does not predict the next token of a text.
    """
    transformers = require_transformers()
    from transformers.initialization import no_init_weights

    directory = plan.base.directory
    if plan.config.pipeline:
        raise UnsupportedError(
            f"{plan.base.path}: is a diffusers pipeline; evaluate, fit, repair and map need a language model"
        )
    plan.check_unchanged()  # a config that vanished since then is not one that never existed
    if directory is None or not (path := directory / MODEL_CONFIG).exists():
        raise MissingInputError(
            f"{plan.base.path}: has no {MODEL_CONFIG}, which names the model's class; give the directory of a language model",
            MODEL_CONFIG,
        )
    name = plan.config.architecture or next(iter(plan.config.architectures), None)
    with quiet_transformers():
        try:
            cls = getattr(transformers, name, None) if isinstance(name, str) else None
        except Exception as e:  # this imports the class, with every package that transformers finds
            encoding = "set PYTHONUTF8=1" if isinstance(e, UnicodeError) else "mend the package, or remove it"
            hint = "run Python without -OO, which removes docstrings" if sys.flags.optimize > 1 else encoding
            what = f"{name}: {type(e).__name__}: {first_line(e)[:ERROR_LENGTH]}"
            raise UnsupportedError(f"{plan.base.path}: transformers cannot import {what}; {hint}") from e
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            raise UnsupportedError(
                f"{path}: names the class {name!r}, which transformers {transformers.__version__} does not have; "
                "evaluate and fit build the model with transformers' own classes"
                if name
                else f"{path}: names no class; name it with --architecture, such as LlamaForCausalLM"
            )
        try:
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as e:
            plan.check_unchanged()
            raise unreadable(path, "transformers cannot read it", e) from e
        if config.is_encoder_decoder or not _predicts_next(cls.__name__):
            raise UnsupportedError(
                f"{path}: {name} does not predict the next token of a text; evaluate and fit need a causal language model"
            )
        config._experts_implementation = "eager"  # loops over experts, so that one is in memory at a time
        config.use_cache = False
        try:
            with _parameters_on_meta(), no_init_weights():
                model: nn.Module = cls(config)
        except Exception as e:  # a model class may raise anything for a config that does not suit it
            why = first_line(e)[:ERROR_LENGTH]
            raise UnsupportedError(f"{path}: transformers cannot build {name} from it: {why}") from e
    for module in model.modules():
        module._buffers |= {name: buffer.to(device) for name, buffer in module._buffers.items() if buffer is not None}
    return model.eval()


def config_values(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """Return what a model's class reads of its config as JSON, as transformers writes it, so that another spelling makes no difference."""
    own = model.config.to_json_string()  # type: ignore[operator, union-attr]  # a model of transformers, typed as a Module
    quantization = plan.config.quantization  # perhaps of another file
    tree = {**({"quantization_config": quantization} if quantization else {}), **json.loads(own)}
    # Readers of records refuse NaN and lone surrogates, which a config may hold.
    told = json.dumps(tree, ensure_ascii=False).encode(errors="replace")
    return cast(dict[str, Any], json.loads(told, parse_constant=str, object_pairs_hook=lambda pairs: {
        key: value for key, value in pairs if key not in UNREAD}))  # fmt: skip


def _predicts_next(name: str) -> bool:
    from transformers.models.auto import modeling_auto as auto

    tables = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
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
