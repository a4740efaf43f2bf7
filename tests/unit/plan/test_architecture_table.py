"""A plan takes from the table of architectures the records of its own class: the time that it adds does not grow with the table."""

from __future__ import annotations

from pathlib import Path

import helpers
import torch

import streamer
from streamer.plan.architectures import architecture_of, conv1d_names, record_of, table
from streamer.plan.plan import make_plan

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
MODULE = "model.layers.0.self_attn.q_proj"


def test_a_plan_parses_the_records_of_its_class(tmp_path: Path) -> None:
    base = helpers.write_sharded(tmp_path / "base", [{f"{MODULE}.weight": torch.ones(32, 32)}], LLAMA)
    adapter = helpers.write_adapter(tmp_path / "adapter", {MODULE: helpers.intruding_factors(32, 32, 4)}, r=4)
    for cached in (table, record_of, conv1d_names):
        cached.cache_clear()
    make_plan(base, adapter)
    assert table.cache_info().misses == 1
    architecture = architecture_of(LLAMA)
    assert architecture is not None
    classes = {architecture.name, *(part.name for part in architecture.parts)}
    assert record_of.cache_info().misses == len(classes) == 2
    assert conv1d_names.cache_info().misses == 0  # it would parse all


def test_the_table_is_small_enough_to_ship() -> None:
    assert (Path(streamer.__path__[0]) / "plan" / "architectures.json.gz").stat().st_size < 200_000
