"""Merges and copies as other tools do them, for `bench_merge.py` to compare with.

    python tools/merge_peers.py loop   BASE OUT             a copy: each tensor by `safe_open`, each shard by `save_file`
    python tools/merge_peers.py shards BASE ADAPTER OUT     a merge at λ = 1: load a shard, add `s·B·A`, save the shard

What they do is the least that such a tool does: no digest, no fsync, no temporary name; a kill leaves a torn file.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

METADATA = {"format": "pt"}


def factors(adapter: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, B and the scale by the name of the base tensor that they change."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / config["r"]
    return {
        name.removeprefix("base_model.model.").replace(".lora_A", ""): (
            A,
            tensors[name.replace("lora_A", "lora_B")],
            scaling,
        )
        for name, A in tensors.items()
        if ".lora_A." in name
    }


def copy_rest(base: Path, out: Path) -> list[Path]:
    """Make the output with all but the shards in it; returns the shards."""
    out.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, out)
    return sorted(base.glob("*.safetensors"))


def loop(base: Path, out: Path) -> None:
    """Copy a model, tensor by tensor into memory and shard by shard to the disk."""
    for shard in copy_rest(base, out):
        with safe_open(shard, framework="pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  # it is no mapping
        save_file(tensors, out / shard.name, METADATA)


def shards(base: Path, adapter: Path, out: Path) -> None:
    """Merge, shard by shard, as PEFT does in a layer: the product in float32, added to the weight in place."""
    changes = factors(adapter)
    merged = 0
    for shard in copy_rest(base, out):
        tensors = load_file(shard)
        for name, weight in tensors.items():
            if name in changes:
                A, B, scaling = changes[name]
                weight.add_((B @ A) * scaling)
                merged += 1
        save_file(tensors, out / shard.name, METADATA)
    if merged != len(changes):
        raise SystemExit(f"merged {merged} matrices, expected {len(changes)}")


def main() -> None:
    what, *paths = sys.argv[1:] or ["--help"]
    job = {"loop": loop, "shards": shards}.get(what)
    if job is None:
        raise SystemExit(__doc__)
    with torch.inference_mode():
        job(*map(Path, paths))


if __name__ == "__main__":
    main()
