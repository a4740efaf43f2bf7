"""Twelve families of models as transformers saves them, adapters on them as PEFT saves them: all modules matched, merged as PEFT merges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from architectures import LINEAR, MODELS, OLD, assert_merged, make_adapter, make_base, merge, old_name, weights
from safetensors.torch import load_file, save_file


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_merged_as_peft_merges(name: str, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    cls = make_base(name, base)
    model = make_adapter(cls, base, adapter, MODELS[name][2])
    wrapped = sum("lora_A" in key for key in load_file(adapter / "adapter_model.safetensors"))
    ours = merge(base, adapter, tmp_path / "ours")
    record = json.loads((tmp_path / "ours" / "streamer.json").read_text())
    assert record["totals"]["matrices"] == wrapped > 0
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    assert_merged(ours, weights(tmp_path / "theirs"))
    assert sum(not torch.equal(ours[k], v) for k, v in weights(base).items()) == wrapped
    _, report = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


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

    with_names(tmp_path / "new-adapter", tmp_path / "old-adapter",
               lambda k: "base_model.model." + old(k.removeprefix("base_model.model.")))  # fmt: skip
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


@pytest.mark.parametrize(
    ("name", "auto"), [("llava", "AutoModel"), ("qwen2.5-vl", "AutoModel"), ("bert", "AutoModel"), ("llama", "AutoModel"),
                       ("gpt2", "AutoModel"), ("llama", "AutoModelForSequenceClassification")]
)  # fmt: skip
def test_an_adapter_trained_on_another_head(name: str, auto: str, tmp_path: Path) -> None:
    """Without the head, or with another one, the modules' names differ by one prefix, or not at all."""
    cls = make_base(name, tmp_path / "base")
    targets = [t for t in MODELS[name][2] if t != "lm_head"]
    make_adapter(getattr(transformers, auto), tmp_path / "base", tmp_path / "adapter", targets)
    make_adapter(cls, tmp_path / "base", tmp_path / "whole", targets)
    theirs = {k.split(".", 2)[2]: v for k, v in load_file(tmp_path / "whole" / "adapter_model.safetensors").items()}
    ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    if name == "bert":
        theirs = {k: v for k, v in theirs.items() if "pooler" in k or "encoder" in k}
    assert len(ours) == len(theirs)
    merged = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    base = weights(tmp_path / "base")
    changed = {k for k, v in merged.items() if not torch.equal(v, base[k])}
    assert len(changed) == len(ours) // 2


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "module._orig_mod."])
def test_an_adapter_saved_inside_a_wrapper(wrapper: str, tmp_path: Path) -> None:
    cls = make_base("qwen3", tmp_path / "base")
    make_adapter(cls, tmp_path / "base", tmp_path / "adapter", LINEAR)

    def wrap(name: str) -> str:
        if wrapper == "_fsdp_wrapped_module.":  # one around every layer
            return name.replace(".self_attn.", f".{wrapper}self_attn.").replace(".mlp.", f".{wrapper}mlp.")
        return (
            wrapper + name
            if wrapper.startswith("module.")
            else name.replace("base_model.model.", f"base_model.model.{wrapper}")
        )

    wrapped = with_names(tmp_path / "adapter", tmp_path / "wrapped", wrap)
    expected = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "expected")
    got = merge(tmp_path / "base", wrapped, tmp_path / "got")
    assert all(torch.equal(got[k], v) for k, v in expected.items())
