"""Choose the cases of the matrix: for a model class, which part is adapted, by which kind of adapter, on which base."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from seeds import vary
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion
from transformers.pytorch_utils import Conv1D

import streamer
from streamer.errors import StreamerError

PARTS = ("attention", "mlp", "experts", "embedding", "head", "all-linear")
KINDS = ("lora", "dora", "saved", "biases", "tokens", "grown", "tuned")
LAYOUTS = ("current", "runtime", "legacy", "bare", "headed", "unnamed", "headless")
"""How the base's tensors are named on disk.

current: as `save_pretrained` names them; runtime: as the model's parameters; legacy: with the old names that loading renames; bare: of a
model with a head, without the prefix of the model within; headed: of the model within, with that prefix and a head; unnamed: as
current, with a config that names no class; headless: without the head that the adapter brings.
"""


@dataclass(frozen=True)
class Case:
    """One base and one adapter.

    Attributes
    ----------
    cls
        The model class.
    part
        What is adapted, one of `PARTS`.
    kind
        The adapter, one of `KINDS`.
    tied
        What the config says of input and output embedding; None leaves the class's default.
    shards
        Whether the base is several files.
    layout
        One of `LAYOUTS`.
    flag
        Whether ``fan_in_fan_out`` is set in the adapter's config, whatever the model has.
    """

    cls: str
    part: str
    kind: str
    tied: bool | None = None
    shards: bool = False
    layout: str = "current"
    flag: bool = False

    @property
    def name(self) -> str:
        tied = {None: "default", True: "tied", False: "untied"}[self.tied]
        files = "shards" if self.shards else "file"
        return "/".join(
            [
                self.cls,
                self.part,
                self.kind,
                tied,
                files,
                self.layout,
                *(["flag"] if self.flag else []),
            ]
        )

    def record(self) -> dict[str, Any]:
        return asdict(self)


def case_of(name: str) -> Case:
    """The case of a name, as the program prints it."""
    cls, part, kind, tied, files, layout, *flag = name.split("/")
    return Case(
        cls,
        part,
        kind,
        {"tied": True, "untied": False}.get(tied),
        files == "shards",
        layout,
        bool(flag),
    )


@dataclass(frozen=True)
class Anatomy:
    """What a built model has: paths of its modules and parameters by part."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    experts: tuple[str, ...]
    embedding: str | None
    head: str | None
    tied: bool
    biased: bool
    conv1d: bool

    def parts(self) -> list[str]:
        return [p for p in PARTS if p == "all-linear" or getattr(self, p)]

    def targets(self, part: str, by_path: bool = False) -> dict[str, Any]:
        """PEFT's options that adapt a part: the last names of its layers, as users give them; one module by its whole path.

        Last names are those of other layers, too: ``dense`` is a pooler's.
        """
        if part == "all-linear":
            return {"target_modules": "all-linear"}
        if part == "experts":
            names = sorted({".".join(p.split(".")[-2:]) for p in self.experts})
            return {"target_modules": [], "target_parameters": names}
        if part in ("embedding", "head"):
            return {"target_modules": [getattr(self, part)]}
        return {
            "target_modules": sorted(
                {p if by_path else p.rpartition(".")[2] for p in getattr(self, part)}
            )
        }


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Find the parts of a model in its modules: a layer of a numbered block is attention's by the class of a module around it."""
    modules = dict(model.named_modules())
    head = _head(model, modules)
    attention = []
    mlp = []
    for path, module in modules.items():
        if (
            isinstance(module, nn.Linear | Conv1D)
            and any(s.isdigit() for s in path.split("."))
            and path != head
        ):
            around = [type(modules[a]).__name__ for a in _ancestors(path)]
            (attention if any("Attention" in a or "Attn" in a for a in around) else mlp).append(
                path
            )
    experts = [
        n
        for n, p in model.named_parameters()
        if p.ndim == 3 and _is_stack(modules[n.rpartition(".")[0]], p)
    ]
    keys = getattr(model, "_tied_weights_keys", None)
    inputs = _path_of(modules, _quiet(model.get_input_embeddings))
    return Anatomy(
        tuple(attention),
        tuple(mlp),
        tuple(experts),
        inputs if isinstance(modules.get(inputs or "-"), nn.Embedding) else None,
        head,
        bool(keys),
        any(n.endswith("bias") for n, _ in model.named_parameters()),
        any(isinstance(m, Conv1D) for m in modules.values()),
    )


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        if path:
            yield path


def _is_stack(owner: nn.Module, parameter: nn.Parameter) -> bool:
    return getattr(owner, "num_experts", 0) == parameter.shape[0]


def _quiet(get: Any) -> nn.Module | None:
    try:
        return get()
    except (NotImplementedError, AttributeError):
        return None


def _path_of(modules: dict[str, nn.Module], module: nn.Module | None) -> str | None:
    return next((path for path, m in modules.items() if m is module and path), None)


def _head(model: PreTrainedModel, modules: dict[str, nn.Module]) -> str | None:
    """The output embedding; else the last linear layer outside of the model within."""
    found = _path_of(modules, _quiet(model.get_output_embeddings))
    if found is None and hasattr(model, model.base_model_prefix or "-"):
        outside = [
            p
            for p, m in modules.items()
            if isinstance(m, nn.Linear) and not p.startswith(f"{model.base_model_prefix}.")
        ]
        found = outside[-1] if outside else None
    return found if isinstance(modules.get(found or "-"), nn.Linear) else None


def cases_of(name: str, number: int, task: str, model: PreTrainedModel) -> list[Case]:
    """The cases of one class; `number` is its place among the classes, by which the pairs turn."""
    found = anatomy(model)
    parts = found.parts()
    kinds = [k for k in KINDS if _has(k, found)]
    layouts = [known for known in LAYOUTS if _laid_out(known, task, model)]
    if task == "classification":
        parts = [parts[(number + i) % len(parts)] for i in range(3)]
        kinds = [("saved", *kinds)[(number + i * 2) % (len(kinds) + 1)] for i in range(3)]
    out: list[Case] = []
    count = max(len(parts), len(kinds))
    for i in range(count):
        turn = number // len(kinds) + i
        tied = (None if turn % 5 == 4 else turn % 2 == 0) if found.tied else None
        part = parts[i % len(parts)]
        kind = kinds[(i + number) % len(kinds)]
        layout = layouts[(i + number * 3) % len(layouts)] if i % 2 else "current"
        if (layout == "bare" and tied is not True) or (
            layout == "headless" and "head" in (part, kind)
        ):
            layout = "current"  # the head would be in no file
        flag = (
            kind in ("lora", "saved")
            and part in ("attention", "mlp", "all-linear")
            and (number + i) % 3 == 0
        )
        out.append(Case(name, part, kind, tied, turn % 3 == 1, layout, flag))
    if found.tied and found.head and task != "classification" and _has_names_of_its_own(found):
        out += [Case(name, *touched, tied=True) for touched in TOUCHES]
    return list(dict.fromkeys(out))


TOUCHES = (
    ("head", "lora"),
    ("head", "saved"),
    ("embedding", "lora"),
    ("embedding", "saved"),
    ("attention", "grown"),
)
"""What changes one of two tensors that are one, each of which a class whose names are its own sees."""


def _has_names_of_its_own(found: Anatomy) -> bool:
    return not (found.head or "").endswith("lm_head") or not (found.embedding or "").endswith(
        "embed_tokens"
    )


def _has(kind: str, found: Anatomy) -> bool:
    if kind in ("tokens", "grown"):
        return found.embedding is not None
    if kind == "saved":
        return found.head is not None or found.embedding is not None
    return found.biased if kind == "biases" else True


def _laid_out(layout: str, task: str, model: PreTrainedModel) -> bool:
    prefix = model.base_model_prefix
    inner = (
        bool(prefix)
        and hasattr(model, prefix)
        and isinstance(getattr(model, prefix), PreTrainedModel)
    )
    if layout in ("bare", "headed"):
        return inner and getattr(model, prefix).base_model_prefix == prefix
    if layout == "headless":
        return inner and task == "classification"
    return True


def numbered_classes() -> dict[str, tuple[int, str]]:
    """Name of each class → its number and task."""
    return {name: (i, task) for i, (name, (_, task)) in enumerate(zoo.classes().items())}


TIE = "tie_word_embeddings"


class NotMade(Exception):
    """The case cannot be made by PEFT or transformers."""


@dataclass
class Made:
    """A base and an adapter on disk, and PEFT's model of them.

    Attributes
    ----------
    cls
        The class that is adapted.
    model
        PEFT's; of a tuned model that itself.
    before
        The tensors of the loaded base; of a grown vocabulary, of the base with its new rows.
    plain
        What the base answers to `inputs`; None where it does not, and `unanswered` says why.
    loading
        What loading the base complains about.
    shared
        Sets of the names of each parameter that has several.
    idle
        Those of them that no answer depends on: an embedding that only others are tied to (SeamlessM4T's ``shared``).
    """

    cls: type[PreTrainedModel]
    base: Path
    adapter: Path
    model: nn.Module
    before: dict[str, torch.Tensor]
    inputs: dict[str, Any]
    plain: torch.Tensor | None
    loading: dict[str, set[str]]
    shared: list[set[str]] = field(default_factory=list)
    unanswered: str = ""
    idle: set[str] = field(default_factory=set)


def configs_within(config: Any) -> list[Any]:
    inner = [
        value for value in vars(config).values() if isinstance(value, transformers.PreTrainedConfig)
    ]
    return [config, *(c for value in inner for c in configs_within(value))]


def base_model(case: Case, seed: int) -> PreTrainedModel:
    """A random model under the stated tie, none of whose parameters is as it was initialised."""
    cls = getattr(transformers, case.cls)
    config = zoo.config_of(case.cls)
    if case.tied is not None:
        for c in configs_within(config):
            setattr(c, TIE, case.tied)
        config = type(config).from_dict(
            config.to_dict()
        )  # as it is loaded: a class may not do what is stated
    torch.manual_seed(vary(seed))
    model: PreTrainedModel = cls(config)
    g = torch.Generator().manual_seed(vary(seed + 1))
    for p in model.parameters():
        if p.is_floating_point():
            p.data.add_(0.05 * torch.randn(p.shape, generator=g))
    for name, buffer in model.named_buffers():
        if (
            name.endswith("final_logits_bias") and case.kind != "grown"
        ):  # zero in new models; of a grown vocabulary it must be
            buffer.add_(0.05 * torch.randn(buffer.shape, generator=g))
    return model


def save_base(case: Case, model: PreTrainedModel, directory: Path) -> type[PreTrainedModel]:
    """Write the base as the case lays it out; returns the class that is adapted."""
    size = {"max_shard_size": "30KB"} if case.shards else {}
    if case.layout in ("bare", "headless"):
        inner = model.base_model
        inner.save_pretrained(directory, **size)
        if (
            case.layout == "bare"
        ):  # a model's config that has a head, and the names of the model within
            path = directory / "config.json"
            path.write_text(
                json.dumps(json.loads(path.read_text()) | {"architectures": [case.cls]})
            )
        return type(model)
    if case.layout == "legacy":
        model._weight_conversions = [
            c
            for c in get_model_conversion_mapping(model, add_legacy=True)
            if not isinstance(c, PrefixChange)
        ]
    model.save_pretrained(directory, save_original_format=case.layout != "runtime", **size)
    if case.layout == "unnamed":
        path = directory / "config.json"
        config = json.loads(path.read_text())
        del config["architectures"]
        path.write_text(json.dumps(config))
    return type(model.base_model) if case.layout == "headed" else type(model)


def load(
    cls: type[PreTrainedModel], directory: Path
) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    """A model, and what loading complains about."""
    torch.manual_seed(vary(7))  # of a head that the base does not have
    model, info = cls.from_pretrained(directory, output_loading_info=True)
    return model.eval(), {
        key: {str(n) for n in info[key]}
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }


def options(case: Case, found: Anatomy, model: PreTrainedModel) -> dict[str, Any]:
    """PEFT's options for a case."""
    values: dict[str, Any] = {"r": 3, "lora_alpha": 9}
    part = case.part
    saved = [p for p in (found.head or found.embedding,) if p]
    if case.kind in ("saved", "tokens") and part in ("embedding", "head"):
        saved = [getattr(found, part) or found.embedding or ""]
        part = "attention" if found.attention else "mlp" if found.mlp else "all-linear"
    values |= found.targets(part, by_path=case.layout in ("headed", "headless"))
    if case.layout == "headless" and part != "head":  # as PEFT does for a classifier
        within = f"{model.base_model_prefix}."
        values["modules_to_save"] = sorted(
            {n.partition(".")[0] for n in model.state_dict() if not n.startswith(within)}
        )
    if case.kind == "dora":
        values["use_dora"] = True
    elif case.kind == "saved":
        values["modules_to_save"] = [*values.get("modules_to_save", ()), *saved]
    elif case.kind == "biases":
        values["bias"] = "all"
    elif case.kind == "tokens":
        values["trainable_token_indices"] = {found.embedding: [3, 5]}
    return values


def train(case: Case, model: PreTrainedModel, directory: Path, seed: int) -> nn.Module:
    """An adapter with all that it trains changed, saved by PEFT; or the tuned model itself."""
    g = torch.Generator().manual_seed(vary(seed + 2))
    found = anatomy(model)
    if case.kind == "tuned":
        paths = {
            "embedding": [found.embedding],
            "head": [found.head],
            "experts": found.experts,
        }.get(case.part)
        for name, p in model.named_parameters():
            chosen = paths is None or any(path and name.startswith(path) for path in paths)
            if p.is_floating_point() and (chosen or p.ndim < 2):
                p.data.add_(0.05 * torch.randn(p.shape, generator=g))
        model.save_pretrained(directory)
        return load(type(model), directory)[0]  # some parameters are computed, and not saved
    peft = get_peft_model(model, LoraConfig(**options(case, found, model)))
    for name, p in peft.named_parameters():
        if p.requires_grad:
            step = 0.3 if "lora_" in name else 0.1
            p.data.add_(
                step * torch.randn(p.shape, generator=g)
            )  # in place: what PEFT ties stays one
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
    with made_by("transformers, base"):
        cls = save_base(case, base_model(case, seed), home / "base")
        model, loading = load(cls, home / "base")
    inputs = {}
    plain = None
    unanswered = ""
    shared = names_of_one(model)
    tied = {n: m for n, m in embeddings(model).items() if any(n in names for names in shared)}
    idle = set(tied)
    hooks = [m.register_forward_hook(lambda *_, n=n: idle.discard(n)) for n, m in tied.items()]
    try:
        with made_by("transformers, forward"):
            inputs = zoo.example(model)
            plain = zoo.answer(model, inputs)
            if not torch.isfinite(plain).all():
                raise ValueError("its answer is not finite")
    except NotMade as error:
        unanswered = str(error)
        idle.clear()
    for hook in hooks:
        hook.remove()
    with made_by("transformers, new rows"):
        if case.kind == "grown":
            model.resize_token_embeddings(zoo.VOCABULARY + 6, mean_resizing=False)
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    with made_by("PEFT"):
        trained = train(case, model, home / "adapter", seed)
    paths = home / "base", home / "adapter"
    return Made(cls, *paths, trained, before, inputs, plain, loading, shared, unanswered, idle)


def embeddings(model: nn.Module) -> dict[str, nn.Embedding]:
    """List the embeddings by the names of their weights."""
    modules = model.named_modules(remove_duplicate=False)
    return {f"{path}.weight": m for path, m in modules if isinstance(m, nn.Embedding)}


@contextlib.contextmanager
def made_by(whom: str) -> Any:
    """Call another library: its warnings are passed over, its exceptions say that the case cannot be made."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except TimeoutError:  # the limit of a case
        raise
    except Exception as error:  # another library's, of any kind
        raise NotMade(
            f"{whom}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


def names_of_one(model: nn.Module) -> list[set[str]]:
    """Sets of the names of each parameter that has several."""
    pointers: dict[int, set[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        pointers.setdefault(parameter.data_ptr(), set()).add(path)
    return [g for g in pointers.values() if len(g) > 1]


def names_of(directory: Path) -> set[str]:
    names: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as f:
            names |= set(f.keys())
    return names


CLEAR = 1e-3
"""Similarities nearer to ε than this are not judged."""

STACKED = re.compile(r"(.*)\[(\d+)\]")

INPUTS_FIRST = {
    "InklingSharedExperts": False,
    "JetMoeParallelExperts": False,
    "Llama4TextExperts": True,
    "LongcatFlashExperts": False,
}
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
    made: Made,
    findings: Any,
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    expected: set[str] | None,
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
        key = (
            stack[1]
            if stack
            else f"{m.module}.weight"
            if f"{m.module}.weight" in before
            else m.module
        )
        if key not in before or key not in after or before[key].shape != after[key].shape:
            wrong.append(f"decisions {m.module}: compared with nothing")
            continue
        W0, W = (
            (t[key][int(stack[2])] if stack else t[key]).flatten(1).double()
            for t in (before, after)
        )
        transposed = sides.transposed(
            stack[1] if stack else m.module, before[key][int(stack[2])] if stack else before[key]
        )
        if transposed is None:
            wrong.append(f"decisions {m.module}: of which the output side is not known")
            continue
        if transposed:
            W0 = W0.T
            W = W.T
        if tuple(W0.shape) != m.shape:
            wrong.append(f"decisions {m.module}: shape {m.shape} for {tuple(W0.shape)}")
            continue
        k = len(m.detection.singular_values)
        clear, intruders = judged(W0.numpy(), W.numpy(), k)
        matrices = matrices + 1
        directions = directions + len(clear)
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
            if owner in self.modules and (
                owner == path or _inputs_first(self.modules[owner]) is not None
            ):
                return self._of_module(owner)
        ways = {
            turned: self._places(matrix)
            for turned, matrix in ((False, W), (True, W.T if W.ndim == 2 else W[:0]))
        }
        found = [(place, turned) for turned, places in ways.items() for place, _ in places]
        return min(found)[1] if found else None

    def _places(self, W: Tensor) -> set[tuple[int, bool]]:
        rows = W.flatten(1).contiguous().numpy()
        return {self.rows[key] for row in rows if (key := row.tobytes()) in self.rows}


def _inputs_first(module: nn.Module) -> bool | None:
    """Say whether a module's experts are stored (in, out); None of a module that has none."""
    return getattr(module, "is_transposed", INPUTS_FIRST.get(type(module).__name__))


RIGHT = "right"
REFUSED = "refused"
WRONG = "wrong"
NOT_MADE = "not made"


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
                made.base,
                made.adapter,
                out,
                findings=findings,
                mitigation_lambda=1.0,
                model_card=False,
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
        f"{key}: {sorted(new)[:4]}"
        for key, names in loading.items()
        if (new := names - made.loading[key] - outer)
    ]
    if case.layout == "headless" and loading["missing_keys"]:
        wrong.append(f"missing head: {sorted(loading['missing_keys'])}")
    wrong += outer_tensors(case, made, out)
    notes: list[str] = []
    expected, why = answer(made)
    matrices_of = adapted(made)
    tied = tied_truth(made)
    theirs, unmerged = merged_state(case, made)
    if expected is None:
        notes.append(f"no logits: {why}")
    else:
        wrong += logits(case, made, ours, expected, _is_truth(theirs, tied), notes)
    matrices = directions = 0
    if theirs is None:
        notes.append(f"PEFT cannot merge: {unmerged}")
    else:
        wrong += tensors(
            ours.state_dict(), theirs | tied, made.idle - tied.keys() if tied else set()
        )
        wrong += names_on_disk(made, out, outer | (names_of_ties(made) if tied else set()), notes)
        matrices, directions, differ = decisions(
            made, findings, made.before, theirs | tied, matrices_of
        )
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


def logits(
    case: Case, made: Made, ours: nn.Module, expected: Tensor, merge_holds: bool, notes: list[str]
) -> list[str]:
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
    if (
        made.plain is not None
        and made.plain.shape == expected.shape
        and close(expected, made.plain, 1e-6)
    ):
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
            truth |= {
                name: value
                for name, (trained, value) in found.items()
                if trained or name not in made.idle
            }
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
    return merged is not None and all(
        merged[n].shape == t.shape and close(merged[n], t, 1e-5) for n, t in tied.items()
    )


def tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor], left_out: set[str]) -> list[str]:
    """Compare all tensors, by their names in the loaded model."""
    wrong = []
    for key in sorted((theirs.keys() | ours.keys()) - left_out):
        if key not in theirs or key not in ours:
            wrong.append(f"tensor {key}: only in {'ours' if key in ours else 'theirs'}")
        elif theirs[key].shape != ours[key].shape:
            wrong.append(
                f"tensor {key}: shape {tuple(ours[key].shape)} for {tuple(theirs[key].shape)}"
            )
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
        {n: t for n, t in m.state_dict().items() if not n.startswith(within) and n not in tied}
        for m in (ours, theirs)
    ]
    if case.kind == "grown":
        heads[0] = {n: t[: len(heads[1][n])] if n in heads[1] else t for n, t in heads[0].items()}
    return tensors(*heads, set())


def names_of_ties(made: Made) -> set[str]:
    """List the names on disk of parameters that have several: an undone tie brings all of them, as one flag of a config states all.

    A model knows the renames of what it was loaded from alone: that of a head which the base does not have is its class's.
    """
    state = {
        n: t for n, t in made.model.state_dict().items() if any(n in names for names in made.shared)
    }
    loaded = made.model._weight_conversions
    names = set(revert_weight_conversion(made.model, dict(state)))
    made.model._weight_conversions = None  # those of the class
    names |= set(revert_weight_conversion(made.model, dict(state)))
    made.model._weight_conversions = loaded
    return names | {
        name.removeprefix(f"{made.model.base_model_prefix}.") for name in names
    }  # as a bare base has them


def zeros(directory: Path) -> set[str]:
    """List the tensors on disk that are zero: loading does without such a bias of the logits."""
    found: set[str] = set()
    for path in directory.glob("*.safetensors"):
        found |= {name for name, tensor in load_file(path).items() if not tensor.any()}
    return found


def names_on_disk(made: Made, out: Path, may_be: set[str], notes: list[str]) -> list[str]:
    """Compare the names on disk with those that transformers saves, and with the base's; `may_be` are in either."""
    try:
        with made_by(
            "transformers, saving"
        ):  # of a vocabulary that has grown, it may refuse its own config (Canary)
            made.model.save_pretrained(out.parent / "theirs")
    except NotMade as error:
        notes.append(f"names on disk: {error}")
        return []
    theirs, ours, base = (names_of(d) for d in (out.parent / "theirs", out, made.base))
    extra = ours - theirs - base - may_be
    lost = (theirs & base) - ours - zeros(made.base)
    return [
        f"on disk: {what} {sorted(names)[:3]}"
        for what, names in (("extra", extra), ("lost", lost))
        if names
    ]
