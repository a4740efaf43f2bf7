"""The table of renames says what transformers' own says, for every class and model type in it."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import transformers
from paths import ROOT
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, apply_converters, apply_renamings

from streamer.plan.transformers_renames import renames_for, table
from streamer.weights.model_config import ModelConfig

THEIRS = _build_checkpoint_conversion_mapping()
SAME_VERSION = f"transformers {transformers.__version__} " in table()["source"]


def test_the_table_is_the_installed_version_s() -> None:
    if not SAME_VERSION:
        pytest.skip(f"the table is of {table()['source']}; tools/make_renames.py renews it")
    done = subprocess.run([sys.executable, ROOT / "tools" / "make_renames.py", "--check"], check=False)
    assert done.returncode == 0


def test_every_class_and_type_is_known() -> None:
    ours = table()["rules"].keys() | table()["same"].keys()
    assert ours == THEIRS.keys() or not SAME_VERSION


def theirs(name: str, transforms: list[Any]) -> tuple[str, bool]:
    renamed = apply_renamings(name, [t for t in transforms if not isinstance(t, WeightConverter)])
    renamed, by = apply_converters(renamed, [t for t in transforms if isinstance(t, WeightConverter)])
    return renamed, by is not None


RENUMBERED = {"dory", "inkling2_text", "inkling2_loop_text"}  # they count layers anew, which no pattern does


@pytest.mark.parametrize("key", sorted(table()["rules"].keys() & THEIRS.keys() - RENUMBERED))
def test_renames_agree_with_transformers(key: str) -> None:
    names = {
        "model.layers.0.self_attn.q_proj.weight", "model.language_model.layers.3.mlp.down_proj.weight", "lm_head.weight",
        "language_model.model.layers.1.mlp.experts.2.gate_proj.weight", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "model.layers.0.block_sparse_moe.experts.1.w2.weight", "encoder.layer.0.attention.attention.query.weight",
    }  # fmt: skip
    for t in THEIRS[key]:
        for pattern in t.source_patterns:
            names |= {
                re.sub(r"\(\?[<!=:].*?\)", "", pattern)
                .replace("(\\d+)", "3")
                .replace("\\.", ".")
                .replace("*", "0")
                .strip("^$"),
            }
    is_class = key[0].isupper()
    ours = renames_for(ModelConfig({"architectures": [key]} if is_class else {"model_type": key}))
    if ours.model != key:  # a class of the type takes precedence, as in transformers
        ours = renames_for(ModelConfig({"architectures": [key]}))
    legacy = [] if key == "legacy" else THEIRS["legacy"]
    got = {name: (renamed, by is not None) for name, renamed, by, _, _ in ours.loaded(sorted(names))}
    for name in sorted(names):
        assert got[name] == theirs(name, [*THEIRS[key], *legacy]), name
