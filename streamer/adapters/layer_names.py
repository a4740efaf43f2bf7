"""Recognise embeddings by layer names, if the model's class is unknown or does not contain the layer."""

from __future__ import annotations

import re

EMBEDDING = re.compile(
    r"(?:^|\.)(?:wte|wpe|shared|(?:\w+_)?relative_attention_bias|embed_(?!out|proj)\w+|(?!patch)\w*embeddings?)$"
)
"""Names of embeddings, as opposed to linear layers."""
