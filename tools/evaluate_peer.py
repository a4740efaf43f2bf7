"""Losses of models that are merged already, each loaded by transformers in turn: what `bench_evaluate.py` compares with.

    python tools/evaluate_peer.py THREADS GENERAL.npy TASK.npy BASE [MERGED ...]

The models are loaded in float32. Printed is a JSON list: of each model, for each text, the mean loss, the mean KL divergence from the first
model, and the share of tokens with the same top one. The first model's log-probabilities stay in memory; some thousand tokens go through a
model at a time, and a model's memory is given back before the next one is loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

TOKENS = 1024
"""Tokens of a batch."""


def figures(model: Any, ids: Tensor, first: list[Tensor], keep: bool) -> dict[str, float]:
    """Mean loss, divergence and agreement on one text; `first` has the first model's log-probabilities, which `keep` puts there."""
    sums, batch = torch.zeros(3, dtype=torch.float64), max(1, TOKENS // ids.shape[1])
    for number, some in enumerate(ids.split(batch)):
        log_p = model(input_ids=some, use_cache=False).logits[:, :-1].log_softmax(-1)
        if keep:
            first.append(log_p)
        base = first[number]
        loss = -log_p.gather(-1, some[:, 1:, None])
        divergence = (base.exp() * (base - log_p)).sum(-1)
        agreement = log_p.argmax(-1) == base.argmax(-1)
        sums += torch.stack([t.double().sum() for t in (loss, divergence, agreement)])
    names = ("loss", "kl", "agreement")
    return dict(zip(names, (sums / ids[:, 1:].numel()).tolist(), strict=True))


def main() -> None:
    if len(sys.argv) < 5:
        raise SystemExit(__doc__)
    threads, general, task, *models = sys.argv[1:]
    torch.set_num_threads(int(threads))
    disable_progress_bar()
    texts = {"general": general, "task": task}
    ids = {name: torch.from_numpy(np.load(path)) for name, path in texts.items()}
    first: dict[str, list[Tensor]] = {name: [] for name in texts}
    rows = []
    with torch.inference_mode():
        for number, path in enumerate(models):
            model = AutoModelForCausalLM.from_pretrained(Path(path), dtype=torch.float32)
            rows.append({name: figures(model, ids[name], first[name], number == 0) for name in texts})
            del model
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
