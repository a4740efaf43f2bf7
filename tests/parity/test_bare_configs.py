"""Bases whose config.json names no class, only a type: merged as PEFT merges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from architectures import MODELS, assert_merged, make_adapter, make_base, merge, weights
from test_ties import HEADS, Case, answer, trained


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


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("what", ["tokens", "grown", "head"])
@pytest.mark.parametrize("name", ["llama, tied", "whisper"])
def test_the_adapter_says_which_class_it_was_trained_on(name: str, what: str, tmp_path: Path) -> None:
    """Ties of a type's classes differ; without a task PEFT writes the class into the adapter's config."""
    kind, config, embedding, head, layer = HEADS[name]
    options = (("trainable_token_indices", {embedding: [3, 5]}),) if what == "tokens" else ()
    case = Case(kind, config, [layer, head] if what == "head" else [layer], grown=what == "grown", options=options)
    cls = getattr(transformers, kind)
    cls(config()).save_pretrained(tmp_path / "base")
    expected = answer(trained(cls.from_pretrained(tmp_path / "base"), case, tmp_path / "adapter"))
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "architectures"}))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    loaded, report = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(answer(loaded), expected, rtol=1e-4, atol=1e-5)
