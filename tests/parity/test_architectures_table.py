"""The table of architectures says what really built models say; outputs have the names, shapes and ties that their loaders expect."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from command_line import ENV
from safetensors import safe_open
from seeds import vary
from torch import nn
from transformers.pytorch_utils import Conv1D

from streamer.plan.architectures import (
    TIE_KEY,
    Architecture,
    architecture_for,
    architecture_table,
    classes_of,
    pattern_of,
    record_of,
)
from streamer.weights.model_config import ModelConfig

TOOL = Path(__file__).parents[2] / "tools" / "make_architectures.py"
SAME_VERSION = f"transformers {transformers.__version__} " in architecture_table()["source"]

# Small sizes under every name that configs have for them.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "projection_dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "dff", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_num_hidden_layers", "decoder_num_hidden_layers"), 2),
    **dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_experts_per_tok", "patch_size", "max_source_positions"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "vocab_size"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "head_dim", "d_kv"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_conv_pos_embedding_groups"), 1),
    "moe_intermediate_size": 24, "image_size": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_nope_head_dim": 8, "word_embed_proj_dim": 32, "pad_token_id": 0, "num_mel_bins": 8, "embed_dim": 32,
    "bos_token_id": 1, "eos_token_id": 2, "state_size": 4, "time_step_rank": 4, "intermediate_size_mlp": 48, "rotary_dim": 8,
    "num_conv_pos_embeddings": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_query_tokens": 4,
    "encoder_hidden_size": 32, "cross_attention_hidden_size": 32,
}  # fmt: skip


def tiny(kind: str, **values: Any) -> Any:
    """A config of small sizes."""
    cls = getattr(transformers, f"{kind}Config")
    known = cls().to_dict().keys() | {*cls.attribute_map}
    sizes = {key: value for key, value in SIZES.items() if key in known}
    return cls(**{**sizes, **values})


def plain(kind: str, **values: Any) -> Callable[[], Any]:
    return lambda: tiny(kind, **values)


def nest(kind: str, values: dict[str, Any] | None = None, **inner: str) -> Callable[[], Any]:
    """A config of others: keyword → the kind of the nested one."""

    def config() -> Any:
        parts = {key: tiny(other).to_dict() for key, other in inner.items()}
        for part in (parts[key] for key in parts if key == "decoder"):
            part.update(is_decoder=True, add_cross_attention=True)
        return getattr(transformers, f"{kind}Config")(**parts, **(values or {}))

    return config


BLIP2 = {"vision_config": "Blip2Vision", "qformer_config": "Blip2QFormer"}

# Name → (class, config)
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    **{cls: (cls, plain(kind)) for cls, kind in {
        "LlamaModel": "Llama", "LlamaForCausalLM": "Llama", "LlamaForSequenceClassification": "Llama", "MistralForCausalLM": "Mistral",
        "Qwen2ForCausalLM": "Qwen2", "Gemma2ForCausalLM": "Gemma2", "Phi3ForCausalLM": "Phi3", "MixtralForCausalLM": "Mixtral",
        "Qwen3MoeForCausalLM": "Qwen3Moe", "OlmoeForCausalLM": "Olmoe", "GptOssForCausalLM": "GptOss",
        "DeepseekV3ForCausalLM": "DeepseekV3", "Llama4ForCausalLM": "Llama4Text", "GPT2Model": "GPT2", "GPT2LMHeadModel": "GPT2",
        "GPT2DoubleHeadsModel": "GPT2", "GPT2ForTokenClassification": "GPT2", "OpenAIGPTLMHeadModel": "OpenAIGPT",
        "ImageGPTForCausalImageModeling": "ImageGPT", "BertModel": "Bert", "BertForMaskedLM": "Bert", "BertForPreTraining": "Bert",
        "RobertaForCausalLM": "Roberta", "ModernBertForMaskedLM": "ModernBert", "AlbertForMaskedLM": "Albert",
        "ElectraForMaskedLM": "Electra", "DistilBertForMaskedLM": "DistilBert", "XLNetLMHeadModel": "XLNet",
        "XLMWithLMHeadModel": "XLM", "CTRLLMHeadModel": "CTRL", "BloomForCausalLM": "Bloom", "MambaForCausalLM": "Mamba",
        "FalconMambaForCausalLM": "FalconMamba", "OPTForCausalLM": "OPT", "GPTNeoXForCausalLM": "GPTNeoX", "GPTJForCausalLM": "GPTJ",
        "T5ForConditionalGeneration": "T5", "T5EncoderModel": "T5", "BartForConditionalGeneration": "Bart", "MarianMTModel": "Marian",
        "WhisperForConditionalGeneration": "Whisper", "MoonshineForConditionalGeneration": "Moonshine",
        "ViTForImageClassification": "ViT", "ResNetForImageClassification": "ResNet", "TrOCRForCausalLM": "TrOCR",
    }.items()},
    "LLaVA": ("LlavaForConditionalGeneration", nest("Llava", text_config="Llama", vision_config="CLIPVision")),
    "LLaVA of Qwen2 and SigLIP": ("LlavaForConditionalGeneration", nest("Llava", text_config="Qwen2", vision_config="SiglipVision")),
    "CLIPModel": ("CLIPModel", nest("CLIP", text_config="CLIPText", vision_config="CLIPVision")),
    "Gemma 3": ("Gemma3ForConditionalGeneration", nest("Gemma3", text_config="Gemma3Text", vision_config="SiglipVision")),
    "BLIP-2 of OPT": ("Blip2ForConditionalGeneration", nest("Blip2", text_config="OPT", **BLIP2)),
    "BLIP-2 of T5": ("Blip2ForConditionalGeneration", nest("Blip2", text_config="T5", **BLIP2)),
    "BERT and BERT": ("EncoderDecoderModel", nest("EncoderDecoder", encoder="Bert", decoder="Bert")),
    "BERT and GPT-2": ("EncoderDecoderModel", nest("EncoderDecoder", encoder="Bert", decoder="GPT2")),
    "ViT and TrOCR": ("VisionEncoderDecoderModel", nest("VisionEncoderDecoder", encoder="ViT", decoder="TrOCR")),
    "ViT and GPT-2": ("VisionEncoderDecoderModel", nest("VisionEncoderDecoder", encoder="ViT", decoder="GPT2")),
    "wav2vec 2 and BART": ("SpeechEncoderDecoderModel", nest("SpeechEncoderDecoder", encoder="Wav2Vec2", decoder="Bart")),
}  # fmt: skip


def configs_within(config: Any) -> list[Any]:
    inner = [
        value for value in vars(config).values() if isinstance(value, transformers.PreTrainedConfig)
    ]
    return [config, *(c for value in inner for c in configs_within(value))]


@pytest.fixture(params=["tied", "untied", "default"])
def stated(request: pytest.FixtureRequest) -> bool | None:
    return {"tied": True, "untied": False, "default": None}[request.param]


def built(name: str, stated: bool | None, directory: Path) -> tuple[Any, Architecture]:
    """A saved model, and what the table says of the config beside it."""
    cls, config = MODELS[name]
    values = config()
    for c in configs_within(values):
        if stated is not None:
            setattr(c, TIE_KEY, stated)
    values = type(values).from_dict(
        values.to_dict()
    )  # as it is loaded: a class may not do what is stated
    torch.manual_seed(vary(0))
    model = getattr(transformers, cls)(values)
    model.tie_weights()
    model.save_pretrained(directory)
    architecture = architecture_for(
        ModelConfig(json.loads((directory / "config.json").read_text()))
    )
    assert architecture is not None
    return model, architecture


def expand(pattern: str, names: list[str]) -> dict[str, tuple[str, ...]]:
    """The names of a pattern, and the numbers in each."""
    expression = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
    return {name: found.groups() for name in names if (found := expression.fullmatch(name))}


def tied_pairs(architecture: Architecture, names: list[str]) -> set[frozenset[str]]:
    """Sets of the names of each parameter that has several, by the table."""
    groups = {name: {name} for name in names}
    for tie in architecture.ties:
        for name, numbers in expand(tie.name, names).items() if tie.tied else ():
            target = tie.source
            for number in numbers if "*" in target else ():
                target = target.replace("*", number, 1)
            if target in groups:
                both = groups[name] | groups[target]
                for member in both:
                    groups[member] = both
    return {frozenset(group) for group in groups.values() if len(group) > 1}


@pytest.mark.parametrize("name", MODELS)
def test_table_agrees_with_built_model(name: str, stated: bool | None, tmp_path: Path) -> None:
    model, architecture = built(name, stated, tmp_path)
    modules = dict(model.named_modules())
    for path, module in modules.items():
        assert architecture.transposed(path) == isinstance(module, Conv1D), path
        if hasattr(module, "weight"):
            assert architecture.is_embedding(path) == isinstance(module, nn.Embedding), path

    parameters = dict(model.named_parameters(remove_duplicate=False))
    labels = (record_of(architecture.name) or {}).get("labels", ())
    assert {pattern_of(path) for path in parameters} <= architecture.tensors
    for path, parameter in parameters.items():
        if (keys := architecture.vocabulary.get(pattern_of(path))) is not None:
            stated = model.config.to_dict()
            for key in keys:
                stated = stated[key]
            assert stated in parameter.shape, path
        assert (pattern_of(path) not in labels) or model.config.num_labels in parameter.shape, path
    embedding = modules.get(architecture.input_embedding or "-")
    if (
        isinstance(embedding, nn.Embedding) and embedding.weight.shape[0] == 64
    ):  # the vocabulary's, and none of another size
        assert f"{architecture.input_embedding}.weight" in architecture.vocabulary

    pointers: dict[int, set[str]] = {}
    for path, parameter in parameters.items():
        pointers.setdefault(parameter.data_ptr(), set()).add(path)
    assert tied_pairs(architecture, list(parameters)) == {
        frozenset(g) for g in pointers.values() if len(g) > 1
    }

    output = model.get_output_embeddings()
    assert modules.get(architecture.output_embedding or "-") is output
    if architecture.input_embedding is not None:
        assert modules[architecture.input_embedding] is model.get_input_embeddings()

    state = model.state_dict()
    assert {pattern_of(n) for n in state if n not in parameters} == architecture.saved_buffers
    for path, parameter in parameters.items():
        owner = modules[path.rpartition(".")[0]]
        experts = getattr(owner, "num_experts", 0)
        stack = parameter.ndim == 3 and parameter.shape[0] == experts
        assert (pattern_of(path) in architecture.expert_stacks) == stack, path


@pytest.mark.parametrize("name", MODELS)
def test_names_on_disk_are_those_that_transformers_writes(name: str, tmp_path: Path) -> None:
    model, architecture = built(name, None, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        disk = {pattern_of(n) for n in f.keys()}  # noqa: SIM118
    modules = dict(model.named_modules())
    known = {
        f"{path}.weight" for path, m in modules.items() if isinstance(m, nn.Embedding | Conv1D)
    }
    known |= {
        n
        for n in model.state_dict()
        if pattern_of(n) in architecture.expert_stacks.keys() | architecture.saved_buffers
    }
    copies = {pattern_of(n) for g in tied_pairs(architecture, list(model.state_dict())) for n in g}
    for run_time in known:
        found = set(architecture.disk_patterns(run_time)) <= disk
        assert found or pattern_of(run_time) in copies | architecture.unsaved, (
            run_time,
            architecture.disk_patterns(run_time),
        )
    for group in tied_pairs(architecture, list(model.state_dict())):
        assert any(set(architecture.disk_patterns(n)) <= disk for n in group), group


@pytest.mark.parametrize(
    ("name", "orientation"),
    [
        ("Qwen3MoeForCausalLM", "out,in"),
        ("MixtralForCausalLM", "out,in"),
        ("GptOssForCausalLM", "in,out"),
        ("Llama4ForCausalLM", "in,out"),
    ],
)
def test_orientation_of_experts_is_that_of_their_shapes(
    name: str, orientation: str, tmp_path: Path
) -> None:
    model, architecture = built(name, None, tmp_path)
    assert set(architecture.expert_stacks.values()) == {orientation}
    for path, parameter in model.named_parameters():
        if path.endswith("experts.down_proj"):  # takes the experts' width, gives the model's
            assert parameter.shape[1 if orientation == "out,in" else 2] == 32


def test_config_that_names_no_class_is_one_where_the_type_has_one() -> None:
    assert len(classes_of("llama")) > 1
    assert architecture_for(ModelConfig({"model_type": "llama"})) is None
    found = architecture_for(ModelConfig({"model_type": "llama"}), "LlamaForCausalLM")
    assert found is not None
    assert found.output_embedding == "lm_head"
    only = next(t for t in ("marian", "vision-encoder-decoder") if len(classes_of(t)) == 1)
    assert architecture_for(ModelConfig({"model_type": only})) is not None


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": ["MyOwnForCausalLM"], "model_type": "llama"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "gpt2"},
        {"architectures": [3], "model_type": "llama"},
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": {"model_type": "my-own"},
        },
    ],
)
def test_what_the_table_does_not_tell_is_none(config: dict[str, Any]) -> None:
    assert architecture_for(ModelConfig(config)) is None


def test_config_beside_the_model_states_the_tie_where_the_table_says() -> None:
    """Nested configs state their own ties; a missing key means the class's default."""
    config = {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "text_config": {"model_type": "opt"},
    }
    found = architecture_for(ModelConfig(config))
    assert found is not None
    (tie,) = found.ties
    assert (tie.keys, tie.tied) == ((("text_config", TIE_KEY),), True)
    config["text_config"] = {"model_type": "opt", TIE_KEY: False}
    untied = architecture_for(ModelConfig(config))
    assert untied is not None
    assert not untied.ties[0].tied


@pytest.mark.slow
def test_the_table_is_the_installed_version_s() -> None:
    if not SAME_VERSION:
        pytest.skip(
            f"the table is of {architecture_table()['source']}; tools/make_architectures.py renews it"
        )
    assert subprocess.run([sys.executable, TOOL, "--check"], env=ENV, check=False).returncode == 0


# Class → values of its config besides the defaults, and modules that it has under these only.
FURTHER: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "DebertaV2ForMaskedLM": (
        {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2},
        ("deberta.encoder.rel_embeddings", "deberta.embeddings.token_type_embeddings"),
    ),
    "DebertaForMaskedLM": (
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2},
        ("deberta.encoder.rel_embeddings", "deberta.embeddings.token_type_embeddings"),
    ),
    "XLMWithLMHeadModel": ({"n_langs": 4}, ("transformer.lang_embeddings",)),
    "FlaubertWithLMHeadModel": ({"n_langs": 4}, ("transformer.lang_embeddings",)),
    "LongT5ForConditionalGeneration": (
        {"encoder_attention_type": "transient-global"},
        ("encoder.block.0.layer.0.TransientGlobalSelfAttention.global_relative_attention_bias",),
    ),
    "T5ForConditionalGeneration": ({"feed_forward_proj": "gated-gelu"}, ("encoder.block.0.layer.1.DenseReluDense.wi_0",)),
    "DeepseekV3ForCausalLM": ({"q_lora_rank": None}, ("model.layers.1.self_attn.q_proj",)),
    "OPTForCausalLM": ({"word_embed_proj_dim": 8}, ("model.decoder.project_in",)),
}  # fmt: skip


def lacking(model: nn.Module, architecture: Architecture) -> set[str]:
    """Patterns of a model's tensors that the table does not have, and of modules that it takes for embeddings, or does not."""
    modules = dict(model.named_modules())
    weights = {
        name: name.rpartition(".")[0]
        for name, p in model.named_parameters()
        if name.endswith(".weight") and p.ndim == 2
    }
    wrong = [
        m
        for m in weights.values()
        if architecture.is_embedding(m) != isinstance(modules[m], nn.Embedding)
    ]
    return {
        pattern_of(name) for name in model.state_dict() if not architecture.has_tensor(name)
    } | {*map(pattern_of, wrong)}


@pytest.mark.parametrize("cls", FURTHER)
def test_table_has_what_another_config_makes(cls: str) -> None:
    values, own = FURTHER[cls]
    config = zoo.tiny_config(getattr(transformers, cls).config_class, **values)
    with torch.device("meta"):
        model = getattr(transformers, cls)(config)
    architecture = architecture_for(ModelConfig({**config.to_dict(), "architectures": [cls]}))
    assert architecture is not None
    assert {*own} <= dict(model.named_modules()).keys()
    assert lacking(model, architecture) == set()


def test_layer_that_the_table_does_not_have_is_an_embedding_by_its_name() -> None:
    """Earlier versions of transformers had relative positions in BERT."""
    architecture = architecture_for(
        ModelConfig({"architectures": ["BertModel"], "model_type": "bert"})
    )
    assert architecture is not None
    attention = "encoder.layer.0.attention.self"
    for module, looked_up in {"distance_embedding": True, "another": False, "query": False}.items():
        assert architecture.is_embedding(f"{attention}.{module}") == looked_up
        assert architecture.is_embedding(f"bert.{attention}.{module}") == looked_up


OF_SEVERAL_KINDS = ["BambaForCausalLM", "BltForCausalLM", "DeepseekV2ForCausalLM", "Dots1ForCausalLM", "GraniteMoeHybridForCausalLM",
                    "KimiLinearForCausalLM", "Mistral4ForCausalLM", "ReformerForMaskedLM"]  # fmt: skip


def tensors_lacking(names: Iterable[str]) -> tuple[dict[str, set[str]], int]:
    """Class → what the table lacks of a tiny model of it, and the number of classes that were built."""
    found = {}
    count = 0
    for name in names:
        try:
            config = zoo.config_of(name)
            with torch.device("meta"):
                model = getattr(transformers, name)(config)
        except Exception:  # other libraries are not installed, or small sizes do not suit it
            continue
        count += 1
        architecture = architecture_for(ModelConfig({**config.to_dict(), "architectures": [name]}))
        if missing := {"class"} if architecture is None else lacking(model, architecture):
            found[name] = missing
    return found, count


def test_table_has_the_tensors_of_models_of_several_kinds_of_layers() -> None:
    assert tensors_lacking(OF_SEVERAL_KINDS) == ({}, len(OF_SEVERAL_KINDS))


@pytest.mark.slow
def test_table_has_every_tensor_of_every_class() -> None:
    missing, count = tensors_lacking(zoo.classes())
    assert missing == {}
    assert count > 450
