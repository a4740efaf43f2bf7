"""Load a base's model with the source of each of its tensors, but without its weights."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any, cast

from torch import Tensor, nn

from streamer.errors import NumericError, UnsupportedError
from streamer.streaming.run_time import RunTimeModule, RunTimeTensor, match_run_time
from streamer.streaming.size import model_size
from streamer.streaming.skeleton import build_skeleton, require_transformers
from streamer.streaming.values import Values
from streamer.streaming.variants import VariantSet
from streamer.units import listed

UNREAD = "_name_or_path", "transformers_version", "use_cache"
"""Config keys that change no logits: a model runs without a cache."""


class LoadedModel:
    """Model of a base as transformers builds it, with the source of each of its tensors.

    Parameters of the model are on the meta device; buffers have their values.

    Attributes
    ----------
    network
        The model of transformers.
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
        self.values = Values(job)
        self.network: Any = build_skeleton(job.plan, job.device)
        self._head = self.network.get_output_embeddings()
        kind = require_transformers().PreTrainedModel
        self._inner = [
            module
            for module in self.network.modules()
            if isinstance(module, kind) and self._head not in module.modules()
        ]
        if not self._inner or not isinstance(self._head, nn.Linear):
            raise UnsupportedError(
                f"{job.plan.base.path}: {type(self.network).__name__} has no linear head behind a model of its own; "
                "evaluate and repair do not support it"
            )
        tensors = self._matched_tensors()
        self.modules: list[RunTimeModule] = []
        for path, module in self.network.named_modules():
            parameters = {
                name: tensors[f"{path}.{name}" if path else name]
                for name, parameter in module._parameters.items()
                if parameter is not None
            }
            if parameters:
                self.modules.append(RunTimeModule(module, parameters))
        self.vocabulary = self._head.out_features
        config = self.network.config.get_text_config()
        tables = [
            module
            for path, module in self.network.named_modules()
            if isinstance(module, nn.Embedding) and "position" in path
        ]
        self.positions = _positions(config, tables)
        # Rotary embeddings without a table have frequencies; those of dynamic NTK and LongRoPE depend on the length.
        rotary = any(name.endswith("inv_freq") for name, _ in self.network.named_buffers())
        rope = str(getattr(config, "rope_parameters", None))
        self.strict_positions = (
            bool(tables) or not rotary or "dynamic" in rope or "longrope" in rope
        )
        self.size = model_size(self.values, config, self._head, self.modules, tensors.values())

    @property
    def job(self) -> VariantSet:
        """Return the variants that run."""
        return self.values.job

    @property
    def parameters(self) -> list[RunTimeTensor]:
        """List the parameters of all modules; modules may share one."""
        return [tensor for module in self.modules for tensor in module.parameters.values()]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return what the class reads of the config, as transformers writes it, so that another spelling makes no difference."""
        tree = json.loads(self.network.config.to_json_string())
        if quantization := self.job.plan.config.quantization:  # perhaps of another file
            tree = {"quantization_config": quantization, **tree}
        # Readers of records refuse NaN and lone surrogates, which a config may hold.
        readable = json.dumps(tree, ensure_ascii=False).encode(errors="replace")

        def read_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            return {key: value for key, value in pairs if key not in UNREAD}

        known = json.loads(readable, parse_constant=str, object_pairs_hook=read_keys)
        return cast(dict[str, Any], known)

    def _matched_tensors(self) -> dict[str, RunTimeTensor]:
        """Match all parameters to their sources, and fill the buffers that a checkpoint stores."""
        stored = self.network.state_dict(keep_vars=True)
        buffers = {
            name: buffer
            for name, buffer in self.network.named_buffers(remove_duplicate=False)
            if name in stored
        }
        named = {**dict(self.network.named_parameters(remove_duplicate=False)), **buffers}
        shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        prefix = getattr(self.network, "base_model_prefix", "")
        tensors = match_run_time(self.job.plan, shapes, buffers, prefix)
        for name, buffer in buffers.items():
            if name in tensors:
                self._fill(name, buffer, tensors.pop(name))
        return tensors

    def _fill(self, name: str, buffer: Tensor, tensor: RunTimeTensor) -> None:
        plan = self.job.plan
        if self.values.edited(tensor) or tensor.targets(plan):
            raise UnsupportedError(
                f"{plan.adapter.path}: changes {name!r}, a buffer; evaluate and repair do not support that"
            )
        stored = plan.weights.stored.get(tensor.base[0].slices[0].weight)
        # Integers, such as DeepSeek-V4's experts of each token, must not pass through float32.
        if stored is not None and not buffer.is_floating_point():
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


def _positions(config: Any, tables: list[nn.Embedding]) -> int | None:
    """Return the most tokens that a sequence may have, if the config states it."""
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated <= 0:  # XLNet states -1 for any number
        return None
    # A position table with a padding row, like RoBERTa's, starts after that row.
    padded = [table.padding_idx + 1 for table in tables if table.padding_idx is not None]
    return stated - max(padded, default=0)
