"""The example that converts a merged model into GGUF: its tensors as gguf reads them, and what llama.cpp makes of the file."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import gguf
import pytest
import tokenized_texts
import torch
import transformers
from architectures import LINEAR, TEXT, config
from causal_models import make_adapter
from command_line import ENV
from pairs import merge
from paths import ROOT
from safetensors.torch import load_file
from seeds import vary

SCRIPT = ROOT / "examples" / "to_gguf.py"
VOCAB = 512
HEAD = 16
SPECIAL = 4

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""As llama.cpp's documentation has them, written down apart from gguf's own table."""

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
KINDS = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def make(home: Path, kind: str, dtype: torch.dtype, tied: bool) -> tuple[Path, Path]:
    """A tiny model with a byte-level tokenizer, and an adapter on all of its linear layers."""
    fields = {
        **TEXT,
        "vocab_size": VOCAB,
        "tie_word_embeddings": tied,
        "hidden_size": 64,
        "head_dim": HEAD,
    }
    torch.manual_seed(vary(0))
    model = getattr(transformers, f"{KINDS[kind]}ForCausalLM")(config(KINDS[kind], **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(home / "base")
    tokenized_texts.save(home / "base")
    return home / "base", make_adapter(type(model), home / "base", home / "adapter", LINEAR)


def expected(name: str, tensor: torch.Tensor, llama: bool) -> tuple[str, torch.Tensor]:
    """Name and float32 values of a merged tensor in GGUF."""
    layer, module, ending = re.fullmatch(
        r"(?:model\.layers\.(\d+)\.)?(.*)\.(weight|bias)", name
    ).groups()
    new = f"{NAMES[module]}.{ending}" if layer is None else f"blk.{layer}.{NAMES[module]}.{ending}"
    if llama and module in ("self_attn.q_proj", "self_attn.k_proj"):
        half = HEAD // 2
        rows = [
            h * HEAD + i + j * half
            for h in range(len(tensor) // HEAD)
            for i in range(half)
            for j in (0, 1)
        ]
        tensor = tensor[rows]
    return new, tensor.float()


@pytest.mark.parametrize(
    ("kind", "dtype", "tied"),
    [
        ("llama", torch.bfloat16, False),
        ("qwen2", torch.float16, False),
        ("qwen3", torch.float32, True),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_a_gguf_holds_the_tensors_that_merge_writes(
    kind: str, dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    base, adapter = make(tmp_path, kind, dtype, tied)
    if kind == "llama":  # once as its docstring says; a process each takes longer than the work
        line = [
            sys.executable,
            str(SCRIPT),
            str(base),
            str(adapter),
            str(tmp_path / "merged.gguf"),
            "--lambda",
            "0.25",
        ]
        done = subprocess.run(line, capture_output=True, text=True, env=ENV, check=False)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    else:
        example().convert(base, adapter, tmp_path / "merged.gguf", mitigation_lambda=0.25)
    merge(base, adapter, tmp_path / "merged", 0.25)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    want = dict(expected(name, tensor, kind == "llama") for name, tensor in merged.items())
    read = gguf.GGUFReader(tmp_path / "merged.gguf")
    assert {t.name for t in read.tensors} == want.keys()
    for tensor in read.tensors:
        assert tensor.tensor_type.name == (
            "F32" if want[tensor.name].ndim == 1 else DTYPES[dtype]
        ), tensor.name
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(values, want[tensor.name]), tensor.name
    base_values = dict(
        expected(name, t, kind == "llama")
        for name, t in load_file(base / "model.safetensors").items()
    )
    changed = [name for name in want if not torch.equal(want[name], base_values[name])]
    assert len(changed) == 2 * len(LINEAR)
    assert read.fields["general.architecture"].contents() == kind
    assert len(read.fields["tokenizer.ggml.tokens"].contents()) == VOCAB


def example() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("to_gguf", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_example_cannot_write_leaves_no_file(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "llama", torch.float32, tied=True)
    text = (base / "config.json").read_text()
    for old, new, words in [
        (
            '"model_type": "llama"',
            '"model_type": "mamba"',
            "expected one of llama, mistral, qwen2, qwen3, found mamba",
        ),
        ('"rope_type": "default"', '"rope_type": "llama3"', "RoPE without scaling"),
    ]:
        assert old in text
        (base / "config.json").write_text(text.replace(old, new))
        with pytest.raises(SystemExit, match=words):
            example().convert(base, adapter, tmp_path / "merged.gguf")
        assert not (tmp_path / "merged.gguf").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_merged_model(kind: str, tmp_path: Path) -> None:
    """llama.cpp reads the file, and gives the likeliest next tokens the probabilities that transformers gives them."""
    xllamacpp = pytest.importorskip("xllamacpp")
    base, adapter = make(tmp_path, kind, torch.float32, tied=False)
    example().convert(base, adapter, tmp_path / "merged.gguf", mitigation_lambda=0.25)
    merge(base, adapter, tmp_path / "merged", 0.25)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[0, *range(300, 340)]])).logits[0].double().log_softmax(1)
    end = int(
        (logits.argmax(1) > SPECIAL).nonzero().max()
    )  # at a token that ends a text it gives no probabilities
    ids = [0, *range(300, 300 + end)]
    want = logits[end]
    params = xllamacpp.CommonParams()
    params.model.path = str(tmp_path / "merged.gguf")
    params.n_ctx = 64
    params.warmup = False
    params.cpuparams.n_threads = 2
    server = xllamacpp.Server(params)
    answer = server.handle_completions(
        {"prompt": ids, "n_predict": 1, "n_probs": 20, "temperature": 0, "cache_prompt": False}
    )
    found = {
        t["id"]: t["logprob"]
        for t in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    }
    assert len(found) == 20
    assert max(found, key=lambda i: found[i]) == int(want.argmax())
    for i, value in found.items():
        assert abs(value - float(want[i])) < 0.03  # keys and values are kept in half precision
