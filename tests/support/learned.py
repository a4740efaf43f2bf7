"""A base, an adapter, and texts of which the adapted model finds one likelier than the base does, and one less likely."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import ATTENTION
from causal_models import make_adapter, make_base
from forks import Outcome, Server
from peft import PeftModel
from seeds import vary
from transformers import AutoModelForCausalLM

import streamer
from streamer.options import RepairOptions


def sampled(model: Any, sequences: int, length: int, first: int, count: int) -> np.ndarray:
    """Draw sequences of so many of the tokens as a model predicts them."""
    ids = torch.randint(first, first + count, (sequences, 1))
    with torch.no_grad():
        for _ in range(length - 1):
            p = model(input_ids=ids).logits[:, -1, first : first + count].softmax(-1)
            ids = torch.cat([ids, first + torch.multinomial(p, 1)], 1)
    return ids.numpy()


def write_texts(home: Path, base: Path, adapter: Path, sequences: int, length: int) -> None:
    """Write ``general.npy`` as the base predicts it, ``task.npy`` of other tokens as the adapted model does, and ``all.npy`` at random."""
    torch.manual_seed(vary(0))
    with warnings.catch_warnings(action="ignore"):
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), adapter
        ).eval()
    np.save(home / "task.npy", sampled(model, sequences, length, 34, 30))
    with model.disable_adapter():
        np.save(home / "general.npy", sampled(model, sequences, length, 3, 30))
    np.save(home / "all.npy", np.random.default_rng(vary(0)).integers(3, 64, (200, length)))


def make_learned(home: Path, sequences: int = 24, length: int = 8, **lora: Any) -> Path:
    """Write ``base``, ``adapter`` and texts, of which the adapter forgets one and learns the other."""
    make_adapter(
        make_base("llama", home / "base"),
        home / "base",
        home / "adapter",
        ATTENTION,
        **{"lora_alpha": 4, **lora},
    )
    write_texts(home, home / "base", home / "adapter", sequences, length)
    return home


def evaluate(
    server: Server, home: Path, output: object, *options: object, before: str = "", **texts: Path
) -> Outcome:
    """Run `streamer evaluate` on them, or on other texts."""
    line = ["evaluate", home / "base", home / "adapter", "-o", output, *options]
    for name in ("general", "task"):
        line += [f"--{name}", texts.get(name, home / f"{name}.npy")]
    return server.run(*line, before=before)


def repaired(home: Path, output: Path, **options: Any) -> streamer.Coefficients:
    """Repair the adapter, and return the factors that were fitted."""
    texts = {name: home / f"{name}.npy" for name in ("general", "task")}
    streamer.repair_adapter(
        **{"base": home / "base", "adapter": home / "adapter", "output": output, **texts, **options}
    )
    return streamer.load_coefficients(f"{output}.fit.safetensors")


def held_apart(home: Path, place: Path) -> dict[str, Path]:
    """Write the sequences that a fit of all of them holds apart."""
    for name in ("general", "task"):
        ids = np.load(home / f"{name}.npy")
        shift = np.random.default_rng(RepairOptions.seed).integers(len(ids))
        count = round(RepairOptions.holdout * len(ids))
        np.save(place / f"{name}.npy", ids[sorted(np.roll(np.arange(len(ids)), shift)[:count])])
    return {name: place / f"{name}.npy" for name in ("general", "task")}
