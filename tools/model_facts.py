"""Facts of one model that transformers builds on the meta device: its ties, embeddings, Conv1D modules, experts, and names on disk.

Names are patterns: a layer's number is ``*``. So the facts of a model of two layers are those of a model of eighty.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights
from transformers.pytorch_utils import Conv1D

Defaults = dict[tuple[str, ...], bool]

TIE = "tie_word_embeddings"

# Sizes that no model has by itself; a tensor on the meta device takes no memory.
VOCABULARY = 1_000_003
LABELS = 1_009

# Modules whose parameters of two and more dimensions are stored as their class says.
_KNOWN = (
    nn.Linear,
    nn.Embedding,
    nn.MultiheadAttention,
    nn.RNNBase,
    Conv1D,
    nn.modules.conv._ConvNd,
)


class Model(NamedTuple):
    """A model within another.

    Attributes
    ----------
    name
        Its class.
    place
        The keys under which its config stands in that of the whole; none: it has the whole one.
    auto
        Whether that config decides what class it is.
    """

    name: str
    place: tuple[str, ...]
    auto: bool


@dataclass
class Facts:
    """What one model says of itself; names are patterns of run-time names.

    Attributes
    ----------
    model_type, prefix
        The config's ``model_type``, and the name of the model without its head within this one (``base_model_prefix``).
    tensors
        Parameters, under all of their names; buffers stand in `buffers`.
    vocabulary, labels
        Tensors with a row for each token → path of the config key that states how many; and tensors with a row for each label.
    embeddings, transposed
        Modules that are embeddings, and those that store (in, out).
    stacks
        Parameter that holds a matrix for each expert → ``out,in`` or ``in,out``; empty if the module does not say.
    matrices
        Matrices of modules of no standard class, as an expert router's.
    buffers
        Buffers that are saved.
    ties
        (name, the name that it is tied to) → where a config may state it, and the default there; none: always tied.
    input, output
        The modules of the input and the output embedding; empty where the model has none.
    disk
        Run-time name → names on disk, where they differ.
    may_miss, unsaved
        Expressions of names that may be missing on loading, and names that are not saved.
    models
        Path of each model within it → its class.
    """

    model_type: str
    prefix: str
    tensors: set[str] = field(default_factory=set)
    vocabulary: dict[str, tuple[str, ...]] = field(default_factory=dict)
    labels: set[str] = field(default_factory=set)
    embeddings: set[str] = field(default_factory=set)
    transposed: set[str] = field(default_factory=set)
    stacks: dict[str, str] = field(default_factory=dict)
    matrices: set[str] = field(default_factory=set)
    buffers: set[str] = field(default_factory=set)
    ties: dict[tuple[str, str], dict[tuple[str, ...], bool]] = field(default_factory=dict)
    input: str = ""
    output: str = ""
    disk: dict[str, list[str]] = field(default_factory=dict)
    may_miss: set[str] = field(default_factory=set)
    unsaved: set[str] = field(default_factory=set)
    models: dict[str, Model] = field(default_factory=dict)

    def __or__(self, other: Facts) -> Facts:
        """The facts of two models of one class."""
        both = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in both.items():
            if isinstance(value, set | dict):
                both[name] = value | getattr(other, name)
        return Facts(**both)


def collapse(name: str) -> str:
    """The pattern of a name: ``h.0.attn`` → ``h.*.attn``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def nested(
    config: PreTrainedConfig, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig]]:
    """Every config within a config, itself first, and where it stands."""
    yield path, config
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from nested(value, (*path, key))


def with_marked_sizes(config: PreTrainedConfig) -> PreTrainedConfig:
    """Give the vocabularies of a config and the nested ones, and the labels, sizes that nothing else in the model has."""
    for number, (_, c) in enumerate(nested(config)):
        if isinstance(getattr(c, "vocab_size", None), int):
            c.vocab_size = VOCABULARY + number
    config.num_labels = LABELS
    return config


def _stated_sizes(config: PreTrainedConfig) -> dict[int, tuple[str, ...]]:
    """Find the keys of ``config.json`` that each marked vocabulary's size follows.

    A nested config may take its size from another when it is read, whatever it states itself: PI0's ``dit_config`` from the text's.
    """

    def sizes(of: PreTrainedConfig) -> dict[tuple[str, ...], int]:
        return {
            (*path, c.attribute_map.get("vocab_size", "vocab_size")): c.vocab_size
            for path, c in nested(of)
            if getattr(c, "vocab_size", None) in range(VOCABULARY, VOCABULARY + 100)
        }

    marked = sizes(config)
    keys = {size: key for key, size in marked.items()}
    with contextlib.suppress(Exception):  # some configs do not read what they write
        read = sizes(type(config).from_dict(config.to_dict()))
        return {size: keys.get(read.get(key, size), key) for key, size in marked.items()}
    return keys


def facts_of(cls: type[PreTrainedModel], config: PreTrainedConfig) -> Facts:
    """Build a model of this class and read its facts. The config's flags of ties are changed.

    Parameters
    ----------
    config
        As `with_marked_sizes` makes it; else no tensor is known to have a row for each token or label.
    """
    defaults = {path: bool(getattr(c, TIE, False)) for path, c in nested(config)}
    for _, c in nested(config):
        setattr(c, TIE, False)
    with torch.device("meta"), no_init_weights(), meta_device_safe_creation_ops():
        model = cls(config)
    model.tie_weights()
    modules = dict(model.named_modules())
    facts = Facts(config.model_type, model.base_model_prefix)
    facts.embeddings = {collapse(n) for n, m in modules.items() if isinstance(m, nn.Embedding)}
    facts.transposed = {collapse(n) for n, m in modules.items() if isinstance(m, Conv1D)}
    linear = {collapse(n) for n, m in modules.items() if isinstance(m, nn.Linear)}
    assert not facts.transposed & linear, f"{cls.__name__}: a name that is a Conv1D and a Linear"
    stacks = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = modules[name.rpartition(".")[0]]
        if (
            not isinstance(owner, _KNOWN)
            and parameter.ndim == 3
            and _holds_experts(owner, parameter.shape[0])
        ):
            stacks[name] = parameter
        elif not isinstance(owner, _KNOWN) and parameter.ndim == 2:
            facts.matrices.add(collapse(name))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    facts.tensors = {collapse(n) for n in parameters}
    facts.buffers = {collapse(n) for n in model.state_dict() if n not in parameters}
    facts.labels = {collapse(n) for n, p in parameters.items() if LABELS in p.shape}
    sizes = _stated_sizes(config)
    for name, tensor in model.state_dict().items():
        facts.vocabulary |= {collapse(name): sizes[size] for size in tensor.shape if size in sizes}
    facts.input = _embedding(model.get_input_embeddings, modules)
    facts.output = _embedding(model.get_output_embeddings, modules)
    facts.stacks = _orientations(
        stacks, modules, getattr(modules.get(facts.input), "embedding_dim", 0)
    )
    facts.may_miss = set(model._keys_to_ignore_on_load_missing or ())
    facts.unsaved = {collapse(n) for n in model._keys_to_ignore_on_save or ()}
    inner = {n: m for n, m in modules.items() if n and isinstance(m, PreTrainedModel)}
    for name, m in inner.items():
        place = _place(m.config, model.config)
        facts.models[name] = Model(type(m).__name__, place, _is_auto(model.config, place))
    _ties(facts, model, {"": model, **inner}, defaults)
    wanted = {f"{m}.weight" for m in (*facts.embeddings, *facts.transposed, facts.output)}
    wanted |= {
        *facts.stacks,
        *facts.matrices,
        *facts.buffers,
        *(n for pair in facts.ties for n in pair),
    }
    facts.disk = _on_disk(model, wanted)
    return facts


def _holds_experts(module: nn.Module, count: int) -> bool:
    return any(
        "expert" in key and value is not True and value == count
        for key, value in vars(module).items()
    )


def _orientations(
    stacks: dict[str, nn.Parameter], modules: dict[str, nn.Module], width: int
) -> dict[str, str]:
    """``out,in`` or ``in,out`` of each stack: as its module says; else as the first takes the model's width and the last gives it.

    A class of modules has one orientation: where one's matrices are square, another's tell.
    """
    said: dict[type[nn.Module], set[bool]] = defaultdict(set)
    owners = {name: name.rpartition(".")[0] for name in stacks}
    for owner in set(owners.values()):
        kind = said[type(modules[owner])]
        turned = getattr(modules[owner], "is_transposed", None)
        group = [p for n, p in stacks.items() if owners[n] == owner]
        if len(group) == 1:  # a module a stack: with those beside it
            group = [
                p
                for n, p in stacks.items()
                if owners[n].rpartition(".")[0] == owner.rpartition(".")[0]
            ]
        if turned is not None:
            kind.add(turned)
        elif (group[0].shape[2] == width) != (group[0].shape[1] == width):
            kind.add(group[0].shape[1] == width)
        elif (group[-1].shape[2] == width) != (group[-1].shape[1] == width):
            kind.add(group[-1].shape[2] == width)
    out = {}
    for name, owner in owners.items():
        kind = said[type(modules[owner])]
        out[collapse(name)] = "" if len(kind) != 1 else "in,out" if kind == {True} else "out,in"
    return out


def _embedding(get: Any, modules: dict[str, nn.Module]) -> str:
    try:
        found = get()
    except (NotImplementedError, AttributeError):  # a model without one
        return ""
    return next((name for name, module in modules.items() if module is found), "")


def _place(config: PreTrainedConfig, root: PreTrainedConfig) -> tuple[str, ...]:
    """Where a model's config stands in the root's: itself; of a copy, the first one of its class; of one made anew, the root."""
    places = list(nested(root))
    same = [path for path, c in places if c is config] + [
        path for path, c in places if type(c) is type(config)
    ]
    return same[0] if same else ()


def _ties(
    facts: Facts, model: PreTrainedModel, models: dict[str, PreTrainedModel], defaults: Defaults
) -> None:
    """The ties that hold whatever the config says, then those that the flag of each model's config makes."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        source = first.setdefault(id(parameter), name)
        if source != name:
            facts.ties[_pair(name, source)] = {}
    always = set(facts.ties)
    for m in models.values():
        setattr(m.config, TIE, True)
    for path, m in models.items():
        place = facts.models[path].place if path else ()
        for names in m.get_expanded_tied_weights_keys(all_submodels=False).items():
            pair = _pair(*(f"{path}.{n}" if path else n for n in names))
            if not {pair, pair[::-1]} & always:
                facts.ties.setdefault(pair, {})[place] = defaults.get(place, False)


def _is_auto(config: PreTrainedConfig, place: tuple[str, ...]) -> bool:
    for key in place[:-1]:
        config = getattr(config, key)
    return bool(place) and config.sub_configs.get(place[-1]) is AutoConfig


def _pair(target: str, source: str) -> tuple[str, str]:
    """The patterns of two tied names; a number in the source that is not the target's stays."""
    numbers = [[part for part in name.split(".") if part.isdigit()] for name in (target, source)]
    return collapse(target), collapse(source) if numbers[0] == numbers[1] else source


def _on_disk(model: PreTrainedModel, wanted: set[str]) -> dict[str, list[str]]:
    """The names on disk of the wanted patterns, as `save_pretrained` writes them; none where several tensors make one."""
    steps = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [step for step in steps if not isinstance(step, PrefixChange)]
    if not model._weight_conversions:
        return {}
    found: dict[str, list[str]] = {}
    for name, tensor in model.state_dict().items():
        pattern = collapse(name)
        if pattern in wanted and pattern not in found:
            try:
                found[pattern] = sorted(
                    {collapse(n) for n in revert_weight_conversion(model, {name: tensor})}
                )
            except (RuntimeError, ValueError, KeyError, IndexError, AttributeError):
                found[pattern] = []
    return {pattern: names for pattern, names in found.items() if names != [pattern]}
