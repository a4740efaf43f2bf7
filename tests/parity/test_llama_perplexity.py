"""The figures that llama-perplexity prints with --kl-divergence, and PEFT's forgetting: by their formulas, on logits of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from causal_models import make_adapter, make_base
from evaluated import loaded, merged_variants, streamed, token_ids
from evaluations import FACTS
from numpy.typing import NDArray

from streamer.evaluation.evaluation import Evaluation
from streamer.measuring.variants import EvaluatedVariant
from streamer.streaming.variants import make_variants

Floats = NDArray[np.float64]


def log_softmax(logits: Floats) -> Floats:
    z = logits - logits.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def printed(own: Floats, base: Floats, labels: NDArray[np.int64]) -> tuple[dict[str, float], dict[str, float]]:
    """Of logits (tokens, vocabulary): the exact figures, and the quantiles. llama.cpp rounds the base's to 16 bits, which is left out."""
    q, p, rows = log_softmax(own), log_softmax(base), np.arange(len(labels))
    kl = (np.exp(p) * (p - q)).sum(-1)
    nll, nll_base = -q[rows, labels], -p[rows, labels]
    change = np.exp(-nll) - np.exp(-nll_base)
    exact = {
        "loss": nll.mean(), "perplexity": np.exp(nll.mean()), "perplexity_ratio": np.exp(nll.mean() - nll_base.mean()),
        "kl": kl.mean(), "kl_max": kl.max(), "p_change": change.mean(), "p_rms": np.sqrt((change**2).mean()),
        "agreement": (own.argmax(-1) == base.argmax(-1)).mean(), "forgetting": nll.mean() - nll_base.mean(),
    }  # fmt: skip
    kl.sort()

    def percentile(share: float) -> float:
        place = share * (len(kl) - 1)
        low = int(place)
        return (1 - (place - low)) * kl[low] + (place - low) * kl[min(low + 1, len(kl) - 1)]

    middle = (kl[(len(kl) - 1) // 2] + kl[len(kl) // 2]) / 2
    return exact, {
        "kl_median": middle,
        "kl_p90": percentile(0.9),
        "kl_p99": percentile(0.99),
        "kl_p999": percentile(0.999),
    }


def test_they_are_those_of_its_formulas(tmp_path: Path) -> None:
    """Equal to 1e-6; quantiles to 1 %, the histogram's resolution."""
    cls, base = make_base("llama", tmp_path / "base"), tmp_path / "base"
    adapter, ids = make_adapter(cls, base, tmp_path / "adapter", ["q_proj", "down_proj"]), token_ids(64, 6, 60)
    variants = make_variants(("shrink",), (0.5, 0.1), "all")
    sums = streamed(base, adapter, variants, None, ids)
    evaluation = Evaluation.of(
        [EvaluatedVariant.of(v) for v in variants], dict.fromkeys(("general", "task"), sums), FACTS, 0.9
    )
    tree = Evaluation.from_json(evaluation.to_json()).to_dict()
    labels, logits = ids[:, 1:].numpy().ravel(), []
    for merged in merged_variants(base, adapter, variants, None, tmp_path):
        with torch.no_grad():
            z = loaded(cls, merged, torch.float32)(input_ids=ids).logits[:, :-1]
        logits.append(z.double().numpy().reshape(len(labels), -1))
    for v, own in zip(tree["variants"], logits, strict=True):
        exact, quantiles = printed(own, logits[0], labels)
        found = {**v["general"], "forgetting": v["against_base"]["general_loss"]}
        assert {name: found[name] for name in exact} == pytest.approx(exact, rel=1e-6, abs=1e-6), v["name"]
        assert {name: found[name] for name in quantiles} == pytest.approx(quantiles, rel=0.01, abs=1e-7), v["name"]
