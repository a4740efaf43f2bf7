"""Match an adapter's modules to a base's tensors by name: exact names, transformers' renames, one exchange of prefixes, or kohya's names.

Adapters use run-time module names; checkpoints use their own. A module is looked up under its own name, then under the name that
transformers gives a tensor on loading (`Renames`), then, for the adapter as a whole, under one exchange of prefixes
that fits every module. A module that finds no tensor, or several, has no match, which is an error and never a mere warning.

``model.layers.0.q_proj`` → ``model.layers.0.q_proj.weight`` (exact); ``model.language_model.layers.0.q_proj`` →
``language_model.model.layers.0.q_proj.weight`` (rename); ``model.layers.0.q_proj`` → ``layers.0.q_proj.weight``, if every module of the
adapter is found after ``model.`` is removed (prefix).

A rename leads from the name on disk to the name in the loaded model. transformers chooses the renames by the model's class and type;
``tools/make_renames.py`` extracts them as facts from its table into ``renames.json``, so that reading them needs none of transformers'
code. Names are compared at run time: every tensor's name is carried forward, and no pattern is ever inverted.
``language_model.model.layers.0.mlp.up_proj.weight`` → ``model.language_model.layers.0.mlp.up_proj.weight`` of a vision-language model;
``model.layers.0.mlp.experts.3.w1.weight`` → a part of ``model.layers.0.mlp.experts.gate_up_proj``, which is built from all experts.

In an adapter of a pipeline, diffusers' names are the components' own. kohya joins a name's parts with underscores, so its names are made
from the base's and looked up:
``unet.down_blocks.0.attentions.0.proj_in`` → ``lora_unet_down_blocks_0_attentions_0_proj_in``. For SDXL and Flux, kohya trains the original
code, whose names `_sdxl` and `_flux` make: ``unet.down_blocks.1.attentions.0.proj_in`` is ``input_blocks.4.1.proj_in`` there, and three
layers of an attention are one, ``double_blocks.0.img_attn.qkv``. Such a fused matrix has its rows in several tensors of the base.
A name that these do not make, or that two tensors have, is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise, takewhile
from typing import Any, NamedTuple

from streamer.adapters.adapter import DeltaSource, PipelineAdapter
from streamer.errors import MismatchError, UnsupportedError, UsageError
from streamer.plan.architectures import architectures_for, packaged
from streamer.storage.checkpoint import PIPELINE_NAME, SINGLE_NAME, Checkpoint
from streamer.units import listed
from streamer.weights.base import RowConcat, Weight
from streamer.weights.logical import WeightView
from streamer.weights.model_config import ModelConfig, read_model_config

ORDER = [
    ("embed_tokens", "wte", "wpe", "embeddings", "word_embeddings", "position_embeddings", "token_type_embeddings"),
    ("self_attn", "self_attention", "attention", "attn", "linear_attn", "cross_attn", "encoder_attn", "self", "intermediate"),
    ("q_proj", "query", "wq", "q", "q_a_proj", "q_b_proj", "c_attn", "qkv_proj", "query_key_value", "in_proj"),
    ("k_proj", "key", "wk", "k", "kv_a_proj_with_mqa", "kv_b_proj"),
    ("v_proj", "value", "wv", "v"),
    ("o_proj", "out_proj", "wo", "o", "output", "dense"),
    ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    ("router", "gate"),
    ("experts", "shared_expert", "shared_experts"),
    ("gate_proj", "gate_up_proj", "w1", "wi_0", "wi", "fc1", "c_fc"),
    ("up_proj", "w3", "wi_1"),
    ("down_proj", "w2", "fc2", "c_proj"),
    ("norm", "ln_f", "final_layernorm"),
    ("lm_head", "score", "classifier", "qa_outputs"),
]  # fmt: skip
"""Parts of names in the order in which data passes them; unlisted parts sort by name between the feed-forward and the head."""

_RANKS = {name: (i, j) for i, names in enumerate(ORDER) for j, name in enumerate(names)}
_OTHER = (len(ORDER) - 3, 99)


def natural(name: str) -> tuple[Any, ...]:
    """Make the sort key of a tensor's name: numbers by size, and in a layer q, k, v, o, gate, up, down."""
    return tuple(_key(part) for part in re.split(r"[.\[\]]+", name) if part)


@lru_cache(4096)  # a model's names have few distinct parts
def _key(part: str) -> tuple[Any, ...]:
    if part.isdigit():
        return 0, int(part)
    return (
        1,
        *_RANKS.get(part, _OTHER),
        [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", part)],
    )


# For a model that no table knows: renames common to vision-language models.
COMMON = (
    {"rename": r"^language_model\.lm_head(?!\w)", "to": "lm_head"},
    {"rename": r"^language_model\.model\.", "to": "model.language_model."},
    {"rename": r"^(visual|vision_tower|multi_modal_projector)\.", "to": r"model.\1."},
)


@dataclass(frozen=True)
class Conversion:
    """Tensors that loading builds from others: `to` from each match of `sources`, by the named operations."""

    sources: tuple[re.Pattern[str], ...]
    to: tuple[str, ...]
    by: tuple[str, ...]
    scope: re.Pattern[str] | None = None

    @property
    def stacks(self) -> bool:
        """Return whether it builds one stack of matrices from whole tensors, or from one that is stored transposed."""
        return self.by in STACKS and len(self.to) == 1

    def load(self, tensor: str, name: str) -> Loaded | None:
        """Return the loaded name of a tensor, or None if it is not a source of this conversion."""
        for at, source in enumerate(self.sources):
            if renamed := _replace(name, source, self.to[0] if self.to else "", self.scope):
                new, replaced = renamed
                numbers = re.findall(r"(?<=\.)\d+(?=\.)", replaced)
                return Loaded(tensor, new, self, at, int(numbers[-1]) if numbers else None)
        return None


MERGE, CONCATENATE, TRANSPOSE, TRANSPOSE_IF = (
    "MergeModulelist 0",
    "Concatenate 1",
    "Transpose 1 2",
    "Transpose 1 2 check_dims",
)
STACKS = {(MERGE,), (MERGE, CONCATENATE), (CONCATENATE,), (TRANSPOSE,), (TRANSPOSE_IF,)}


class Loaded(NamedTuple):
    """A tensor on disk, and its name in the loaded model.

    Attributes
    ----------
    tensor, name
        Its name on disk, and the run-time name of the tensor that it becomes, whole or as a part.
    by
        Conversion that builds that tensor from this one and others; None if it is loaded unchanged.
    source, number
        Index of the conversion's source that it matches, and its number within that source, if numbered.
    """

    tensor: str
    name: str
    by: Conversion | None = None
    source: int = 0
    number: int | None = None


@dataclass(frozen=True)
class Rename:
    """Pairs of a pattern and the replacement of its first match; several pairs apply only if the first one matches some name."""

    pairs: tuple[tuple[re.Pattern[str], str], ...]
    scope: re.Pattern[str] | None = None

    def apply(self, names: Iterable[str]) -> dict[str, str]:
        """Return name → new name for the names that it changes."""
        out = {}
        for name in names:
            renamed = (_replace(name, pattern, to, self.scope) for pattern, to in self.pairs)
            if first := next(filter(None, renamed), None):
                out[name], _ = first
        if len(self.pairs) > 1 and not any(self.pairs[0][0].search(name) for name in out):
            return {}  # the checkpoint is already converted
        return out


def _replace(
    name: str, pattern: re.Pattern[str], to: str, scope: re.Pattern[str] | None
) -> tuple[str, str] | None:
    """Rename by one pattern, and return the new name and the part of the old one that was replaced; None if nothing matches."""
    scoped = None if scope is None else scope.match(name)
    start = scoped.end() if scoped else 0
    match = pattern.search(name[start:]) if scoped or scope is None else None
    if match is None:
        return None
    replacement = to.replace(r"\1", match[1]) if r"\1" in to else to
    return name[:start] + name[start:].replace(match[0], replacement, 1), match[0]


@dataclass(frozen=True)
class Renames:
    """The renames of one model, in the order in which they apply.

    Attributes
    ----------
    model
        The model for messages: a class or model type; empty if there are only the renames common to all models.
    """

    model: str
    renames: tuple[Rename, ...]
    conversions: tuple[Conversion, ...]

    def at_run_time(self, names: Iterable[str]) -> dict[str, str]:
        """Map each tensor on disk → its run-time name, for tensors that are loaded unchanged."""
        return {tensor: name for tensor, name, by, _, _ in self.loaded(names) if by is None}

    def loaded(self, names: Iterable[str]) -> list[Loaded]:
        """Return the loaded name of every tensor."""
        now = {name: name for name in names}
        for rename in self.renames:
            changed = rename.apply(set(now.values()))
            now = {name: changed.get(at, at) for name, at in now.items()} if changed else now
        return [
            next(
                (converted for c in self.conversions if (converted := c.load(name, at))),
                Loaded(name, at),
            )
            for name, at in now.items()
        ]


RENAMES = "renames.json"
"""The packaged table: ``rules`` and ``same`` by class or model type, and ``classes`` by model type."""


def renames_for(config: ModelConfig) -> Renames:
    """Collect the renames of a model: its own, its inner models', and those common to all models.

    This follows transformers: by each model's class, else by its type unless a surrounding model used the same type; renames of an inner
    model apply below its path, with or without the base's prefix. ``language_model.embed_tokens`` of ``LlavaForConditionalGeneration`` is
    below ``model.language_model``.
    """
    if config.pipeline:
        return Renames("", (), ())
    # If the base's class is not known, the class of its type with the most inner models decides.
    unnamed = replace(config, values={**config.values, "architectures": None})
    known = architectures_for(config) or architectures_for(unnamed)
    architecture = max(known, key=lambda a: len(a.parts), default=None)
    models: list[tuple[str, ...]]
    if architecture is None:
        named = next(iter(config.architectures), None)
        models = [("", named if isinstance(named, str) else "", config.model_type or "")]
        prefix = ""
    else:
        # EXAONE is a Llama with names of its own: transformers goes by the config's type.
        types = config.model_type or "", architecture.model_type
        models = [("", architecture.name, *types), *(p[:3] for p in architecture.parts)]
        prefix = architecture.base_prefix
    rules, same = packaged(RENAMES)["rules"], packaged(RENAMES)["same"]
    seen: defaultdict[str, list[str]] = defaultdict(list)
    steps_within: list[tuple[str | None, Sequence[dict[str, Any]]]] = []
    whose = ""
    for path, *keys in models:
        for key in keys:
            if any(around == "" or path.startswith(f"{around}.") for around in seen[key]):
                break
            if (steps := rules.get(same.get(key, key))) is not None:
                steps_within.append((_scope(path, prefix), steps))
                seen[keys[0]].append(path)
                seen[key].append(path)
                whose = whose or key
                break
    if architecture is None and not steps_within:
        steps_within.append((None, COMMON))
    steps_within.append((None, rules.get("legacy", ())))
    renames, conversions = [], []
    for within, steps in steps_within:
        where = None if within is None else re.compile(within)
        for step in steps:
            if "convert" in step:
                sources = tuple(re.compile(s) for s in step["convert"])
                conversions.append(Conversion(sources, tuple(step["to"]), tuple(step["by"]), where))
            else:
                pairs = step["group"] if "group" in step else [(step["rename"], step["to"])]
                renames.append(Rename(tuple((re.compile(p), to) for p, to in pairs), where))
    return Renames(whose, tuple(renames), tuple(conversions))


def _scope(path: str, prefix: str) -> str | None:
    """Return a pattern for the start of names below an inner model, loaded with or without the base prefix; None for the whole model."""
    if not path:
        return None
    below = path.removeprefix(prefix).removeprefix(".")
    head = rf"(?:{re.escape(prefix)}\.)?" if prefix else ""
    return f"^{head}{re.escape(below)}\\." if below else f"^{head}"


@dataclass(frozen=True)
class TensorSlice:
    """A part of a base's weight that holds a matrix, or some of its rows.

    Expert 3 of a stack is ``("model.layers.0.mlp.experts.down_proj", 3)``. The upper half of expert 3 of a ``gate_up_proj`` that the base
    stores in two tensors is ``("model.layers.0.mlp.experts.3.gate_proj.weight", None, (0, 4096))``.

    Attributes
    ----------
    weight
        A weight's name.
    index
        Index of the matrix, if the weight is a stack.
    rows
        First and last-plus-one row of the matrix that this weight holds, if other weights hold the rest; None for all rows.
    """

    weight: str
    index: int | None = None
    rows: tuple[int, int] | None = None


def joined(name: str, slices: Sequence[TensorSlice], weights: WeightView) -> Weight:
    """Make a matrix of this name from the slices that hold its rows."""
    parts = [
        weights[s.weight] if s.index is None else weights[s.weight].slice(s.index) for s in slices
    ]
    return replace(parts[0], name=name) if len(parts) == 1 else RowConcat.of(name, parts)


class Match(NamedTuple):
    """A base tensor that was found for a module, and the rule that found it.

    Attributes
    ----------
    tensor
        Name in the base; empty if there is no match.
    rule
        ``exact``, ``rename`` or ``prefix '…' → '…'``; empty if there is no match.
    why
        Reason for the match, or against it.
    pieces
        For a fused matrix of a pipeline, whose name `tensor` is made up: the slices that hold its rows, in order.
    """

    tensor: str
    rule: str
    why: str
    pieces: tuple[TensorSlice, ...] = ()


EXACT = "the module's own name"


def match_names(
    modules: Iterable[str], tensors: Iterable[str], renames: Renames, parameters: Iterable[str] = ()
) -> dict[str, Match]:
    """Match every module to its ``.weight`` tensor.

    Parameters
    ----------
    tensors
        All tensor names of the base.
    renames
        Renames of the base's model.
    parameters
        Names of parameters, matched in the same way. A parameter that loading builds from one tensor for each expert has no tensor of its
        own: it matches its run-time name.
    """
    parameters = list(parameters)
    modules = [*modules, *parameters]
    names = _Names(list(tensors), renames, frozenset(parameters))
    matches = {name: names.by_name(name, modules) for name in modules}
    if all(m.tensor for m in matches.values()):
        return matches
    ambiguous = any(m.why for m in matches.values() if not m.tensor)
    exchanged = [] if ambiguous else names.by_prefix(modules)
    if len(exchanged) == 1:
        return exchanged[0]
    for name, match in matches.items():
        if match.tensor or match.why:
            continue
        why = f"has no tensor in the base (looked for {name + '.weight'!r} and for one exchange of prefixes)"
        if exchanged:
            why = f"is ambiguous: it could be {listed(sorted(repr(way[name].tensor) for way in exchanged))}"
        matches[name] = Match("", "", why)
    return matches


class _Names:
    """A base's tensor names, on disk and in a loaded model."""

    def __init__(
        self, tensors: Sequence[str], renames: Renames, parameters: frozenset[str]
    ) -> None:
        self.renames = renames
        self.parameters = parameters
        self.stacks: set[str] = set()
        self.disk: dict[str, str] = {}
        self.run_time: defaultdict[str, list[str]] = defaultdict(list)
        for tensor, name, conversion, _, _ in renames.loaded(tensors):
            stem = tensor.removesuffix(".weight")
            # A parameter is found by its whole name, a module by the name of its weight.
            if stem != tensor or stem not in self.disk:
                self.disk[stem] = tensor
            if conversion is None:
                self.run_time[name.removesuffix(".weight")].append(tensor)
                continue
            if conversion.stacks:
                self.stacks.add(name)
            if (
                name == tensor
            ):  # the name stays but the values change: the module's weight is not on disk
                del self.disk[stem]

    def by_name(self, name: str, modules: Sequence[str]) -> Match:
        """Match under the module's own name or a known rename; `why` is empty if there is simply no match."""
        if name in self.stacks and name in self.parameters:
            return self._renamed(name, name)
        exact, loaded = self.disk.get(name), self.run_time.get(name, [])
        if exact is not None and (not loaded or exact in loaded):
            return Match(exact, "exact", EXACT)
        if exact is None and len(loaded) == 1:
            return self._renamed(name, loaded[0])
        if loaded:  # the name means one tensor on disk and another in a loaded model
            by_disk, by_run_time = (
                all(m in names for m in modules) for names in (self.disk, self.run_time)
            )
            if exact is not None and by_disk and not by_run_time:
                return Match(exact, "exact", f"{EXACT}, as for all modules of the adapter")
            if len(loaded) == 1 and by_run_time and not by_disk:
                return self._renamed(name, loaded[0])
            places = listed(repr(t) for t in ([exact] if exact else []) + loaded)
            return Match("", "", f"is ambiguous: it could be {places}")
        # An adapter of transformers 4 on a checkpoint of transformers 5: rename both forward, and accept only an unambiguous result.
        onward = self.renames.at_run_time([name + ".weight"]).get(name + ".weight", name)
        loaded = self.run_time.get(onward.removesuffix(".weight"), [])
        if len(loaded) == 1 and self.renames.at_run_time([onward]).get(onward) == onward:
            return self._renamed(name, loaded[0])
        return Match("", "", "")

    def _renamed(self, name: str, tensor: str) -> Match:
        if tensor == name:
            return Match(
                tensor, "rename", f"transformers builds it on loading, in {self.renames.model}"
            )
        whose = self.renames.model or "vision-language models"
        return Match(
            tensor,
            "rename",
            f"transformers loads {tensor!r} as {name + '.weight'!r}, or did, in {whose}",
        )

    def by_prefix(self, modules: Sequence[str]) -> list[dict[str, Match]]:
        """List every way in which one exchange of prefixes fits all modules, on disk names or run-time names."""
        run_time = {
            name: tensors[0] for name, tensors in self.run_time.items() if len(tensors) == 1
        }
        run_time |= {name: name for name in self.stacks}
        ways: dict[tuple[str, ...], dict[str, Match]] = {}
        for stems in (self.disk, run_time):
            for strip, add in _prefix_rules(modules, stems):
                why = (
                    f"this exchange of prefixes fits all {len(modules)} modules, and no other does"
                )
                rule = f"prefix {strip!r} → {add!r}"
                matches = {
                    name: Match(stems[_exchange(name, strip, add)], rule, why) for name in modules
                }
                if all(
                    m.tensor not in self.stacks or name in self.parameters
                    for name, m in matches.items()
                ):
                    ways.setdefault(tuple(m.tensor for m in matches.values()), matches)
        return list(ways.values())


def prefix_exchange(module: str, stem: str) -> tuple[str, str]:
    """Return the differing prefixes of a module and its tensor: (strip, add).

    ``model.layers.0.q``, ``transformer.layers.0.q`` → ``("model.", "transformer.")``.
    """
    of_module, of_stem = module.split("."), stem.split(".")
    from_the_end = zip(reversed(of_module), reversed(of_stem), strict=False)
    n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], from_the_end))
    strip, add = (
        "".join(p + "." for p in parts[: len(parts) - n]) for parts in (of_module, of_stem)
    )
    return strip, add


def _exchange(name: str, strip: str, add: str) -> str:
    return add + name[len(strip) :]


def _prefix_rules(modules: Sequence[str], stems: Mapping[str, str]) -> list[tuple[str, str]]:
    """List exchanges of a prefix that fit every module, only those with the longest common suffix.

    A prefix may not contain a number: ``layers.0`` is not ``layers.1``. It may be added or removed, as wrappers do, but replaced by another
    only if the suffix contains a layer's number: ``classifier.dense`` is not ``pooler.dense``.
    """
    first, *others = modules
    last = first.rpartition(".")[2]
    rules = {prefix_exchange(first, stem) for stem in stems if stem.rpartition(".")[2] == last}
    rules = {rule for rule in rules if not any(part.isdigit() for part in "".join(rule).split("."))}
    fitting = [
        rule for rule in rules if all(_fits(name, *rule, stems) for name in (first, *others))
    ]
    shortest = min((strip.count(".") for strip, _ in fitting), default=0)
    return sorted(rule for rule in fitting if rule[0].count(".") == shortest)


def _fits(name: str, strip: str, add: str, stems: Mapping[str, str]) -> bool:
    if not name.startswith(strip) or _exchange(name, strip, add) not in stems:
        return False
    return not (strip and add) or any(part.isdigit() for part in name[len(strip) :].split("."))


OTHER_NAME = "the module's name in kohya's files, or in another version of transformers"

TEXT = "text_model."
"""Prefix of the layers of CLIP's text encoder, which transformers 5 leaves out in one of its classes."""

PREFIXES = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
"""Prefixes of kohya's names of each component."""

RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
"""Layers of SDXL's UNet outside of its blocks, by diffusers' names → by the original's."""

FLUX_CLASS = "FluxTransformer2DModel"

_ATTENTION = ("to_q", "to_k", "to_v")
_CONTEXT = ("add_q_proj", "add_k_proj", "add_v_proj")

FLUX = {
    "transformer_blocks": {
        "double_blocks.{}.img_attn.qkv": tuple(f"attn.{name}" for name in _ATTENTION),
        "double_blocks.{}.txt_attn.qkv": tuple(f"attn.{name}" for name in _CONTEXT),
        "double_blocks.{}.img_attn.proj": ("attn.to_out.0",),
        "double_blocks.{}.txt_attn.proj": ("attn.to_add_out",),
        "double_blocks.{}.img_mlp.0": ("ff.net.0.proj",),
        "double_blocks.{}.img_mlp.2": ("ff.net.2",),
        "double_blocks.{}.txt_mlp.0": ("ff_context.net.0.proj",),
        "double_blocks.{}.txt_mlp.2": ("ff_context.net.2",),
        "double_blocks.{}.img_mod.lin": ("norm1.linear",),
        "double_blocks.{}.txt_mod.lin": ("norm1_context.linear",),
    },
    "single_transformer_blocks": {
        "single_blocks.{}.linear1": (*(f"attn.{name}" for name in _ATTENTION), "proj_mlp"),
        "single_blocks.{}.linear2": ("proj_out",),
        "single_blocks.{}.modulation.lin": ("norm.linear",),
    },
}
"""Layers of Flux's blocks by the original's names → the layers by diffusers' names that hold their rows, in order."""


def match_modules(
    base: Checkpoint,
    config: ModelConfig,
    adapter: DeltaSource,
    weights: WeightView,
    renames: Renames,
    parameters: Iterable[str],
) -> dict[str, Match]:
    """Match every module of an adapter to a base's weight; see `match_names`. A module without a weight has an empty match.

    Raises
    ------
    UsageError
        If the user names a pipeline's class.
    MismatchError
        If only one of the two is a pipeline's.
    UnsupportedError
        If a component of a pipeline that the adapter changes is quantized.
    """
    if config.pipeline and config.architecture is not None:
        raise UsageError(
            "architecture: the base is a pipeline, whose components say their classes; leave the option out"
        )
    of_pipeline = isinstance(adapter, PipelineAdapter)
    if of_pipeline != config.pipeline:
        expected = (
            f"{PIPELINE_NAME} and no {SINGLE_NAME} or its index in {base.path}"
            if of_pipeline
            else (
                f"names of a diffusers pipeline (unet.….lora_A.weight, lora_unet_….lora_down.weight), as {base.path} is one; evaluate, "
                "repair and map need a language model"
            )
        )
        raise MismatchError(
            f"{adapter.path}: is {'' if of_pipeline else 'not '}an adapter of a diffusers pipeline; expected {expected}"
        )
    if not of_pipeline:
        return match_names(adapter.modules, weights, renames, parameters)
    return _match_pipeline(base, adapter, weights)


def _match_pipeline(
    base: Checkpoint, adapter: DeltaSource, weights: WeightView
) -> dict[str, Match]:
    alphas = [
        name for name in adapter.tensors if name.endswith(".alpha") and not name.startswith("lora_")
    ]
    if alphas and _class_of(base, "transformer") != FLUX_CLASS:
        raise UnsupportedError(
            f"{adapter.path}: refused: {alphas[0]!r}: diffusers loads alphas beside lora_A for Flux only; scale lora_B itself instead"
        )
    stems = {name.removesuffix(".weight"): name for name in weights if name.endswith(".weight")}
    known: defaultdict[str, list[tuple[str, ...]]] = defaultdict(list)
    for name, modules in _kohya_names(base, stems):
        known[name].append(tuple(stems[module] for module in modules))
    matches: dict[str, Match] = {}
    for module in adapter.modules:
        candidates: list[tuple[str, ...]] = [
            (stems[name],) for name in _spellings(module) if name in stems
        ]
        matches[module] = _match(module, candidates + known[module], weights)
    changed = {
        piece.weight
        for m in matches.values()
        for piece in m.pieces or (TensorSlice(m.tensor),)
        if m.tensor
    }
    coded = {tensor.partition(".")[0] for tensor in changed & weights.quantized_names}
    for component in sorted({tensor.partition(".")[0] for tensor in changed}):
        if component in coded or read_model_config(base.path / component).quantization:
            raise UnsupportedError(
                f"{base.path / component}: is quantized, which is not supported in pipelines; use the 16-bit component"
            )
    return matches


def _spellings(module: str) -> Iterator[str]:
    """List the names that the base may have for a module by diffusers' name."""
    yield module
    component, _, rest = module.partition(".")
    if component.startswith("text_encoder"):
        yield f"{component}.{rest.removeprefix(TEXT) if rest.startswith(TEXT) else TEXT + rest}"


def _match(module: str, candidates: Sequence[tuple[str, ...]], weights: WeightView) -> Match:
    """Choose the only candidate; each consists of the tensors that hold the module's rows, in order."""
    if not candidates:
        return Match("", "", f"has no tensor of a known name in the base ({', '.join(PREFIXES)})")
    if len(candidates) > 1:
        return Match(
            "", "", f"is ambiguous: it could be {candidates[0][0]!r} or {candidates[1][0]!r}"
        )
    first, *others = tensors = candidates[0]
    if f"{module}.weight" == first:
        return Match(first, "exact", EXACT)
    if not others:
        return Match(first, "pipeline", OTHER_NAME)
    last_names = (tensor.removesuffix(".weight").rpartition(".")[2] for tensor in others)
    rows = pairwise(accumulate((weights[tensor].shape[0] for tensor in tensors), initial=0))
    pieces = tuple(
        TensorSlice(tensor, None, span) for tensor, span in zip(tensors, rows, strict=True)
    )
    return Match(
        "+".join([first.removesuffix(".weight"), *last_names]), "pipeline", OTHER_NAME, pieces
    )


def _class_of(base: Checkpoint, component: str) -> Any:
    return read_model_config(base.path / component).values.get("_class_name")


def _kohya_names(base: Checkpoint, stems: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each name of kohya's, and the modules of the base that hold its rows."""
    layers: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for stem in stems:
        component, _, rest = stem.partition(".")
        layers[component][rest] = None
    for component, names in layers.items():
        known: dict[str, tuple[str, ...]] = {layer: (layer,) for layer in names}
        kind = _class_of(base, component)
        if (
            component == "unet"
            and kind == "UNet2DConditionModel"
            and "add_embedding.linear_1" in names
        ):
            known |= {name: (layer,) for layer, name in _sdxl(names)}
        elif component == "transformer" and kind == FLUX_CLASS:
            known = dict(_flux(names))
        elif component in ("text_encoder", "text_encoder_2") and not any(
            layer.startswith(TEXT) for layer in names
        ):
            known = {TEXT + layer: (layer,) for layer in names}
        for name, rows in known.items():
            for prefix in PREFIXES[component]:
                yield (
                    prefix + name.replace(".", "_"),
                    tuple(f"{component}.{layer}" for layer in rows),
                )


def _sdxl(layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the layers of SDXL's UNet, each with its name in the original code, which counts the blocks' layers through."""
    layers = list(layers)
    numbered = re.compile(r"(down|up)_blocks\.\d+\.(?:resnets|downsamplers)\.\d+")
    resnets = {m[0] for m in map(numbered.match, layers) if m}
    starts: dict[tuple[str, int], int] = {}
    for side, first in (("down", 1), ("up", 0)):
        counts = [
            sum(name.startswith(f"{side}_blocks.{block}.") for name in resnets)
            for block in range(len(resnets))
        ]
        starts |= {(side, block): first + sum(counts[:block]) for block in range(len(resnets))}
    for layer in layers:
        if layer in OUTSIDE:
            yield layer, OUTSIDE[layer]
        elif match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", layer):
            kind, number, rest = match.groups()
            yield (
                layer,
                f"middle_block.{2 * int(number) if kind == 'resnets' else 1}.{RESNET.get(rest, rest)}",
            )
        elif match := re.fullmatch(
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)",
            layer,
        ):
            side, block, kind, number, rest = match.groups()
            start = starts[side, int(block)]
            count = sum(name.startswith(f"{side}_blocks.{block}.resnets.") for name in resnets)
            if kind == "downsamplers":
                yield layer, f"input_blocks.{start + count}.0.op"
            elif kind == "upsamplers":
                attends = any(name.startswith(f"up_blocks.{block}.attentions.") for name in layers)
                yield layer, f"output_blocks.{start + count - 1}.{1 + attends}.conv"
            else:
                blocks = "input_blocks" if side == "down" else "output_blocks"
                yield (
                    layer,
                    f"{blocks}.{start + int(number)}.{int(kind == 'attentions')}.{RESNET.get(rest, rest)}",
                )


def _flux(layers: Mapping[str, None]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the original's name of each layer of Flux's blocks, with the layers that hold its rows."""
    for blocks, table in FLUX.items():
        numbers = dict.fromkeys(
            m[1] for layer in layers if (m := re.match(rf"{blocks}\.(\d+)\.", layer))
        )
        for number in numbers:
            for name, rows in table.items():
                inside = tuple(f"{blocks}.{number}.{layer}" for layer in rows)
                if all(layer in layers for layer in inside):
                    yield name.format(number), inside
