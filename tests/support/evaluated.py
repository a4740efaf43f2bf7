"""What transformers says of merged models: the oracle of `streamer evaluate`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from evaluations import text_of
from safetensors.torch import load_file, save_file
from seeds import vary
from torch import Tensor

import streamer
from streamer.detection.findings import Findings
from streamer.fitting.fit import Point
from streamer.fitting.solver import FactorSolver, factors_of, streams_of, unchanged
from streamer.linalg.torch_state import CPU
from streamer.measuring.batches import batches
from streamer.measuring.losses import batch_sums
from streamer.measuring.sequences import GENERAL, TASK, TextSequences
from streamer.measuring.statistics import SequenceSums
from streamer.methods import UNCHANGED, Shrink
from streamer.plan.plan import Plan, make_plan
from streamer.plan.targets import Target
from streamer.streaming.groups import Group
from streamer.streaming.sites import TargetWatch
from streamer.streaming.spool import Spool
from streamer.streaming.sweep import SweepModel
from streamer.streaming.variants import ADAPTER, BASE, Variant, VariantSet, make_variants

TOP_K = 4


def token_ids(vocabulary: int, sequences: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(
        3, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(vary(3))
    )


def nothing() -> None:
    """Stand for a checkpoint at which no run stops."""


def sequences(ids: torch.Tensor) -> TextSequences:
    return text_of(row.numpy() for row in ids)


def loaded(cls: Any, path: Path, dtype: torch.dtype) -> Any:
    model = cls.from_pretrained(path, dtype=dtype).eval()
    model.config.get_text_config()._experts_implementation = (
        model.config._experts_implementation
    ) = "eager"  # float64
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
            parameter.mul_(
                1 + torch.finfo(torch.float32).eps * (2 * torch.rand_like(parameter) - 1)
            )
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
        exact, *rounded = (
            logits_of(model, ids).double().log_softmax(-1)[:, :-1] for model in models
        )
    return Answer(exact, torch.stack([(other - exact).abs().amax(-1) for other in rounded]).amax(0))


ROUNDINGS = 4
"""How many times as far as transformers in float32 the streamed sums may be from float64."""


def assert_sums(
    loss: Any, kl: Any, own: Answer, base: Answer, ids: torch.Tensor, what: object
) -> None:
    """The streamed loss and KL of some sequences, added up, are those of transformers, up to what float32 does to this very model.

    A log-probability that is off by d moves the loss by d. The KL Σ p0 (log p0 − log p) moves by d, and as the base's own d0 moves p0 by
    p0 d0, by Σ p0 d0 (1 + |log p0 − log p|) more.
    """
    exact_loss, exact_kl, _ = sums_of(own.log_p, base.log_p, ids)
    by_base = 1 + (base.log_p.exp() * (base.log_p - own.log_p).abs()).sum(-1)
    room = own.moved.sum()
    assert abs(float(loss - exact_loss.sum())) <= ROUNDINGS * room, what
    assert abs(float(kl - exact_kl.sum())) <= ROUNDINGS * (room + (by_base * base.moved).sum()), (
        what
    )


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
    model = SweepModel(
        VariantSet(make_plan(base, adapter), variants, found, projected, rounds_products)
    )
    (part,) = batches({"text": sequences(ids)}, len(variants), model.size, ids.numel(), False)
    model.run(part.groups, nothing)
    (sums,) = batch_sums(model, [part], 25, nothing)
    model.check_all_used()
    return sums


def merged_variants(
    base: Path,
    adapter: Path,
    variants: tuple[Variant, ...],
    found: Findings | None,
    directory: Path,
) -> Iterator[Path]:
    """Write the model of each variant; of the base, itself."""
    for v, variant in enumerate(variants):
        if variant.mitigation is None:
            yield base
            continue
        options = variant.mitigation
        merged = directory / f"merged-{v}"
        streamer.merge_with_reduced_intruder_dimensions(
            base,
            adapter,
            merged,
            findings=found,
            top_k=TOP_K,
            mitigation_lambda=options.mitigation_lambda,
            method=options.name,
            amplify=True,
        )
        yield merged


def assert_as_transformers(
    cls: Any,
    base: Path,
    adapter: Path,
    directory: Path,
    *,
    methods: tuple[Any, ...] = ("paper", "shrink"),
    lambdas: tuple[float, ...] = (0.5,),
    vocabulary: int = 64,
    decoded: Path | None = None,
) -> None:
    """The streamed losses of every variant are those of transformers with the merged model; of a quantized base, with the decoded one."""
    found = streamer.detect_intruder_dimensions(base, adapter, top_k=TOP_K)
    variants = make_variants(methods, lambdas, "all", amplify=True)
    ids = token_ids(vocabulary)
    ours = streamed(base, adapter, variants, found, ids)
    if decoded is not None:
        base = decoded
        found = streamer.detect_intruder_dimensions(decoded, adapter, top_k=TOP_K)
    reference = answer(precisions(cls, base), ids)
    tokens = ours.tokens.sum()
    assert tokens == ids[:, 1:].numel()
    answers = [
        reference if merged == base else answer(precisions(cls, merged), ids)
        for merged in merged_variants(base, adapter, variants, found, directory)
    ]
    for v, own in enumerate(answers):
        assert_sums(
            ours.loss[v].sum(),
            ours.kl_from_adapter[v].sum(),
            own,
            answers[1],
            ids,
            variants[v].name,
        )
        assert_sums(ours.loss[v].sum(), ours.kl[v].sum(), own, reference, ids, variants[v].name)
        agreement = sums_of(own.log_p, reference.log_p, ids)[2]
        assert abs(ours.agree[v] - agreement.numpy()).max() <= 1, variants[v].name
        right = (own.log_p.argmax(-1) == ids[:, 1:]).sum(-1)
        assert abs(ours.right[v] - right.numpy()).max() <= 1, variants[v].name
    assert (abs(ours.loss[1:] - ours.loss[0]).max(1) / ours.tokens.max()).min() > 1e-3, (
        "variants differ"
    )


WEIGHTS = (0.5, 4.0)
"""Weights μ of the general text, one for each candidate."""


def halves(ids: Tensor) -> list[Tensor]:
    """Batches of two lengths: most sequences, and the others without their ends."""
    cut = (2 * len(ids) + 2) // 3
    return [ids[:cut], ids[cut:, :-2]]


@dataclass
class Sweep:
    """A model, ready to fit an adapter's factors.

    Attributes
    ----------
    groups
        Two groups of each stream, of two lengths.
    """

    plan: Plan
    model: SweepModel
    solver: FactorSolver
    groups: list[Group]

    @property
    def rights(self) -> dict[str, list[Tensor]]:
        """Return each candidate's right factors of the matrices that were fitted, by `Target.tensor`."""
        rights: dict[str, list[Tensor]] = {}
        for key, right in sorted(self.solver.factors().items()):
            rights.setdefault(key.rpartition("/")[0], []).append(right)
        return rights

    def run(self, riders: Sequence[Group] = (), checkpoint: Any = nothing) -> None:
        """Fit."""
        self.model.run([*self.groups, *riders], checkpoint, self.solver, TargetWatch(self.plan))


def make_sweep(
    base: Path,
    adapter: Path,
    general: Tensor,
    task: Tensor,
    weights: Sequence[float] = WEIGHTS,
    device: torch.device = CPU,
) -> Sweep:
    """Prepare a fit; the variants are the base, the adapter, the candidates, and a shrink."""
    plan = make_plan(base, adapter)
    spool = Spool()
    as_is = unchanged(plan)
    texts = {GENERAL: halves(general), TASK: halves(task)}
    tokens = {name: sum(ids.numel() for ids in text) for name, text in texts.items()}
    model = SweepModel(
        VariantSet(plan, (Variant(BASE, None), Variant(ADAPTER, UNCHANGED)), None, device=device)
    )
    solver = FactorSolver(model, weights, tokens, spool)
    points = [Point(mu, solver.candidate(k, as_is)) for k, mu in enumerate(weights)]
    candidates = [point.variant for point in points]
    model.use(
        replace(model.job, variants=(*model.job.variants, *candidates, Variant.of(Shrink(0.5))))
    )
    groups = [
        Group(ids, stream.variant, stream)
        for stream in streams_of(len(weights))
        for ids in texts[stream.text]
    ]
    return Sweep(plan, model, solver, groups)


def fitted(
    base: Path, adapter: Path, general: Tensor, task: Tensor, weights: Sequence[float] = WEIGHTS
) -> Sweep:
    """Fit an adapter's factors in one sweep."""
    sweep = make_sweep(base, adapter, general, task, weights)
    sweep.run()
    return sweep


def delta_of(plan: Plan, target: Target, right: Tensor | None = None) -> Tensor:
    """Δ (out, in) in float64, with another right factor if one is given."""
    delta = factors_of(plan, target)
    return delta.L.double() @ (delta.R if right is None else right).double().T


def merged(cls: Any, base: Path, plan: Plan, rights: Mapping[str, Tensor], out: Path) -> Any:
    """The base's model in float64 with the adapter's deltas, with other right factors of some matrices."""
    out.mkdir()
    tensors = {
        name: t.double()
        for file in base.glob("*.safetensors")
        for name, t in load_file(file).items()
    }
    for target in plan.targets:
        delta = delta_of(plan, target, rights.get(target.tensor))
        for part in target.slices:
            own = delta if part.rows is None else delta[slice(*part.rows)]
            into = tensors[part.weight] if part.index is None else tensors[part.weight][part.index]
            into += own.T if target.transposed else own
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in base.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    return loaded(cls, out, torch.float64)
