"""`--max-memory`: every command keeps within the smallest budget that it names, as the system counts it, or refuses before it writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fitted
import measure
import pytest
import torch
from command_line import process_mib, with_method
from forks import server
from helpers import intruding_factors, power_law, write_adapter, write_sharded
from safetensors.torch import save_file
from seeds import vary
from torch import Tensor

import streamer
from streamer.detection.detect import float64_way
from streamer.detection.options import DetectionOptions
from streamer.plan.plan import AdapterBatch, make_batch, resident_bytes

M = 4096
N = 3072
RANK = 8
MODULE = "model.layers.0.mlp.up_proj"
Inputs = tuple[Path, Path]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(vary(seed)))


def write_base(directory: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return directory


def plain(directory: Path, scale: float = 1) -> Path:
    """Two matrices of decaying spectra, without their SVDs."""
    tensors = {}
    for layer in range(2):
        top = (
            noise(M, 32, seed=layer)
            @ (noise(32, N, seed=9) * torch.arange(1, 33).pow(-0.7)[:, None])
            / 300
        )
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = (
            (top + noise(M, N, seed=layer + 5) / 100) * scale
        ).bfloat16()
    return write_base(directory / "base", tensors)


def factors(rank: int = RANK, m: int = M, n: int = N) -> tuple[Tensor, Tensor]:
    return noise(rank, n) / n**0.5, 10 * noise(m, rank, seed=1) / m**0.5


def lora(directory: Path, rank: int = RANK) -> Inputs:
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(2)]
    return plain(directory), write_adapter(
        directory / "adapter", {name: factors(rank) for name in names}, rank
    )


def wide_lora(directory: Path) -> Inputs:
    return lora(directory, 256)


def dora(directory: Path) -> Inputs:
    base = plain(directory)
    adapter = directory / "adapter"
    adapter.mkdir()
    A, B = factors()
    stem = f"base_model.model.{MODULE}"
    tensors = {
        f"{stem}.lora_A.weight": A,
        f"{stem}.lora_B.weight": B,
        f"{stem}.lora_magnitude_vector": torch.ones(M),
    }
    return base, written(adapter, tensors, peft_type="LORA", r=RANK, lora_alpha=RANK, use_dora=True)


def loha(directory: Path) -> Inputs:
    adapter = directory / "adapter"
    adapter.mkdir(parents=True)
    A, B = factors()
    stem = f"base_model.model.{MODULE}.hada_"
    tensors = {f"{stem}w{i}_a": B.clone() for i in (1, 2)} | {
        f"{stem}w{i}_b": A.clone() for i in (1, 2)
    }
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
    count = 8
    m = 2048
    n = 1024
    name = "model.layers.0.mlp.experts.gate_up_proj"
    base = write_base(
        directory / "base",
        {name: noise(count, m, n).bfloat16()},
        model_type="qwen3_moe",
        hidden_size=n,
    )
    adapter = directory / "adapter"
    adapter.mkdir()
    stem = "base_model.model.model.layers.0.mlp.experts.lora_"
    tensors = {
        f"{stem}A.weight": noise(count * 64, n) / 100,
        f"{stem}B.weight": noise(m, count * 64) / 100,
    }
    config = {
        "r": 64,
        "lora_alpha": 64,
        "target_parameters": ["mlp.experts.gate_up_proj"],
        "peft_version": "0.21.0",
    }
    return base, written(adapter, tensors, peft_type="LORA", **config)


CASES: list[tuple[Callable[[Path], Inputs], str, tuple[str, ...]]] = [
    (lora, "merge", ()), (lora, "merge", ("--lambda", "1", "--io", "pread")), (wide_lora, "merge", ("--method", "shrink")),
    (wide_lora, "mitigate", ("--lambda", "0.5")), (dora, "merge", ("--lambda", "1")),
    (dora, "mitigate", ("--to-lora", "16", "--method", "shrink")), (dora, "detect", ()), (loha, "merge", ("--method", "shrink")),
    (tuned, "merge", ("--method", "shrink")), (tuned, "mitigate", ("--to-lora", "32", "--lambda", "1")),
    (tuned, "detect", ("--io", "pread")), (fp8, "merge", ("--lambda", "1", "--io", "pread")), (experts, "mitigate", ("--io", "pread")),
    (experts, "merge", ()),
]  # fmt: skip


LONG = [
    (lora, "merge", ("--lambda", "1", "--io", "pread")),
    (tuned, "merge", ("--method", "shrink")),
]


@pytest.mark.parametrize(
    ("make", "command", "options"),
    [pytest.param(*c, marks=pytest.mark.long if c in LONG else pytest.mark.slow) for c in CASES],
    ids=[" ".join((c[0].__name__, c[1], *c[2])) for c in CASES],
)
def test_the_smallest_budget_is_kept(
    make: Callable[[Path], Inputs], command: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    base, adapter = make(tmp_path / "in")
    keeps_smallest_budget(command, base, adapter, tmp_path / "out.safetensors", *options)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["merge", "mitigate"])
@pytest.mark.parametrize("make", [wide_lora, dora])
def test_the_smallest_budget_of_coefficients_is_kept(
    make: Callable[[Path], Inputs], command: str, tmp_path: Path
) -> None:
    base, adapter = make(tmp_path / "in")
    file = fitted.coefficients_file(tmp_path / "c.safetensors", base, adapter)
    rank = ("--to-lora", "16") if make is dora and command == "mitigate" else ()
    keeps_smallest_budget(
        command, base, adapter, tmp_path / "out.safetensors", "--coefficients", str(file), *rank
    )


def smallest_budget(arguments: list[str], says: str = r"for tensor '[^']+' \([\dx]+\); ") -> int:
    """The megabytes that a command says would do, in the least that is refused."""
    refused = server().run(*arguments, "--max-memory", f"{process_mib() + 1}M")
    assert refused.code == 2, refused.err
    least = re.search(rf"--max-memory: \d+M is not enough .*{says}it needs (\d+)M", refused.err)
    assert least, refused.err
    return int(least[1])


def assert_kept(line: list[str], budget: int) -> None:
    peak = measure.watched(line).anonymous
    assert 0.4 * budget < peak <= budget, f"{peak >> 20}M of {budget >> 20}M"


def keeps_smallest_budget(
    command: str, base: Path, adapter: Path, out: Path, *options: str
) -> None:
    """Run a command in the smallest budget that it says would do."""
    arguments = with_method([command, base, adapter, "-o", out, *options])
    budget = smallest_budget(arguments)
    assert not out.exists()
    assert_kept(
        [sys.executable, "-m", "streamer", *arguments, "--quiet", "--max-memory", f"{budget}M"],
        budget << 20,
    )
    assert out.exists()


@pytest.mark.long
@pytest.mark.parametrize("dora", [False, True])
def test_float64_keeps_within_its_budget(dora: bool, tmp_path: Path) -> None:
    """A matrix near ε, done once more in the least memory that is forecast for it."""
    m = 900
    n = 700
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": power_law(m, n).bfloat16()})
    magnitude = {f"base_model.model.{MODULE}.lora_magnitude_vector": torch.ones(m)} if dora else {}
    adapter = write_adapter(
        tmp_path / "adapter",
        {MODULE: intruding_factors(m, n, RANK)},
        RANK,
        None,
        magnitude,
        use_dora=dora,
    )
    plan = make_batch(base, [adapter]).plans[0]
    (target,) = plan.targets
    similarity = streamer.detect_intruder_dimensions(base, adapter, solver="dense")[
        MODULE
    ].detection.similarity[1]
    resident = resident_bytes(AdapterBatch(plan.base, (plan,)))
    needed = float64_way(plan, target, DetectionOptions(), resident, "dense")
    assert needed is not None
    budget = needed[1]
    out = tmp_path / "findings.safetensors"
    line = [
        sys.executable,
        "-m",
        "streamer",
        "detect",
        str(base),
        str(adapter),
        "-o",
        str(out),
        "--quiet",
        "--solver",
        "dense",
        "--epsilon",
        str(similarity + 1e-4),
        "--max-memory",
        str(budget),
    ]
    assert_kept(line, budget)
    (found,) = (row.detection for row in streamer.load_findings(out))
    assert (found.precision, found.certified) == ("float64", True)


TENSORS = 3000
ADAPTERS = 20
SIZE = 16


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("tables")
    base = home / "base"
    base.mkdir()
    names = [
        f"model.layers.{i}.mlp.{which}_proj.weight"
        for i in range(TENSORS // 3)
        for which in ("gate", "up", "down")
    ]
    g = torch.Generator().manual_seed(vary(0))
    save_file(
        {name: torch.randn(SIZE, SIZE, generator=g).bfloat16() for name in names},
        base / "model.safetensors",
    )
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for i in range(ADAPTERS):
        write_adapter(
            home / "adapters" / f"n{i}", {MODULE: intruding_factors(SIZE, SIZE, 2, seed=i)}, 2
        )
    return base, home / "adapters"


@pytest.mark.long
@pytest.mark.parametrize("command", ["detect", "merge"])
def test_many_adapters_keep_the_budget(
    inputs: tuple[Path, Path], command: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = with_method([command, *inputs, "-o", out, "--quiet"])
    budget = smallest_budget(arguments, "")
    assert not out.exists()
    assert_kept(
        [sys.executable, "-m", "streamer", *arguments, "--max-memory", f"{budget}M"], budget << 20
    )
    assert len(list(out.iterdir())) == ADAPTERS


IN_MEMORY = """
import sys, streamer
found = streamer.detect_intruder_dimensions(*sys.argv[1:3], top_k=1.0, threshold_epsilon=1.0, max_memory=int(sys.argv[3]))
assert len(found.matrices) == 160
"""


@pytest.mark.long
def test_findings_that_stay_in_memory_are_counted(tmp_path: Path) -> None:
    """All directions of 160 matrices are intruders: 84 MB of vectors."""
    g = torch.Generator().manual_seed(vary(0))
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(160)]
    tensors = {f"{name}.weight": torch.randn(256, 256, generator=g).bfloat16() for name in names}
    base = write_sharded(tmp_path / "base", [tensors])
    adapter = write_adapter(
        tmp_path / "adapter", {name: intruding_factors(256, 256, 2) for name in names}, 2
    )
    command = [sys.executable, "-c", IN_MEMORY, str(base), str(adapter)]
    refused = subprocess.run(
        [*command, str(process_mib() + 1 << 20)], stderr=subprocess.PIPE, text=True, check=False
    )
    least = re.search(r"it needs (\d+)M", refused.stderr)
    assert least, refused.stderr
    assert_kept([*command, str(int(least[1]) << 20)], int(least[1]) << 20)
