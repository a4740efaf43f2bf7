"""Models that run on a device: no operation has tensors of two devices, and results are those of the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from causal_models import CAUSAL, make_adapter, make_base
from evaluated import sequences, token_ids
from fitted_models import coefficients_of
from pretended import DEVICE

from streamer.evaluation.losses import measure
from streamer.evaluation.statistics import MEASURES
from streamer.fitting.points import factors_of, through
from streamer.linalg.feedback import InputPair, WeightDelta, corrected
from streamer.linalg.regmean import DIRECT_BYTES, answers
from streamer.linalg.second_moments import Moments, RowMoments, leading_vectors
from streamer.linalg.torch_state import threads
from streamer.plan.base_plan import make_base_plan
from streamer.plan.plan import Plan, make_plan
from streamer.plan.targets import Target
from streamer.streaming.base_inputs import BaseInputModel, BaseMatrix
from streamer.streaming.corrected import STREAMS, CorrectedModel
from streamer.streaming.gradients import GradientModel
from streamer.streaming.logit_checks import check_logits
from streamer.streaming.model import StreamingModel
from streamer.streaming.streams import GENERAL_AS, GENERAL_CORRECTED, TASK_AS, TASK_CORRECTED, Group
from streamer.streaming.values import Job
from streamer.streaming.variants import make_variants

TOLERANCE = 1e-4
"""Of the largest value: products are cut up otherwise, and rounded."""

Arrays = dict[str, np.ndarray]


def evaluated(plan: Plan, ids: torch.Tensor, device: torch.device) -> Arrays:
    """Losses of all that `evaluate` measures without findings, in blocks of the vocabulary, once the logits are checked."""
    job = Job(plan, make_variants(("shrink",), (0.5,), "all"), None, device=device)
    check_logits(job, ids[0].numpy(), lambda tensor: None)
    sums = measure(StreamingModel(job), sequences(ids), 25)
    return {name: getattr(sums, name) for name in MEASURES}


def fitted(plan: Plan, ids: torch.Tensor, device: torch.device) -> Arrays:
    """Right factors, by inputs, as the adapter's; and those that are corrected."""
    rights: dict[str, torch.Tensor] = {}
    factors = {t.tensor: factors_of(plan, t) for t in plan.targets}

    def solve(targets: Sequence[Target], moments: Mapping[int, Moments]) -> None:
        own = [(factors[t.tensor].L, factors[t.tensor].R) for t in targets]
        found, _ = answers(own, moments[TASK_AS], moments[GENERAL_AS], [0.5], targets[0].tensor)
        rights.update({t.tensor: right[0].float() for t, right in zip(targets, found, strict=True)})

    def replace(targets: Sequence[Target], moments: Mapping[int, RowMoments]) -> None:
        own = [WeightDelta(factors[t.tensor].L, factors[t.tensor].R, partial(through, plan, t)) for t in targets]
        pairs = [InputPair(moments[a], moments[b]) for a, b in ((TASK_AS, TASK_CORRECTED), (GENERAL_AS, GENERAL_CORRECTED))]  # fmt: skip
        found = corrected(own, *pairs, 0.5, DIRECT_BYTES)
        assert found is not None
        rights.update({t.tensor: right.float() for t, right in zip(targets, found, strict=True)})

    model = CorrectedModel(plan, device=device)
    texts = {stream: sequences(ids[: 1 + stream % 2]) for stream in STREAMS}
    groups = [Group(texts[stream], stream, lambda tensor: None) for stream in STREAMS]
    model.collect(groups[:2], solve)
    rights.update({name: factors[name].R.float() for name in model.unseen})
    first = {f"{name} first": right.numpy() for name, right in rights.items()}
    model.correct(groups, rights, replace)
    return first | {name: right.numpy() for name, right in rights.items()}


def fitted_by_gradients(plan: Plan, ids: torch.Tensor, device: torch.device) -> Arrays:
    """Values and gradients of every objective."""
    model = GradientModel(plan, block=25, device=device)
    found: Arrays = {}
    for against in ("base", "adapter", "labels"):
        own = model.gradient(sequences(ids), coefficients_of(model), against)
        found |= {f"{against} {name}": gradient for name, gradient in own.gradient.items()}
        found[against] = np.array([own.value])
    return found


def mapped(plan: Plan, ids: torch.Tensor, device: torch.device) -> Arrays:
    """Leading vectors of the inputs of all matrices of the base."""
    found: Arrays = {}

    def keep(matrices: Sequence[BaseMatrix], moments: Mapping[int, Moments]) -> None:
        own = moments[GENERAL_AS]
        values = leading_vectors(own, 4)[0] if isinstance(own, RowMoments) else own.diagonal
        found[matrices[0].tensor] = values.cpu().numpy()

    model = BaseInputModel(make_base_plan(plan.base.path, "mmap", None), device=device)
    model.collect([Group(sequences(ids), GENERAL_AS, lambda tensor: None)], keep)
    return found


COMMANDS = {"evaluate": evaluated, "fit": fitted, "fit by gradients": fitted_by_gradients, "map": mapped}


SHORT = ("mixtral",)
"""Runs with the short tests: routers, experts, a head of its own."""


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[] if n in SHORT else pytest.mark.long) for n in CAUSAL])
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = tmp_path_factory.mktemp("devices")
    cls = make_base(request.param, path / "base")
    return make_plan(
        path / "base", make_adapter(cls, path / "base", path / "adapter", CAUSAL[request.param][2], lora_alpha=4)
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_architectures(plan: Plan, command: str) -> None:
    ids = token_ids(64)
    with threads():
        expected, found = (COMMANDS[command](plan, ids, device) for device in (torch.device("cpu"), DEVICE))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        atol = TOLERANCE * float(np.abs(values).max())
        np.testing.assert_allclose(found[name], values, rtol=0, atol=atol, err_msg=name)
