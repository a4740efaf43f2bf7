"""What transformers says of merged models: the oracle of `streamer evaluate`."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from seeds import vary

import streamer
from streamer.detection.findings import Findings
from streamer.measuring.riders import part_sums, riders
from streamer.measuring.sequences import TextSequences
from streamer.measuring.statistics import SequenceSums
from streamer.plan.plan import make_plan
from streamer.streaming.sweep import SweepModel
from streamer.streaming.values import Variant, VariantSet, make_variants

TOP_K = 4


def token_ids(vocabulary: int, sequences: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(3, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(vary(3)))


def nothing() -> None:
    """Stand for a checkpoint at which no run stops."""


def sequences(ids: torch.Tensor) -> TextSequences:
    return TextSequences.of(row.numpy() for row in ids)


def loaded(cls: Any, path: Path, dtype: torch.dtype) -> Any:
    model = cls.from_pretrained(path, dtype=dtype).eval()
    model.config.get_text_config()._experts_implementation = model.config._experts_implementation = "eager"  # float64
    return model


class Answer(NamedTuple):
    """What transformers says of a model."""

    log_p: torch.Tensor
    """Log-probabilities in float64: (sequences, tokens, vocabulary)."""
    moved: torch.Tensor
    """The furthest that float32 moves a log-probability of each token: (sequences, tokens)."""


def precisions(cls: Any, path: Path) -> list[Any]:
    """A model in float64, and in float32 four times, where each weight moves to one of the floats beside it or stays, at random.

    How far rounding moves a log-probability depends on the model: 1e-6 for one, 3e-3 for another of the same shapes. It is measured more
    than once, as one run may come out near the exact value by luck.
    """
    models = [loaded(cls, path, torch.float64), loaded(cls, path, torch.float32)]
    models += [copy.deepcopy(models[1]) for _ in range(3)]
    with torch.no_grad():
        for parameter in (p for model in models[1:] for p in model.parameters()):
            parameter.mul_(1 + torch.finfo(torch.float32).eps * (2 * torch.rand_like(parameter) - 1))
    return models


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    try:
        return model(input_ids=ids).logits
    except RuntimeError:  # XGLM makes the least value of its mask in torch's default dtype
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return model(input_ids=ids).logits
        finally:
            torch.set_default_dtype(before)


def answer(models: list[Any], ids: torch.Tensor) -> Answer:
    with torch.no_grad():
        exact, *rounded = (logits_of(model, ids).double().log_softmax(-1)[:, :-1] for model in models)
    return Answer(exact, torch.stack([(other - exact).abs().amax(-1) for other in rounded]).amax(0))


ROUNDINGS = 4
"""How many times as far as transformers in float32 the streamed sums may be from float64."""


def assert_sums(loss: Any, kl: Any, own: Answer, base: Answer, ids: torch.Tensor, what: object) -> None:
    """The streamed loss and KL of some sequences, added up, are those of transformers, up to what float32 does to this very model.

    A log-probability that is off by d moves the loss by d. The KL Σ p0 (log p0 − log p) moves by d, and as the base's own d0 moves p0 by
    p0 d0, by Σ p0 d0 (1 + |log p0 − log p|) more.
    """
    exact_loss, exact_kl, _ = sums_of(own.log_p, base.log_p, ids)
    by_base = 1 + (base.log_p.exp() * (base.log_p - own.log_p).abs()).sum(-1)
    room = own.moved.sum()
    assert abs(float(loss - exact_loss.sum())) <= ROUNDINGS * room, what
    assert abs(float(kl - exact_kl.sum())) <= ROUNDINGS * (room + (by_base * base.moved).sum()), what


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
    model = SweepModel(VariantSet(make_plan(base, adapter), variants, found, projected, rounds_products))
    (part,) = riders({"text": sequences(ids)}, len(variants), model.size, ids.numel(), False)
    model.run(part.groups, nothing)
    (sums,) = part_sums(model, [part], 25, nothing)
    model.check_all_used()
    return sums


def merged_variants(
    base: Path, adapter: Path, variants: tuple[Variant, ...], found: Findings | None, directory: Path
) -> Iterator[Path]:
    """Write the model of each variant; of the base, itself."""
    for v, variant in enumerate(variants):
        if variant.mitigation is None:
            yield base
            continue
        options, merged = variant.mitigation, directory / f"merged-{v}"
        streamer.merge_with_reduced_intruder_dimensions(
            base, adapter, merged, findings=found, top_k=TOP_K, mitigation_lambda=options.mitigation_lambda,
            method=options.name, amplify=True,
        )  # fmt: skip
        yield merged


def assert_as_transformers(cls: Any, base: Path, adapter: Path, directory: Path, *, methods: tuple[Any, ...] = ("paper", "shrink"),
                           lambdas: tuple[float, ...] = (0.5,), vocabulary: int = 64,
                           decoded: Path | None = None) -> None:  # fmt: skip
    """The streamed losses of every variant are those of transformers with the merged model; of a quantized base, with the decoded one."""
    found = streamer.detect_intruder_dimensions(base, adapter, top_k=TOP_K)
    variants, ids = make_variants(methods, lambdas, "all", amplify=True), token_ids(vocabulary)
    ours = streamed(base, adapter, variants, found, ids)
    if decoded is not None:
        base, found = decoded, streamer.detect_intruder_dimensions(decoded, adapter, top_k=TOP_K)
    reference = answer(precisions(cls, base), ids)
    tokens = ours.tokens.sum()
    assert tokens == ids[:, 1:].numel()
    for v, merged in enumerate(merged_variants(base, adapter, variants, found, directory)):
        own = reference if merged == base else answer(precisions(cls, merged), ids)
        assert_sums(ours.loss[v].sum(), ours.kl[v].sum(), own, reference, ids, variants[v].name)
        agreement = sums_of(own.log_p, reference.log_p, ids)[2]
        assert abs(ours.agree[v] - agreement.numpy()).max() <= 1, variants[v].name
        right = (own.log_p.argmax(-1) == ids[:, 1:]).sum(-1)
        assert abs(ours.right[v] - right.numpy()).max() <= 1, variants[v].name
    assert (abs(ours.loss[1:] - ours.loss[0]).max(1) / ours.tokens.max()).min() > 1e-3, "variants differ"
