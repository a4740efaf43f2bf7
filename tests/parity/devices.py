"""Models that run on a device: no operation has tensors of two devices, and results are those of the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architectures import LINEAR, TEXT, config
from causal_models import CAUSAL, make_adapter
from evaluated import sequences, token_ids
from pairs import make_pair
from pretended import DEVICE, TRAFFIC, MixedDevices
from seeds import vary

import streamer
from streamer.api.options import Settings
from streamer.errors import UsageError
from streamer.events import Monitor
from streamer.fitting.prepare import collecting_bytes, states_bytes
from streamer.fitting.result import factors_of, through
from streamer.linalg.moments import Moments, RowMoments, leading_vectors
from streamer.linalg.regmean import DIRECT_BYTES, InputPair, WeightDelta, answers, corrected
from streamer.linalg.torch_state import threads
from streamer.measuring.statistics import MEASURES
from streamer.measuring.task import TRANSFORMERS_BYTES, measure, pass_bytes
from streamer.plan.plan import Plan, make_base_plan, make_plan
from streamer.plan.targets import Target
from streamer.streaming.corrected import STREAMS, CorrectedModel
from streamer.streaming.inputs import BaseInputModel, BaseMatrix
from streamer.streaming.model import StreamingModel, check_logits, vocabulary_block
from streamer.streaming.run_time import GENERAL_AS, GENERAL_CORRECTED, TASK_AS, TASK_CORRECTED, Group
from streamer.streaming.values import VariantSet, make_variants

TOLERANCE = 1e-4
"""Of the largest value: products are cut up otherwise, and rounded."""

VARIANTS = make_variants(("shrink",), (0.5,), "all")

Arrays = dict[str, np.ndarray]


def evaluated(plan: Plan, ids: torch.Tensor, device: torch.device) -> Arrays:
    """Losses of all that `evaluate` measures without findings, in blocks of the vocabulary, once the logits are checked."""
    job = VariantSet(plan, VARIANTS, None, device=device)
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


COMMANDS = {"evaluate": evaluated, "fit": fitted, "map": mapped}


SHORT = ("mixtral",)
"""Runs with the short tests: routers, experts, a head of its own."""


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[] if n in SHORT else pytest.mark.long) for n in CAUSAL])
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    _, base, adapter = make_pair(
        request.param, tmp_path_factory.mktemp("devices"), CAUSAL[request.param][2], lora_alpha=4
    )
    return make_plan(base, adapter)


@pytest.mark.parametrize("command", COMMANDS)
def test_architectures(plan: Plan, command: str) -> None:
    ids = token_ids(64)
    with threads():
        expected, found = (COMMANDS[command](plan, ids, device) for device in (torch.device("cpu"), DEVICE))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        atol = TOLERANCE * float(np.abs(values).max())
        np.testing.assert_allclose(found[name], values, rtol=0, atol=atol, err_msg=name)


def test_the_device_tells_what_is_mixed() -> None:
    there = torch.ones(2, device=DEVICE)
    for mixed in (lambda: there + torch.ones(2), lambda: torch.ones(2, 2) @ there, lambda: there[torch.ones(2).bool()]):
        with pytest.raises(MixedDevices):
            mixed()


def test_wide_inputs_are_solved_for_by_products_there() -> None:
    torch.manual_seed(vary(0))
    x, L, R = torch.randn(900, 600) * torch.arange(1, 601) ** -0.5, torch.randn(8, 2), torch.randn(600, 2)
    found = []
    for device in (torch.device("cpu"), DEVICE):
        own = [part.to(device) for part in (x[:500], x[500:])]
        task, general = (RowMoments(600, len(t), float((t**2).sum()) / len(t), partial(iter, [t]), device) for t in own)
        (right,), _ = answers([(L, R)], task, general, [0.5], "", 0)
        pairs = InputPair(task, task), InputPair(general, general)
        after = corrected([WeightDelta(L, R, lambda Q: x.to(Q.device).double().T[:, :8] @ Q)], *pairs, 0.5, 0)
        assert after is not None
        found.append([right[0], after[0], leading_vectors(general, 4)[0].cpu()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE * float(other.abs().max()))


def test_weights_cross_once_a_pass_and_memory_there_is_as_forecast(tmp_path: Path) -> None:
    """But for what the device's allocator rounds up, and kernels take for themselves."""
    sizes = TEXT | {
        "hidden_size": 128,
        "intermediate_size": 344,
        "head_dim": 32,
        "num_hidden_layers": 4,
        "vocab_size": 1000,
    }
    transformers.LlamaForCausalLM(config("Llama", **sizes)).save_pretrained(tmp_path / "base")
    plan = make_plan(
        tmp_path / "base", make_adapter(transformers.LlamaForCausalLM, tmp_path / "base", tmp_path / "adapter", LINEAR)
    )
    with pytest.raises(
        UsageError, match=r"^bf16 products run only on the CPU; with --device pretended:0, use --dtype float32$"
    ):
        VariantSet(plan, VARIANTS, None, rounds_products=True, device=DEVICE)
    text = sequences(token_ids(1000, 4, 64))
    rows, length, size = 256, 64, StreamingModel(VariantSet(plan, VARIANTS, None)).size

    def evaluate() -> None:
        measure(StreamingModel(VariantSet(plan, VARIANTS, None, device=DEVICE)), text, vocabulary_block(3 * rows))

    def collect() -> None:
        groups = [Group(text, stream, lambda tensor: None) for stream in (GENERAL_AS, TASK_AS)]
        CorrectedModel(plan, device=DEVICE).collect(groups, lambda targets, moments: None)

    taken: dict[Any, int] = {evaluate: pass_bytes(size, 0, 3 * rows, length),
             collect: states_bytes(size, 0, 2 * rows) + collecting_bytes(size, rows, length)}  # fmt: skip
    for run, forecast in taken.items():
        with threads(), TRAFFIC.counted() as traffic:
            run()
        assert 0.1 < traffic.peak / (forecast - TRANSFORMERS_BYTES) <= 1, run.__name__
        if run is evaluate:  # an embedding's rows that are not looked up stay
            assert 0.8 < traffic.to_device / size.read < 1.1


@pytest.mark.parametrize(
    "function", [streamer.evaluate_variants, streamer.fit_coefficients, streamer.repair_adapter, streamer.map_inputs]
)
def test_a_device_that_is_not_there_is_refused(function: Any, tmp_path: Path) -> None:
    inputs = make_pair("llama", tmp_path, LINEAR)[1 : 2 if function is streamer.map_inputs else 3]
    texts = {} if function is streamer.map_inputs else {"task": tmp_path / "t.npy"}
    np.save(tmp_path / "t.npy", token_ids(64, 8).numpy())
    with pytest.raises(UsageError, match=r"^device: cuda:99 is not available; use cpu$"):
        function(*inputs, tmp_path / "out", general=tmp_path / "t.npy", device="cuda:99", **texts)


def test_auto_runs_models_on_the_cpu_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = Settings().make_run(Monitor())
    assert (run.device.type, run.model_device.type) == ("cuda", "cpu")
