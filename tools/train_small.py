"""Train a small Llama on the sources of Python's standard library, and fine-tune two LoRA adapters of it on Python's language reference.

    python tools/train_small.py DIR                                        minutes on two cores: 7 million parameters, 42 matrices
    python tools/train_small.py DIR --hidden 64 --layers 2 --steps 20      seconds, for a test

DIR/base is a model that `transformers` loads, with its tokenizer (byte-level BPE); DIR/high is an adapter of rank 8 on every linear
layer, trained at a high rate, DIR/rslora one of rank 4 with rsLoRA at a lower one. Neither DIR/general.txt, more of the library's
sources, nor DIR/task.txt, more of the reference, was trained on. Both texts come with Python: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch

LENGTH = 256
"""Tokens of a sequence."""

BATCH = 8
"""Sequences of a training step."""

HELD_OUT = 100_000
"""Characters of each text that are not trained on, at least."""

END = "<|end|>"
"""Token 0, between two documents."""

ADAPTERS: dict[str, dict[str, Any]] = {
    "high": {"rate": 5e-3, "config": {"r": 8, "lora_alpha": 16}},
    "rslora": {"rate": 1e-3, "config": {"r": 4, "lora_alpha": 8, "use_rslora": True}},
}


def texts() -> dict[str, list[str]]:
    """Collect the documents: files of the standard library for the base, topics of the language reference for the adapters."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "lib2to3", "pydoc_data", "encodings"}
    files = sorted(p for p in library.rglob("*.py") if not left_out & set(p.relative_to(library).parts))
    sources = [p.read_text(encoding="utf-8", errors="replace") for p in files]
    return {
        "general": [s for s in sources if 2000 < len(s) < 60_000],
        "task": [topics[name] for name in sorted(topics)],
    }


def divided(documents: list[str]) -> tuple[list[str], list[str]]:
    """Divide documents, in random order, into those to train on and the first ones, which are held out."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [documents[i] for i in order]
    sizes = torch.tensor([len(d) for d in shuffled]).cumsum(0)
    held = int(torch.searchsorted(sizes, HELD_OUT)) + 1
    return shuffled[held:], shuffled[:held]


def make_tokenizer(documents: list[str], vocab: int) -> Any:
    """Train a byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        documents,
        trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False),
    )
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=4 * LENGTH, **special)


def stream(tokenizer: Any, documents: list[str]) -> torch.Tensor:
    """Tokenize documents into one row of ids, with the end token before each."""
    return torch.tensor([i for ids in tokenizer(documents)["input_ids"] for i in (tokenizer.eos_token_id, *ids)])


def train(model: torch.nn.Module, ids: torch.Tensor, steps: int, rate: float, what: str) -> None:
    """Train by AdamW on random sequences of a stream; the rate rises over 5 % of the steps and falls along a cosine."""
    generator = torch.Generator().manual_seed(0)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm, began = max(1, steps // 20), time.perf_counter()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * i / steps))
    )
    model.train()
    for step in range(1, steps + 1):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator)
        rows = torch.stack([ids[i : i + LENGTH] for i in starts.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(f"{what}: step {step}/{steps}, loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s",
                  file=sys.stderr)  # fmt: skip
    model.eval()


def held_out_loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Mean loss of up to 32 sequences of a stream, in nats a token."""
    rows = ids[: min(32, len(ids) // LENGTH) * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        return model(input_ids=rows, labels=rows).loss.item()


def make(out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Write the base, its tokenizer, both adapters and the texts held out; return the losses on these."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    parts = {name: divided(documents) for name, documents in texts().items()}
    tokenizer = make_tokenizer([*parts["general"][0], *parts["task"][0]], args.vocab)
    streams = {name: [stream(tokenizer, documents) for documents in both] for name, both in parts.items()}
    torch.manual_seed(args.seed)
    shape = {"hidden_size": args.hidden, "intermediate_size": 8 * args.hidden // 3, "num_hidden_layers": args.layers,
             "num_attention_heads": args.heads, "num_key_value_heads": args.heads, "vocab_size": len(tokenizer)}  # fmt: skip
    config = LlamaConfig(**shape, max_position_embeddings=4 * LENGTH, tie_word_embeddings=True, bos_token_id=0,
                         eos_token_id=0, pad_token_id=0)  # fmt: skip
    model = LlamaForCausalLM(config)
    train(model, streams["general"][0], args.steps, 2e-3, "base")
    losses = {"base": {name: held_out_loss(model, s[1]) for name, s in streams.items()}}
    out.mkdir(parents=True, exist_ok=True)
    base = model.to(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    base.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    for name, (_, held) in parts.items():
        (out / f"{name}.txt").write_text("\n\n".join(held), encoding="utf-8")
    for name, adapter in ADAPTERS.items():
        torch.manual_seed(args.seed)
        base = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
        lora = get_peft_model(base, LoraConfig(**adapter["config"], target_modules="all-linear", task_type="CAUSAL_LM"))
        train(lora, streams["task"][0], args.adapter_steps or args.steps // 3, adapter["rate"], name)
        lora.save_pretrained(out / name)
        losses[name] = {text: held_out_loss(lora, s[1]) for text, s in streams.items()}
    parameters = sum(p.numel() for p in model.parameters())
    return {"base": str(out / "base"), "adapters": [str(out / name) for name in ADAPTERS], "parameters": parameters,
            "losses": losses}  # fmt: skip


def main() -> int:
    """Train and write all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write to; one that exists is refused")
    parser.add_argument("--hidden", type=int, default=288, help="width of the model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="attention heads (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens (default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the base (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help=f"of {BATCH} sequences each (default: %(default)s)")
    parser.add_argument("--adapter-steps", type=int, help="of each adapter (default: a third of --steps)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the paths and the losses as JSON")
    args = parser.parse_args()
    if args.out.exists():
        print(f"{args.out} exists; name a new directory", file=sys.stderr)
        return 1
    made = make(args.out, args)
    if args.json:
        print(json.dumps(made, indent=2))
    else:
        print(f"{made['parameters'] / 1e6:.1f} million parameters; losses on text held out, in nats a token:")
        for name, found in made["losses"].items():
            print(f"  {name:<8} general {found['general']:.3f}  task {found['task']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
