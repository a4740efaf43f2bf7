"""Match the modules of a pipeline's adapter to tensors of its components: by their own names, or by kohya's names of other code bases.

diffusers' names are the components' own. kohya joins a name's parts with underscores, so its names are made from the base's and looked up:
``unet.down_blocks.0.attentions.0.proj_in`` → ``lora_unet_down_blocks_0_attentions_0_proj_in``. For SDXL and Flux, kohya trains the original
code, whose names `_sdxl` and `_flux` make: ``unet.down_blocks.1.attentions.0.proj_in`` is ``input_blocks.4.1.proj_in`` there, and three
layers of an attention are one, ``double_blocks.0.img_attn.qkv``. Such a fused matrix has its rows in several tensors of the base.
A name that these do not make, or that two tensors have, is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.reader import PipelineAdapter
from streamer.errors import MismatchError, UnsupportedError, UsageError
from streamer.plan.name_matching import EXACT, Match, Renames, match_names
from streamer.plan.targets import TensorSlice
from streamer.storage.checkpoint import PIPELINE_NAME, SINGLE_NAME, Checkpoint
from streamer.weights.base import RowConcat, Weight
from streamer.weights.logical import WeightView
from streamer.weights.model_config import ModelConfig, read_model_config

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
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
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


@dataclass(frozen=True)
class ModuleNames:
    """Matches of an adapter's modules.

    Attributes
    ----------
    names
        The match of each module; the tensor of a fused matrix has a made-up name.
    fused
        Slices that hold the rows of each fused matrix, by its made-up name; only in pipelines.
    """

    names: dict[str, Match]
    fused: Mapping[str, tuple[TensorSlice, ...]] = field(default_factory=dict)

    def extended(self, weights: WeightView) -> WeightView:
        """Add the fused matrices."""

        def joined(name: str, whole: WeightView) -> Weight:
            return RowConcat.of(name, [whole[piece.weight] for piece in self.fused[name]])

        return weights.extended({name: partial(joined, name) for name in self.fused})


def match_modules(base: Checkpoint, config: ModelConfig, adapter: DeltaSource, weights: WeightView, renames: Renames,
                  parameters: Iterable[str]) -> ModuleNames:  # fmt: skip
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
        expected = f"{PIPELINE_NAME} and no {SINGLE_NAME} or its index in {base.path}" if of_pipeline else (
            f"names of a diffusers pipeline (unet.….lora_A.weight, lora_unet_….lora_down.weight), as {base.path} is one; evaluate, fit, "
            "repair and map need a language model")  # fmt: skip
        raise MismatchError(
            f"{adapter.path}: is {'' if of_pipeline else 'not '}an adapter of a diffusers pipeline; expected {expected}"
        )
    if not of_pipeline:
        return ModuleNames(match_names(adapter.modules, weights, renames, parameters))
    return _match_pipeline(base, adapter, weights)


def _match_pipeline(base: Checkpoint, adapter: DeltaSource, weights: WeightView) -> ModuleNames:
    alphas = [name for name in adapter.tensors if name.endswith(".alpha") and not name.startswith("lora_")]
    if alphas and _class_of(base, "transformer") != FLUX_CLASS:
        raise UnsupportedError(
            f"{adapter.path}: refused: {alphas[0]!r}: diffusers loads alphas beside lora_A and lora_B for Flux only; scale lora_B by "
            "alpha/rank and leave them out, or write a LoRA config into the metadata"
        )
    stems = {name.removesuffix(".weight"): name for name in weights if name.endswith(".weight")}
    known: defaultdict[str, list[tuple[str, ...]]] = defaultdict(list)
    for name, modules in _kohya_names(base, stems):
        known[name].append(tuple(stems[module] for module in modules))
    names: dict[str, Match] = {}
    fused: dict[str, tuple[TensorSlice, ...]] = {}
    for module in adapter.modules:
        found: list[tuple[str, ...]] = [(stems[name],) for name in _spellings(module) if name in stems]
        found += known[module]
        names[module] = _match(module, found)
        if len(found) == 1 and len(found[0]) > 1:
            rows = pairwise(accumulate((weights[tensor].shape[0] for tensor in found[0]), initial=0))
            fused[names[module].tensor] = tuple(TensorSlice(t, None, r) for t, r in zip(found[0], rows, strict=True))
    matched = [m.tensor for m in names.values() if m.tensor]
    changed = {part.weight for tensor in matched for part in fused.get(tensor, (TensorSlice(tensor),))}
    coded = {tensor.partition(".")[0] for tensor in changed & weights.quantized_names}
    for component in sorted({tensor.partition(".")[0] for tensor in changed}):
        if component in coded or read_model_config(base.path / component).quantization:
            raise UnsupportedError(
                f"{base.path / component}: is quantized, which is not supported in pipelines; use the 16-bit component"
            )
    return ModuleNames(names, fused)


def _spellings(module: str) -> Iterator[str]:
    """List the names that the base may have for a module by diffusers' name."""
    yield module
    component, _, rest = module.partition(".")
    if component.startswith("text_encoder"):
        yield f"{component}.{rest.removeprefix(TEXT) if rest.startswith(TEXT) else TEXT + rest}"


def _match(module: str, found: list[tuple[str, ...]]) -> Match:
    if not found:
        return Match("", "", f"has no tensor of a known name in the base ({', '.join(PREFIXES)})")
    if len(found) > 1:
        return Match("", "", f"is ambiguous: it could be {found[0][0]!r} or {found[1][0]!r}")
    first, *others = found[0]
    if f"{module}.weight" == first:
        return Match(first, "exact", EXACT)
    more = [tensor.removesuffix(".weight").rpartition(".")[2] for tensor in others]
    return Match("+".join([first.removesuffix(".weight"), *more]) if more else first, "pipeline", OTHER_NAME)


def _class_of(base: Checkpoint, component: str) -> Any:
    return read_model_config(base.path / component).values.get("_class_name")


def _kohya_names(base: Checkpoint, stems: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each name of kohya's, and the modules of the base that hold its rows."""
    layers: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for stem in stems:
        component, _, rest = stem.partition(".")
        layers[component][rest] = None
    for component, own in layers.items():
        known: dict[str, tuple[str, ...]] = {layer: (layer,) for layer in own}
        kind = _class_of(base, component)
        if component == "unet" and kind == "UNet2DConditionModel" and "add_embedding.linear_1" in own:
            known |= {name: (layer,) for layer, name in _sdxl(own)}
        elif component == "transformer" and kind == FLUX_CLASS:
            known = dict(_flux(own))
        elif component in ("text_encoder", "text_encoder_2") and not any(layer.startswith(TEXT) for layer in own):
            known = {TEXT + layer: (layer,) for layer in own}
        for name, rows in known.items():
            for prefix in PREFIXES[component]:
                yield prefix + name.replace(".", "_"), tuple(f"{component}.{layer}" for layer in rows)


def _sdxl(layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the layers of SDXL's UNet, each with its name in the original code, which counts the blocks' layers through."""
    layers = list(layers)
    numbered = re.compile(r"(down|up)_blocks\.\d+\.(?:resnets|downsamplers)\.\d+")
    resnets = {m[0] for m in map(numbered.match, layers) if m}
    starts: dict[tuple[str, int], int] = {}
    for side, first in (("down", 1), ("up", 0)):
        counts = [sum(name.startswith(f"{side}_blocks.{block}.") for name in resnets) for block in range(len(resnets))]
        starts |= {(side, block): first + sum(counts[:block]) for block in range(len(resnets))}
    for layer in layers:
        if layer in OUTSIDE:
            yield layer, OUTSIDE[layer]
        elif match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", layer):
            kind, number, rest = match.groups()
            yield layer, f"middle_block.{2 * int(number) if kind == 'resnets' else 1}.{RESNET.get(rest, rest)}"
        elif match := re.fullmatch(
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", layer
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
                yield layer, f"{blocks}.{start + int(number)}.{int(kind == 'attentions')}.{RESNET.get(rest, rest)}"


def _flux(layers: Mapping[str, None]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the original's name of each layer of Flux's blocks, with the layers that hold its rows."""
    for blocks, table in FLUX.items():
        numbers = dict.fromkeys(m[1] for layer in layers if (m := re.match(rf"{blocks}\.(\d+)\.", layer)))
        for number in numbers:
            for name, rows in table.items():
                inside = tuple(f"{blocks}.{number}.{layer}" for layer in rows)
                if all(layer in layers for layer in inside):
                    yield name.format(number), inside
