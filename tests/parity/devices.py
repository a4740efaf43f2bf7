"""Models that run on a device: no operation has tensors of two devices, and results are those of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architectures import LINEAR, TEXT, config
from causal_models import CAUSAL, make_adapter
from evaluated import make_sweep, nothing, sequences, token_ids
from pairs import make_pair
from pretended import DEVICE, TRAFFIC, MixedDevices
from seeds import vary

import streamer
from streamer.api.requests import Request
from streamer.api.texts import MapRequest
from streamer.errors import UsageError
from streamer.events import Monitor
from streamer.fitting.mapping import prepare_map
from streamer.linalg.moments import Refit, System, TextInputs, basis, leading_vectors, refit
from streamer.linalg.torch_state import CPU, threads
from streamer.measuring import batches
from streamer.measuring.batches import TRANSFORMERS_BYTES, Limits, Work
from streamer.measuring.losses import batch_sums
from streamer.measuring.statistics import MEASURES
from streamer.plan.plan import Plan, make_plan
from streamer.run import Run
from streamer.streaming.checks import check_logits
from streamer.streaming.sweep import SweepModel
from streamer.streaming.variants import VariantSet, make_variants

TOLERANCE = 1e-4
"""Of the largest value: products are cut up otherwise, and rounded."""

VARIANTS = make_variants(("shrink",), (0.5,), "all")

Arrays = dict[str, np.ndarray]


def measured(model: SweepModel, ids: torch.Tensor, block: int) -> Arrays:
    """Sums of all variants, in blocks of the vocabulary."""
    (part,) = batches.batches(
        {"text": sequences(ids)}, len(VARIANTS), model.size, ids.numel(), False
    )
    model.run(part.groups, nothing)
    (sums,) = batch_sums(model, [part], block, nothing)
    return {name: getattr(sums, name) for name in MEASURES}


def evaluated(plan: Plan, ids: torch.Tensor, device: torch.device) -> Arrays:
    """Losses of all that `evaluate` measures without findings, once the logits are checked."""
    model = SweepModel(VariantSet(plan, VARIANTS, None, device=device))
    check_logits(model, ids[0].numpy(), nothing)
    return measured(model, ids, 25)


def fitted(plan: Plan, ids: torch.Tensor, device: torch.device) -> Arrays:
    """Right factors of all candidates."""
    sweep = make_sweep(plan.base.path, plan.adapter.path, ids, ids.flip(1), device=device)
    sweep.run()
    return {
        f"{name} {k}": R.cpu().numpy()
        for name, own in sweep.rights.items()
        for k, R in enumerate(own)
    }


def mapped(plan: Plan, ids: torch.Tensor, device: torch.device) -> Arrays:
    """Eigenvalues of the base's inputs, or frequencies."""
    np.save(text := plan.adapter.path.parent / "g.npy", ids.numpy())
    prepared = prepare_map(
        plan.base.path,
        text,
        MapRequest(base=plan.base.path, vectors=4),
        None,
        Run(CPU, model_device=device),
    )
    return {
        f"{one.names[0]} {one.vectors is None}": one.values.numpy()
        for one in prepared.result(None).inputs
    }


COMMANDS = {"evaluate": evaluated, "fit": fitted, "map": mapped}


@pytest.fixture(scope="module", params=CAUSAL)
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    _, base, adapter = make_pair(
        request.param, tmp_path_factory.mktemp("devices"), CAUSAL[request.param][2], lora_alpha=4
    )
    return make_plan(base, adapter)


@pytest.mark.parametrize("command", COMMANDS)
def test_architectures(plan: Plan, command: str) -> None:
    ids = token_ids(64)
    with threads():
        expected, found = (
            COMMANDS[command](plan, ids, device) for device in (torch.device("cpu"), DEVICE)
        )
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        atol = TOLERANCE * float(np.abs(values).max())
        np.testing.assert_allclose(found[name], values, rtol=0, atol=atol, err_msg=name)


def test_the_device_tells_what_is_mixed() -> None:
    there = torch.ones(2, device=DEVICE)
    for mixed in (
        lambda: there + torch.ones(2),
        lambda: torch.ones(2, 2) @ there,
        lambda: there[torch.ones(2).bool()],
    ):
        with pytest.raises(MixedDevices):
            mixed()


@pytest.mark.parametrize("tokens", [50, 450], ids=["fewer tokens than inputs", "more"])
def test_wide_inputs_are_solved_for_there(tokens: int) -> None:
    torch.manual_seed(vary(0))
    x = torch.randn(4, tokens, 600) * torch.arange(1, 601) ** -0.5
    L = torch.randn(8, 2)
    R = torch.randn(600, 2)
    (Q, T), W, found = (
        basis(L),
        torch.randn(8, 600).double(),
        list[tuple[torch.Tensor, torch.Tensor]](),
    )
    for device in (CPU, DEVICE):
        task, general, *now = x.to(device)
        delta = Refit(R, T, (R.double() @ T.T).to(device), (W.T @ Q).to(device))
        system = System([now[0]], [now[1]], (tokens, tokens), 0.5)
        texts = zip((task, general), now, strict=True)
        refitted = refit(
            delta, *(TextInputs(*([x] for x in pair), tokens) for pair in texts), 0.5, system
        )
        assert refitted is not None
        found.append((refitted.cpu(), leading_vectors([general], tokens, 4)[0].cpu()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE * float(other.abs().max()))


def test_weights_cross_once_a_sweep_and_memory_there_is_as_forecast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        tmp_path / "base",
        make_adapter(
            transformers.LlamaForCausalLM, tmp_path / "base", tmp_path / "adapter", LINEAR
        ),
    )
    with pytest.raises(
        UsageError,
        match=r"^bf16 products run only on the CPU; with --device pretended:0, use --dtype float32$",
    ):
        VariantSet(plan, VARIANTS, None, rounds_products=True, device=DEVICE)
    ids = token_ids(1000, 4, 64)
    rows = 3 * 256
    monkeypatch.setattr(batches, "LOGIT_BYTES", 4 * rows * 64)
    model = SweepModel(VariantSet(plan, VARIANTS, None, device=DEVICE))
    model.limit(1 << 20, False)
    forecast = (
        Work(rows, 64).nbytes(model.size, 0, Limits(256, 1 << 20, False)) - TRANSFORMERS_BYTES
    )
    with threads(), TRAFFIC.counted() as traffic:
        measured(model, ids, 64)
    assert 0.1 < traffic.peak / forecast <= 1
    # The head's are read again for each block; of an embedding only rows that are looked up.
    assert 0.8 < traffic.to_device / model.size.read < 1.1


@pytest.mark.parametrize(
    "function", [streamer.evaluate_variants, streamer.repair_adapter, streamer.map_inputs]
)
def test_a_device_that_is_not_there_is_refused(function: Any, tmp_path: Path) -> None:
    inputs = make_pair("llama", tmp_path, LINEAR)[1 : 2 if function is streamer.map_inputs else 3]
    texts = {} if function is streamer.map_inputs else {"task": tmp_path / "t.npy"}
    np.save(tmp_path / "t.npy", token_ids(64, 8).numpy())
    with pytest.raises(UsageError, match=r"^device: cuda:99 is not available; use cpu$"):
        function(*inputs, tmp_path / "out", general=tmp_path / "t.npy", device="cuda:99", **texts)


def test_auto_runs_models_on_the_cpu_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = Request(base="base").make_run(Monitor())
    assert (run.device.type, run.model_device.type) == ("cuda", "cpu")
