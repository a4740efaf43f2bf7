"""The example that merges while llm-compressor quantizes: the same files as from a merged directory."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from architectures import LINEAR, TEXT, config
from causal_models import make_adapter
from command_line import ENV
from pairs import merge
from paths import ROOT
from safetensors.torch import load_file, save_file
from seeds import vary

pytest.importorskip(
    "llmcompressor",
    reason="needs llmcompressor, which wants older transformers and compressed-tensors than the others",
)

SCRIPT = ROOT / "examples" / "quantize_merged.py"
SIZES = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
"""What groups of 128 divide."""


def make(home: Path, size: str, **options: object) -> tuple[Path, Path]:
    """A tiny model in files of this size, and an adapter."""
    torch.manual_seed(vary(0))
    fields = {**TEXT, **SIZES, "tie_word_embeddings": "modules_to_save" in options}
    model = transformers.LlamaForCausalLM(config("Llama", **fields))
    model.to(torch.bfloat16).save_pretrained(home / "base", max_shard_size=size)
    return home / "base", make_adapter(
        type(model), home / "base", home / "adapter", LINEAR, **options
    )


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """The bytes of all tensors."""
    files = map(load_file, directory.glob("*.safetensors"))
    return {name: tensor.view(torch.uint8) for file in files for name, tensor in file.items()}


def example() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("quantize_merged", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("scheme", "size"), [("FP8_DYNAMIC", "1GB"), ("W4A16", "75KB"), ("NVFP4A16", "75KB")]
)
def test_files_equal_those_made_of_a_merged_directory(
    scheme: str, size: str, tmp_path: Path
) -> None:
    """NVFP4 has a scale of queries, keys and values together, which then are in two files."""
    (base, adapter), script = make(tmp_path, size), example()
    if scheme == "FP8_DYNAMIC":  # once as its docstring says
        line = [
            sys.executable,
            str(SCRIPT),
            str(base),
            str(adapter),
            str(tmp_path / "one"),
            "--lambda",
            "0.25",
        ]
        done = subprocess.run(
            line, capture_output=True, text=True, env={**ENV, "PYTHONPATH": str(ROOT)}, check=False
        )
        assert done.returncode == 0, done.stderr
    else:
        layer = "model.layers.0.self_attn"
        weight_map = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
        assert len({weight_map[f"{layer}.{c}_proj.weight"] for c in "qkv"}) == 2
        script.quantize(base, adapter, tmp_path / "one", scheme, mitigation_lambda=0.25)
    merge(base, adapter, tmp_path / "merged", 0.25)
    script.model_free_ptq(tmp_path / "merged", tmp_path / "two", scheme, ignore=script.IGNORE)
    script.model_free_ptq(base, tmp_path / "unmerged", scheme, ignore=script.IGNORE)
    made, wanted = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two")
    )
    assert made == {
        name: data for name, data in wanted.items() if name not in ("streamer.json", "README.md")
    }
    merged = tensors(tmp_path / "one")
    unmerged = tensors(tmp_path / "unmerged")
    changed = {
        name.rpartition(".")[0] for name in merged if not torch.equal(merged[name], unmerged[name])
    }
    assert len(changed) == 2 * len(LINEAR)


def test_what_the_example_cannot_merge_is_refused(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "1GB", modules_to_save=["lm_head"])
    with pytest.raises(
        SystemExit,
        match=r"^lm_head.weight: the merged model has it, the base does not; run `streamer merge`",
    ):
        example().Merge(base, adapter, mitigation_lambda=0.25)
    loaded = load_file(base / "model.safetensors")
    converter = example().Merge(base, make(tmp_path / "plain", "1GB")[1], mitigation_lambda=0.25)
    name = "model.norm.weight"
    with pytest.raises(
        SystemExit,
        match=rf"^{name}: torch.float32 \[128\] in the base, torch.bfloat16 \[128\] in the merged",
    ):
        converter.process({**loaded, name: loaded[name].float()})
    with pytest.raises(SystemExit, match=r"^extra: the base has it, the merged model does not"):
        converter.process({**loaded, "extra": loaded[name]})
    save_file(
        {**loaded, "lm_head.weight": loaded["model.embed_tokens.weight"].clone()},
        base / "model.safetensors",
    )
    assert '"tie_word_embeddings": true' in (base / "config.json").read_text()
    with pytest.raises(SystemExit, match=r"^lm_head.weight: the base has it though it is tied"):
        example().Merge(base, adapter, mitigation_lambda=0.25)
