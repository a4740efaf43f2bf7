"""Size a sweep: what its memory and its time depend on."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from streamer.streaming.run_time import RunTimeModule, RunTimeTensor
from streamer.streaming.values import Values

RUN_ALL_EXPERTS = {"Llama4TextExperts"}
"""Modules in which every token passes every expert, with weight 0 for experts that the router did not choose."""

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
    sharing
        Number of heads that share a key.
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
    sharing: int = 1


def model_size(
    values: Values,
    config: Any,
    head: nn.Linear,
    modules: Sequence[RunTimeModule],
    tensors: Collection[RunTimeTensor],
) -> ModelSize:
    """Size the sweeps of a model.

    Parameters
    ----------
    config
        The config of the model that predicts text.
    modules, tensors
        All modules with parameters, and all parameters.
    """
    experts = _Experts.of(config, modules)
    matrices = [
        tensor
        for module, parameters in modules
        if not isinstance(module, nn.Embedding)
        for tensor in parameters.values()
        if len(tensor.shape) > 1
    ]
    heads = getattr(config, "num_attention_heads", None) or 1
    groups = getattr(config, "num_key_value_heads", None) or heads
    hidden = int(getattr(config, "hidden_size", 0))
    key_size = getattr(config, "head_dim", None) or hidden // heads
    held_whole = [*filter(values.dense, tensors), *(t for t in matrices if t.stacked)]
    targets = [target for pairs in values.plan.by_weight.values() for target, _ in pairs]
    low_rank = [target.module for target in targets if target.module.low_rank]
    weights = {weight for tensor in tensors for weight in tensor.weights}
    others = [tensor for tensor in matrices if tensor.shape != head.weight.shape]
    return ModelSize(
        widest=max(map(experts.width, others), default=0),
        hidden=hidden,
        vocabulary=head.out_features,
        attention=_attention_values(config),
        dense=16 * max(map(_area, held_whole), default=0),
        factors=FACTOR_BYTES * max((m.factor_rank * sum(m.shape) for m in low_rank), default=0),
        products={tensor.name: _area(tensor) * experts.passed(tensor) for tensor in matrices},
        read=sum(values.plan.weights[weight].nbytes for weight in weights),
        short=_short_length(config),
        keys=next((keys for name in CHOSEN_KEYS if (keys := getattr(config, name, None))), None),
        cached=2 * 4 * groups * key_size * (getattr(config, "num_hidden_layers", None) or 1),
        sharing=heads // groups,
    )


@dataclass(frozen=True)
class _Experts:
    """Experts that a token passes: `chosen` of each tensor, or all of those in `run_all`."""

    chosen: int
    run_all: Collection[str]

    @classmethod
    def of(cls, config: Any, modules: Sequence[RunTimeModule]) -> _Experts:
        """Find them by the config and by the modules' classes."""
        run_all = {
            tensor.name
            for module, parameters in modules
            if type(module).__name__ in RUN_ALL_EXPERTS
            for tensor in parameters.values()
        }
        return cls(getattr(config, "num_experts_per_tok", None) or 1, run_all)

    def passed(self, tensor: RunTimeTensor) -> int:
        """Count the matrices of a tensor that a token passes."""
        if not tensor.stacked:
            return 1
        experts = tensor.shape[0]
        return experts if tensor.name in self.run_all else min(self.chosen, experts)

    def width(self, tensor: RunTimeTensor) -> int:
        """Return the inputs or outputs of the matrices that a token passes at once, whichever are more."""
        at_once = self.passed(tensor) if tensor.name in self.run_all else 1
        return max(tensor.shape[-2:]) * at_once


def _area(tensor: RunTimeTensor) -> int:
    """Count the values of one matrix of a tensor."""
    return math.prod(tensor.shape[tensor.stacked :])


def _attention_values(config: Any) -> int:
    """Return the number of values that attention forms for each pair of tokens: weights by head, or a mask if it has a window."""
    if config._attn_implementation == "eager":
        return 3 * int(getattr(config, "num_attention_heads", 1))
    kinds = getattr(config, "layer_types", None) or ()
    windowed = getattr(config, "sliding_window", None) or any(
        "sliding" in kind or "chunked" in kind for kind in kinds
    )
    return MASK_VALUES if windowed else 0


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
