"""Models of the hub by their sizes: the tensors in the order of their modules, the config, and what PEFT would wrap.

A mixture has its experts one tensor each on disk, as the hub has them, and one parameter
for all of a layer when it is loaded; PEFT wraps that one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from streamer.storage.header import tensor_nbytes
from streamer.weights.base import FLOATS


@dataclass(frozen=True)
class Llama:
    """Sizes of a Llama-shaped model, which determine its tensors and its config.

    Attributes
    ----------
    hidden, intermediate, layers, vocab, heads, kv_heads
        As in the config; hidden is a multiple of heads, and heads of kv_heads.
    tied
        Whether the embedding is also the output layer; if not, there is an ``lm_head``.
    """

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int
    tied: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """List the linear layers of one block: name to (out, in)."""
        h = self.hidden
        inner = self.intermediate
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (inner, h),
            "mlp.up_proj": (inner, h),
            "mlp.down_proj": (h, inner),
        }

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """List the linear layers of all blocks: path in the model to (out, in)."""
        return {
            f"model.layers.{i}.{name}": shape
            for i in range(self.layers)
            for name, shape in self.linears.items()
        }

    @property
    def targets(self) -> dict[str, list[str]]:
        """Make the entries of an adapter's config that name its targets: every linear layer."""
        return {"target_modules": sorted({name.rpartition(".")[2] for name in self.linears})}

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """List the tensors in file order: name to shape."""
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for i in range(self.layers):
            out |= {
                f"model.layers.{i}.{name}.weight": shape for name, shape in self.linears.items()
            }
            out |= {
                f"model.layers.{i}.{at}_layernorm.weight": (self.hidden,)
                for at in ("input", "post_attention")
            }
        out["model.norm.weight"] = (self.hidden,)
        return out if self.tied else out | {"lm_head.weight": (self.vocab, self.hidden)}

    def nbytes(self, dtype: str) -> int:
        """Count the bytes of all tensors in this dtype."""
        return sum(tensor_nbytes(dtype, shape) for shape in self.tensors.values())

    def config(self, dtype: str) -> dict[str, Any]:
        """Make the model's ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "torch_dtype": str(FLOATS[dtype]).removeprefix("torch."),
        }


def lora_shapes(model: Llama, rank: int) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """List the shapes of A and B for a LoRA adapter on every linear layer."""
    return {module: ((rank, n), (m, rank)) for module, (m, n) in model.modules.items()}


@dataclass(frozen=True)
class Known(Llama):
    """A Llama of the hub.

    Attributes
    ----------
    more
        What its config says besides the sizes.
    """

    more: dict[str, Any] = field(default_factory=dict)

    def config(self, dtype: str) -> dict[str, Any]:
        """What stands in ``config.json``."""
        return super().config(dtype) | self.more

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Every weight matrix with a spectrum of its own: path on disk to (out, in)."""
        return self.modules

    @property
    def stacks(self) -> dict[str, tuple[str, int, tuple[int, int]]]:
        """Parameters that PEFT wraps as stacks of matrices: the wrapper's path to parameter, matrices, (out, in) of one."""
        return {}


@dataclass(frozen=True)
class Mixture(Known):
    """A mixture of experts; `intermediate` is the width inside one of them.

    Attributes
    ----------
    head_dim
        Width of an attention head, whatever `hidden` is.
    experts, per_token
        How many a layer has, and how many of them a token takes.
    block
        The name of the router and the experts on disk.
    layers_of_one
        The names of an expert's layers on disk, in order; `down` is the one back to `hidden`.
    head_norms
        Whether queries and keys are normed head by head.
    """

    head_dim: int = 128
    experts: int = 8
    per_token: int = 2
    block: str = "mlp"
    layers_of_one: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    down: str = "down_proj"
    head_norms: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block, which all belong to attention."""
        h = self.hidden
        q = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, q),
        }

    @property
    def expert(self) -> dict[str, tuple[int, int]]:
        """The layers of one expert, as on disk."""
        h = self.hidden
        inner = self.intermediate
        return {
            name: (h, inner) if name == self.down else (inner, h) for name in self.layers_of_one
        }

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor in file order: name to shape."""
        norms = ("q_norm", "k_norm") if self.head_norms else ()
        out: dict[str, tuple[int, ...]] = {}
        for name, shape in super().tensors.items():
            if name.endswith(".input_layernorm.weight"):  # after attention, before the norms
                at = name.removesuffix(".input_layernorm.weight")
                out |= {f"{at}.self_attn.{norm}.weight": (self.head_dim,) for norm in norms}
                out[f"{at}.{self.block}.gate.weight"] = (self.experts, self.hidden)
                out |= {
                    f"{at}.{self.block}.experts.{e}.{layer}.weight": of_one
                    for e in range(self.experts)
                    for layer, of_one in self.expert.items()
                }
            out[name] = shape
        return out

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Attention's, and each expert's."""
        return super().matrices | {
            f"model.layers.{i}.{self.block}.experts.{e}.{name}": shape
            for i in range(self.layers)
            for e in range(self.experts)
            for name, shape in self.expert.items()
        }

    @property
    def stacks(self) -> dict[str, tuple[str, int, tuple[int, int]]]:
        """The two parameters that hold a layer's experts when loaded; PEFT wraps the first one first, and the other around it."""
        h = self.hidden
        inner = self.intermediate
        out = {}
        for i in range(self.layers):
            at = f"model.layers.{i}.mlp.experts"
            out[f"{at}.base_layer"] = f"{at}.gate_up_proj", self.experts, (2 * inner, h)
            out[at] = f"{at}.down_proj", self.experts, (h, inner)
        return out

    @property
    def targets(self) -> dict[str, list[str]]:
        """What an adapter's config says that it wraps."""
        return super().targets | {
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        }

    def config(self, dtype: str) -> dict[str, Any]:
        """What stands in ``config.json``; the counts of experts under the names of both families."""
        return super().config(dtype) | {
            "head_dim": self.head_dim,
            "num_experts_per_tok": self.per_token,
            "moe_intermediate_size": self.intermediate,
            "num_experts": self.experts,
            "num_local_experts": self.experts,
        }


LLAMA_3 = {
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}

KNOWN: dict[str, Known] = {
    "llama-3-8b": Known(4096, 14336, 32, 128256, heads=32, kv_heads=8, more=LLAMA_3),
    "llama-3-70b": Known(8192, 28672, 80, 128256, heads=64, kv_heads=8, more=LLAMA_3),
    "mixtral": Mixture(
        4096,
        14336,
        32,
        32000,
        heads=32,
        kv_heads=8,
        block="block_sparse_moe",
        layers_of_one=("w1", "w2", "w3"),
        down="w2",
        more={
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
    ),
    "qwen3-moe": Mixture(
        2048,
        768,
        48,
        151936,
        heads=32,
        kv_heads=4,
        experts=128,
        per_token=8,
        head_norms=True,
        more={
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "max_position_embeddings": 40960,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
}
"""Meta-Llama-3-8B and -70B, Mixtral-8x7B, Qwen3-30B-A3B."""
