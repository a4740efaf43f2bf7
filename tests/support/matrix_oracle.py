"""Judge a case of the matrix: merge and detect as PEFT, transformers and a float64 SVD say."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo
from matrix_cases import Case
from matrix_inputs import Made, NotMade, base_model, load, made_by, make
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import streamer
from streamer.errors import StreamerError

RIGHT, REFUSED, WRONG, NOT_MADE = "right", "refused", "wrong", "not made"

CLEAR = 1e-3
"""Similarities nearer to ε than this are not judged."""

STACKED = re.compile(r"(.*)\[(\d+)\]")


@dataclass
class Result:
    """What came of a case.

    Attributes
    ----------
    status
        ``right``, ``refused``, ``wrong`` or ``not made``.
    said
        The refusal, what is wrong, why it was not made, or what of a right one was not compared.
    matrices, directions
        How many decisions were compared.
    """

    status: str
    said: str = ""
    matrices: int = 0
    directions: int = 0


def judge(case: Case, home: Path, seed: int = 0) -> Result:
    """Make a case and compare what streamer does with what PEFT, transformers and numpy say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = make(case, home, seed)
        except NotMade as error:
            return Result(NOT_MADE, str(error))
        out = home / "out"
        try:
            findings = streamer.detect_intruder_dimensions(made.base, made.adapter)
            streamer.merge_with_reduced_intruder_dimensions(
                made.base, made.adapter, out, findings=findings, mitigation_lambda=1.0, model_card=False
            )
        except StreamerError as error:
            said = f"{type(error).__name__}: {str(error).replace(str(home), '')}"
            return Result(
                REFUSED if error.exit_code in (2, 3, 4) else WRONG, said
            )  # others say that streamer itself is wrong
        except Exception as error:
            return Result(WRONG, f"exception {type(error).__name__}: {_line(error)}")
        return compare(case, made, findings, out)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def compare(case: Case, made: Made, findings: Any, out: Path) -> Result:
    """Compare a merged directory and findings with the oracles."""
    try:
        ours, loading = load(made.cls, out)
    except Exception as error:
        return Result(WRONG, f"loading: {type(error).__name__}: {_line(error)}")
    outer = outer_names(case)
    wrong = [
        f"{key}: {sorted(new)[:4]}" for key, names in loading.items() if (new := names - made.loading[key] - outer)
    ]
    if case.layout == "headless" and loading["missing_keys"]:
        wrong.append(f"missing head: {sorted(loading['missing_keys'])}")
    notes: list[str] = []
    expected, why = answer(made)
    tied = tied_truth(case, made)
    theirs = merged_state(case, made)
    if theirs is None:
        notes.append("PEFT cannot merge")
    if expected is None:
        notes.append(f"no logits: {why}")
    else:
        wrong += logits(case, made, ours, expected, _is_truth(theirs, tied), notes)
    if theirs is not None:
        wrong += tensors(ours.state_dict(), theirs | tied, _touched(made) - tied.keys())
        if not _touched(made):
            wrong += names_on_disk(made, out, outer)
    matrices, directions, differ = decisions(made, findings, (theirs or {}) | tied)
    wrong += differ
    said = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
    return Result(WRONG if wrong else RIGHT, said or "; ".join(notes), matrices, directions)


def answer(made: Made) -> tuple[Tensor | None, str]:
    """What PEFT's model answers, or why it does not."""
    if made.plain is None:
        return None, made.unanswered
    try:
        with made_by("transformers, forward of the adapted model"):
            return zoo.answer(made.model, made.inputs), ""
    except NotMade as error:
        return None, str(error)


def logits(case: Case, made: Made, ours: nn.Module, expected: Tensor, merge_holds: bool, notes: list[str]) -> list[str]:
    """Compare the answer of the merged directory with that of PEFT's model."""
    try:
        answered = zoo.answer(ours, made.inputs)
    except Exception as error:
        return [f"answer: {type(error).__name__}: {_line(error)}"]
    if answered.shape != expected.shape:
        return [f"logits: shape {tuple(answered.shape)} for {tuple(expected.shape)}"]
    if close(answered, expected, 1e-3):
        return []
    off = f"logits: off by {float((answered - expected).abs().max()):.2g}"
    if any(close(answered, other, 1e-3) for other in other_answers(case, made, merge_holds)):
        notes.append(f"PEFT answers in two ways; {off}")
        return []
    return [off]


def other_answers(case: Case, made: Made, merge_holds: bool) -> Iterator[Tensor]:
    """What PEFT answers once it has merged, where it merges what it should, and once it has loaded the adapter that it saved.

    Until then a head that is tied to trained tokens lacks its bias, an embedding of a class of its own what that adds, and a layer whose
    weight is used from outside its delta (PEFT 0.21).
    """
    if case.kind == "tuned":
        return
    if merge_holds or case.kind == "tokens":
        yield zoo.answer(made.model, made.inputs)
    with contextlib.suppress(Exception):  # what it cannot load it does not answer
        model, _ = load(made.cls, made.base)
        if case.kind == "grown":
            model.resize_token_embeddings(zoo.VOCABULARY + 6, mean_resizing=False)
        yield zoo.answer(PeftModel.from_pretrained(model, made.adapter), made.inputs)


def _touched(made: Made) -> set[str]:
    return {name for names in made.shared for name in names}


def tied_truth(case: Case, made: Made) -> dict[str, Tensor]:
    """What each of the names of one parameter is in PEFT's model before it merges, which adds to both what belongs to one."""
    if case.kind == "tuned":
        return {}
    modules = dict(made.model.base_model.model.named_modules())
    truth: dict[str, Tensor] = {}
    for name in _touched(made):
        module = modules.get(name.removesuffix(".weight"))
        if isinstance(module, LoraLayer):
            if not any(module.use_dora.values()):
                truth[name] = module.get_base_layer().weight.detach() + module.get_delta_weight("default").detach()
        elif isinstance(module, ModulesToSaveWrapper):
            truth[name] = module.modules_to_save["default"].weight.detach().clone()
        elif isinstance(module, TrainableTokensWrapper):
            truth[name] = module.token_adapter.get_merged_weights(["default"]).detach().clone()
        elif module is not None and hasattr(module, "weight"):
            truth[name] = module.weight.detach().clone()
    return truth


def merged_state(case: Case, made: Made) -> dict[str, Tensor] | None:
    """The tensors of PEFT's merged model; None where it cannot merge."""
    if case.kind != "tuned":
        try:
            made.model = made.model.merge_and_unload()
        except Exception:
            return None
    return dict(made.model.state_dict())


def _is_truth(merged: dict[str, Tensor] | None, tied: dict[str, Tensor]) -> bool:
    return merged is not None and all(merged[n].shape == t.shape and close(merged[n], t, 1e-5) for n, t in tied.items())


def tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor], left_out: set[str]) -> list[str]:
    """Compare all tensors, by their names in the loaded model."""
    wrong = []
    for key in sorted((theirs.keys() | ours.keys()) - left_out):
        if key not in theirs or key not in ours:
            wrong.append(f"tensor {key}: only in {'ours' if key in ours else 'theirs'}")
        elif theirs[key].shape != ours[key].shape:
            wrong.append(f"tensor {key}: shape {tuple(ours[key].shape)} for {tuple(theirs[key].shape)}")
        elif theirs[key].is_floating_point() and not close(ours[key], theirs[key], 1e-5):
            wrong.append(f"tensor {key}: off by {float((ours[key] - theirs[key]).abs().max()):.2g}")
    return wrong


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether all values agree, relative to the largest of them where that is above 1."""
    if not b.numel():
        return a.shape == b.shape
    scale = max(1.0, float(b.abs().max()))
    return bool(torch.isfinite(a).all()) and float((a - b).abs().max()) <= tolerance * scale


def outer_names(case: Case) -> set[str]:
    """The names of a head that the adapted model is within: it is written where its tie is undone, and not loaded."""
    if case.layout != "headed":
        return set()
    model = base_model(case, 0)
    head = {n for n in model.state_dict() if not n.startswith(f"{model.base_model_prefix}.")}
    return head | {f"language_model.{n}" for n in head}  # as vision-language models have it on disk


def names_on_disk(made: Made, out: Path, outer: set[str]) -> list[str]:
    """Compare the names on disk with those that transformers saves, and with the base's."""
    try:
        made.model.save_pretrained(out.parent / "theirs")
    except Exception:  # of a vocabulary that has grown, transformers may refuse its own config (Canary)
        return []
    theirs, ours, base = (names_of(d) for d in (out.parent / "theirs", out, made.base))
    extra, lost = ours - theirs - base - outer, (theirs & base) - ours
    return [f"on disk: {what} {sorted(names)[:3]}" for what, names in (("extra", extra), ("lost", lost)) if names]


def names_of(directory: Path) -> set[str]:
    names: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as f:
            names |= set(f.keys())
    return names


def decisions(made: Made, findings: Any, after: dict[str, Tensor]) -> tuple[int, int, list[str]]:
    """Compare decisions with a float64 SVD of the matrices, the output side of each: matrices, directions, what is wrong."""
    model = made.model.get_base_model() if hasattr(made.model, "get_base_model") else made.model
    modules = dict(model.named_modules())
    matrices = directions = 0
    wrong: list[str] = []
    for m in findings:
        stack = STACKED.fullmatch(m.module)
        key = stack[1] if stack else f"{m.module}.weight" if f"{m.module}.weight" in made.before else m.module
        if key not in made.before or key not in after or made.before[key].shape != after[key].shape:
            continue  # a tensor of another name, or a vocabulary that has grown
        W0, W = ((t[key][int(stack[2])] if stack else t[key]).flatten(1).double() for t in (made.before, after))
        module = modules.get(m.module)
        transposed = tuple(W0.shape) != m.shape if stack else isinstance(module, Conv1D | nn.Embedding)
        if transposed:
            W0, W = W0.T, W.T
        if tuple(W0.shape) != m.shape:
            wrong.append(f"decisions {m.module}: shape {m.shape} for {tuple(W0.shape)}")
            continue
        k = len(m.detection.singular_values)
        U0 = np.linalg.svd(W0.numpy(), full_matrices=False)[0]
        U, S, _ = np.linalg.svd(W.numpy(), full_matrices=False)
        similarity = np.abs(U0.T @ U[:, :k]).max(0)
        clear = [j for j in range(k) if abs(similarity[j] - 0.5) > CLEAR and _alone(S, j)]
        expected = [j for j in clear if similarity[j] < 0.5]
        matrices, directions = matrices + 1, directions + len(clear)
        if [j for j in m.detection.intruders if j in clear] != expected:
            wrong.append(f"decisions {m.module}: {m.detection.intruders} for {expected}")
    return matrices, directions, wrong


def _alone(S: np.ndarray, j: int) -> bool:
    """Whether a singular value is apart from its neighbours, so that its vector is one."""
    return bool(np.abs(np.delete(S, j) - S[j]).min(initial=np.inf) > 1e-4 * S[0])
