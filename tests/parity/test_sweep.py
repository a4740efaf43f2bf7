"""Factors fitted in one sweep: those of float64, from the inputs of transformers' and PEFT's own models; and what stops a sweep."""

from __future__ import annotations

import contextlib
import gc
import json
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import greenlet
import numpy as np
import peft
import pytest
import torch
from architectures import LINEAR
from causal_models import ADAPTERS, CAUSAL, make_adapter, make_base
from evaluated import (
    WEIGHTS,
    Sweep,
    fitted,
    halves,
    loaded,
    make_sweep,
    merged,
    nothing,
    sequences,
    token_ids,
)
from pairs import make_pair
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D

import streamer
from streamer.errors import Interrupted, NumericError, UnsupportedError
from streamer.events import Event
from streamer.fitting.solver import FactorSolver, factors_of
from streamer.linalg.moments import GENERAL_RIDGE, RIDGE
from streamer.measuring.batches import Batch
from streamer.measuring.losses import batch_sums
from streamer.measuring.statistics import SequenceSums
from streamer.plan.targets import Target
from streamer.streaming.groups import Group
from streamer.streaming.resume import States
from streamer.streaming.sites import TargetWatch
from streamer.streaming.values import ROOM


def adapted(cls: Any, base: Path, adapter: Path) -> tuple[Any, dict[str, Any]]:
    """PEFT's model in float64, and its layers by name, without experts."""
    with warnings.catch_warnings(action="ignore"):
        model = (
            peft.PeftModel.from_pretrained(loaded(cls, base, torch.float64), adapter)
            .eval()
            .double()
        )
    layers = {
        n.removeprefix("base_model.model."): m
        for n, m in model.named_modules()
        if isinstance(m, LoraLayer)
    }
    return model, {
        name: layer for name, layer in layers.items() if not isinstance(layer, ParamWrapper)
    }


def given(model: Any, layers: Mapping[str, Any], ids: Tensor) -> dict[str, np.ndarray]:
    """Inputs of each layer, of all tokens in order; of an embedding the numbers of the rows."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        def take(module: Any, args: Any, kwargs: Any) -> None:
            x = (*args, *kwargs.values())[0].detach()
            # Some classes look up positions once for all sequences.
            x = (
                x.reshape(-1, x.shape[-1])
                if x.is_floating_point()
                else x.expand(len(part), -1).flatten()
            )
            found.setdefault(name, []).append(x)

        return take

    hooks = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for part in halves(ids):
            model(input_ids=part)
    for one in hooks:
        one.remove()
    return {name: torch.cat(own).numpy() for name, own in found.items()}


def weight_of(layer: Any) -> np.ndarray:
    """W (out, in)."""
    weight: np.ndarray = layer.base_layer.weight.data.numpy()
    return weight.T if isinstance(layer.base_layer, Conv1D) else weight


def solution(
    layer: Any, factors: tuple[Tensor, Tensor], mu: float, x: Any, y: Any, u: Any, v: Any
) -> np.ndarray:
    """A' (r, n) by the formula, with whole matrices: task inputs x and y, general inputs u and v, before and now."""
    A, B = (t.numpy() for t in factors)
    B = layer.scaling["default"] * B
    P = np.linalg.solve(B.T @ B, B.T) @ weight_of(layer)
    rho, gamma = (
        share * np.sum(now**2) / len(now) / now.shape[1]
        for share, now in ((RIDGE, y), (GENERAL_RIDGE, v))
    )
    wanted = (
        ((x - y) @ P.T + x @ A.T).T @ y / len(y) + mu * ((u - v) @ P.T).T @ v / len(v) + rho * A
    )
    return np.linalg.solve(
        y.T @ y / len(y) + mu * v.T @ v / len(v) + (rho + mu * gamma) * np.eye(y.shape[1]), wanted.T
    ).T


def relative(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(np.asarray(found) - wanted) / np.linalg.norm(wanted))


SITES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Modules of a layer that share their inputs, in order."""


@pytest.mark.parametrize("sequences", [3, 9], ids=["fewer tokens than inputs", "more"])
def test_factors_are_those_of_whole_matrices_layer_by_layer(sequences: int, tmp_path: Path) -> None:
    """From the embeddings up: no factor of the sweep's own enters what is expected."""
    cls = make_base("llama", tmp_path / "base")
    base = tmp_path / "base"
    adapter = make_adapter(cls, base, tmp_path / "adapter", LINEAR, r=4, lora_alpha=2)
    general, task = token_ids(64, 2 * sequences, sequences + 2).split(sequences)
    weights = (0.3, 3.0, 30.0)
    sweep = fitted(base, adapter, general, task, weights)
    model, layers = adapted(cls, base, adapter)
    plain = loaded(cls, base, torch.float64)
    u = given(plain, {name: plain.get_submodule(name) for name in layers}, general)
    x = given(model, layers, task)
    assert {2 * len(own) < own.shape[1] for own in x.values()} == {sequences == 3}
    before = {
        n: (m.lora_A["default"].weight.data.clone(), m.lora_B["default"].weight.data)
        for n, m in layers.items()
    }
    for k, mu in enumerate(weights):
        for name, layer in layers.items():
            layer.lora_A["default"].weight.data = before[name][0]
        for number in range(2):
            for site in SITES:
                v = given(model, layers, general)
                y = given(model, layers, task)
                for name in (n for n in layers if f".{number}." in n and n.endswith(site)):
                    A = solution(layers[name], before[name], mu, x[name], y[name], u[name], v[name])
                    layers[name].lora_A["default"].weight.data = torch.from_numpy(A)
                    found = sweep.rights[f"{name}.weight"][k].T.numpy()
                    assert relative(found, A) <= 1e-4, (name, mu)
                    alone = solution(
                        layers[name], before[name], mu, y[name], y[name], v[name], v[name]
                    )
                    assert number == 0 or relative(A, alone) > 1e-3, (
                        "the modules before it changed its inputs"
                    )


LONG = "gpt2", "qwen3-moe", "gemma4", "falcon", "jamba", "deepseek-v4"
"""Whose layers hand on more than one state of each token: keys and values, a recurrence, tables. All others are slow."""


def marked(names: Iterable[str], quick: Sequence[str] = ("llama", "gemma3n")) -> list[Any]:
    marks = dict.fromkeys(LONG, pytest.mark.long) | dict.fromkeys(quick, ())
    return [pytest.param(name, marks=marks.get(name, pytest.mark.slow)) for name in names]


QUICK = "llama", "gpt2", "phi3", "qwen3-moe", "gemma"
KINDS = (
    "LoRA on a tied head",
    "LoRA on a tied embedding",
    "saved head and norms",
    "LoRA's own biases",
    "embeddings of positions",
    "biases",
)


@pytest.mark.parametrize(
    "name", marked([*KINDS, *(n for n in CAUSAL if n != "xglm")], (*QUICK, *KINDS))
)
def test_each_layer_is_fitted_to_what_those_before_it_make(name: str, tmp_path: Path) -> None:
    """Given the factors of the layers before, and of each embedding, each solution is the formula's. xglm's code has no float64."""
    made, targets, options = ADAPTERS.get(name) or (name, CAUSAL[name][2], {})
    cls, base, adapter = make_pair(made, tmp_path, targets, **{"lora_alpha": 4, **options})
    general, task = token_ids(64, 12).split(6)
    sweep = fitted(base, adapter, general, task)
    model, layers = adapted(cls, base, adapter)
    plain = loaded(cls, base, torch.float64)
    u = given(plain, {name: plain.get_submodule(name) for name in layers}, general)
    x = given(model, layers, task)
    names = {t.module.name: t.tensor for t in sweep.plan.targets}
    assert {names[name] for name in layers} == {
        one for one in sweep.rights if "experts" not in one
    }, "all are fitted"
    before = {}
    for name, layer in layers.items():
        looked_up = np.issubdtype(x[name].dtype, np.integer)
        A, B = (
            (layer.lora_embedding_A, layer.lora_embedding_B)
            if looked_up
            else (layer.lora_A, layer.lora_B)
        )
        A, B = (one["default"] if looked_up else one["default"].weight for one in (A, B))
        before[name] = A.data.clone(), B.data, A
    for k, mu in enumerate(WEIGHTS):
        for name, (_, _, A) in before.items():
            A.data = sweep.rights[names[name]][k].T.double()
        v = given(model, layers, general)
        y = given(model, layers, task)
        for name, (A, B, own) in before.items():
            if np.issubdtype(x[name].dtype, np.integer):
                of_task, of_general = (
                    np.bincount(t[name], minlength=A.shape[1]) / len(t[name]) for t in (x, u)
                )
                kept = of_task + RIDGE * of_task.mean()
                wanted = A.numpy() * kept / (kept + mu * of_general)
            else:
                wanted = solution(layers[name], (A, B), mu, x[name], y[name], u[name], v[name])
            assert relative(own.data, wanted) <= 1e-4, (name, mu)


TOWERS = "gemma3-vision", "llava", "qwen2.5-vl"
"""Models with layers that no text runs."""


class Recorder(TorchFunctionMode):
    """Inputs of the matrices of stacks, by the matrix's address."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = defaultdict[int, list[Tensor]](list)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            len(args) > 1
            and isinstance(args[0], Tensor)
            and isinstance(args[1], Tensor)
            and args[1].ndim == 2
        ):
            self.seen[args[1].data_ptr()].append(args[0])
        return func(*args, **(kwargs or {}))


def experts_inputs(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What each matrix of a stack receives, in the order of the groups."""
    with torch.no_grad(), Recorder() as recorder:
        for part in halves(ids):
            model(input_ids=part)
    stacks = {name: stack for name, stack in model.named_parameters() if stack.ndim == 3}
    places = {
        f"{name}[{e}]": stack[e].data_ptr()
        for name, stack in stacks.items()
        for e in range(len(stack))
    }
    return {
        name: torch.cat(recorder.seen[at]) for name, at in places.items() if at in recorder.seen
    }


@pytest.mark.parametrize("chosen", [2, 4])
@pytest.mark.parametrize("kind", ["experts, one tensor each", "experts, stacked"])
def test_experts_are_fitted_to_the_tokens_that_each_candidate_sends_them(
    kind: str, chosen: int, tmp_path: Path
) -> None:
    """Without the correction: other tokens reach an expert under each model, or the same ones in the order of their routes. One that a
    text does not reach keeps its delta."""
    name, targets, options = ADAPTERS[kind]
    cls, base, adapter = make_pair(name, tmp_path, targets, lora_alpha=20, **options)
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts_per_tok": chosen}))
    task = token_ids(64, 9, 12)
    general = task[:1, :1].expand(4, 5)  # one token reaches few experts
    sweep = fitted(base, adapter, general, task)
    targets_of = {t.tensor: t for t in sweep.plan.targets if "experts" in t.tensor}
    as_is = {tensor: factors_of(sweep.plan, target).R for tensor, target in targets_of.items()}
    plain = loaded(cls, base, torch.float64)
    imitated = (
        experts_inputs(plain, general),
        experts_inputs(merged(cls, base, sweep.plan, {}, tmp_path / "a"), task),
    )
    every = [imitated]
    tokens = [sum(ids.numel() for ids in halves(text)) for text in (general, task)]
    for k, mu in enumerate(WEIGHTS):
        rights = {tensor: own[k] for tensor, own in sweep.rights.items()}
        model = merged(cls, base, sweep.plan, rights, tmp_path / str(k))
        every.append((experts_inputs(model, general), experts_inputs(model, task)))
        for tensor in targets_of.keys() & rights.keys():
            v, y = (text[tensor].numpy() for text in every[-1])
            C = y.T @ y / tokens[1]
            G = v.T @ v / tokens[0]
            R = as_is[tensor].double().numpy()
            n = y.shape[1]
            kept, lost = (
                own + share * np.trace(own) / n * np.eye(n)
                for own, share in ((C, RIDGE), (G, GENERAL_RIDGE))
            )
            wanted = np.linalg.solve(kept + mu * lost, kept @ R)
            assert relative(rights[tensor], wanted) <= 1e-4, (tensor, mu)
    reached = {
        tensor for tensor in targets_of if all(tensor in text for pair in every for text in pair)
    }
    assert targets_of.keys() & sweep.rights.keys() == reached
    assert set() < reached
    assert (reached < targets_of.keys()) == (chosen < 4)
    sizes = [[len(of_task[tensor]) for tensor in sorted(reached)] for _, of_task in every]
    assert sizes[0] != sizes[1] or sizes[0] != sizes[2] or chosen == 4, (
        "candidates route otherwise than the adapter"
    )


def test_a_router_that_casts_its_weight_is_fitted(tmp_path: Path) -> None:
    options = {"target_parameters": ["gate.weight"], "lora_alpha": 4}
    cls, base, adapter = make_pair("deepseek-v3", tmp_path, ["q_b_proj"], **options)
    general, task = token_ids(64, 12).split(6)
    sweep = fitted(base, adapter, general, task)
    (target,) = (target for target in sweep.plan.targets if target.tensor.endswith("gate.weight"))
    name = target.tensor.removesuffix(".weight")
    delta = factors_of(sweep.plan, target)

    def inputs(model: Any, ids: Tensor) -> np.ndarray:
        return given(model, {name: model.get_submodule(name)}, ids)[name]

    plain = loaded(cls, base, torch.float64)
    router = SimpleNamespace(base_layer=plain.get_submodule(name), scaling={"default": 1.0})
    x = inputs(merged(cls, base, sweep.plan, {}, tmp_path / "a"), task)
    u = inputs(plain, general)
    for k, mu in enumerate(WEIGHTS):
        rights = {tensor: own[k] for tensor, own in sweep.rights.items()}
        model = merged(cls, base, sweep.plan, rights, tmp_path / str(k))
        y = inputs(model, task)
        v = inputs(model, general)
        wanted = solution(router, (delta.R.T, delta.L), mu, x, y, u, v)
        assert relative(rights[target.tensor].T, wanted) <= 1e-4, mu


def sums(sweep: Sweep, ids: Tensor, variants: Sequence[int], fits: bool) -> SequenceSums:
    """Sums of some variants, which ride beside groups of the fit, or alone."""
    text = sequences(ids)
    part = Batch(
        "text", (*range(len(ids)),), text, tuple(Group(text.padded_ids, v) for v in variants)
    )
    if fits:
        sweep.run(part.groups)
    else:
        sweep.model.run(part.groups, nothing)
    return batch_sums(sweep.model, [part], 25, nothing)[0]


def assert_same(one: SequenceSums, other: SequenceSums) -> None:
    for measure in ("loss", "kl", "agree", "right"):
        assert np.array_equal(getattr(one, measure), getattr(other, measure)), measure


BESIDE = {
    "llama": [*LINEAR, "lm_head", "embed_tokens"],
    "gpt2": ["c_attn", "wte"],
    "qwen3-moe": ["q_proj"],
    "gemma3n": ["q_proj", "down_proj"],
}
ALL = marked(name for name in CAUSAL if name not in TOWERS)


@pytest.mark.parametrize("spools", [False, True])
@pytest.mark.parametrize("name", marked(BESIDE))
def test_riders_do_not_depend_on_what_else_runs(name: str, spools: bool, tmp_path: Path) -> None:
    """Bit for bit; candidates have the factors that the sweep has just fitted."""
    _, base, adapter = make_pair(name, tmp_path, BESIDE[name], lora_alpha=4)
    general, task, other = token_ids(64, 18).split(6)
    sweep = make_sweep(base, adapter, general, task)
    *candidates, shrink = range(2, 3 + len(WEIGHTS))
    before = sums(sweep, other, (0, 1, shrink), False)
    sweep.model.limit(0, spools)
    beside = sums(sweep, other, (0, 1, *candidates, shrink), True)
    assert_same(before, beside.take((0, 1, len(candidates) + 2)))
    sweep.model.limit(ROOM, False)
    assert_same(beside, sums(sweep, other, (0, 1, *candidates, shrink), False))
    assert len({*beside.loss.sum(1).tolist()}) == len(beside.loss), "variants differ"


@pytest.mark.parametrize("name", marked(CAUSAL))
def test_states_that_lie_in_a_spool_come_back(name: str, tmp_path: Path) -> None:
    """Bit for bit, also of one sequence, whose shape is a mask's or an embedding's of positions."""
    _, base, adapter = make_pair(name, tmp_path, CAUSAL[name][2], lora_alpha=4)
    sweep = make_sweep(base, adapter, *token_ids(64, 12).split(6))
    for ids in (token_ids(64), token_ids(64)[:1]):
        sweep.model.limit(0, False)
        before = sums(sweep, ids, (0, 1, 4), False)
        sweep.model.limit(0, True)
        assert_same(before, sums(sweep, ids, (0, 1, 4), False))


def suspended() -> list[Any]:
    """Greenlets that wait to be resumed."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one) is greenlet.greenlet]
    return [one for one in found if one and not one.dead and one is not greenlet.getcurrent()]


@pytest.mark.parametrize(
    "where", [0.0, 0.3, 0.55, 0.9, 0.999, "in the model's code", "in a solution"]
)
def test_a_stopped_sweep_leaves_nothing_behind(
    where: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model runs again, with the same results. Numbers are shares of the sweep."""
    _, base, adapter = make_pair("llama", tmp_path, LINEAR, lora_alpha=4)
    general, task, other = token_ids(64, 18).split(6)
    sweep = make_sweep(base, adapter, general, task)
    calls = 0
    forward = LlamaMLP.forward
    refit = FactorSolver._refit

    def count(error: Exception, last: float) -> None:
        nonlocal calls
        calls += 1
        if calls >= last:
            raise error

    def run(error: Exception, last: float) -> None:
        nonlocal calls
        calls = 0
        sweep.solver.places.clear()
        sweep.run([Group(other, 1)], lambda: count(error, last))

    def stop_at_gates(self: Any, target: Target, *args: Any) -> Any:
        if "gate_proj" in target.tensor:
            raise Interrupted(2)
        return refit(self, target, *args)

    expected = sums(sweep, other, (0, 1), False)
    run(Interrupted(2), torch.inf)
    rights = sweep.rights
    total = calls
    if isinstance(where, float):
        with pytest.raises(Interrupted):
            run(Interrupted(2), 1 + int(where * total))
    else:
        with monkeypatch.context() as patched:
            if where == "in a solution":
                patched.setattr(
                    LlamaMLP, "forward", torch.no_grad()(forward)
                )  # groups wait within it
                patched.setattr(FactorSolver, "_refit", stop_at_gates)
                error = Interrupted
                message = "stopped"
            else:
                patched.setattr(
                    LlamaMLP,
                    "forward",
                    lambda self, x: (count(KeyError("none"), total // 2), forward(self, x))[1],
                )
                error = UnsupportedError
                message = r"module 'model.layers.\d.mlp' of LlamaForCausalLM raises KeyError"
            with pytest.raises(error, match=message):
                run(KeyError(), torch.inf)
    assert torch.is_grad_enabled()
    assert not suspended()
    assert_same(expected, sums(sweep, other, (0, 1), False))
    run(Interrupted(2), torch.inf)
    assert all(
        torch.equal(*pair)
        for name, own in rights.items()
        for pair in zip(own, sweep.rights[name], strict=True)
    )


@pytest.mark.parametrize("spools", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_a_killed_sweep_resumes_between_two_layers(
    name: str, spools: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same bits. In Gemma 3n and 4, later layers read what earlier ones leave in a container: it starts again."""
    monkeypatch.setattr("streamer.streaming.resume.SECONDS", 0)
    _, base, adapter = make_pair(name, tmp_path, BESIDE.get(name, CAUSAL[name][2]), lora_alpha=4)
    general, task, other = token_ids(64, 18).split(6)
    rights = []
    results = []
    runs = list[list[str]]()
    for sweeps in (["whole"], ["killed", "killed"]):
        for sweep in sweeps:
            own = make_sweep(base, adapter, general, task)
            riders = [Group(other, 1)]
            done = list[str]()
            own.model.limit(ROOM, spools)

            layers = own.model.layers
            solver = own.solver
            last = layers[-1] if sweep == "killed" and len(runs) == 1 else ""

            def after(layer: str, done: list[str] = done, last: str = last) -> None:
                done.append(layer)
                if layer == last:
                    raise Interrupted(9)

            states = States(tmp_path / f"{sweep}.states", sweep, solver.factors, solver.restore)
            with contextlib.suppress(Interrupted):
                own.model.run(
                    [*own.groups, *riders], nothing, solver, TargetWatch(own.plan), after, states
                )
            runs.append(done)
        rights.append(own.rights)
        (part,) = own.model.logits([riders], own.model.vocabulary, nothing)
        results.append(part[3])
    assert torch.equal(*results)
    assert rights[0].keys() == rights[1].keys()
    for tensor, right in rights[0].items():
        assert all(map(torch.equal, right, rights[1][tensor]))
    again = name in ("gemma3n", "gemma4")
    assert runs[2] == (runs[0] if again else runs[0][len(layers) - 1 :])


def test_a_module_that_runs_more_than_once_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        gates: Tensor = self.act_fn(self.gate_proj(x)) + self.act_fn(self.gate_proj(-x))
        return self.down_proj(gates * self.up_proj(x))  # type: ignore[no-any-return]  # of a module

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    _, base, adapter = make_pair("llama", tmp_path, LINEAR, lora_alpha=4)
    with pytest.raises(
        UnsupportedError,
        match=r"^'model.layers.0.mlp.gate_proj.weight': its module runs in several layers",
    ):
        make_sweep(base, adapter, *token_ids(64, 12).split(6)).run()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_state_of_nan_is_refused_with_the_matrix(value: float, tmp_path: Path) -> None:
    _, base, adapter = make_pair("llama", tmp_path, LINEAR, lora_alpha=4)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][3] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NumericError,
        match=r"the inputs of 'model.layers.1.mlp.gate_proj.weight' are NaN or Inf on the texts",
    ):
        make_sweep(base, adapter, *token_ids(64, 12).split(6)).run()


def test_a_weight_that_is_not_a_factor_of_a_product_is_refused_after_its_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a convolution's."""

    def forward(self: Any, x: Tensor) -> Tensor:
        up = x @ (self.up_proj.weight * 2).T
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)  # type: ignore[no-any-return]  # of a module

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    _, base, adapter = make_pair("llama", tmp_path, ["q_proj", "up_proj"])
    np.save(tmp_path / "g.npy", token_ids(60, 12))
    options = {"general": tmp_path / "g.npy", "sequences": 12, "length": 12}
    events = list[Event]()
    refusal = r"the weight 'model.layers.0.mlp.up_proj.weight' is not used by a matrix product"
    with pytest.raises(UnsupportedError, match=refusal) as e:
        streamer.repair_adapter(base, adapter, tmp_path / "out", **options, on_event=events.append)
    assert len(str(e.value).replace(str(tmp_path), "")) <= 300
    layers = [event.name for event in events if event.stage == "fit"]
    assert layers[-2:] == ["embeddings", "model.layers.0"]
    assert layers.count("embeddings") == 2, "what was learned is measured before"
