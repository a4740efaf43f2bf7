"""Compare the decisions of a case with a float64 SVD: every matrix that is adapted, an expert at a time, its output side."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from matrix_inputs import Made, names_of
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

CLEAR = 1e-3
"""Similarities nearer to ε than this are not judged."""

STACKED = re.compile(r"(.*)\[(\d+)\]")

INPUTS_FIRST = {
    "InklingSharedExperts": False, "JetMoeParallelExperts": False, "Llama4TextExperts": True,
    "LongcatFlashExperts": False,
}  # fmt: skip
"""Whether an expert is stored (in, out), of classes that do not say `is_transposed`: as their forward multiplies."""


def adapted(made: Made) -> set[str] | None:
    """List the names of the findings that PEFT's model, not merged yet, must have; None of a tuned model, see `_changed`."""
    if not hasattr(made.model, "get_base_model"):
        return None
    names: set[str] = set()
    for path, module in made.model.get_base_model().named_modules():
        layer = path.replace(".base_layer", "")
        if isinstance(module, ParamWrapper):
            parameter = module.get_param()
            name = f"{layer}.{module.parameter_name}"
            stack = {f"{name}[{e}]" for e in range(len(parameter))}
            names |= stack if parameter.ndim == 3 else {name.removesuffix(".weight")}
        elif isinstance(module, LoraLayer):
            names.add(layer)
    return names


def decisions(
    made: Made, findings: Any, before: dict[str, Tensor], after: dict[str, Tensor], expected: set[str] | None
) -> tuple[int, int, list[str]]:
    """Compare decisions with the tensors before and after: matrices, directions, what is wrong.

    A finding whose tensors or whose output side are not known is wrong, and so is a matrix without a finding.
    """
    model = made.model.get_base_model() if hasattr(made.model, "get_base_model") else made.model
    sides = Sides(model, before)
    if expected is None:  # findings of a tuned model have its names on disk
        saved = names_of(made.adapter)  # of tied tensors one
        before, after = (
            {n: t for n, t in revert_weight_conversion(model, dict(state)).items() if n in saved}
            for state in (before, after)
        )
        expected = _changed(sides, before, after)
    matrices = directions = 0
    wrong: list[str] = []
    for m in findings:
        stack = STACKED.fullmatch(m.module)
        key = stack[1] if stack else f"{m.module}.weight" if f"{m.module}.weight" in before else m.module
        if key not in before or key not in after or before[key].shape != after[key].shape:
            wrong.append(f"decisions {m.module}: compared with nothing")
            continue
        W0, W = ((t[key][int(stack[2])] if stack else t[key]).flatten(1).double() for t in (before, after))
        transposed = sides.transposed(
            stack[1] if stack else m.module, before[key][int(stack[2])] if stack else before[key]
        )
        if transposed is None:
            wrong.append(f"decisions {m.module}: of which the output side is not known")
            continue
        if transposed:
            W0, W = W0.T, W.T
        if tuple(W0.shape) != m.shape:
            wrong.append(f"decisions {m.module}: shape {m.shape} for {tuple(W0.shape)}")
            continue
        k = len(m.detection.singular_values)
        clear, intruders = judged(W0.numpy(), W.numpy(), k)
        matrices, directions = matrices + 1, directions + len(clear)
        if [j for j in m.detection.intruders if j in clear] != intruders:
            wrong.append(f"decisions {m.module}: {m.detection.intruders} for {intruders}")
    if lacking := expected - {m.module for m in findings}:
        wrong.append(f"decisions: none of {sorted(lacking)[:3]} ({len(lacking)})")
    return matrices, directions, wrong


def judged(W0: np.ndarray, W: np.ndarray, k: int) -> tuple[list[int], list[int]]:
    """Find the directions among the leading `k` that are clearly decided, and the intruders of these."""
    U0 = np.linalg.svd(W0, full_matrices=False)[0]
    U, S, _ = np.linalg.svd(W, full_matrices=False)
    similarity = np.abs(U0.T @ U[:, :k]).max(0)
    clear = [j for j in range(k) if abs(similarity[j] - 0.5) > CLEAR and _alone(S, j)]
    return clear, [j for j in clear if similarity[j] < 0.5]


def _alone(S: np.ndarray, j: int) -> bool:
    """Say whether a singular value is apart from its neighbours, so that its vector is one."""
    return bool(np.abs(np.delete(S, j) - S[j]).min(initial=np.inf) > 1e-4 * S[0])


def _changed(sides: Sides, before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """List the names of the findings of a tuned model: its weights that changed, and each expert of its stacks."""
    names: set[str] = set()
    for key, W0 in before.items():
        if W0.is_floating_point() and W0.ndim > 1 and key in after and not W0.equal(after[key]):
            if W0.ndim == 3 and sides.is_stack(W0):
                names |= {f"{key}[{e}]" for e in range(len(W0))}
            elif key.endswith(".weight"):
                names.add(key.removesuffix(".weight"))
    return names


class Sides:
    """Know the output sides of a model's matrices, by what its modules are.

    On disk a matrix may have another name, be turned, and a part of what it is in the model (``experts.0.w1.weight`` is rows of
    ``experts.gate_up_proj[0]``): then it is the one whose rows, an output each, it has. They are random, so that no others are equal.
    """

    def __init__(self, model: nn.Module, before: dict[str, Tensor]) -> None:
        self.modules = dict(model.named_modules())
        self.before = before

    @cached_property
    def rows(self) -> dict[bytes, tuple[int, bool]]:
        """An output's values → the place of its matrix, embeddings before heads that are tied to them; whether it is an expert's."""
        rows: dict[bytes, tuple[int, bool]] = {}
        for place, (W, stacked, _) in enumerate(sorted(self._matrices(), key=lambda m: not m[2])):
            for row in W.flatten(1).contiguous().numpy():
                if row.any():
                    rows.setdefault(row.tobytes(), (place, stacked))
        return rows

    def _matrices(self) -> Iterator[tuple[Tensor, bool, bool]]:
        """Every matrix, (out, in); whether it is an expert's; whether it is an embedding's."""
        for path, module in self.modules.items():
            for name, _ in module.named_parameters(recurse=False):
                W = self.before.get(f"{path}.{name}")
                if W is None or W.ndim < 2 or not W.is_floating_point():
                    continue
                turned = self._of_module(path)
                if W.ndim == 3 and _inputs_first(module) is not None:
                    yield from ((expert.T if turned else expert, True, False) for expert in W)
                elif name == "weight":
                    yield (W.T if turned else W), False, isinstance(module, nn.Embedding)

    def _of_module(self, path: str) -> bool:
        module = self.modules[path]
        return bool(_inputs_first(module)) or isinstance(module, Conv1D | nn.Embedding)

    def is_stack(self, stack: Tensor) -> bool:
        """Say whether a tensor on disk is a stack of experts."""
        return any(stacked for W in (stack[0], stack[0].T) for _, stacked in self._places(W))

    def transposed(self, path: str, W: Tensor) -> bool | None:
        """Say whether a matrix is stored (in, out); None where that is not known."""
        for owner in (path, path.rpartition(".")[0]):
            if owner in self.modules and (owner == path or _inputs_first(self.modules[owner]) is not None):
                return self._of_module(owner)
        ways = {turned: self._places(matrix) for turned, matrix in ((False, W), (True, W.T if W.ndim == 2 else W[:0]))}
        found = [(place, turned) for turned, places in ways.items() for place, _ in places]
        return min(found)[1] if found else None

    def _places(self, W: Tensor) -> set[tuple[int, bool]]:
        rows = W.flatten(1).contiguous().numpy()
        return {self.rows[key] for row in rows if (key := row.tobytes()) in self.rows}


def _inputs_first(module: nn.Module) -> bool | None:
    """Say whether a module's experts are stored (in, out); None of a module that has none."""
    return getattr(module, "is_transposed", INPUTS_FIRST.get(type(module).__name__))
