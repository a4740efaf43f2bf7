"""Gradients of the whole model in transformers with the same coefficients: the oracle of the streamed ones."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluated import loaded, sequences
from peft import PeftModel
from seeds import vary
from torch.func import functional_call

from streamer.methods.coefficient_set import directions
from streamer.plan.plan import make_plan
from streamer.streaming.gradients import GradientModel, TextGradient

OBJECTIVES = "base", "adapter", "labels"


def coefficients_of(model: GradientModel, seed: int = 0) -> dict[str, np.ndarray]:
    """Random ones, of each direction."""
    generator = np.random.default_rng(vary(seed))
    targets = model.job.plan.targets
    return {t.tensor: generator.uniform(0.2, 0.9, len(directions(model.job.plan.delta(t)))) for t in targets}


def adapted_values(cls: Any, base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Parameters of the adapted model that differ from the base's, by PEFT in float64, each tied one by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(loaded(cls, base, torch.float64), adapter)
    before = dict(loaded(cls, base, torch.float64).named_parameters(remove_duplicate=False))
    changed = {}
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight") and not getattr(module, "use_dora", {}).get("default"):
            own = getattr(module, "parameter_name", "weight")
            name = re.sub(r"\.base_layer\b", "", path) + "." + own
            changed[name] = before[name] + module.get_delta_weight("default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload().named_parameters(remove_duplicate=False)
    others = {n: p for n, p in merged if n not in changed and not torch.equal(p, before[n])}
    tied = {id(before[name]) for name in changed}
    return {
        n: p.detach() for n, p in {**changed, **{n: p for n, p in others.items() if id(before[n]) not in tied}}.items()
    }


def parameter_of(tensor: str, parameters: Mapping[str, torch.Tensor]) -> str:
    """Name of a parameter of the loaded model, whose names may begin otherwise than those on disk."""
    if tensor in parameters:
        return tensor
    tail = RENAMED.get(tensor) or ".layers." + tensor.partition(".layers.")[2]
    (found,) = (
        name
        for name in parameters
        if name.endswith(tail) and ("language_model" in name) >= ("language_model" in tensor)
    )
    return found


RENAMED = {"embed_out.weight": "lm_head.weight"}


def with_coefficients(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], coefficients: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Parameters with ``W + U diag(c) Uᵀ Δ``, from the whole matrices."""
    values = dict(after)
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, c in coefficients.items():
        found = re.fullmatch(r"(.*)\[(\d+)\]", name)
        parameter, index = (found[1], int(found[2])) if found else (parameter_of(name, before), None)
        delta = (after[parameter] - before[parameter]).detach()
        delta = delta if index is None else delta[index]
        flat = delta.flatten(1)
        if len(c) == 1 and torch.linalg.matrix_rank(flat, rtol=1e-8) > 1:
            change = c * delta
        else:
            U, S, Vh = torch.linalg.svd(flat, full_matrices=False)
            p = len(c)
            change = ((U[:, :p] * (c * S[:p])) @ Vh[:p]).view(delta.shape)
        if index is None:
            values[parameter] = before[parameter] + change
        else:
            experts.setdefault(parameter, {})[index] = before[parameter][index] + change
    for parameter, by_index in experts.items():
        values[parameter] = torch.stack([by_index[e] for e in range(len(by_index))])
    for name in after.keys() - coefficients.keys():  # one module on both of two that are tied
        twin = next((n for n in coefficients if before.get(n) is before[name]), None)
        if twin is not None and torch.equal(after[name], after[twin]):
            values[name] = values[twin]
    return values


def oracle(
    cls: Any, base: Path, adapter: Path, ids: torch.Tensor, coefficients: Mapping[str, np.ndarray]
) -> dict[str, tuple[float, dict[str, np.ndarray]]]:
    """Value and gradient of each objective."""
    model = loaded(cls, base, torch.float64)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    once = {id(p): p.detach() for p in parameters.values()}  # tied ones stay one tensor
    before = {n: once[id(p)] for n, p in parameters.items()}
    after = adapted_values(cls, base, adapter)
    leaves = {n: torch.tensor(c, requires_grad=True) for n, c in coefficients.items()}

    def log_p(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        out = functional_call(
            model, {**before, **values}, (), {"input_ids": ids, "use_cache": False}, tie_weights=False
        )
        return out.logits.double().log_softmax(-1)[:, :-1]

    with torch.no_grad():
        references = {"base": log_p({}), "adapter": log_p(after)}
    results = {}
    own = log_p(with_coefficients(before, after, leaves))
    for objective in OBJECTIVES:
        if objective == "labels":
            value = -own.gather(-1, ids[:, 1:, None]).sum()
        else:
            value = (references[objective].exp() * (references[objective] - own)).sum()
        grads = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
        found = {
            n: np.zeros(len(c)) if g is None else g.numpy() for (n, c), g in zip(leaves.items(), grads, strict=True)
        }
        results[objective] = value.item(), found
    return results


def assert_gradients(cls: Any, base: Path, adapter: Path, ids: torch.Tensor, *, decoded: Path | None = None, tolerance: float = 1e-4,
                     **options: Any) -> None:  # fmt: skip
    """The streamed value and gradient of each objective are those of transformers and PEFT; of a quantized base, of the decoded one."""
    model = GradientModel(make_plan(base, adapter), block=25, **options)
    coefficients = coefficients_of(model)
    expected = oracle(cls, decoded or base, adapter, ids, coefficients)
    for objective in OBJECTIVES:
        assert_close(model.gradient(sequences(ids), coefficients, objective), *expected[objective], tolerance)


def assert_close(
    found: TextGradient, value: float, gradient: Mapping[str, np.ndarray], tolerance: float = 1e-4
) -> None:
    assert abs(found.value - value) <= tolerance * abs(value)
    largest = np.sqrt(sum(float(g @ g) for g in gradient.values()))
    assert largest > 1e-4
    for name, expected in gradient.items():
        off = np.linalg.norm(found.gradient[name] - expected) / max(np.linalg.norm(expected), 1e-2 * largest)
        assert off <= tolerance, (name, off, found.gradient[name], expected)
