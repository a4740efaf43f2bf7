"""Kinds of adapters that PEFT makes: the model, the config, and what is asked of each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.loraga import preprocess_loraga
from seeds import vary
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


VOCAB = 64


def llama_config(**options) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        **options,
    )


def llama(**options) -> Callable[[], nn.Module]:
    return lambda: LlamaForCausalLM(llama_config(**options))


tied = llama(tie_word_embeddings=True)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=48,
            n_layer=2,
            n_head=4,
            vocab_size=VOCAB,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def bert() -> nn.Module:
    return BertModel(
        BertConfig(
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCAB,
        )
    )


class Convolutions(nn.Module):
    """A convolution over as many dimensions as are asked for, kernel 3 and then 1, behind an embedding's rows."""

    def __init__(self, dimensions: int, groups: int = 1) -> None:
        super().__init__()
        layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        self.example = (2, 16, *(4,) * dimensions)
        self.wide = layer(16, 24, 3, padding=1, groups=groups)
        self.pointwise = layer(24, 20, 1)
        self.strided = layer(20, 20, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.strided(torch.tanh(self.pointwise(torch.tanh(self.wide(x)))))


def convolutions(dimensions: int) -> Callable[[], nn.Module]:
    return lambda: Convolutions(dimensions)


CONVOLUTIONS = ["wide", "pointwise", "strided"]


@dataclass
class Kind:
    """One kind of adapter.

    Attributes
    ----------
    model
        Makes the base model.
    config
        Makes PEFT's config.
    load
        Loads the model that PEFT wraps from the saved base; by default as it was saved.
    prepare
        Changes the loaded model before PEFT wraps it: grows its vocabulary, say.
    mitigate
        Whether this route takes the kind.
    before
        What PEFT asks for before it wraps the model: a look at its activations or gradients.
    plain
        Whether a plain LoRA adapter can say all that this one says.
    residual
        Whether PEFT takes something off the base when it makes the adapter: the base is what it leaves then.
    shared
        Whether PEFT's merge may work on a model whose embedding and lm_head are one tensor; it adds to both what belongs to one.
    """

    model: Callable[[], nn.Module]
    config: Callable[[], peft.PeftConfig]
    load: Callable[[Path, torch.dtype], nn.Module] | None = None
    prepare: Callable[[nn.Module], None] = lambda model: None
    mitigate: bool = True
    shared: bool = True
    residual: bool = False

    plain: bool = True
    before: Callable[[nn.Module, Any], None] = lambda model, config: None

    @property
    def options(self) -> dict[str, Any]:
        return {"base_is_residual": True} if self.residual else {}


def lora(*targets: str, **options) -> Callable[[], peft.PeftConfig]:
    return lambda: peft.LoraConfig(
        **{"r": 4, "lora_alpha": 12, "target_modules": list(targets), **options}
    )


def classifier(base: Path, dtype: torch.dtype) -> nn.Module:
    return LlamaForSequenceClassification.from_pretrained(base, dtype=dtype, num_labels=3)


def bert_classifier(base: Path, dtype: torch.dtype) -> nn.Module:
    return BertForSequenceClassification.from_pretrained(base, dtype=dtype, num_labels=3)


def grow(model: nn.Module) -> None:
    torch.manual_seed(vary(5))
    model.resize_token_embeddings(VOCAB + 6)  # type: ignore[operator]


def lora_ga(model: nn.Module, config: Any) -> None:
    preprocess_loraga(
        model,
        config,
        lambda: model(torch.randint(1, VOCAB, (8, 12))).logits.float().pow(2).mean().backward(),
    )


KINDS: dict[str, Kind] = {
    "linear": Kind(llama(), lora("q_proj", "down_proj")),
    "rslora": Kind(llama(), lora("q_proj", "up_proj", use_rslora=True, alpha_pattern={"up_proj": 3})),
    "parameters, patterns": Kind(
        llama(),
        lora(
            "k_proj", target_parameters=["q_proj.weight", "down_proj.weight"],
            rank_pattern={"q_proj.weight": 6, "down_proj": 3}, alpha_pattern={"q_proj": 5, "down_proj.weight": 7},
        ),
    ),
    "fan_in_fan_out": Kind(gpt2, lora("c_attn", "c_proj", fan_in_fan_out=True)),
    "embedding": Kind(llama(), lora("embed_tokens", "q_proj")),
    "embedding, resized": Kind(llama(), lora("embed_tokens", "lm_head"), prepare=grow),
    "conv1d": Kind(convolutions(1), lora("wide", "pointwise", "strided")),
    "conv2d": Kind(convolutions(2), lora("wide", "pointwise", "strided")),
    "conv2d, lora_bias": Kind(convolutions(2), lora("wide", "pointwise", lora_bias=True), plain=False),
    "conv3d": Kind(convolutions(3), lora("wide", "strided")),  # a kernel of 1x1x1 PEFT itself cannot merge
    "modules_to_save": Kind(llama(), lora("q_proj", modules_to_save=["lm_head", "layers.1.mlp"])),
    "modules_to_save, new": Kind(llama(), lora("q_proj", task_type="SEQ_CLS"), load=classifier),
    "bias=all": Kind(llama(attention_bias=True, mlp_bias=True), lora("q_proj", "up_proj", bias="all")),
    "bias=lora_only": Kind(llama(attention_bias=True, mlp_bias=True), lora("q_proj", "up_proj", bias="lora_only")),
    "lora_bias": Kind(llama(attention_bias=True), lora("q_proj", "o_proj", lora_bias=True), plain=False),
    "lora_bias, bias=all": Kind(llama(attention_bias=True), lora("q_proj", lora_bias=True, bias="all"), plain=False),
    "lm_head with its base": Kind(llama(), lora("q_proj", "lm_head")),
    "resized": Kind(llama(), lora("q_proj"), prepare=grow),
    "resized, saved modules": Kind(llama(), lora("q_proj", modules_to_save=["embed_tokens", "lm_head"]), prepare=grow),
    "DoRA": Kind(llama(), lora("q_proj", "down_proj", use_dora=True), mitigate=False),
    "DoRA, fan_in_fan_out": Kind(gpt2, lora("c_attn", "c_proj", use_dora=True, fan_in_fan_out=True), mitigate=False),
    "DoRA, embedding": Kind(llama(), lora("embed_tokens", "v_proj", use_dora=True, use_rslora=True), mitigate=False),
    "DoRA, conv1d": Kind(convolutions(1), lora("wide", "pointwise", "strided", use_dora=True), mitigate=False),
    "DoRA, conv2d": Kind(convolutions(2), lora("wide", "pointwise", "strided", use_dora=True), mitigate=False),
    "DoRA, conv3d": Kind(convolutions(3), lora("wide", "strided", use_dora=True), mitigate=False),
    "DoRA, saved modules": Kind(llama(), lora("q_proj", use_dora=True, modules_to_save=["lm_head"]), mitigate=False),
    "PiSSA": Kind(llama(), lora("q_proj", "up_proj", init_lora_weights="pissa"), residual=True, plain=False),
    "OLoRA": Kind(llama(), lora("q_proj", "up_proj", init_lora_weights="olora"), residual=True, plain=False),
    "LoRA-GA": Kind(
        llama(), lora("q_proj", "up_proj", init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()),
        before=lora_ga, residual=True, plain=False,
    ),
    "LoHa": Kind(llama(), lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=["q_proj", "down_proj"]), mitigate=False),
    "LoHa, conv2d": Kind(convolutions(2), lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=CONVOLUTIONS), mitigate=False),
    "LoKr": Kind(llama(), lambda: peft.LoKrConfig(r=4, alpha=8, target_modules=["q_proj", "down_proj"]), mitigate=False),
    "LoKr, both decomposed": Kind(
        llama(), lambda: peft.LoKrConfig(r=2, alpha=8, target_modules=["q_proj"], decompose_both=True, decompose_factor=8), mitigate=False
    ),
    "LoKr, large rank": Kind(llama(), lambda: peft.LoKrConfig(r=40, alpha=8, target_modules=["q_proj", "up_proj"]), mitigate=False),
    "LoKr, conv1d": Kind(convolutions(1), lambda: peft.LoKrConfig(r=2, alpha=8, target_modules=CONVOLUTIONS), mitigate=False),
    "LoKr, conv1d without factors of w2": Kind(
        convolutions(1), lambda: peft.LoKrConfig(r=40, alpha=8, target_modules=CONVOLUTIONS), mitigate=False
    ),
    "LoKr, conv2d": Kind(convolutions(2), lambda: peft.LoKrConfig(r=2, alpha=8, target_modules=CONVOLUTIONS), mitigate=False),
    "AdaLoRA": Kind(llama(), lambda: peft.AdaLoraConfig(init_r=6, lora_alpha=16, total_step=9, target_modules=["q_proj", "up_proj"]),
                    mitigate=False),
    "AdaLoRA, conv2d": Kind(convolutions(2), lambda: peft.AdaLoraConfig(init_r=6, target_r=3, total_step=10, target_modules=["wide"]),
                            mitigate=False),
    "VeRA": Kind(llama(), lambda: peft.VeraConfig(r=16, target_modules=["q_proj", "o_proj"], d_initial=1.0), mitigate=False),
    "VeRA, shapes": Kind(llama(), lambda: peft.VeraConfig(r=16, target_modules=["k_proj", "down_proj"]), mitigate=False),
    "OFT": Kind(llama(), lambda: peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "down_proj"]), mitigate=False),
    "OFT, exact": Kind(
        llama(), lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=["q_proj"], use_cayley_neumann=False), mitigate=False
    ),
    "OFT, shared, constrained": Kind(
        llama(), lambda: peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], block_share=True, coft=True, eps=0.5), mitigate=False
    ),
    "OFT, three terms": Kind(
        llama(), lambda: peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], num_cayley_neumann_terms=3), mitigate=False
    ),
    "OFT, conv2d": Kind(convolutions(2), lambda: peft.OFTConfig(oft_block_size=8, target_modules=["wide"]), mitigate=False),
    "OFT, embedding": Kind(llama(), lambda: peft.OFTConfig(oft_block_size=8, target_modules=["embed_tokens"]), mitigate=False),
    "BOFT": Kind(llama(), lambda: peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj", "down_proj"]), mitigate=False),
    "BOFT, conv2d": Kind(convolutions(2), lambda: peft.BOFTConfig(boft_block_size=8, target_modules=["wide"]), mitigate=False),
    "MiSS": Kind(llama(), lambda: peft.MissConfig(r=16, target_modules=["q_proj", "down_proj"]), mitigate=False),
    "MiSS, uneven": Kind(llama(), lambda: peft.MissConfig(r=7, target_modules=["q_proj", "up_proj"]), mitigate=False),
    "MiSS, bat": Kind(llama(), lambda: peft.MissConfig(r=8, target_modules=["k_proj", "down_proj"], init_weights="bat"), mitigate=False),
    "SHiRA": Kind(llama(), lambda: peft.ShiraConfig(r=4, target_modules=["q_proj", "down_proj"]), mitigate=False),
    "DeLoRA": Kind(llama(), lambda: peft.DeloraConfig(r=4, target_modules=["k_proj", "down_proj"]), mitigate=False),
    "HRA": Kind(llama(), lambda: peft.HRAConfig(r=4, target_modules=["k_proj", "down_proj"]), mitigate=False),
    "HRA, orthogonal": Kind(llama(), lambda: peft.HRAConfig(r=4, target_modules=["k_proj"], apply_GS=True), mitigate=False),
    "HRA, conv2d": Kind(convolutions(2), lambda: peft.HRAConfig(r=4, target_modules=["wide"]), mitigate=False),
    "tied, lm_head": Kind(tied, lora("q_proj", "lm_head"), shared=False),
    "tied, embedding": Kind(tied, lora("q_proj", "embed_tokens"), shared=False),
    "tied, both": Kind(tied, lora("lm_head", "embed_tokens"), shared=False),
    "tied, one delta": Kind(tied, lora("q_proj", "embed_tokens", ensure_weight_tying=True), shared=False, plain=False),
    "tied, one delta of lm_head": Kind(tied, lora("q_proj", "lm_head", ensure_weight_tying=True), shared=False, plain=False),
    "tied, saved lm_head": Kind(tied, lora("q_proj", modules_to_save=["lm_head"]), shared=False),
    "tied, saved embedding": Kind(tied, lora("q_proj", modules_to_save=["embed_tokens"]), shared=False),
    "tied, saved as one": Kind(tied, lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "tied, resized": Kind(tied, lora("q_proj"), prepare=grow),
    "tied, tokens": Kind(tied, lora("q_proj", trainable_token_indices=[3, 5])),
    "tied, new tokens": Kind(tied, lora("q_proj", trainable_token_indices=[3, 5]), prepare=grow),
    "tied, new tokens by name": Kind(tied, lora("q_proj", trainable_token_indices={"embed_tokens": [3, 5]}), prepare=grow),
    "tied, tokens of lm_head": Kind(tied, lora("q_proj", trainable_token_indices={"lm_head": [3, 5]}), shared=False),
    "tied, GPT-2": Kind(gpt2, lora("c_attn", "lm_head", fan_in_fan_out=True), shared=False),
    "headless, new head": Kind(bert, lora("query", task_type="SEQ_CLS"), load=bert_classifier),
    "headless, embedding": Kind(bert, lora("query", "word_embeddings")),
    "headless, saved embedding": Kind(bert, lora("query", modules_to_save=["word_embeddings"])),
    "headless, tokens": Kind(bert, lora("query", trainable_token_indices={"word_embeddings": [3, 5]})),
    "trainable tokens": Kind(llama(), lora("q_proj", trainable_token_indices=[3, 60, 7])),
    "trainable tokens by name": Kind(llama(), lora("v_proj", trainable_token_indices={"embed_tokens": [1, 2]})),
}  # fmt: skip

APART = {
    ("tied, one delta", "bf16"),
    ("tied, one delta of lm_head", "bf16"),
    ("HRA, conv2d", "fp32"),
}
"""Kinds whose shared factors PEFT trains separately in this dtype: its cast to float32 copies them; and one that it merges less exactly."""
