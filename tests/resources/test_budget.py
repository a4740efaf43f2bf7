"""`--max-memory`: every command keeps within the smallest budget that it names, as the system counts it, or refuses before it writes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import run_cli, write_adapter
from safetensors.torch import save_file
from torch import Tensor

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import measure  # noqa: E402

M, N, RANK = 4096, 3072, 8
MODULE = "model.layers.0.mlp.up_proj"
Inputs = tuple[Path, Path]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_base(directory: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return directory


def plain(directory: Path, scale: float = 1) -> Path:
    """Two matrices of decaying spectra, without their SVDs."""
    tensors = {}
    for layer in range(2):
        top = noise(M, 32, seed=layer) @ (noise(32, N, seed=9) * torch.arange(1, 33).pow(-0.7)[:, None]) / 300
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = (
            (top + noise(M, N, seed=layer + 5) / 100) * scale
        ).bfloat16()
    return write_base(directory / "base", tensors)


def factors(rank: int = RANK, m: int = M, n: int = N) -> tuple[Tensor, Tensor]:
    return noise(rank, n) / n**0.5, 10 * noise(m, rank, seed=1) / m**0.5


def lora(directory: Path, rank: int = RANK) -> Inputs:
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(2)]
    return plain(directory), write_adapter(directory / "adapter", {name: factors(rank) for name in names}, rank)


def wide_lora(directory: Path) -> Inputs:
    return lora(directory, 256)


def dora(directory: Path) -> Inputs:
    base, adapter = plain(directory), directory / "adapter"
    adapter.mkdir()
    A, B = factors()
    stem = f"base_model.model.{MODULE}"
    tensors = {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B, f"{stem}.lora_magnitude_vector": torch.ones(M)}
    return base, written(adapter, tensors, peft_type="LORA", r=RANK, lora_alpha=RANK, use_dora=True)


def loha(directory: Path) -> Inputs:
    adapter = directory / "adapter"
    adapter.mkdir(parents=True)
    A, B = factors()
    stem = f"base_model.model.{MODULE}.hada_"
    tensors = {f"{stem}w{i}_a": B.clone() for i in (1, 2)} | {f"{stem}w{i}_b": A.clone() for i in (1, 2)}
    return plain(directory), written(adapter, tensors, peft_type="LOHA", r=RANK, alpha=RANK)


def written(adapter: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"bias": "none", **config}))
    return adapter


def tuned(directory: Path) -> Inputs:
    return plain(directory), plain(directory / "other", 1.125)


def fp8(directory: Path) -> Inputs:
    tensors = {f"{MODULE}.weight": noise(M, N).to(torch.float8_e4m3fn)}
    tensors[f"{MODULE}.weight_scale_inv"] = noise(M // 128, N // 128).abs() + 0.1
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    base = write_base(directory / "base", tensors, **config)
    return base, write_adapter(directory / "adapter", {MODULE: factors()}, RANK)


def experts(directory: Path) -> Inputs:
    """A stack of eight, and factors of all of them in one tensor."""
    count, m, n = 8, 2048, 1024
    name = "model.layers.0.mlp.experts.gate_up_proj"
    base = write_base(directory / "base", {name: noise(count, m, n).bfloat16()}, model_type="qwen3_moe", hidden_size=n)
    adapter = directory / "adapter"
    adapter.mkdir()
    stem = "base_model.model.model.layers.0.mlp.experts.lora_"
    tensors = {f"{stem}A.weight": noise(count * 64, n) / 100, f"{stem}B.weight": noise(m, count * 64) / 100}
    config = {"r": 64, "lora_alpha": 64, "target_parameters": ["mlp.experts.gate_up_proj"], "peft_version": "0.21.0"}
    return base, written(adapter, tensors, peft_type="LORA", **config)


CASES: list[tuple[Callable[[Path], Inputs], str, tuple[str, ...]]] = [
    (lora, "merge", ()),
    (lora, "merge", ("--lambda", "1", "--io", "pread")),
    (wide_lora, "merge", ("--method", "shrink")),
    (wide_lora, "mitigate", ("--lambda", "0.5")),
    (dora, "merge", ("--lambda", "1")),
    (dora, "mitigate", ("--to-lora", "16", "--method", "shrink")),
    (dora, "detect", ()),
    (loha, "merge", ("--method", "shrink")),
    (tuned, "merge", ("--method", "shrink")),
    (tuned, "mitigate", ("--to-lora", "32", "--lambda", "1")),
    (tuned, "detect", ("--io", "pread")),
    (fp8, "merge", ("--lambda", "1", "--io", "pread")),
    (experts, "mitigate", ("--io", "pread")),
    (experts, "merge", ()),
]


QUICK = {(lora, "merge", ("--lambda", "1", "--io", "pread")), (tuned, "merge", ("--method", "shrink"))}


@pytest.mark.parametrize(
    ("make", "command", "options"),
    [pytest.param(*c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CASES],
    ids=[" ".join((c[0].__name__, c[1], *c[2])) for c in CASES],
)
def test_the_smallest_budget_is_kept(
    make: Callable[[Path], Inputs], command: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    base, adapter = make(tmp_path / "in")
    out = tmp_path / "out.safetensors"
    arguments = [command, str(base), str(adapter), "-o", str(out), *options]
    refused = run_cli(*arguments, "--max-memory", "201M")
    assert refused.returncode == 2, refused.stderr
    assert not out.exists()
    least = re.search(
        r"--max-memory: 201M is not enough for tensor '[^']+' \([\dx]+\); it takes (\d+)M", refused.stderr
    )
    assert least, refused.stderr
    budget = int(least[1])
    line = [sys.executable, "-m", "streamer", *arguments, "--quiet", "--max-memory", f"{budget}M"]
    peak = measure.watched(line).anonymous
    assert out.exists()
    assert peak <= budget << 20, f"{peak >> 20}M of {budget}M"
    assert peak > 0.4 * (budget << 20), f"{peak >> 20}M of {budget}M: the estimate is too far off"
