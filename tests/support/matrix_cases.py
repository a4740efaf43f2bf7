"""Choose the cases of the matrix: for a model class, which part is adapted, by which kind of adapter, on which base."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import zoo
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

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
        return "/".join([self.cls, self.part, self.kind, tied, files, self.layout, *(["flag"] if self.flag else [])])

    def record(self) -> dict[str, Any]:
        return asdict(self)


def case_of(name: str) -> Case:
    """The case of a name, as the program prints it."""
    cls, part, kind, tied, files, layout, *flag = name.split("/")
    return Case(cls, part, kind, {"tied": True, "untied": False}.get(tied), files == "shards", layout, bool(flag))


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
        return {"target_modules": sorted({p if by_path else p.rpartition(".")[2] for p in getattr(self, part)})}


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Find the parts of a model in its modules: a layer of a numbered block is attention's by the class of a module around it."""
    modules = dict(model.named_modules())
    head = _head(model, modules)
    attention, mlp = [], []
    for path, module in modules.items():
        if isinstance(module, nn.Linear | Conv1D) and any(s.isdigit() for s in path.split(".")) and path != head:
            around = [type(modules[a]).__name__ for a in _ancestors(path)]
            (attention if any("Attention" in a or "Attn" in a for a in around) else mlp).append(path)
    experts = [n for n, p in model.named_parameters() if p.ndim == 3 and _is_stack(modules[n.rpartition(".")[0]], p)]
    keys = getattr(model, "_tied_weights_keys", None)
    inputs = _path_of(modules, _quiet(model.get_input_embeddings))
    return Anatomy(
        tuple(attention), tuple(mlp), tuple(experts),
        inputs if isinstance(modules.get(inputs or "-"), nn.Embedding) else None, head, bool(keys),
        any(n.endswith("bias") for n, _ in model.named_parameters()),
        any(isinstance(m, Conv1D) for m in modules.values()),
    )  # fmt: skip


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
        part, kind = parts[i % len(parts)], kinds[(i + number) % len(kinds)]
        layout = layouts[(i + number * 3) % len(layouts)] if i % 2 else "current"
        if (layout == "bare" and tied is not True) or (layout == "headless" and "head" in (part, kind)):
            layout = "current"  # the head would be in no file
        flag = kind in ("lora", "saved") and part in ("attention", "mlp", "all-linear") and (number + i) % 3 == 0
        out.append(Case(name, part, kind, tied, turn % 3 == 1, layout, flag))
    if found.tied and found.head and task != "classification" and _has_names_of_its_own(found):
        out += [Case(name, *touched, tied=True) for touched in TOUCHES]
    return list(dict.fromkeys(out))


TOUCHES = (("head", "lora"), ("head", "saved"), ("embedding", "lora"), ("embedding", "saved"), ("attention", "grown"))
"""What changes one of two tensors that are one, each of which a class whose names are its own sees."""


def _has_names_of_its_own(found: Anatomy) -> bool:
    return not (found.head or "").endswith("lm_head") or not (found.embedding or "").endswith("embed_tokens")


def every_case_of(name: str, task: str, model: PreTrainedModel) -> list[Case]:
    """All parts, kinds and ties of one class, on bases as they are saved today."""
    found = anatomy(model)
    ties = (True, False) if found.tied else (None,)
    kinds = [k for k in KINDS if _has(k, found)]
    return [Case(name, part, kind, tied) for part in found.parts() for kind in kinds for tied in ties]


def _has(kind: str, found: Anatomy) -> bool:
    if kind in ("tokens", "grown"):
        return found.embedding is not None
    if kind == "saved":
        return found.head is not None or found.embedding is not None
    return found.biased if kind == "biases" else True


def _laid_out(layout: str, task: str, model: PreTrainedModel) -> bool:
    prefix = model.base_model_prefix
    inner = bool(prefix) and hasattr(model, prefix) and isinstance(getattr(model, prefix), PreTrainedModel)
    if layout in ("bare", "headed"):
        return inner and getattr(model, prefix).base_model_prefix == prefix
    if layout == "headless":
        return inner and task == "classification"
    return True


TAGS = {
    "orientation": "Conv1D layers, or fan_in_fan_out set by habit",
    "vision tie": "tied embeddings of a vision-language model",
    "tie": "tied embeddings that change",
    "head's name": "a head that is not called lm_head",
    "experts": "stacks of experts, alone or with other layers",
    "saved copies": "saved modules, and copies that PEFT leaves beside them",
    "tuned": "a fully fine-tuned model",
    "tuned experts": "a fully fine-tuned model with stacks of experts",
    "nested types": "an encoder and a decoder of types of their own",
    "tie, biases or vocabulary": "tied embeddings beside all biases or a grown vocabulary",
    "old names": "names on disk that loading renames",
    "small": "configs that name no class, and bases without a head",
}
"""Kinds of facts of an architecture that a case may hang on."""


def tags(case: Case, model: PreTrainedModel) -> list[str]:
    """The keys of `TAGS` that a case has."""
    found = anatomy(model)
    tied = found.tied and case.tied is not False
    touches = case.part in ("embedding", "head") or case.kind in ("saved", "tokens", "grown", "tuned")
    lm_head = (found.head or "lm_head").endswith("lm_head")
    said = {
        "orientation": found.conv1d or case.flag,
        "vision tie": hasattr(model.config, "vision_config") and tied and touches,
        "tie": tied and touches,
        "head's name": not lm_head and (case.part == "head" or case.kind == "saved"),
        "experts": bool(found.experts) and case.part in ("experts", "all-linear", "mlp") and case.kind != "tuned",
        "saved copies": case.kind in ("saved", "grown") or (case.kind == "biases" and touches),
        "tuned": case.kind == "tuned",
        "tuned experts": case.kind == "tuned" and bool(found.experts),
        "nested types": hasattr(model.config, "encoder") and hasattr(model.config, "decoder"),
        "tie, biases or vocabulary": tied and case.kind in ("biases", "grown"),
        "old names": case.layout in ("legacy", "runtime", "bare", "headed"),
        "small": case.layout in ("unnamed", "headless"),
    }
    return [tag for tag in TAGS if said[tag]]


def numbered_classes() -> dict[str, tuple[int, str]]:
    """Name of each class → its number and task."""
    return {name: (i, task) for i, (name, (_, task)) in enumerate(zoo.classes().items())}
