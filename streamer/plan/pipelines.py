"""Match the modules of a diffusers pipeline's adapter to the pipeline's weights, by diffusers' names or kohya's.

diffusers' names are the components' own. kohya joins a name's parts with underscores, so its names are made from the base's and looked up:
``unet.down_blocks.0.attentions.0.proj_in`` → ``lora_unet_down_blocks_0_attentions_0_proj_in``. For SDXL and Flux, kohya trains the original
code, whose names `_sdxl` and `_flux` make: ``unet.down_blocks.1.attentions.0.proj_in`` is ``input_blocks.4.1.proj_in`` there, and three
layers of an attention are one, ``double_blocks.0.img_attn.qkv``. Such a fused matrix has its rows in several tensors of the base.
A name that these do not make, or that two tensors have, is refused.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from streamer.adapters.adapter import DeltaSource, PipelineAdapter
from streamer.errors import MismatchError, UnsupportedError, UsageError
from streamer.plan.name_matching import EXACT, Match, TensorSlice
from streamer.storage.checkpoint import PIPELINE_NAME, SINGLE_NAME, Checkpoint
from streamer.weights.logical import WeightView
from streamer.weights.model_config import ModelConfig, read_model_config

Layers = tuple[str, ...]
"""Layers of the base, or their tensors, that together hold a matrix's rows."""

OTHER_NAME = "the module's name in kohya's files, or in another version of transformers"

TEXT_MODEL = "text_model."
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


_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_LAYER = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_COUNTED = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|downsamplers)\.\d+")


def of_pipeline(base: Checkpoint, config: ModelConfig, adapter: DeltaSource) -> bool:
    """Test whether base and adapter are a pipeline's.

    Raises
    ------
    UsageError
        If the user names a pipeline's class.
    MismatchError
        If only one of the two is a pipeline's.
    """
    if config.pipeline and config.architecture is not None:
        raise UsageError(
            "architecture: the base is a pipeline, whose components say their classes; leave the option out"
        )
    is_adapter = isinstance(adapter, PipelineAdapter)
    if is_adapter == config.pipeline:
        return is_adapter
    kind = "is not an adapter"
    expected = (
        f"names of a diffusers pipeline (unet.….lora_A.weight, lora_unet_….lora_down.weight), as {base.path} is one; evaluate, "
        "repair and map need a language model"
    )
    if is_adapter:
        kind = "is an adapter"
        expected = f"{PIPELINE_NAME} and no {SINGLE_NAME} or its index in {base.path}"
    raise MismatchError(f"{adapter.path}: {kind} of a diffusers pipeline; expected {expected}")


def match_pipeline(base: Checkpoint, adapter: DeltaSource, weights: WeightView) -> dict[str, Match]:
    """Match every module of a pipeline's adapter to a weight. A module without one has an empty match.

    Raises
    ------
    UnsupportedError
        If a component that the adapter changes is quantized, or the file has alphas that diffusers does not read.
    """
    alphas = (name for name in adapter.tensors if name.endswith(".alpha"))
    alpha = next((name for name in alphas if not name.startswith("lora_")), None)
    if alpha is not None and _class_of(base, "transformer") != FLUX_CLASS:
        raise UnsupportedError(
            f"{adapter.path}: refused: {alpha!r}: diffusers loads alphas beside lora_A for Flux only; scale lora_B itself instead"
        )
    stems = {name.removesuffix(".weight"): name for name in weights if name.endswith(".weight")}
    candidates: defaultdict[str, list[Layers]] = defaultdict(list)
    for module in adapter.modules:
        candidates[module] += [(stems[name],) for name in _spellings(module) if name in stems]
    for name, layers in _kohya_names(base, stems):
        candidates[name].append(tuple(stems[layer] for layer in layers))
    matches = {module: _match(module, candidates[module], weights) for module in adapter.modules}
    found = [match for match in matches.values() if match.tensor]
    changed = {piece.weight for match in found for piece in match.pieces} | {
        match.tensor for match in found if not match.pieces
    }
    coded = changed & weights.quantized_names
    for component in sorted({tensor.partition(".")[0] for tensor in changed}):
        is_coded = any(tensor.startswith(f"{component}.") for tensor in coded)
        if is_coded or read_model_config(base.path / component).quantization:
            raise UnsupportedError(
                f"{base.path / component}: is quantized, which is not supported in pipelines; use the 16-bit component"
            )
    return matches


def _spellings(module: str) -> Iterator[str]:
    """List the names that the base may have for a module by diffusers' name."""
    yield module
    component, _, rest = module.partition(".")
    if component.startswith("text_encoder"):
        yield f"{component}.{rest.removeprefix(TEXT_MODEL) if rest.startswith(TEXT_MODEL) else TEXT_MODEL + rest}"


def _match(module: str, candidates: Sequence[Layers], weights: WeightView) -> Match:
    """Choose the only candidate; each consists of the tensors that hold the module's rows, in order."""
    if not candidates:
        return Match("", "", f"has no tensor of a known name in the base ({', '.join(PREFIXES)})")
    tensors, *more = candidates
    first, *others = tensors
    if more:
        return Match("", "", f"is ambiguous: it could be {first!r} or {more[0][0]!r}")
    if first == f"{module}.weight":
        return Match(first, "exact", EXACT)
    if not others:
        return Match(first, "pipeline", OTHER_NAME)
    heights = (weights[tensor].shape[0] for tensor in tensors)
    spans = pairwise(accumulate(heights, initial=0))
    pieces = (TensorSlice(tensor, None, rows) for tensor, rows in zip(tensors, spans, strict=True))
    last_names = (tensor.removesuffix(".weight").rpartition(".")[2] for tensor in others)
    name = "+".join([first.removesuffix(".weight"), *last_names])
    return Match(name, "pipeline", OTHER_NAME, tuple(pieces))


def _class_of(base: Checkpoint, component: str) -> Any:
    return read_model_config(base.path / component).values.get("_class_name")


def _kohya_names(base: Checkpoint, stems: Iterable[str]) -> Iterator[tuple[str, Layers]]:
    """Yield each name of kohya's, and the modules of the base that hold its rows."""
    layers_of: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for stem in stems:
        component, _, layer = stem.partition(".")
        layers_of[component][layer] = None
    for component, layers in layers_of.items():
        for name, rows in _names_in(component, _class_of(base, component), layers).items():
            inside = tuple(f"{component}.{layer}" for layer in rows)
            for prefix in PREFIXES[component]:
                yield prefix + name.replace(".", "_"), inside


def _names_in(component: str, kind: Any, layers: Mapping[str, None]) -> Mapping[str, Layers]:
    """Map the names that kohya has for a component's layers → the layers that hold each one's rows."""
    own = {layer: (layer,) for layer in layers}
    if kind == FLUX_CLASS and component == "transformer":
        return dict(_flux(layers))
    if (
        kind == "UNet2DConditionModel"
        and component == "unet"
        and "add_embedding.linear_1" in layers
    ):
        return own | {name: (layer,) for layer, name in _sdxl(layers)}
    is_text = component in ("text_encoder", "text_encoder_2")
    if is_text and not any(layer.startswith(TEXT_MODEL) for layer in layers):
        return {TEXT_MODEL + layer: (layer,) for layer in layers}
    return own


def _sdxl(layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the layers of SDXL's UNet, each with its name in the original code, which counts the blocks' layers through."""
    counted = {m[0]: m.groups() for m in map(_COUNTED.match, layers) if m}
    counts = Counter((side, int(block)) for side, block, _ in counted.values())
    resnets = Counter(
        (side, int(block)) for side, block, kind in counted.values() if kind == "resnets"
    )
    for layer in layers:
        if layer in OUTSIDE:
            yield layer, OUTSIDE[layer]
        elif match := _MIDDLE.fullmatch(layer):
            kind, number, rest = match.groups()
            at = 2 * int(number) if kind == "resnets" else 1
            yield layer, f"middle_block.{at}.{RESNET.get(rest, rest)}"
        elif match := _LAYER.fullmatch(layer):
            side, number_of_block, kind, number, rest = match.groups()
            block = int(number_of_block)
            # The first input block holds the first convolution.
            start = 1 if side == "down" else 0
            start += sum(n for (of, before), n in counts.items() if of == side and before < block)
            after = start + resnets[side, block]
            if kind == "downsamplers":
                yield layer, f"input_blocks.{after}.0.op"
            elif kind == "upsamplers":
                attends = any(name.startswith(f"up_blocks.{block}.attentions.") for name in layers)
                yield layer, f"output_blocks.{after - 1}.{2 if attends else 1}.conv"
            else:
                blocks = "input_blocks" if side == "down" else "output_blocks"
                within = 1 if kind == "attentions" else 0
                yield layer, f"{blocks}.{start + int(number)}.{within}.{RESNET.get(rest, rest)}"


def _flux(layers: Mapping[str, None]) -> Iterator[tuple[str, Layers]]:
    """Yield the original's name of each layer of Flux's blocks, with the layers that hold its rows."""
    for blocks, table in FLUX.items():
        matches = (re.match(rf"{blocks}\.(\d+)\.", layer) for layer in layers)
        for number in dict.fromkeys(match[1] for match in matches if match):
            for name, rows in table.items():
                inside = tuple(f"{blocks}.{number}.{layer}" for layer in rows)
                if all(layer in layers for layer in inside):
                    yield name.format(number), inside
