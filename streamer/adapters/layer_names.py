"""Layer names that tell embeddings and heads from other layers."""

from __future__ import annotations

import re

EMBEDDING = re.compile(
    r"(?:^|\.)(?:wte|wpe|shared|relative_attention_bias|embed_(?!out|proj)\w+|(?!patch)\w*embeddings?)$"
)
"""Names of embeddings, as against linear layers."""

HEADS = ("lm_head", "embed_out", "output", "score", "classifier")
"""Last names of linear layers on top of a model: of those that are not Conv1D in a model of Conv1D."""
