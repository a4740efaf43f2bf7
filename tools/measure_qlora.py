"""Measure which base an adapter that was trained on 4-bit weights (QLoRA) fits: the weights as NF4 represents them, or the original ones.

    pip install bitsandbytes, and what measure_forgetting.py asks for
    python tools/measure_qlora.py DIRECTORY --adapters qa,language         DIRECTORY as measure_forgetting.py left it; 10 CPU minutes each

Rounds every linear layer of the decoder to NF4 (blocks of 64, scales quantized too) and back, trains each adapter on that base as
measure_forgetting.py does, and measures it on both bases by transformers and PEFT: the loss on the adapter's test text, how often the
likeliest token is right, and the divergence (nats a token) from the model that was trained, on test text of the task and on general text.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import measure_forgetting as forgetting
import numpy as np
import torch
import train_small


def make_nf4(home: Path, out: Path) -> None:
    """Write the base with the values that NF4 represents."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from transformers import AutoTokenizer

    model = forgetting.load(home / "base")
    with torch.no_grad():
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                codes, state = quantize_4bit(
                    module.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
                )
                module.weight.copy_(dequantize_4bit(codes, state))
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(home / "base").save_pretrained(out)


def scored(
    base: Path, adapter: Path | None, rows: list[Any]
) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Sum loss, right predictions and tokens of each sequence, and keep the log-probabilities."""
    from peft import PeftModel

    model = forgetting.load(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    sums = []
    kept = []
    with torch.no_grad():
        for row in rows:
            labels = row.ids[0, row.begin :]
            found = model(input_ids=row.ids).logits[0, row.begin - 1 : -1].log_softmax(-1)
            chances = found.gather(1, labels[:, None]).double()
            sums.append(
                (-chances.sum().item(), (found.argmax(1) == labels).sum().item(), len(labels))
            )
            kept.append(found.half())
    return np.array(sums).T, kept


def main() -> int:
    """Make the rounded base, train, measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--adapters",
        type=train_small.chosen(forgetting.ADAPTERS),
        default=["qa", "language"],
        help="(default: qa,language)",
    )
    args = parser.parse_args()
    from transformers import AutoTokenizer

    home: Path = args.directory.absolute()
    rounded = home / "nf4"
    rounded.mkdir(exist_ok=True)
    forgetting.stage("NF4 base", rounded / "base", lambda: make_nf4(home, rounded / "base"))
    if not (rounded / "texts").exists():
        (rounded / "texts").symlink_to(home / "texts")
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    print(
        "| adapter | model | loss on its task | right, % | KL from the trained model: task | general |\n|---|---|---|---|---|---|"
    )
    for name in args.adapters:
        adapter = rounded / "made" / name / "adapter"
        adapter.parent.mkdir(parents=True, exist_ok=True)
        if not adapter.exists():
            forgetting.make_adapter(name, 0, rounded, adapter, tokenizer)
        (task,) = (home / "texts").glob(f"{name}-test.*")
        texts = [
            forgetting.sequences(path, tokenizer)
            for path in (task, home / "texts" / "general-test.txt")
        ]
        trained = [scored(rounded / "base", adapter, rows) for rows in texts]
        variants = {
            "NF4 + adapter (trained)": (rounded / "base", adapter),
            "original + adapter": (home / "base", adapter),
            "NF4": (rounded / "base", None),
            "original": (home / "base", None),
        }
        for label, (base, one) in variants.items():
            found = (
                trained
                if label.endswith("(trained)")
                else [scored(base, one, rows) for rows in texts]
            )
            cells = []
            for (_, here), (sums, there) in zip(found, trained, strict=True):
                each = [
                    (t.float().exp() * (t.float() - h.float())).double().sum().item()
                    for h, t in zip(here, there, strict=True)
                ]
                share, error = forgetting.ratio(np.array(each), sums[2])
                cells.append(f"{share:.3f} ± {error:.3f}")
            losses, right, tokens = found[0][0]
            loss, error = forgetting.ratio(losses, tokens)
            print(
                f"| {name} | {label} | {loss:.3f} ± {error:.3f} | {100 * right.sum() / tokens.sum():.1f} | {' | '.join(cells)} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
