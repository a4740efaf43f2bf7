"""Make the base and the adapter of a case: transformers builds and saves, PEFT wraps and saves."""

import contextlib
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo
from matrix_cases import Anatomy, Case, anatomy
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from seeds import vary
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

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
    torch.manual_seed(vary(7))  # of a head that the base does not have
    model, info = cls.from_pretrained(directory, output_loading_info=True)
    return model.eval(), {
        key: {str(n) for n in info[key]} for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
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
        paths = {"embedding": [found.embedding], "head": [found.head], "experts": found.experts}.get(case.part)
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
    with made_by("transformers, base"):
        cls = save_base(case, base_model(case, seed), home / "base")
        model, loading = load(cls, home / "base")
    inputs, plain, unanswered = {}, None, ""
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
        raise NotMade(f"{whom}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


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
