"""Judge a case of the matrix: merge and detect as PEFT, transformers and a float64 SVD say."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import zoo
from matrix_cases import Anatomy, Case, anatomy
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.pytorch_utils import Conv1D

import streamer
from streamer.errors import StreamerError

RIGHT, REFUSED, WRONG, NOT_MADE = "right", "refused", "wrong", "not made"
TIE = "tie_word_embeddings"
CLEAR = 1e-3
"""Similarities nearer to ε than this are not judged."""


class NotMade(Exception):
    """The case cannot be made by PEFT or transformers."""


@dataclass
class Result:
    """What came of a case.

    Attributes
    ----------
    status
        ``right``, ``refused``, ``wrong`` or ``not made``.
    said
        The refusal, what is wrong, or why it was not made.
    matrices, directions
        How many decisions were compared.
    """

    status: str
    said: str = ""
    matrices: int = 0
    directions: int = 0


@dataclass
class Made:
    """A base and an adapter on disk, and PEFT's model of them."""

    cls: type[PreTrainedModel]
    base: Path
    adapter: Path
    model: nn.Module
    before: dict[str, torch.Tensor]
    inputs: dict[str, Any]
    plain: torch.Tensor
    loading: dict[str, set[str]]
    shared: list[set[str]] = field(default_factory=list)


def configs_within(config: Any) -> list[Any]:
    inner = [value for value in vars(config).values() if isinstance(value, transformers.PreTrainedConfig)]
    return [config, *(c for value in inner for c in configs_within(value))]


def base_model(case: Case, seed: int) -> PreTrainedModel:
    """A random model under the stated tie, none of whose parameters is as it was initialised."""
    cls = getattr(transformers, case.cls)
    config = zoo.config_of(case.cls)
    if case.tied is not None:
        for c in configs_within(config):
            setattr(c, TIE, case.tied)
        config = type(config).from_dict(config.to_dict())  # as it is loaded: a class may not do what is stated
    torch.manual_seed(seed)
    model: PreTrainedModel = cls(config)
    g = torch.Generator().manual_seed(seed + 1)
    for p in model.parameters():
        if p.is_floating_point():
            p.data.add_(0.05 * torch.randn(p.shape, generator=g))
    return model


def save_base(case: Case, model: PreTrainedModel, directory: Path) -> type[PreTrainedModel]:
    """Write the base as the case lays it out; returns the class that is adapted."""
    size = {"max_shard_size": "30KB"} if case.shards else {}
    if case.layout in ("bare", "headless"):
        inner = model.base_model
        inner.save_pretrained(directory, **size)
        if case.layout == "bare":  # a model's config that has a head, and the names of the model within
            path = directory / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [case.cls]}))
        return type(model)
    if case.layout == "legacy":
        model._weight_conversions = [
            c for c in get_model_conversion_mapping(model, add_legacy=True) if not isinstance(c, PrefixChange)
        ]
    model.save_pretrained(directory, save_original_format=case.layout != "runtime", **size)
    if case.layout == "unnamed":
        path = directory / "config.json"
        config = json.loads(path.read_text())
        del config["architectures"]
        path.write_text(json.dumps(config))
    return type(model.base_model) if case.layout == "headed" else type(model)


def load(cls: type[PreTrainedModel], directory: Path) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    """A model, and what loading complains about."""
    torch.manual_seed(7)  # of a head that the base does not have
    model, info = cls.from_pretrained(directory, output_loading_info=True)
    return model.eval(), {
        key: {str(n) for n in info[key]} for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }


def options(case: Case, found: Anatomy) -> dict[str, Any]:
    """PEFT's options for a case."""
    values: dict[str, Any] = {"r": 3, "lora_alpha": 9}
    part = case.part
    saved = [p for p in (found.head or found.embedding,) if p]
    if case.kind in ("saved", "tokens") and part in ("embedding", "head"):
        saved = [getattr(found, part) or found.embedding or ""]
        part = "attention" if found.attention else "mlp" if found.mlp else "all-linear"
    values |= found.targets(part)
    if case.kind == "dora":
        values["use_dora"] = True
    elif case.kind == "saved":
        values["modules_to_save"] = saved
    elif case.kind == "biases":
        values["bias"] = "all"
    elif case.kind == "tokens":
        values["trainable_token_indices"] = {found.embedding: [3, 5]}
    return values


def train(case: Case, model: PreTrainedModel, directory: Path, seed: int) -> nn.Module:
    """An adapter with all that it trains changed, saved by PEFT; or the tuned model itself."""
    g = torch.Generator().manual_seed(seed + 2)
    found = anatomy(model)
    if case.kind == "tuned":
        paths = {"embedding": [found.embedding], "head": [found.head], "experts": found.experts}.get(case.part)
        for name, p in model.named_parameters():
            chosen = paths is None or any(path and name.startswith(path) for path in paths)
            if p.is_floating_point() and (chosen or p.ndim < 2):
                p.data.add_(0.05 * torch.randn(p.shape, generator=g))
        model.save_pretrained(directory)
        return model
    if case.kind == "grown":
        model.resize_token_embeddings(zoo.VOCABULARY + 6, mean_resizing=False)
    peft = get_peft_model(model, LoraConfig(**options(case, found)))
    for name, p in peft.named_parameters():
        if p.requires_grad:
            step = 0.3 if "lora_" in name else 0.1
            p.data.add_(step * torch.randn(p.shape, generator=g))  # in place: what PEFT ties stays one
    peft.save_pretrained(directory, save_embedding_layers=True if case.kind == "grown" else "auto")
    if case.flag:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": True}))
    return peft.eval()


def make(case: Case, home: Path, seed: int) -> Made:
    """The base and the adapter of a case.

    Raises
    ------
    NotMade
        With the message of who cannot.
    """
    with _made_by("transformers, base"):
        cls = save_base(case, base_model(case, seed), home / "base")
        model, loading = load(cls, home / "base")
    with _made_by("transformers, forward"):
        inputs = zoo.example(model)
        plain = zoo.answer(model, inputs)
        if not torch.isfinite(plain).all():
            raise ValueError("its answer is not finite")
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    shared = names_of_one(model)
    with _made_by("PEFT"):
        trained = train(case, model, home / "adapter", seed)
    return Made(cls, home / "base", home / "adapter", trained, before, inputs, plain, loading, shared)


@contextlib.contextmanager
def _made_by(whom: str) -> Any:
    try:
        yield
    except Exception as error:  # another library's, of any kind
        raise NotMade(f"{whom}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def names_of_one(model: nn.Module) -> list[set[str]]:
    """Sets of the names of each parameter that has several."""
    pointers: dict[int, set[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        pointers.setdefault(parameter.data_ptr(), set()).add(path)
    return [g for g in pointers.values() if len(g) > 1]


def judge(case: Case, home: Path, seed: int = 0) -> Result:
    """Make a case and compare what streamer does with what PEFT, transformers and numpy say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = make(case, home, seed)
            with _made_by("transformers, forward of the adapted model"):
                expected = zoo.answer(made.model, made.inputs)
        except NotMade as error:
            return Result(NOT_MADE, str(error))
        out = home / "out"
        try:
            findings = streamer.detect_intruder_dimensions(made.base, made.adapter)
            streamer.merge_with_reduced_intruder_dimensions(
                made.base, made.adapter, out, findings=findings, mitigation_lambda=1.0, model_card=False
            )
        except StreamerError as error:
            return Result(REFUSED, f"{type(error).__name__}: {str(error).replace(str(home), '')}")
        except Exception as error:
            return Result(WRONG, f"exception {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return compare(case, made, expected, findings, out)


def compare(case: Case, made: Made, expected: torch.Tensor, findings: Any, out: Path) -> Result:
    try:
        ours, loading = load(made.cls, out)
    except Exception as error:
        return Result(WRONG, f"loading: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    outer = outer_names(case)
    wrong = [
        f"{key}: {sorted(new)[:4]}" for key, names in loading.items() if (new := names - made.loading[key] - outer)
    ]
    if case.layout == "headless" and loading["missing_keys"]:
        wrong.append(f"missing head: {sorted(loading['missing_keys'])}")
    try:
        answered = zoo.answer(ours, made.inputs)
    except Exception as error:
        return Result(
            WRONG, "; ".join([*wrong, f"answer: {type(error).__name__}: {' '.join(str(error).split())[:200]}"])
        )
    if answered.shape != expected.shape:
        wrong.append(f"logits: shape {tuple(answered.shape)} for {tuple(expected.shape)}")
    theirs, merged_by = merged_state(case, made)
    note = "" if merged_by else "PEFT cannot merge"
    if answered.shape == expected.shape and not close(answered, expected, 1e-3):
        step = float((made.plain - expected).abs().max()) if made.plain.shape == expected.shape else float("nan")
        off = f"logits: off by {float((answered - expected).abs().max()):.2g}, the adapter changes them by {step:.2g}"
        if any(close(answered, a, 1e-3) for a in other_answers(case, made, merged_by)):
            note = f"PEFT answers in two ways; {off}"
        else:
            wrong.append(off)
    touched = set().union(*made.shared) if made.shared else set()
    state = ours.state_dict()
    if merged_by:
        for key in sorted(theirs.keys() | state.keys()):
            if key in touched and case.kind != "tuned":
                continue
            if key not in theirs or key not in state:
                wrong.append(f"tensor {key}: only in {'ours' if key in state else 'theirs'}")
            elif theirs[key].shape != state[key].shape:
                wrong.append(f"tensor {key}: shape {tuple(state[key].shape)} for {tuple(theirs[key].shape)}")
            elif theirs[key].is_floating_point() and not close(state[key], theirs[key], 1e-5):
                changed = not torch.equal(state[key], made.before.get(key, state[key]))
                wrong.append(
                    f"tensor {key}: off by {float((state[key] - theirs[key]).abs().max()):.2g}{'' if changed else ', unchanged'}"
                )
        if case.kind == "tuned" or not any(k for k in touched):
            wrong += names_on_disk(case, made, out, home=out.parent)
    matrices, directions, differ = decisions(made, findings, theirs if merged_by else {}, touched)
    wrong += differ
    said = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
    return Result(WRONG if wrong else RIGHT, said or note, matrices, directions)


def outer_names(case: Case) -> set[str]:
    """The names of a head that the adapted model is within: it is written where its tie is undone, and not loaded."""
    if case.layout != "headed":
        return set()
    model = base_model(case, 0)
    return {n for n in model.state_dict() if not n.startswith(f"{model.base_model_prefix}.")}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
    return bool(torch.isfinite(a).all()) and (a - b).abs().max().item() <= tolerance * scale if b.numel() else True


def merged_state(case: Case, made: Made) -> tuple[dict[str, torch.Tensor], str]:
    """PEFT's merged model; deltas of tied layers are added to what stood there before, as PEFT adds each to both."""
    if case.kind == "tuned":
        return dict(made.model.state_dict()), "tuned"
    own: dict[str, torch.Tensor] = {}
    try:
        tied = set().union(*made.shared) if made.shared else set()
        for path, module in made.model.base_model.model.named_modules():
            if isinstance(module, LoraLayer) and f"{path}.weight" in tied and not any(module.use_dora.values()):
                own[f"{path}.weight"] = (
                    module.get_base_layer().weight.detach() + module.get_delta_weight("default").detach()
                )
        merged = made.model.merge_and_unload()
    except Exception:
        return own, ""
    made.model = merged
    return {**merged.state_dict(), **own}, "PEFT"


def other_answers(case: Case, made: Made, merged_by: str) -> Iterator[torch.Tensor]:
    """What PEFT answers once it has loaded the adapter that it saved, and, of trained tokens, once it has merged.

    A head that is tied to trained tokens lacks its bias until then (PEFT 0.21).
    """
    if case.kind == "tuned":
        return
    if case.kind == "tokens" and merged_by:
        yield zoo.answer(made.model, made.inputs)
    with contextlib.suppress(Exception):  # what it cannot load it does not answer
        model, _ = load(made.cls, made.base)
        if case.kind == "grown":
            model.resize_token_embeddings(zoo.VOCABULARY + 6, mean_resizing=False)
        yield zoo.answer(PeftModel.from_pretrained(model, made.adapter), made.inputs)


def names_on_disk(case: Case, made: Made, out: Path, home: Path) -> list[str]:
    made.model.save_pretrained(home / "theirs")
    theirs, ours, base = (tensor_shapes(d) for d in (home / "theirs", out, made.base))
    extra = {k for k in ours if k not in theirs and k not in base} - outer_names(case)
    lost = {k for k in theirs if k not in ours and k in base}
    return [f"on disk: {what} {sorted(names)[:3]}" for what, names in (("extra", extra), ("lost", lost)) if names]


def tensor_shapes(directory: Path) -> dict[str, list[int]]:
    shapes = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as f:
            shapes |= {k: f.get_slice(k).get_shape() for k in f.keys()}  # noqa: SIM118
    return shapes


STACKED = re.compile(r"(.*)\[(\d+)\]")


def decisions(
    made: Made, findings: Any, after: dict[str, torch.Tensor], touched: set[str]
) -> tuple[int, int, list[str]]:
    """Compare decisions with a float64 SVD of the matrices, the output side of each."""
    model = made.model.get_base_model() if hasattr(made.model, "get_base_model") else made.model
    modules = dict(model.named_modules())
    matrices = directions = 0
    wrong: list[str] = []
    for m in findings:
        found = STACKED.fullmatch(m.module)
        key = found[1] if found else f"{m.module}.weight" if f"{m.module}.weight" in made.before else m.module
        if key not in made.before or key not in after or (key in touched and made.model is model and False):
            continue
        W0, W = made.before[key], after[key]
        if found:
            W0, W = W0[int(found[2])], W[int(found[2])]
            transposed = tuple(W0.shape) != m.shape
        else:
            transposed = isinstance(modules.get(m.module), Conv1D | nn.Embedding)
        if W0.shape != W.shape or W0.ndim < 2:
            continue
        W0, W = W0.flatten(1).double(), W.flatten(1).double()
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
        matrices, directions = matrices + 1, directions + len(clear)
        if [j for j in m.detection.intruders if j in clear] != [j for j in clear if similarity[j] < 0.5]:
            wrong.append(
                f"decisions {m.module}: {m.detection.intruders} for {[j for j in clear if similarity[j] < 0.5]}"
            )
    return matrices, directions, wrong


def _alone(S: np.ndarray, j: int) -> bool:
    """Whether a singular value is apart from its neighbours, so that its vector is one."""
    gaps = np.abs(np.delete(S, j) - S[j])
    return bool(gaps.min(initial=np.inf) > 1e-4 * S[0])
