"""Live models that accelerate offloads to the CPU's memory, with saved modules and with tied embeddings: as models that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import kinds_cases
import pytest
import torch
from kinds_cases import relative
from live import loaded
from torch import Tensor, nn

import streamer.peft as live


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(torch.arange(2 * 9).reshape(2, 9) % 61).logits
    return out


def offloaded(made: kinds_cases.Made) -> Any:
    model = loaded(made)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def test_saved_modules_of_the_new_adapter_are_the_old_one_s(tmp_path: Path) -> None:
    """PEFT copies the base's module with its hook, which loads the base's values before each use."""
    made = kinds_cases.make("modules_to_save", torch.float32, tmp_path)
    model, plain = offloaded(made), loaded(made)
    tuned = logits(plain)
    for one in (model, plain):
        live.reduce_intruder_dimension(one, mitigation_lambda=0.5)
    assert torch.equal(logits(model), logits(plain))
    assert not torch.equal(logits(model), tuned)
    model.set_adapter("default")
    assert torch.equal(logits(model), tuned)


@pytest.mark.parametrize("kind", ["tied, lm_head", "tied, embedding", "tied, both"])
def test_a_tied_embedding_and_head_part_where_one_is_merged(kind: str, tmp_path: Path) -> None:
    made = kinds_cases.make(kind, torch.float32, tmp_path)
    tuned = logits(loaded(made))
    merged = live.merge_and_unload_with_reduced_intruder_dimensions(offloaded(made), mitigation_lambda=1.0)
    assert relative(logits(merged), tuned) < 5e-6
