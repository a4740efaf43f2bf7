"""Sort names of tensors in natural order: numbers by size, and parts of a layer in the order in which data passes them."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

ORDER = [
    ("embed_tokens", "wte", "wpe", "embeddings", "word_embeddings", "position_embeddings", "token_type_embeddings"),
    ("self_attn", "self_attention", "attention", "attn", "linear_attn", "cross_attn", "encoder_attn", "self", "intermediate"),
    ("q_proj", "query", "wq", "q", "q_a_proj", "q_b_proj", "c_attn", "qkv_proj", "query_key_value", "in_proj"),
    ("k_proj", "key", "wk", "k", "kv_a_proj_with_mqa", "kv_b_proj"),
    ("v_proj", "value", "wv", "v"),
    ("o_proj", "out_proj", "wo", "o", "output", "dense"),
    ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    ("router", "gate"),
    ("experts", "shared_expert", "shared_experts"),
    ("gate_proj", "gate_up_proj", "w1", "wi_0", "wi", "fc1", "c_fc"),
    ("up_proj", "w3", "wi_1"),
    ("down_proj", "w2", "fc2", "c_proj"),
    ("norm", "ln_f", "final_layernorm"),
    ("lm_head", "score", "classifier", "qa_outputs"),
]  # fmt: skip
"""Parts of names in the order in which data passes them; unlisted parts sort by name between the feed-forward and the head."""

_RANKS = {name: (i, j) for i, names in enumerate(ORDER) for j, name in enumerate(names)}
_OTHER = (len(ORDER) - 3, 99)


def natural(name: str) -> tuple[Any, ...]:
    """Make the sort key of a tensor's name: numbers by size, and in a layer q, k, v, o, gate, up, down."""
    return tuple(_key(part) for part in re.split(r"[.\[\]]+", name) if part)


@lru_cache(4096)  # a model's names have few distinct parts
def _key(part: str) -> tuple[Any, ...]:
    if part.isdigit():
        return 0, int(part)
    return 1, *_RANKS.get(part, _OTHER), [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", part)]
