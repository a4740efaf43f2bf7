"""Corrected factors: those of numpy in float64, from what PEFT's layers are given before and after the modules before them changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from causal_models import ADAPTERS, CAUSAL, make_adapter, make_base
from elsewhere import Away
from evaluated import loaded, sequences, token_ids
from pairs import make_pair
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

from streamer.fitting.result import factors_of, through
from streamer.linalg.moments import RowMoments
from streamer.linalg.regmean import DIRECT_BYTES, RIDGE, InputPair, WeightDelta, corrected
from streamer.linalg.torch_state import threads
from streamer.plan.plan import make_plan
from streamer.plan.targets import Target
from streamer.streaming.corrected import STREAMS, CorrectedModel
from streamer.streaming.run_time import GENERAL_AS, GENERAL_CORRECTED, TASK_AS, TASK_CORRECTED, Group

MU = 0.5


def corrected_factors(
    base: Path, adapter: Path, texts: Mapping[int, torch.Tensor], memory: int, away: bool = False
) -> tuple[dict[str, torch.Tensor], list[str], list[str]]:
    """R' of each module, and which were replaced, and which were not."""
    plan, made = make_plan(base, adapter), list[str]()
    rights = {t.tensor: factors_of(plan, t).R.float() for t in plan.targets}

    def replace(targets: Sequence[Target], moments: Mapping[int, RowMoments]) -> None:
        deltas = [factors_of(plan, target) for target in targets]
        own = [WeightDelta(d.L, d.R, partial(through, plan, t)) for t, d in zip(targets, deltas, strict=True)]
        pairs = (
            InputPair(moments[a], moments[b]) for a, b in ((TASK_AS, TASK_CORRECTED), (GENERAL_AS, GENERAL_CORRECTED))
        )
        found = corrected(own, *pairs, MU, memory)
        assert found is not None
        for target, right in zip(targets, found, strict=True):
            rights[target.tensor] = right.float()
            made.append(target.module.name)

    model = CorrectedModel(plan, elsewhere=Away(plan) if away else None)
    # Two groups a stream, of two lengths, take turns.
    groups = [
        Group(sequences(part), stream, lambda tensor: None)
        for stream in STREAMS
        for part in (texts[stream][:3], texts[stream][3:, :-2])
    ]
    with threads():
        model.collect(
            [group for group in groups if group.stream in (GENERAL_AS, TASK_AS)], lambda targets, moments: None
        )
        model.correct(groups, rights, replace)
    names = {t.tensor: t.module.name for t in plan.targets}
    return {names[tensor]: R for tensor, R in rights.items()}, made, sorted({*names.values()} - {*made})


def given(model: Any, texts: torch.Tensor) -> dict[str, np.ndarray]:
    """Inputs of each layer of PEFT's, in the order of the groups."""
    found: dict[str, list[torch.Tensor]] = {}

    def hook(name: str) -> Any:
        def take(module: Any, args: Any, kwargs: Any) -> None:
            x = (args[0] if args else kwargs["x"]).detach()
            found.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))

        return take

    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    hooks = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    with torch.no_grad():
        for part in (texts[:3], texts[3:, :-2]):
            model(input_ids=part)
    for one in hooks:
        one.remove()
    return {name: torch.cat(own).numpy() for name, own in found.items()}


QUICK = "llama", "gpt2", "phi3", "gemma2", "opt", "gpt-neox", "qwen3-moe"
"""By matrices, and by products with the inputs, which are those of linalg whatever the architecture."""


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        *((name, memory) for name in QUICK for memory in (DIRECT_BYTES, 0)),
        *(
            pytest.param(name, DIRECT_BYTES, marks=pytest.mark.long)
            for name in CAUSAL
            if name not in QUICK and name != "xglm"  # whose own code does not run in float64
        ),
    ],
)
def test_each_layer_is_fitted_to_what_those_before_it_make(name: str, memory: int, tmp_path: Path) -> None:
    cls, base = make_base(name, tmp_path / "base"), tmp_path / "base"
    targets = (
        CAUSAL[name][2] if isinstance(CAUSAL[name][2], str) else [one for one in CAUSAL[name][2] if "embed" not in one]
    )
    adapter = make_adapter(cls, base, tmp_path / "adapter", targets, lora_alpha=4, r=2)
    general, task = token_ids(64, 6), token_ids(64, 12)[6:]
    texts = {GENERAL_AS: general, GENERAL_CORRECTED: general, TASK_AS: task, TASK_CORRECTED: task}
    rights, made, left = corrected_factors(base, adapter, texts, memory)
    assert made
    if memory:
        elsewhere, *same = corrected_factors(base, adapter, texts, memory, away=True)
        assert same == [made, left]
        assert all(torch.equal(R, elsewhere[one]) for one, R in rights.items())
    assert all(any(part in one for part in ("expert", "lm_head")) for one in left), left
    with warnings.catch_warnings(action="ignore"):
        model = peft.PeftModel.from_pretrained(loaded(cls, base, torch.float64), adapter).eval().double()
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    with model.disable_adapter():
        x_general = given(model, general)
    x_task = given(model, task)
    before = {
        one: (layer.lora_A["default"].weight.data.clone(), layer.lora_B["default"].weight.data)
        for one, layer in layers.items()
    }
    for one in made:  # all but experts and heads, whose factors stay
        layers[one].lora_A["default"].weight.data = rights[one].T.double()
    now_general, now_task = given(model, general), given(model, task)
    for one in made:
        weight = layers[one].base_layer.weight.data.numpy()
        W = weight.T if isinstance(layers[one].base_layer, Conv1D) else weight
        A, B = (t.numpy() for t in before[one])
        delta = layers[one].scaling["default"] * B @ A
        Q = np.linalg.qr(B)[0]
        x, y, u, v = x_task[one], now_task[one], x_general[one], now_general[one]
        s = RIDGE * np.trace(y.T @ y) / len(y) / y.shape[1]
        # The least squares as they are written down, of Q D' alone: targets of the task, of general text, and of the ridge.
        rows = [y / len(y) ** 0.5, v * (MU / len(v)) ** 0.5, s**0.5 * np.eye(y.shape[1])]
        wanted = [
            (x @ (W + delta).T - y @ W.T) @ Q / len(y) ** 0.5,
            (u - v) @ W.T @ Q * (MU / len(v)) ** 0.5,
            s**0.5 * delta.T @ Q,
        ]
        D = np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted), rcond=None)[0]
        found = layers[one].scaling["default"] * B @ rights[one].T.double().numpy()
        assert np.linalg.norm(found - Q @ D.T) <= 1e-4 * np.linalg.norm(D), one


def test_what_is_not_of_all_tokens_stays(tmp_path: Path) -> None:
    name, targets, options = ADAPTERS["experts, stacked"]
    _, base, adapter = make_pair(name, tmp_path, targets, **{"lora_alpha": 4, **options})
    ids = token_ids(64, 6)
    rights, made, left = corrected_factors(base, adapter, dict.fromkeys(STREAMS, ids), DIRECT_BYTES)
    plan = make_plan(base, adapter)
    assert left
    for target in plan.targets:
        if target.module.name not in made:
            assert torch.equal(rights[target.module.name], factors_of(plan, target).R.float())
