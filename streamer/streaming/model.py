"""Build a base's model from its config without its weights, find the weights of each tensor, and size a sweep.

Parameters are on the meta device; buffers have real values.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from streamer.errors import (
    FormatError,
    MissingInputError,
    NumericError,
    StreamerError,
    UnsupportedError,
)
from streamer.packages import require_package
from streamer.plan.plan import Plan
from streamer.storage.files import storage_error
from streamer.streaming.values import RunTimeTensor, Values, VariantSet, match_run_time
from streamer.units import listed
from streamer.weights.model_config import MODEL_CONFIG

RUN_ALL_EXPERTS = {"Llama4TextExperts"}
"""Modules in which every token passes every expert, with weight 0 for experts that the router did not choose."""

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
        If the class is not one of transformers', or does not predict the next token of a text, or if the adapter changes the vocabulary.
    """
    transformers = require_transformers()
    from transformers.initialization import no_init_weights

    directory = plan.base.directory
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
            encoding = (
                "set PYTHONUTF8=1"
                if isinstance(e, UnicodeError)
                else "mend the package, or remove it"
            )
            hint = (
                "run Python without -OO, which removes docstrings"
                if sys.flags.optimize > 1
                else encoding
            )
            what = f"{name}: {type(e).__name__}: {first_line(e)[:ERROR_LENGTH]}"
            raise UnsupportedError(
                f"{plan.base.path}: transformers cannot import {what}; {hint}"
            ) from e
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            raise UnsupportedError(
                f"{path}: names the class {name!r}, which transformers {transformers.__version__} does not have; "
                "evaluate and repair build the model with transformers' own classes"
                if name
                else f"{path}: names no class; name it with --architecture, such as LlamaForCausalLM"
            )
        try:
            config = transformers.AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError) as e:
            plan.check_unchanged()
            raise unreadable(path, "transformers cannot read it", e) from e
        if config.is_encoder_decoder or not _predicts_next(cls.__name__):
            raise UnsupportedError(
                f"{path}: {name} does not predict the next token of a text; evaluate and repair need a causal language model"
            )
        config._experts_implementation = (
            "eager"  # loops over experts, so that one is in memory at a time
        )
        config.use_cache = False
        try:
            with _parameters_on_meta(), no_init_weights():
                model: nn.Module = cls(config)
        except (
            Exception
        ) as e:  # a model class may raise anything for a config that does not suit it
            why = first_line(e)[:ERROR_LENGTH]
            raise UnsupportedError(
                f"{path}: transformers cannot build {name} from it: {why}"
            ) from e
    for module in model.modules():
        module._buffers |= {
            name: buffer.to(device)
            for name, buffer in module._buffers.items()
            if buffer is not None
        }
    return model.eval()


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


LOGIT_BYTES = 32 << 20
"""Bytes of logits of all variants that exist at once."""

MASK_VALUES = 2
"""Four-byte values that a mask needs for each pair of tokens of a sequence: a byte, and a float that torch makes from it."""

CHOSEN_KEYS = "index_topk", "keep_window_size"
"""Config keys for the number of keys that attention selects."""

FACTOR_BYTES = 24
"""Bytes for each value of a delta's factors: 4 when read, and 8 + 4 for a variant's factors, up to twice as many; rounded down."""


@dataclass(frozen=True)
class ModelSize:
    """Sizes that determine the memory and time of a sweep.

    Attributes
    ----------
    widest, hidden, vocabulary
        Inputs or outputs of the widest layer except the head (over all experts if a token passes all of them), the model's width, and the
        head's outputs.
    attention
        Values formed for each pair of tokens if attention forms its weights or uses a mask; else 0.
    dense
        Bytes of matrices held whole: a dense delta and the weight that it is added to, or an expert's matrix.
    factors
        Bytes of one delta's factors, both as read and as used in computations.
    products
        Multiplications for one token, by parameter; for experts, for as many as a token passes.
    read
        Bytes of all weights on disk.
    short
        Longest sequence, with padding, that longrope embeddings treat as short; None for other embeddings.
    keys
        Number of tokens that attention selects in a longer sequence; None if it attends to all that it sees.
    cached
        Bytes of a token's keys and values in all layers.
    """

    widest: int
    hidden: int
    vocabulary: int
    attention: int
    dense: int
    factors: int
    products: Mapping[str, int]
    read: int
    short: int | None = None
    keys: int | None = None
    cached: int = 0


class RunTimeModule(NamedTuple):
    """A module of the loaded model, with the parameters of its own by their names in it."""

    module: nn.Module
    parameters: dict[str, RunTimeTensor]


class LoadedModel:
    """Model of a base as transformers builds it, with the source of each of its tensors.

    Attributes
    ----------
    modules
        The modules that have parameters of their own.
    vocabulary
        Rows of the head's weight.
    positions
        Most tokens that a sequence may have, if the model's config states it.
    strict_positions
        Whether one more token might fail or change the other tokens' positions.
    size
        See `ModelSize`.
    """

    def __init__(self, job: VariantSet) -> None:
        self.job, self.values = job, Values(job)
        self._model = build_skeleton(job.plan, job.device)
        prefix = getattr(self._model, "base_model_prefix", "")
        self._head = self._model.get_output_embeddings()  # type: ignore[operator]  # a model of transformers, typed as a Module
        kind = require_transformers().PreTrainedModel
        self._inner = [
            m
            for m in self._model.modules()
            if isinstance(m, kind) and self._head not in m.modules()
        ]
        if not self._inner or not isinstance(self._head, nn.Linear):
            name = type(self._model).__name__
            raise UnsupportedError(
                f"{job.plan.base.path}: {name} has no linear head behind a model of its own; evaluate and repair do not support it"
            )
        named = itertools.chain(
            self._model.named_parameters(remove_duplicate=False), self._buffers()
        )
        state = {n: tuple(t.shape) for n, t in named}
        tensors = match_run_time(job.plan, state, {n for n, _ in self._buffers()}, prefix)
        for n, buffer in self._buffers():
            if n in tensors:
                self._fill(n, buffer, tensors.pop(n))
        self.modules: list[RunTimeModule] = []
        inner: list[RunTimeTensor] = []
        for path, module in self._model.named_modules():
            params = {
                n: tensors[f"{path}.{n}" if path else n]
                for n, p in module._parameters.items()
                if p is not None
            }
            if params:
                self.modules.append(RunTimeModule(module, params))
            if not isinstance(module, nn.Embedding):
                inner += [tensor for tensor in params.values() if len(tensor.shape) > 1]
        self.vocabulary = self._head.out_features
        config = self._model.config.get_text_config()  # type: ignore[operator, union-attr]  # as above
        tables = [
            m
            for path, m in self._model.named_modules()
            if isinstance(m, nn.Embedding) and "position" in path
        ]
        # XLNet states -1 for any number; a position table with a padding row, like RoBERTa's, starts after that row.
        stated = getattr(config, "max_position_embeddings", None)
        padded = max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)
        self.positions = stated - padded if isinstance(stated, int) and stated > 0 else None
        # Rotary embeddings without a table have frequencies; those of dynamic NTK and LongRoPE depend on the length.
        rotary = any(name.endswith("inv_freq") for name, _ in self._model.named_buffers())
        kind = str(getattr(config, "rope_parameters", None))
        self.strict_positions = (
            bool(tables) or not rotary or "dynamic" in kind or "longrope" in kind
        )
        self.size = self._size(config, inner, tensors.values())

    @property
    def parameters(self) -> list[RunTimeTensor]:
        """List the parameters of all modules; modules may share one."""
        return [tensor for module in self.modules for tensor in module.parameters.values()]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return what the class reads of the config, as transformers writes it, so that another spelling makes no difference."""
        text = self._model.config.to_json_string()  # type: ignore[operator, union-attr]  # as above
        quantization = self.job.plan.config.quantization  # perhaps of another file
        tree = {
            **({"quantization_config": quantization} if quantization else {}),
            **json.loads(text),
        }
        # Readers of records refuse NaN and lone surrogates, which a config may hold.
        readable = json.dumps(tree, ensure_ascii=False).encode(errors="replace")
        return cast(
            dict[str, Any],
            json.loads(
                readable,
                parse_constant=str,
                object_pairs_hook=lambda pairs: {
                    key: value for key, value in pairs if key not in UNREAD
                },
            ),
        )

    def _size(
        self, config: Any, inner: Sequence[RunTimeTensor], tensors: Collection[RunTimeTensor]
    ) -> ModelSize:
        chosen = getattr(config, "num_experts_per_tok", None) or 1
        run_all = {
            t.name
            for m in self.modules
            if type(m.module).__name__ in RUN_ALL_EXPERTS
            for t in m.parameters.values()
        }

        def used(t: RunTimeTensor) -> int:
            """Count the matrices of a tensor that a token passes."""
            return (
                1 if not t.stacked else t.shape[0] if t.name in run_all else min(chosen, t.shape[0])
            )

        layers = [t for t in inner if t.shape != self._head.weight.shape]
        held_whole = [*filter(self.values.dense, tensors), *(t for t in inner if t.stacked)]
        targets = [
            t
            for pairs in self.values.plan.by_weight.values()
            for t, _ in pairs
            if t.module.low_rank
        ]
        return ModelSize(
            widest=max(
                (max(t.shape[-2:]) * (used(t) if t.name in run_all else 1) for t in layers),
                default=0,
            ),
            hidden=int(getattr(config, "hidden_size", 0)),
            vocabulary=self.vocabulary,
            attention=_attention_values(config),
            dense=16 * max((math.prod(t.shape[t.stacked :]) for t in held_whole), default=0),
            factors=FACTOR_BYTES
            * max((t.module.factor_rank * sum(t.module.shape) for t in targets), default=0),
            products={t.name: math.prod(t.shape[t.stacked :]) * used(t) for t in inner},
            read=sum(
                self.values.plan.weights[weight].nbytes
                for weight in {w for t in tensors for w in t.weights}
            ),
            short=_short_length(config),
            keys=next(
                (keys for name in CHOSEN_KEYS if (keys := getattr(config, name, None))), None
            ),
            cached=_cached_bytes(config),
        )

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers that a checkpoint stores."""
        stored = self._model.state_dict(keep_vars=True)
        return ((n, b) for n, b in self._model.named_buffers(remove_duplicate=False) if n in stored)

    def _fill(self, name: str, buffer: Tensor, tensor: RunTimeTensor) -> None:
        if self.values.edited(tensor) or tensor.targets(self.job.plan):
            raise UnsupportedError(
                f"{self.job.plan.adapter.path}: changes {name!r}, a buffer; evaluate and repair do not support that"
            )
        stored = self.job.plan.weights.stored.get(tensor.base[0].slices[0].weight)
        if (
            stored is not None and not buffer.is_floating_point()
        ):  # DeepSeek-V4's experts of each token, for example
            buffer.copy_(stored.tensors["weight"].whole())
        else:
            buffer.copy_(self.values.whole(tensor, 0))

    def check_all_used(self) -> None:
        """Raise `NumericError` if a sweep did not use everything that the adapter changes."""
        values = self.values
        if unused := sorted({*values.plan.by_weight} - values.applied | values.edits - values.read):
            raise NumericError(
                f"{self.job.plan.adapter.path}: {len(unused)} of the tensors that it changes were not used in a sweep over the text, "
                f"{listed(map(repr, unused))}; the losses would be those of another model"
            )


def _attention_values(config: Any) -> int:
    """Return the number of values that attention forms for each pair of tokens: weights by head, or a mask if it has a window."""
    if config._attn_implementation == "eager":
        return 3 * int(getattr(config, "num_attention_heads", 1))
    kinds = getattr(config, "layer_types", None) or ()
    windowed = getattr(config, "sliding_window", None) or any(
        "sliding" in kind or "chunked" in kind for kind in kinds
    )
    return MASK_VALUES if windowed else 0


def _cached_bytes(config: Any) -> int:
    """Return the bytes of a token's keys and values in all layers, in float32."""
    hidden, heads = (
        getattr(config, "hidden_size", 0),
        getattr(config, "num_attention_heads", None) or 1,
    )
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = groups * (getattr(config, "head_dim", None) or hidden // heads)
    return 2 * 4 * width * (getattr(config, "num_hidden_layers", None) or 1)


def _short_length(config: Any) -> int | None:
    """Return the length up to which longrope uses its short factors; None for other rotary embeddings."""
    rope = getattr(config, "rope_parameters", None) or {}
    # Some models have separate parameters for each kind of layer.
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    stated = [
        kind.get("original_max_position_embeddings")
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]
    default = getattr(config, "original_max_position_embeddings", None) if stated else None
    length = next((n for n in stated if n), default)
    return None if length is None else int(length)
