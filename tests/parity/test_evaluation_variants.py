"""Variants in any order and number: each gives what it gives beside the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import LINEAR
from causal_models import EXPERTS, make_adapter, make_base
from evaluated import streamed, token_ids

from streamer.streaming.variants import make_variants

# What → the model, the adapter's modules, and further options of the adapter
KINDS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "head and embedding": ("llama", [*LINEAR, "lm_head", "embed_tokens"], {}),
    "DoRA": ("llama", LINEAR, {"use_dora": True}),
    "saved modules": ("llama-tied", LINEAR, {"modules_to_save": ["embed_tokens", "norm"]}),
    "experts": ("mixtral", ["q_proj"], {"target_parameters": EXPERTS}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_makes_no_difference_which_variants_run_together(kind: str, tmp_path: Path) -> None:
    name, targets, options = KINDS[kind]
    cls, base = make_base(name, tmp_path / "base"), tmp_path / "base"
    adapter, ids = make_adapter(cls, base, tmp_path / "adapter", targets, **options), token_ids(64)
    variants = make_variants(("shrink",), (0.5,), "all")
    together = streamed(base, adapter, variants, None, ids)
    for order in ((1,), (2,), (2, 1), (1, 0, 2, 0)):
        own = streamed(base, adapter, tuple(variants[v] for v in order), None, ids)
        np.testing.assert_allclose(own.loss, together.loss[list(order)], rtol=1e-5)
