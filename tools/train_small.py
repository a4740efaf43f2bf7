"""Train a small model on the sources of Python's standard library, and fine-tune LoRA adapters of it on Python's language reference.

    python tools/train_small.py DIR                                        minutes on two cores: 7 million parameters, 42 matrices
    python tools/train_small.py DIR --hidden 64 --layers 2 --steps 20      seconds, for a test
    python tools/train_small.py DIR --kind mixture --adapters high,attention,mild

DIR/base is a model that `transformers` loads, with its tokenizer (byte-level BPE): a Llama, a Qwen3 with tied embeddings, a mixture of
four experts (Qwen3-MoE), all of whose experts an adapter of "every linear layer" adapts, or a GPT-NeoX. The adapters, by default the
first two:

- high: rank 8 on every linear layer, trained at a high rate
- rslora: rank 4 with rsLoRA on every linear layer, at a lower rate
- attention: rank 16 on the attention alone, at a high rate
- usual: rank 16 on every linear layer, at a rate that people use
- wide: rank 64 with rsLoRA on every linear layer, at that rate
- mild: rank 32 on every linear layer, at a rate so low that it hardly forgets

Three parts of the two texts have no document in common: what is trained on; DIR/general.txt, sources, and DIR/task.txt, the reference,
to choose or fit something on; DIR/general-test.txt and DIR/task-test.txt to measure it on. Both texts come with Python: nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "TRANSFORMERS_VERBOSITY", "error"
)  # before it is imported: its notes on long texts and kernels are not about this
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # spinning threads and other busy processes slow each other many times over

import torch

LENGTH = 256
"""Tokens of a sequence."""

BATCH = 8
"""Sequences of a training step."""

HELD_OUT = 70_000
"""Characters of each text, at least, that are not trained on but written as one file; and again as the other."""

KINDS = ("llama", "qwen", "mixture", "neox")

END = "<|end|>"
"""Token 0, between two documents."""

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
"""Parameters that are stacks of the experts' matrices, for PEFT's `target_parameters`."""

ADAPTERS: dict[str, dict[str, Any]] = {
    "high": {"rate": 5e-3, "config": {"r": 8, "lora_alpha": 16}},
    "rslora": {"rate": 1e-3, "config": {"r": 4, "lora_alpha": 8, "use_rslora": True}},
    "attention": {"rate": 5e-3, "config": {"r": 16, "lora_alpha": 32, "target_modules": ATTENTION}},
    "usual": {"rate": 1e-3, "config": {"r": 16, "lora_alpha": 32}},
    "wide": {"rate": 1e-3, "config": {"r": 64, "lora_alpha": 16, "use_rslora": True}},
    "mild": {"rate": 2e-4, "config": {"r": 32, "lora_alpha": 32}},
}
"""Learning rate and PEFT's options of each adapter; one without `target_modules` adapts every linear layer but the head."""


def texts() -> dict[str, list[str]]:
    """Collect the documents: files of the standard library for the base, topics of the language reference for the adapters."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    left_out = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "lib2to3",
        "pydoc_data",
        "encodings",
    }
    files = sorted(
        p for p in library.rglob("*.py") if not left_out & set(p.relative_to(library).parts)
    )
    sources = [p.read_text(encoding="utf-8", errors="replace") for p in files]
    return {
        "general": [s for s in sources if 2000 < len(s) < 60_000],
        "task": [topics[name] for name in sorted(topics)],
    }


def divided(documents: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Divide documents, in random order, into those to train on and twice some that are held out, disjoint."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [documents[i] for i in order]
    sizes = torch.tensor([len(d) for d in shuffled])
    first = int(torch.searchsorted(sizes.cumsum(0), HELD_OUT)) + 1
    both = first + int(torch.searchsorted(sizes[first:].cumsum(0), HELD_OUT)) + 1
    return shuffled[both:], shuffled[:first], shuffled[first:both]


def make_tokenizer(documents: list[str], vocab: int) -> Any:
    """Train a byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=4 * LENGTH, **special)


def stream(tokenizer: Any, documents: list[str]) -> torch.Tensor:
    """Tokenize documents into one row of ids, with the end token before each."""
    return torch.tensor(
        [i for ids in tokenizer(documents)["input_ids"] for i in (tokenizer.eos_token_id, *ids)]
    )


def train(
    model: torch.nn.Module, ids: torch.Tensor, steps: int, rate: float, seed: int, what: str
) -> None:
    """Train by AdamW on random sequences of a stream; the rate rises over 5 % of the steps and falls along a cosine."""
    generator = torch.Generator().manual_seed(seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, steps // 20)
    began = time.perf_counter()
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
        if step in (10, steps) or step % 50 == 0:
            print(
                f"{what}: step {step}/{steps}, loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s",
                file=sys.stderr,
            )
    model.eval()


def held_out_loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Mean loss of up to 32 sequences of a stream, in nats per token."""
    rows = ids[: min(32, len(ids) // LENGTH) * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        return model(input_ids=rows, labels=rows).loss.item()


def new_model(kind: str, args: argparse.Namespace, vocab: int) -> Any:
    """Make a model of random weights: of Llama's shape, of Qwen3's with tied embeddings, Qwen3's mixture of four experts, or GPT-NeoX's."""
    import transformers

    shape = {
        "hidden_size": args.hidden,
        "intermediate_size": 8 * args.hidden // 3,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4 * LENGTH,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    if kind == "neox":
        shape |= {"intermediate_size": 4 * args.hidden, "tie_word_embeddings": False}
        del shape["num_key_value_heads"]
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape))
    shape |= {"num_key_value_heads": max(1, args.heads // 2), "head_dim": args.hidden // args.heads}
    if kind == "qwen":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape))
    shape |= {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": args.hidden,
        "tie_word_embeddings": False,
    }
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shape))


def lora_config(name: str, kind: str) -> Any:
    """Make the options of an adapter for a kind of base, whose experts "every linear layer" includes."""
    from peft import LoraConfig

    options = {"target_modules": "all-linear", **ADAPTERS[name]["config"]}
    if kind == "mixture" and options["target_modules"] == "all-linear":
        options |= {"target_modules": ATTENTION, "target_parameters": EXPERTS}
    return LoraConfig(**options, task_type="CAUSAL_LM")


def streams(tokenizer: Any) -> dict[str, list[torch.Tensor]]:
    """Tokenize each text's three parts: trained on, held out, held out again."""
    return {
        name: [stream(tokenizer, part) for part in divided(documents)]
        for name, documents in texts().items()
    }


def make_base(out: Path, args: argparse.Namespace) -> None:
    """Write the base, its tokenizer and the texts held out."""
    parts = {name: divided(documents) for name, documents in texts().items()}
    tokenizer = make_tokenizer([*parts["general"][0], *parts["task"][0]], args.vocab)
    torch.manual_seed(args.seed)
    model = new_model(args.kind, args, len(tokenizer))
    train(model, stream(tokenizer, parts["general"][0]), args.steps, args.rate, 0, "base")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out / "base")
    for name, (_, held, test) in parts.items():
        (out / f"{name}.txt").write_text("\n\n".join(held), encoding="utf-8")
        (out / f"{name}-test.txt").write_text("\n\n".join(test), encoding="utf-8")
    model.to(torch.bfloat16 if args.dtype == "bf16" else torch.float32).save_pretrained(
        out / "base"
    )


def make_adapter(base: Path, out: Path, name: str, ids: torch.Tensor, steps: int, seed: int) -> Any:
    """Train an adapter on a stream, from a start and in an order of the seed's, and write it; return the model."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    kind = "mixture" if hasattr(model.config, "num_experts") else ""
    lora = get_peft_model(model, lora_config(name, kind))
    train(lora, ids, steps, ADAPTERS[name]["rate"], seed, out.name)
    lora.save_pretrained(out)
    return lora


def make(out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Write the base, its tokenizer, the adapters and the texts held out; return the losses on the test texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_base(out, args)
    ids = streams(AutoTokenizer.from_pretrained(out / "base"))
    model = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    losses = {"base": {text: held_out_loss(model, s[2]) for text, s in ids.items()}}
    for name in args.adapters:
        steps = args.adapter_steps or args.steps // 3
        lora = make_adapter(out / "base", out / name, name, ids["task"][0], steps, args.seed)
        losses[name] = {text: held_out_loss(lora, s[2]) for text, s in ids.items()}
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "base": str(out / "base"),
        "adapters": [str(out / name) for name in args.adapters],
        "parameters": parameters,
        "losses": losses,
    }


def chosen(names: Collection[str]) -> Callable[[str], list[str]]:
    """Make a reader of a list of some of the names."""

    def read(text: str) -> list[str]:
        if unknown := [one for one in text.split(",") if one not in names]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(names)}")
        return text.split(",")

    return read


def main() -> int:
    """Train and write all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory to write to; one that exists is refused")
    parser.add_argument(
        "--kind", choices=KINDS, default="llama", help="of the base (default: %(default)s)"
    )
    parser.add_argument(
        "--adapters",
        type=chosen(ADAPTERS),
        default="high,rslora",
        help=f"some of {','.join(ADAPTERS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--hidden", type=int, default=288, help="width of the model (default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument(
        "--heads", type=int, default=4, help="attention heads (default: %(default)s)"
    )
    parser.add_argument("--vocab", type=int, default=4096, help="tokens (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the base (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=400, help=f"of {BATCH} sequences each (default: %(default)s)"
    )
    parser.add_argument(
        "--rate", type=float, default=2e-3, help="learning rate of the base (default: %(default)s)"
    )
    parser.add_argument(
        "--adapter-steps", type=int, help="of each adapter (default: a third of --steps)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--json", action="store_true", help="print the paths and the losses as JSON"
    )
    args = parser.parse_args()
    if args.out.exists():
        print(f"{args.out} exists; name a new directory", file=sys.stderr)
        return 1
    made = make(args.out, args)
    if args.json:
        print(json.dumps(made, indent=2))
    else:
        print(
            f"{made['parameters'] / 1e6:.1f} million parameters; losses on the test texts, in nats per token:"
        )
        for name, found in made["losses"].items():
            print(f"  {name:<9} general {found['general']:.3f}  task {found['task']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
