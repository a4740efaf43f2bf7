"""Run a model whose weights stay on disk: read each when its module runs, use it for all variants at once, and drop it.

A batch repeats the same sequences for each variant: rows are (variant, sequence). The logits are computed a block of the vocabulary at a
time by the model's own `forward`, starting from the result of the layers below the head.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from streamer.errors import NumericError, UnsupportedError
from streamer.plan.targets import Target
from streamer.streaming.extra import quiet_transformers, refused_errors, require_transformers
from streamer.streaming.installed import RUN_ALL_EXPERTS, InstalledModule, RowBatch
from streamer.streaming.run_time import RunTimeTensor, match_run_time
from streamer.streaming.skeleton import build_skeleton, config_values
from streamer.streaming.values import Values, VariantSet
from streamer.units import listed

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
    """Sizes that determine the memory and time of a pass.

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
    layer_width
        Inputs and outputs of all matrices of one layer for one token; for experts, of as many as a token passes.
    layer_factors
        Bytes of the factors of all deltas in one layer, in float32.
    changed_inputs
        Inputs, for one token, of all matrices of one layer that the adapter changes; shared inputs are counted for each matrix.
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
    layer_width: int = 0
    layer_factors: int = 0
    changed_inputs: int = 0


class LoadedModel:
    """Model of a base as transformers builds it, with the source of each of its tensors.

    Parameters
    ----------
    together
        Number of variants that run at once.

    Attributes
    ----------
    modules
        Path, module, and own parameters of each module that has any.
    vocabulary
        Rows of the head's weight.
    positions
        Most tokens that a sequence may have, if the model's config states it.
    strict_positions
        Whether one more token might fail or change the other tokens' positions.
    size
        See `ModelSize`.
    """

    def __init__(self, job: VariantSet, together: int) -> None:
        self.job, self.values = job, Values(job)
        self.batch = RowBatch(together)
        self._model = build_skeleton(job.plan, job.device)
        prefix = getattr(self._model, "base_model_prefix", "")
        self._head = self._model.get_output_embeddings()  # type: ignore[operator]  # a model of transformers, typed as a Module
        kind = require_transformers().PreTrainedModel
        self._inner = [m for m in self._model.modules() if isinstance(m, kind) and self._head not in m.modules()]
        if not self._inner or not isinstance(self._head, nn.Linear):
            name = type(self._model).__name__
            raise UnsupportedError(
                f"{job.plan.base.path}: {name} has no linear head behind a model of its own; evaluate and fit do not support it"
            )
        state = {
            n: tuple(t.shape)
            for n, t in itertools.chain(self._model.named_parameters(remove_duplicate=False), self._buffers())
        }
        tensors = match_run_time(job.plan, state, {n for n, _ in self._buffers()}, prefix)
        for n, buffer in self._buffers():
            if n in tensors:
                self._fill(n, buffer, tensors.pop(n))
        self.modules: list[tuple[str, nn.Module, dict[str, RunTimeTensor]]] = []
        inner: list[RunTimeTensor] = []
        for path, module in self._model.named_modules():
            own = {n: tensors[f"{path}.{n}" if path else n] for n, p in module._parameters.items() if p is not None}
            if own:
                self.modules.append((path, module, own))
            if not isinstance(module, nn.Embedding):
                inner += [tensor for tensor in own.values() if len(tensor.shape) > 1]
        self.vocabulary = self._head.out_features
        config = self._model.config.get_text_config()  # type: ignore[operator, union-attr]  # as above
        tables = [m for path, m in self._model.named_modules() if isinstance(m, nn.Embedding) and "position" in path]
        self.positions = _position_count(tables, getattr(config, "max_position_embeddings", None))
        # Rotary embeddings without a table have frequencies; those of dynamic NTK and LongRoPE depend on the length.
        rotary = any(name.endswith("inv_freq") for name, _ in self._model.named_buffers())
        kind = str(getattr(config, "rope_parameters", None))
        self.strict_positions = bool(tables) or not rotary or "dynamic" in kind or "longrope" in kind
        self.size = self._size(config, inner, tensors.values())

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return what determines the logits besides weights; see `config_values`."""
        return config_values(self._model, self.job.plan)

    def inside(self, layer: str) -> list[RunTimeTensor]:
        """List the parameters of a layer, by its path."""
        return [t for path, _, own in self.modules if f"{path}.".startswith(f"{layer}.") for t in own.values()]

    def _size(self, config: Any, inner: Sequence[RunTimeTensor], tensors: Collection[RunTimeTensor]) -> ModelSize:
        chosen = getattr(config, "num_experts_per_tok", None) or 1
        run_all = {t.name for _, m, own in self.modules for t in own.values() if type(m).__name__ in RUN_ALL_EXPERTS}

        def used(t: RunTimeTensor) -> int:
            """Count the matrices of a tensor that a token passes."""
            return 1 if not t.stacked else t.shape[0] if t.name in run_all else min(chosen, t.shape[0])

        layers = [t for t in inner if t.shape != self._head.weight.shape]
        whole = [t for t in tensors if self.values.targets(t) and self.values.low_rank_target(t) is None]
        whole += [t for t in inner if t.stacked]
        targets = [target for pairs in self.values.plan.by_weight.values() for target, _ in pairs]
        return ModelSize(
            widest=max((max(t.shape[-2:]) * (used(t) if t.name in run_all else 1) for t in layers), default=0),
            hidden=int(getattr(config, "hidden_size", 0)),
            vocabulary=self.vocabulary,
            attention=_attention_values(config),
            dense=16 * max((math.prod(t.shape[t.stacked :]) for t in whole), default=0),
            factors=FACTOR_BYTES * max(map(_factor_values, targets), default=0),
            products={t.name: math.prod(t.shape[t.stacked :]) * used(t) for t in inner},
            read=sum(self.values.plan.weights[weight].nbytes for weight in {w for t in tensors for w in t.weights}),
            short=_short_length(config),
            keys=next((keys for name in CHOSEN_KEYS if (keys := getattr(config, name, None))), None),
            layer_width=self._in_one_layer(lambda t: (sum(t.shape[-2:]) if t.stacked else sum(t.shape)) * used(t)),
            layer_factors=self._in_one_layer(
                lambda t: sum(4 * _factor_values(target) for target, _ in self.values.targets(t))
            ),
            changed_inputs=self._in_one_layer(
                lambda t: used(t) * max((target.module.shape[1] for target, _ in self.values.targets(t)), default=0)
            ),
        )

    def _in_one_layer(self, size: Callable[[RunTimeTensor], int]) -> int:
        """Sum the sizes of matrices by layer and return the largest sum."""
        layers: dict[str, int] = {}
        for path, module, own in self.modules:
            layer = re.match(r".*?\.\d+(?=\.)", path)
            if layer and not isinstance(module, nn.Embedding):
                found = sum(size(tensor) for tensor in own.values() if len(tensor.shape) in (2, 3))
                layers[layer[0]] = layers.get(layer[0], 0) + found
        return max(layers.values(), default=0)

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers that a checkpoint stores."""
        stored = self._model.state_dict(keep_vars=True)
        return ((n, b) for n, b in self._model.named_buffers(remove_duplicate=False) if n in stored)

    def _fill(self, name: str, buffer: Tensor, tensor: RunTimeTensor) -> None:
        if self.values.edited(tensor) or self.values.targets(tensor):
            raise UnsupportedError(
                f"{self.job.plan.adapter.path}: changes {name!r}, a buffer; evaluate and fit do not support that"
            )
        stored = self.job.plan.weights.stored.get(tensor.base[0].slices[0].weight)
        if stored is not None and not buffer.is_floating_point():  # DeepSeek-V4's experts of each token, for example
            buffer.copy_(stored.tensors["weight"].whole())
        else:
            buffer.copy_(self.values.whole(tensor, 0, with_delta=False))

    @contextlib.contextmanager
    def _captured(self) -> Iterator[dict[nn.Module, Any]]:
        """Collect the results of the models below the head inside the context; on exit, restore every replaced `forward`."""
        results: dict[nn.Module, Any] = {}
        handles = [
            module.register_forward_hook(lambda module, args, out: results.update({module: out}))
            for module in self._inner
        ]
        try:
            yield results
        finally:
            for handle in handles:
                handle.remove()
            for module in results:
                module.__dict__.pop("forward", None)
            self.batch.vocabulary = None

    def _run(self, ids: Tensor, block: tuple[int, int]) -> Tensor:
        """Compute the logits of one block of the vocabulary: (rows, length, block)."""
        self.batch.vocabulary = i, j = block
        with quiet_transformers(), refused_errors(self.job.plan.base.path, self._model):
            out: Tensor = self._model(input_ids=ids, use_cache=False).logits
        if out.shape != (*ids.shape, j - i):
            raise UnsupportedError(
                f"{self.job.plan.base.path}: {type(self._model).__name__} gives logits {list(out.shape)} for {j - i} tokens of "
                "the vocabulary: it does not compute all logits with its head alone; not supported by evaluate and fit"
            )
        return out

    def _outermost(self, results: Mapping[nn.Module, Any]) -> nn.Module:
        """Find the outermost model below the head that ran; if it returns its result again, nothing inside it runs."""
        found: nn.Module | None = next((module for module in self._inner if module in results), None)
        if found is None:
            raise UnsupportedError(
                f"{self.job.plan.base.path}: {type(self._model).__name__} does not compute its logits with a model of its own and its "
                "head alone; not supported by evaluate and fit"
            )
        return found

    def vocabulary_blocks(self, block: int) -> list[tuple[int, int]]:
        """Divide the vocabulary into blocks of this many tokens; the last may be smaller."""
        return [(i, min(self.vocabulary, i + block)) for i in range(0, self.vocabulary, block)]

    def check_all_used(self) -> None:
        """Raise `NumericError` if a pass did not use everything that the adapter changes."""
        if unused := self.values.unused():
            raise NumericError(
                f"{self.job.plan.adapter.path}: {len(unused)} of the tensors that it changes were not used in a pass over the text, "
                f"{listed(map(repr, unused))}; the losses would be those of another model"
            )


class StreamingModel(LoadedModel):
    """Model of a base that runs all variants of an adapted model at once."""

    def __init__(self, job: VariantSet) -> None:
        super().__init__(job, len(job.variants))
        for path, module, own in self.modules:
            InstalledModule(path, module, own, self.values, self.batch, head=module is self._head)

    def logits(self, ids: Tensor, blocks: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, Tensor]]:
        """Compute the logits of some sequences under all variants, one block of the vocabulary at a time.

        Parameters
        ----------
        ids
            Tokens (sequences, length).
        blocks
            Ranges of the vocabulary to compute together; see `vocabulary_blocks`.

        Yields
        ------
        i, j, logits
            Logits (variants, sequences, length, j − i) of tokens i to j.

        Raises
        ------
        UnsupportedError
            If the model does not compute all logits with its head alone, token by token.
        """
        batch = self.batch
        batch.sequences, batch.length = ids.shape
        ids = ids.to(self.job.device).repeat(batch.variants, 1)
        with self._captured() as results:
            for number, (i, j) in enumerate(blocks):
                with torch.inference_mode():
                    out = self._run(ids, (i, j))
                if number == 0:
                    outer = self._outermost(results)
                    outer.forward = giving(results[outer])
                yield i, j, out.view(batch.variants, batch.sequences, batch.length, -1)


def vocabulary_block(rows: int) -> int:
    """Return the number of vocabulary tokens to compute together, for this many rows."""
    return max(64, LOGIT_BYTES // (4 * rows))


def _attention_values(config: Any) -> int:
    """Return the number of values that attention forms for each pair of tokens: weights by head, or a mask if it has a window."""
    if config._attn_implementation == "eager":
        return 3 * int(getattr(config, "num_attention_heads", 1))
    kinds = getattr(config, "layer_types", None) or ()
    windowed = getattr(config, "sliding_window", None) or any("sliding" in kind or "chunked" in kind for kind in kinds)
    return MASK_VALUES if windowed else 0


def _position_count(tables: Sequence[nn.Embedding], stated: object) -> int | None:
    """Return the most tokens of a sequence; a position table with a padding row, like RoBERTa's, starts after that row."""
    if not isinstance(stated, int) or stated < 1:  # XLNet states -1 for any number
        return None
    return stated - max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)


def _short_length(config: Any) -> int | None:
    """Return the length up to which longrope uses its short factors; None for other rotary embeddings."""
    rope = getattr(config, "rope_parameters", None) or {}
    # Some models have separate parameters for each kind of layer.
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    stated = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    length = next(
        (n for n in stated if n), getattr(config, "original_max_position_embeddings", None) if stated else None
    )
    return None if length is None else int(length)


def _factor_values(target: Target) -> int:
    """Return the number of values in a delta's factors; 0 for a dense delta."""
    return (target.module.factor_rank if target.module.low_rank else 0) * sum(target.module.shape)


def giving(result: Any) -> Callable[..., Any]:
    """Make a function that returns `result` for any arguments."""
    return lambda *args, **kwargs: result
