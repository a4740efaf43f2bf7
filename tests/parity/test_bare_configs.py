"""Bases whose config.json names no class, only a type: merged as PEFT merges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from architectures import MODELS, assert_merged, make_adapter, make_base, merge, weights


@pytest.mark.parametrize("name", ["llama", "gemma3-text", "gpt2", "t5", "gpt-oss", "llava"])
def test_merged_as_peft_merges(name: str, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    cls = make_base(name, base)
    model = make_adapter(cls, base, adapter, MODELS[name][2])
    config = json.loads((base / "config.json").read_text())
    del config["architectures"]
    (base / "config.json").write_text(json.dumps(config))
    ours = merge(base, adapter, tmp_path / "ours")
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    assert_merged(ours, weights(tmp_path / "theirs"))
    _, report = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
