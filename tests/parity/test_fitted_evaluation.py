"""Losses of a fit as variants, against transformers with the model that they are merged into."""

from __future__ import annotations

from pathlib import Path

import fitted
import pytest
from causal_models import make_adapter, make_base
from evaluated import answer, assert_sums, precisions, streamed, token_ids
from test_evaluation_variants import KINDS

import streamer
from streamer.streaming.variants import make_variants


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "DoRA"])
def test_losses_are_those_of_the_merged_model(kind: str, tmp_path: Path) -> None:
    name, targets, options = KINDS[kind]
    cls, base = make_base(name, tmp_path / "base"), tmp_path / "base"
    adapter, ids = make_adapter(cls, base, tmp_path / "adapter", targets, **options), token_ids(64)
    coefficients = fitted.random_coefficients(base, adapter, 0.95, 0.9)
    variants = make_variants(("regmean",), (0.5,), "all", coefficients)
    ours = streamed(base, adapter, variants, None, ids)
    reference, tokens = answer(precisions(cls, base), ids), ours.tokens.sum()
    for v, keep in ((2, 0.95), (3, 0.9)):
        merged = tmp_path / f"merged-{keep}"
        streamer.merge_with_reduced_intruder_dimensions(base, adapter, merged, coefficients=coefficients, keep=keep)
        own = answer(precisions(cls, merged), ids)
        assert_sums(ours.loss[v].sum(), ours.kl[v].sum(), own, reference, ids, keep)
    assert min(abs(ours.kl[a].sum() - ours.kl[b].sum()) for a, b in ((1, 2), (2, 3))) / tokens > 1e-4, "variants differ"
