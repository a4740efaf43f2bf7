"""Layer names that tell embeddings from other layers where the model's class is not known, or the layer in no model of its class."""

from __future__ import annotations

import re

EMBEDDING = re.compile(
    r"(?:^|\.)(?:wte|wpe|shared|(?:\w+_)?relative_attention_bias|embed_(?!out|proj)\w+|(?!patch)\w*embeddings?)$"
)
"""Names of embeddings, as against linear layers."""
