"""Layer names that tell embeddings from other layers in a model of an unknown class."""

from __future__ import annotations

import re

EMBEDDING = re.compile(
    r"(?:^|\.)(?:wte|wpe|shared|relative_attention_bias|embed_(?!out|proj)\w+|(?!patch)\w*embeddings?)$"
)
"""Names of embeddings, as against linear layers."""
