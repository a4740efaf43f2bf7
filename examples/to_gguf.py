"""Merge an adapter into a Llama, Qwen2 or Qwen3 with its intruders scaled down, as one GGUF file and nothing in between.

    pip install gguf
    python examples/to_gguf.py BASE ADAPTER merged.gguf --lambda 0.75 --pre llama-bpe

Each tensor is written as it comes from `streamer.iter_merged`, in the dtype that the base has it in; vectors become float32, as in
llama.cpp's own converter. The tokenizer has to be byte-level BPE, and RoPE without scaling. An example: change it to what you need.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

import streamer

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""`model_type` in config.json → llama.cpp's architecture."""

TYPES = {
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
}


def convert(base: Path, adapter: Path, output: Path, pre: str = "default", **options: Any) -> None:
    """Write the merged model as GGUF.

    Parameters
    ----------
    base, adapter
        Directories, as `streamer.iter_merged` takes them.
    output
        The file. The tensors go through a temporary file first, so that a merge that fails leaves nothing here.
    pre
        Name of the tokenizer's rule for splitting text in llama.cpp, like ``llama-bpe`` or ``qwen2``.
    options
        Of `streamer.iter_merged`: `mitigation_lambda`, `findings`, `method` and so on.
    """
    config = json.loads((base / "config.json").read_text())
    if config["model_type"] not in ARCHITECTURES:
        raise SystemExit(
            f"{base}: expected one of {', '.join(ARCHITECTURES)}, found {config['model_type']}"
        )
    arch = ARCHITECTURES[config["model_type"]]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(output, gguf.MODEL_ARCH_NAMES[arch], use_temp_file=True)
    add_hyperparameters(writer, config)
    add_vocabulary(writer, base, config["vocab_size"], pre)
    file_type = gguf.LlamaFileType.ALL_F32
    for name, merged in streamer.iter_merged(base, adapter, dequantize=True, **options):
        if name.endswith(".rotary_emb.inv_freq"):  # in files of years ago; llama.cpp computes it
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise SystemExit(f"{name}: gguf has no name for it in {gguf.MODEL_ARCH_NAMES[arch]}")
        tensor = merged.float() if merged.ndim == 1 else merged
        if arch == gguf.MODEL_ARCH.LLAMA and new.split(".")[-2] in heads:
            tensor = pairs_together(tensor, heads[new.split(".")[-2]])
        if tensor.dtype != torch.float32:
            file_type = TYPES[tensor.dtype][1]
        writer.add_tensor(new, as_array(tensor), raw_dtype=TYPES[tensor.dtype][0])
    writer.add_file_type(file_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pairs_together(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder a Llama's queries or keys: RoPE turns rows i and i + d/2 of a head in transformers, 2i and 2i + 1 in llama.cpp."""
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the same memory as numpy has it: numpy lacks bfloat16, which gguf takes as bytes."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def add_hyperparameters(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Write what llama.cpp takes from ``config.json``."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise SystemExit(
            f"config.json: RoPE without scaling is all that this example writes, found {rope}"
        )
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.get("rope_theta") or rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def add_vocabulary(writer: gguf.GGUFWriter, base: Path, size: int, pre: str) -> None:
    """Write tokens, merges and special tokens of a byte-level BPE tokenizer; rows of the embedding without a token get a name."""
    tree = json.loads((base / "tokenizer.json").read_text())
    if tree["model"]["type"] != "BPE" or tree["model"].get("byte_fallback"):
        raise SystemExit(f"{base}/tokenizer.json: byte-level BPE is all that this example writes")
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, i in tree["model"]["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in tree["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(base, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--lambda",
        dest="mitigation_lambda",
        type=float,
        default=0.75,
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--findings",
        type=Path,
        help="of `streamer detect`; without them each matrix is judged first",
    )
    parser.add_argument(
        "--pre",
        default="default",
        help="llama.cpp's name of the tokenizer's rule for splitting text",
    )
    arguments = parser.parse_args()
    convert(**vars(arguments))
