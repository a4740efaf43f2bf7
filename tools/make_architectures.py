"""Write streamer/plan/architectures.json.gz: what every model class of the installed transformers ties, transposes and names its parts.

python tools/make_architectures.py            # rewrites the file
python tools/make_architectures.py --check    # exit code 1 if the file is not what the installed version says

Each class is built on the meta device from a small config. What a model within it says (a base model, a vision tower, a decoder) stands
with that model's class, and the class around it refers to it by its path and by the place of its config.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import pkgutil
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import table_file
import transformers
from architecture_records import record
from model_facts import Facts, facts_of, nested, with_marked_sizes
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

Change = Callable[[PreTrainedConfig], dict[str, Any]]

TIE = "tie_word_embeddings"

LAYERS = re.compile(r"(^|_)(n_layers?|layers|depth)$")

# Enough layers for one of each kind: of DeepSeek-V3, the first three have no experts; of Jamba, every eighth has attention.
FEW = 8

# What makes a model of configs whose defaults make none: sizes that they leave open, and layers that are not of the kinds they name.
VALUES: dict[str, dict[str, Any]] = {
    "AutoformerConfig": {"prediction_length": 4},
    "BambaConfig": {"attn_layer_indices": [1]},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 4}},
    "CohereCompassTextConfig": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "DbrxConfig": {"attn_config": {"rope_theta": 1e4}},
    "DeepseekOcr2TextConfig": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]},
    "DiffusionGemmaTextConfig": {"num_experts": 4, "moe_intermediate_size": 64, "top_k_experts": 2},
    "DeepseekV2Config": {"first_k_dense_replace": 1},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "Emu3Config": {"vocabulary_map": {"<image>": 4}},
    "EsmConfig": {"vocab_size": 64, "pad_token_id": 1},
    "Granite4VisionConfig": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "4/8"},
    "GraniteMoeHybridConfig": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "HunYuanDenseV1Config": {"head_dim": 128},
    "HunYuanMoEV1Config": {"head_dim": 128},
    "InformerConfig": {"prediction_length": 4},
    "Lfm2MoeConfig": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "HunYuanVLTextConfig": {"head_dim": 128},
    "MinistralConfig": {"head_dim": 128},
    "Mistral4Config": {"first_k_dense_replace": 1},
    "MoonshineStreamingConfig": {"num_key_value_heads": 8},
    "MoshiConfig": {"audio_vocab_size": 64},
    "NemotronConfig": {"num_key_value_heads": 8},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 64},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "ReformerConfig": {"is_decoder": True},
    "TimeSeriesTransformerConfig": {"prediction_length": 4},
    "Wav2Vec2BertConfig": {"vocab_size": 64},
    "Wav2Vec2ConformerConfig": {"vocab_size": 64},
}

# Values under which a model has modules that it has not under the default: key → the values to set where a config has this key.
FURTHER: dict[str, dict[str, Any]] = {
    "relative_attention": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "norm_rel_ebd": "layer_norm",
        "conv_kernel_size": 3,
        "talking_head": True,
    },
    "type_vocab_size": {"type_vocab_size": 2},
    "n_langs": {"n_langs": 4},
    "cross_attn_k": {"cross_attn_k": 4},
    "encoder_attention_type": {"encoder_attention_type": "transient-global"},
    "feed_forward_proj": {"feed_forward_proj": "gated-gelu"},
    "learn_initial_query": {"learn_initial_query": True},
    "num_patterns": {"num_patterns": 2},
    "use_task_id": {"use_task_id": True},
    "new_decoder_architecture": {"new_decoder_architecture": True},
    "word_embed_proj_dim": {"word_embed_proj_dim": 64},
}
RANK = "q_lora_rank"  # queries of low rank where it is set, and of full rank where it is None

AUTO = {
    "MODEL": ("MODEL_MAPPING_NAMES",),
    # BLIP-2's language model is of either kind, by its type.
    "LANGUAGE": (
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    ),
    "TEXT_ENCODING": ("MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",),
    "BACKBONE": ("MODEL_FOR_BACKBONE_MAPPING_NAMES",),
}
"""The auto classes by which a model builds a part from its config, the first that fits; of two tables the first that has the type."""


def model_classes() -> tuple[dict[str, type[PreTrainedModel]], dict[str, str]]:
    """Every model class that a module of transformers exports, and modules that cannot be imported with the reason.

    Classes that only share code are not built alone; those of timm and its wrappers hold another library's modules.
    """
    found = {}
    missing = {}
    for module in pkgutil.walk_packages(transformers.models.__path__, "transformers.models."):
        if not module.name.rpartition(".")[2].startswith("modeling_"):
            continue
        try:
            modeling = importlib.import_module(module.name)
        except ImportError as error:
            missing[module.name] = str(error)
            continue
        for name in getattr(modeling, "__all__", ()):
            cls = getattr(modeling, name)
            is_model = (
                inspect.isclass(cls)
                and issubclass(cls, PreTrainedModel)
                and cls.config_class is not None
            )
            if is_model and not name.endswith("PreTrainedModel") and not name.startswith("Timm"):
                found[name] = cls
    return dict(sorted(found.items())), missing


def small_config(cls: type[PreTrainedConfig], change: Change = lambda _: {}) -> PreTrainedConfig:
    """A default config with few layers, its nested configs too, and with the values that `change` gives for each."""
    config = default_config(cls)
    return cls(**{**_fewer(config, change), **VALUES.get(cls.__name__, {}), **change(config)})


def further_values(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of `FURTHER` that differ from those of a config, which those within it do not count for."""
    values = {
        key: value
        for found in FURTHER.keys() & vars(config)
        for key, value in FURTHER[found].items()
    }
    if RANK in vars(config):
        values[RANK] = None if getattr(config, RANK) else 64
    return {key: value for key, value in values.items() if getattr(config, key, None) != value}


def default_config(cls: type[PreTrainedConfig], **values: Any) -> PreTrainedConfig:
    """A config of the class's defaults."""
    if cls.__name__ in PAIRS:
        return _pair(cls, *PAIRS[cls.__name__])
    return cls(**{**VALUES.get(cls.__name__, {}), **values})


def _fewer(config: PreTrainedConfig, change: Change) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            if inner := {
                **_fewer(value, change),
                **VALUES.get(type(value).__name__, {}),
                **change(value),
            }:
                changed[key] = {"model_type": value.model_type, **inner}
        elif LAYERS.search(key) and isinstance(value, int) and value > FEW:
            changed[key] = FEW
    return changed


def _open_timm() -> None:
    """Let models be built around a vision tower of the timm library, which stays empty; it has no embeddings of tokens and no ties."""
    from transformers.models.timm_wrapper import modeling_timm_wrapper as timm

    for cls in (timm.TimmWrapperModel, timm.TimmWrapperForImageClassification):
        cls.__init__ = PreTrainedModel.__init__
    timm.requires_backends = lambda *_: None


def class_facts(cls: type[PreTrainedModel]) -> Facts:
    """The facts of a class, with those of its decoder with cross attention, which has modules of its own."""
    facts = None
    for make in (
        small_config,
        default_config,
    ):  # a config may not have fewer layers, or a vocabulary of any size
        for change in (with_marked_sizes, lambda config: config):
            with contextlib.suppress(Exception):
                facts = facts or facts_of(cls, change(make(cls.config_class)))
    if facts is None:
        with contextlib.suppress(Exception):
            facts = facts_of(
                cls, with_marked_sizes(default_config(cls.config_class, is_decoder=False))
            )
    if facts is None:
        facts = facts_of(cls, default_config(cls.config_class))  # says why
    with contextlib.suppress(Exception):  # values of several kinds may not go together
        config = small_config(cls.config_class, further_values)
        if any(further_values(c) for _, c in nested(small_config(cls.config_class))):
            facts |= facts_of(cls, with_marked_sizes(config))
    # A model of one of these types may have none, and says so in a way of its own.
    with contextlib.suppress(Exception):
        config = default_config(cls.config_class, is_decoder=True)
        if hasattr(config, "add_cross_attention"):
            config.add_cross_attention = True
            facts |= facts_of(cls, config)
    return facts


def _pair(pair: type[PreTrainedConfig], encoder: str, decoder: str) -> PreTrainedConfig:
    parts = [getattr(transformers, name)() for name in (encoder, decoder)]
    parts[1].is_decoder = parts[1].add_cross_attention = True
    return pair(
        **{key: part.to_dict() for key, part in zip(("encoder", "decoder"), parts, strict=True)}
    )


PAIRS = {
    "EncoderDecoderConfig": ("BertConfig", "BertConfig"),
    "VisionEncoderDecoderConfig": ("ViTConfig", "GPT2Config"),
    "SpeechEncoderDecoderConfig": ("Wav2Vec2Config", "BartConfig"),
}
"""Configs that are made of two others and have no default: of which."""


def tie_rules(classes: dict[str, type[PreTrainedModel]]) -> dict[str, list[str]]:
    """What a config's ``tie_word_embeddings`` means, by model type, where it means more than itself (see ``_Table.tie_rules``)."""
    rules: defaultdict[str, set[str]] = defaultdict(set)
    for model_type in CONFIG_MAPPING:
        with contextlib.suppress(Exception):  # configs that have no default are of no such type
            cls = CONFIG_MAPPING[model_type]
            default, tied, untied = (
                default_config(cls, **values) for values in ({}, {TIE: True}, {TIE: False})
            )
            text = getattr(default, "text_config", None)
            if getattr(default, TIE, False):
                rules["default"].add(model_type)
            if isinstance(text, PreTrainedConfig) and hasattr(text, TIE):
                nested = [{"model_type": text.model_type, TIE: stated} for stated in (False, True)]
                said = [
                    getattr(cls(**{TIE: False}, text_config=values), TIE, False)
                    for values in nested
                ]
            else:
                said = [getattr(untied, TIE, False)]
            if all(said):
                rules["always"].add(model_type)
            elif any(said):
                rules["of_text"].add(model_type)
            elif {**tied.to_dict(), TIE: None} != {**untied.to_dict(), TIE: None}:
                rules["not_alone"].add(model_type)
    for cls in classes.values():
        if f"config.{TIE}" in inspect.getsource(cls.forward):
            rules["not_alone"].add(cls.config_class.model_type)
    return {rule: sorted(rules[rule]) for rule in ("always", "not_alone", "of_text", "default")}


def build(
    classes: dict[str, type[PreTrainedModel]],
) -> tuple[dict[str, Facts], dict[str, list[str]]]:
    """The facts of every class, and for each reason why one cannot be built the classes."""
    built: dict[str, Facts] = {}
    unbuilt: defaultdict[str, list[str]] = defaultdict(list)
    for name, cls in classes.items():
        try:
            built[name] = class_facts(cls)
        except (
            Exception
        ) as error:  # what a constructor says of a config that does not suit it is of every kind
            unbuilt[" ".join(f"{type(error).__name__}: {error}".split())[:120]].append(name)
    return built, dict(unbuilt)


def auto_classes() -> dict[str, dict[str, str]]:
    """Auto class → model type → the class it builds."""
    found: dict[str, dict[str, str]] = {}
    for kind, tables in AUTO.items():
        names = dict(
            item for table in reversed(tables) for item in getattr(modeling_auto, table).items()
        )
        found[kind] = {t: c if isinstance(c, str) else c[0] for t, c in sorted(names.items())}
    return found


def _all_auto() -> set[tuple[str, str]]:
    """Every model type and class that an auto class of transformers puts together."""
    tables = [
        vars(modeling_auto)[n]
        for n in dir(modeling_auto)
        if n.startswith("MODEL_") and n.endswith("_NAMES")
    ]
    pairs = [
        (t, c)
        for table in tables
        for t, classes in table.items()
        for c in ([classes] if isinstance(classes, str) else classes)
    ]
    return set(pairs)


def make_table() -> str:
    """The table: a line of what all share, then a line for all classes that say the same."""
    classes, missing = model_classes()
    _open_timm()
    built, unbuilt = build(classes)
    return as_text(
        built,
        unbuilt | {reason: [module] for module, reason in missing.items()},
        {"auto": auto_classes(), "tie_rules": tie_rules(classes)},
    )


def as_text(
    built: dict[str, Facts], unbuilt: dict[str, list[str]], shared: dict[str, dict[str, Any]]
) -> str:
    """The table as JSON lines; `shared` are facts of no single class."""
    lines: dict[str, int] = {}
    at: dict[str, int] = {}
    types: defaultdict[str, list[str]] = defaultdict(list)
    for name, facts in built.items():
        text = json.dumps(
            record(name, facts, built, shared["auto"]), sort_keys=True, separators=(",", ":")
        )
        at[name] = lines.setdefault(text, len(lines))
        types[facts.model_type].append(name)
    for model_type, name in _all_auto():
        if name in built and name not in types[model_type]:
            types[model_type].append(name)
    head = {
        "source": f"transformers {transformers.__version__} (Apache-2.0), model classes",
        "classes": at,
        "types": {
            model_type: sorted(names) for model_type, names in sorted(types.items()) if names
        },
        **shared,
        "unbuilt": dict(sorted(unbuilt.items())),
    }
    return "\n".join([json.dumps(head, separators=(",", ":")), *lines, ""])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(table_file.main(__doc__ or "", "architectures.json.gz", make_table))
