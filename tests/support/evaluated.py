"""What transformers says of merged models: the oracle of `streamer evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from seeds import vary

import streamer
from streamer.detection.findings import Findings
from streamer.evaluation.losses import measure
from streamer.evaluation.sequences import TextSequences
from streamer.evaluation.statistics import SequenceSums
from streamer.plan.plan import make_plan
from streamer.streaming.model import StreamingModel
from streamer.streaming.values import Job
from streamer.streaming.variants import Variant, make_variants

TOP_K = 4


def token_ids(vocabulary: int, sequences: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(3, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(vary(3)))


def sequences(ids: torch.Tensor) -> TextSequences:
    return TextSequences.of(row.numpy() for row in ids)


def log_probabilities(cls: Any, path: Path, ids: torch.Tensor) -> torch.Tensor:
    model = cls.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits.double().log_softmax(-1)[:, :-1]


def sums_of(
    own: torch.Tensor, base: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, KL and agreement of each sequence, added up over its tokens."""
    loss = -own.gather(-1, ids[:, 1:, None])[..., 0]
    kl = (base.exp() * (base - own)).sum(-1)
    return loss.sum(-1), kl.sum(-1), (own.argmax(-1) == base.argmax(-1)).double().sum(-1)


def streamed(
    base: Path,
    adapter: Path,
    variants: tuple[Variant, ...],
    found: Findings | None,
    ids: torch.Tensor,
    *,
    projected: bool = False,
    rounds_products: bool = False,
) -> SequenceSums:
    model = StreamingModel(Job(make_plan(base, adapter), variants, found, projected, rounds_products))
    sums = measure(model, sequences(ids), block=25)
    model.check_all_used()
    return sums


def assert_as_transformers(cls: Any, base: Path, adapter: Path, directory: Path, *, methods: tuple[Any, ...] = ("paper", "shrink"),
                           lambdas: tuple[float, ...] = (0.5,), vocabulary: int = 64,
                           decoded: Path | None = None) -> None:  # fmt: skip
    """The streamed losses of every variant are those of transformers with the merged model, in float32; of a quantized base, with the
    decoded one.
    """
    found = streamer.detect_intruder_dimensions(base, adapter, top_k=TOP_K)
    variants, ids = make_variants(methods, lambdas, "all", amplify=True), token_ids(vocabulary)
    ours = streamed(base, adapter, variants, found, ids)
    if decoded is not None:
        base, found = decoded, streamer.detect_intruder_dimensions(decoded, adapter, top_k=TOP_K)
    reference = log_probabilities(cls, base, ids)
    tokens = ours.tokens.sum()
    assert tokens == ids[:, 1:].numel()
    for v, variant in enumerate(variants):
        merged = base
        if variant.mitigation is not None:
            merged, options = directory / f"merged-{v}", variant.mitigation
            streamer.merge_with_reduced_intruder_dimensions(
                base,
                adapter,
                merged,
                findings=found,
                top_k=TOP_K,
                mitigation_lambda=options.mitigation_lambda,
                method=options.method,
                amplify=True,
            )
        loss, kl, agreement = sums_of(log_probabilities(cls, merged, ids), reference, ids)
        assert abs(ours.loss[v].sum() - loss.sum()) / tokens <= 1e-5, variant.name
        assert abs(ours.kl[v].sum() - kl.sum()) / tokens <= 2e-5, variant.name
        assert abs(ours.agree[v] - agreement.numpy()).max() <= 1, variant.name
    assert (abs(ours.loss[1:] - ours.loss[0]).max(1) / ours.tokens.max()).min() > 1e-3, "variants differ"
