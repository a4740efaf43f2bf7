"""Families of models as transformers saves them, adapters as PEFT saves them: merged as PEFT merges; renames are transformers'."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import MODELS, OLD, assert_merged, make_adapter, make_base, merge, old_name
from paths import ROOT
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import (
    _build_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter, apply_converters, apply_renamings

from streamer.plan.architectures import packaged
from streamer.plan.names import RENAMES, NameIndex, renames_for
from streamer.weights.model_config import ModelConfig, read_model_config


def with_names(source: Path, out: Path, rename: Callable[[str], str]) -> Path:
    """A copy of a base or adapter with other tensor names."""
    out.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            save_file({rename(k): v for k, v in load_file(file).items()}, out / file.name)
        else:
            (out / file.name).write_bytes(file.read_bytes())
    return out


@pytest.mark.parametrize("name", OLD)
def test_names_of_either_version_on_either_side(name: str, tmp_path: Path) -> None:
    """Bases and adapters of transformers 4 and 5, in all pairs: merged as PEFT merges."""
    cls = make_base(name, tmp_path / "saved")
    model = make_adapter(cls, tmp_path / "saved", tmp_path / "new-adapter", MODELS[name][2])

    def old(key: str) -> str:
        return old_name(key, OLD[name])

    with_names(
        tmp_path / "new-adapter",
        tmp_path / "old-adapter",
        lambda k: "base_model.model." + old(k.removeprefix("base_model.model.")),
    )
    state = cls.from_pretrained(tmp_path / "saved").state_dict()
    assert any(old(k) != k for k in state)
    for age, rename in {"old": old, "new": str}.items():
        with_names(tmp_path / "saved", tmp_path / age, str)
        save_file({rename(k): v for k, v in state.items()}, tmp_path / age / "model.safetensors")
    expected = model.merge_and_unload().state_dict()
    for adapter in ("new-adapter", "old-adapter"):
        for age, rename in {"old": old, "new": str}.items():
            got = merge(tmp_path / age, tmp_path / adapter, tmp_path / f"{age}-{adapter}-merged")
            assert_merged(got, {rename(k): v for k, v in expected.items()})


THEIRS = _build_checkpoint_conversion_mapping()
SAME_VERSION = f"transformers {transformers.__version__} " in packaged(RENAMES)["source"]


@pytest.mark.long
def test_the_table_is_the_installed_version_s() -> None:
    if not SAME_VERSION:
        pytest.skip(
            f"the table is of {packaged(RENAMES)['source']}; tools/make_renames.py renews it"
        )
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "make_renames.py", "--check"], check=False
    )
    assert done.returncode == 0


def test_every_class_and_type_is_known() -> None:
    ours = packaged(RENAMES)["rules"].keys() | packaged(RENAMES)["same"].keys()
    assert ours == THEIRS.keys() or not SAME_VERSION


def theirs(name: str, transforms: list[Any]) -> tuple[str, bool]:
    renamed = apply_renamings(name, [t for t in transforms if not isinstance(t, WeightConverter)])
    renamed, by = apply_converters(
        renamed, [t for t in transforms if isinstance(t, WeightConverter)]
    )
    return renamed, by is not None


RENUMBERED = {
    "dory",
    "inkling2_text",
    "inkling2_loop_text",
}  # they count layers anew, which no pattern does


@pytest.mark.xfail(
    not SAME_VERSION,  # a release after the table may change any rule
    reason=f"the table is of {packaged(RENAMES)['source']}; tools/make_renames.py renews it",
)
@pytest.mark.parametrize(
    "key", sorted(packaged(RENAMES)["rules"].keys() & THEIRS.keys() - RENUMBERED)
)
def test_renames_agree_with_transformers(key: str) -> None:
    names = {
        "model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.3.mlp.down_proj.weight",
        "lm_head.weight",
        "language_model.model.layers.1.mlp.experts.2.gate_proj.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "model.layers.0.block_sparse_moe.experts.1.w2.weight",
        "encoder.layer.0.attention.attention.query.weight",
    }
    for t in THEIRS[key]:
        for pattern in t.source_patterns:
            names |= {
                re.sub(r"\(\?[<!=:].*?\)", "", pattern)
                .replace("(\\d+)", "3")
                .replace("\\.", ".")
                .replace("*", "0")
                .strip("^$")
            }
    # Of a type that is not known, so that no models within it bring their own.
    ours = renames_for(ModelConfig({"architectures": [key], "model_type": "unknown"}))
    legacy = [] if key == "legacy" else THEIRS["legacy"]
    got = {
        name: (renamed, by is not None)
        for name, renamed, by, _, _ in NameIndex(tuple(sorted(names)), ours).loaded.values()
    }
    for name in sorted(names):
        assert got[name] == theirs(name, [*THEIRS[key], *legacy]), name


@pytest.mark.parametrize("name", MODELS)
def test_renames_of_models_within_agree_with_transformers(name: str) -> None:
    """Each of a model's parts brings its own, below its path."""
    cls, make, _ = MODELS[name]
    with torch.device("meta"):
        model = getattr(transformers, cls)(make())
    transforms = get_model_conversion_mapping(model)
    config = {**model.config.to_dict(), "architectures": [cls]}
    names = set(model.state_dict())
    names |= {old_name(key, OLD[name]) for key in names if name in OLD}
    vit = [
        (".layers.", ".encoder.layer."),
        (".attention.q_proj.", ".attention.attention.query."),
        (".mlp.fc1.", ".intermediate.dense."),
    ]
    names |= {old_name(key, vit) for key in names}
    ours = renames_for(ModelConfig(config))
    got = {
        key: (renamed, by is not None)
        for key, renamed, by, _, _ in NameIndex(tuple(sorted(names)), ours).loaded.values()
    }
    for key in sorted(names):
        assert got[key] == theirs(key, transforms), key


def test_a_type_that_borrows_a_class_keeps_its_own_names(tmp_path: Path) -> None:
    """EXAONE 3 is a Llama in memory, and its files have other names."""
    config = transformers.AutoConfig.for_model(
        "exaone",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors").keys()
    assert "transformer.wte.weight" in stored
    assert {
        *NameIndex.of(stored, read_model_config(tmp_path)).at_run_time.values()
    } == model.state_dict().keys()
