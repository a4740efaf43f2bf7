"""Judge a case of the matrix: merge and detect as PEFT, transformers and a float64 SVD say."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo
from matrix_cases import Case
from matrix_decisions import adapted, decisions
from matrix_inputs import Made, NotMade, base_model, load, made_by, make, names_of, names_of_one
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

import streamer
from streamer.errors import StreamerError

RIGHT, REFUSED, WRONG, NOT_MADE = "right", "refused", "wrong", "not made"


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
    wrong += outer_tensors(case, made, out)
    notes: list[str] = []
    expected, why = answer(made)
    matrices_of, tied = adapted(made), tied_truth(made)
    theirs, unmerged = merged_state(case, made)
    if expected is None:
        notes.append(f"no logits: {why}")
    else:
        wrong += logits(case, made, ours, expected, _is_truth(theirs, tied), notes)
    matrices = directions = 0
    if theirs is None:
        notes.append(f"PEFT cannot merge: {unmerged}")
    else:
        wrong += tensors(ours.state_dict(), theirs | tied, made.idle - tied.keys() if tied else set())
        wrong += names_on_disk(made, out, outer | (names_of_ties(made) if tied else set()), notes)
        matrices, directions, differ = decisions(made, findings, made.before, theirs | tied, matrices_of)
        wrong += differ
    said = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
    return Result(WRONG if wrong else RIGHT, said or "; ".join(notes), matrices, directions)


def answer(made: Made) -> tuple[Tensor | None, str]:
    """Ask PEFT's model; None and why where it does not answer."""
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
    if made.plain is not None and made.plain.shape == expected.shape and close(expected, made.plain, 1e-6):
        # It uses the head's weight from outside of the layer that PEFT wraps (MobileBERT).
        notes.append(f"PEFT's model answers as the base does; {off}")
        return []
    if any(close(answered, other, 1e-3) for other in other_answers(case, made, merge_holds)):
        notes.append(f"PEFT answers in two ways; {off}")
        return []
    return [off]


def other_answers(case: Case, made: Made, merge_holds: bool) -> Iterator[Tensor]:
    """Ask PEFT's model once it has merged, where it merges what it should, and once it has loaded the adapter that it saved.

    Until then a head that is tied to trained tokens lacks its bias, an embedding of a class of its own what that adds, and a layer whose
    weight is used from outside its delta (PEFT 0.21).
    """
    if case.kind == "tuned":
        return
    if merge_holds or case.kind == "tokens":
        yield zoo.answer(made.model, made.inputs)
    with (
        contextlib.suppress(NotMade),
        made_by("PEFT, loading of the adapter"),
    ):  # what it cannot load it does not answer
        model, _ = load(made.cls, made.base)
        if case.kind == "grown":
            model.resize_token_embeddings(zoo.VOCABULARY + 6, mean_resizing=False)
        yield zoo.answer(PeftModel.from_pretrained(model, made.adapter), made.inputs)


def tied_truth(made: Made) -> dict[str, Tensor]:
    """Take each name of a trained parameter from PEFT's model before it merges, which adds to all what belongs to one.

    Of a tuned model there is nothing to tell apart.
    """
    if not hasattr(made.model, "get_base_model"):
        return {}
    model = made.model.get_base_model()
    truth: dict[str, Tensor] = {}
    for names in made.shared:
        found = {name: adapted_parameter(model, name) for name in names}
        if any(trained for trained, _ in found.values()):
            truth |= {name: value for name, (trained, value) in found.items() if trained or name not in made.idle}
    return truth


def adapted_parameter(model: nn.Module, name: str) -> tuple[bool, Tensor]:
    """Say whether PEFT trains a parameter, and take its value with its own adapter alone."""
    *path, leaf = name.split(".")
    module = model
    for step in path:
        module = getattr(_within(module), step)
    if isinstance(module, LoraLayer) and leaf == "weight":
        alone = copy.deepcopy(module)  # untied
        alone.merge(adapter_names=["default"])
        return True, alone.get_base_layer().weight.detach()
    if isinstance(module, TrainableTokensWrapper) and leaf == "weight":
        return True, module.token_adapter.get_merged_weights(["default"]).detach().clone()
    parameter = getattr(_within(module), leaf)
    return parameter.requires_grad, parameter.detach().clone()


def _within(module: nn.Module) -> nn.Module:
    """Return the module that a wrapper of PEFT's stands for."""
    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save["default"]
    if isinstance(module, TrainableTokensWrapper):
        return module.original_module
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def merged_state(case: Case, made: Made) -> tuple[dict[str, Tensor] | None, str]:
    """Return the tensors of PEFT's merged model; None and why where it cannot merge."""
    if case.kind != "tuned":
        try:
            with made_by("PEFT, merge"):
                made.model = made.model.merge_and_unload()
        except NotMade as error:
            return None, str(error)
    return dict(made.model.state_dict()), ""


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
    """Say whether all values agree, relative to the largest of them where that is above 1."""
    if not b.numel():
        return a.shape == b.shape
    scale = max(1.0, float(b.abs().max()))
    return bool(torch.isfinite(a).all()) and float((a - b).abs().max()) <= tolerance * scale


def outer_names(case: Case) -> set[str]:
    """List the names of a head that the adapted model is within: it is written where its tie is undone, and not loaded."""
    if case.layout != "headed":
        return set()
    model = base_model(case, 0)
    head = {n for n in model.state_dict() if not n.startswith(f"{model.base_model_prefix}.")}
    return head | {f"language_model.{n}" for n in head}  # as vision-language models have it on disk


def outer_tensors(case: Case, made: Made, out: Path) -> list[str]:
    """Compare the head that the adapted model is within with the base's, both as the class with a head loads them.

    A head that is tied to the embedding of a tuned model follows that, as the config goes on to say; one of a vocabulary that has grown
    has the base's rows.
    """
    if case.layout != "headed":
        return []
    cls = getattr(transformers, case.cls)
    ours, theirs = (load(cls, directory)[0] for directory in (out, made.base))
    within = f"{theirs.base_model_prefix}."
    tied = {n for names in names_of_one(theirs) for n in names} if case.kind == "tuned" else set()
    heads = [
        {n: t for n, t in m.state_dict().items() if not n.startswith(within) and n not in tied} for m in (ours, theirs)
    ]
    if case.kind == "grown":
        heads[0] = {n: t[: len(heads[1][n])] if n in heads[1] else t for n, t in heads[0].items()}
    return tensors(*heads, set())


def names_of_ties(made: Made) -> set[str]:
    """List the names on disk of parameters that have several: an undone tie brings all of them, as one flag of a config states all.

    A model knows the renames of what it was loaded from alone: that of a head which the base does not have is its class's.
    """
    state = {n: t for n, t in made.model.state_dict().items() if any(n in names for names in made.shared)}
    loaded = made.model._weight_conversions
    names = set(revert_weight_conversion(made.model, dict(state)))
    made.model._weight_conversions = None  # those of the class
    names |= set(revert_weight_conversion(made.model, dict(state)))
    made.model._weight_conversions = loaded
    return names | {name.removeprefix(f"{made.model.base_model_prefix}.") for name in names}  # as a bare base has them


def zeros(directory: Path) -> set[str]:
    """List the tensors on disk that are zero: loading does without such a bias of the logits."""
    found: set[str] = set()
    for path in directory.glob("*.safetensors"):
        found |= {name for name, tensor in load_file(path).items() if not tensor.any()}
    return found


def names_on_disk(made: Made, out: Path, may_be: set[str], notes: list[str]) -> list[str]:
    """Compare the names on disk with those that transformers saves, and with the base's; `may_be` are in either."""
    try:
        with made_by("transformers, saving"):  # of a vocabulary that has grown, it may refuse its own config (Canary)
            made.model.save_pretrained(out.parent / "theirs")
    except NotMade as error:
        notes.append(f"names on disk: {error}")
        return []
    theirs, ours, base = (names_of(d) for d in (out.parent / "theirs", out, made.base))
    extra, lost = ours - theirs - base - may_be, (theirs & base) - ours - zeros(made.base)
    return [f"on disk: {what} {sorted(names)[:3]}" for what, names in (("extra", extra), ("lost", lost)) if names]
