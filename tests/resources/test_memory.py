"""Merging holds a few rows, whatever the model's size: peak anonymous memory of the command, as the system counts it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import bench_merge
import bitsandbytes.functional as bnb
import make_checkpoint
import measure
import pytest
import torch
from helpers import write_adapter
from make_checkpoint import GeneratedModel
from safetensors.torch import save_file
from seeds import vary
from shapes import Known

from streamer.detection.findings import load_findings

BOUND = 700e6
SLACK = 8e6  # allocator and interpreter noise, absolute; a matrix of the models below is larger


def model(layers: int, hidden: int = 1024) -> Known:
    return Known(
        hidden, hidden * 7 // 2, layers, 32000, heads=hidden // 128, kv_heads=hidden // 512
    )


def make(directory: Path, size: Known) -> GeneratedModel:
    """One shard; the adapter touches every linear layer."""
    return make_checkpoint.make_checkpoint(directory, size, shards=1)


def peak(made: GeneratedModel, out: Path, *extra: str) -> int:
    """Peak anonymous bytes of a merge at λ = 1."""
    found = measure.watched([*bench_merge.merge_command(made.base, made.adapter, out), *extra])
    written, read = ((d / "model.safetensors").stat().st_size for d in (out, made.base))
    assert 0 <= written - read < 1000  # what it was made from stands in its header
    return found.anonymous


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[GeneratedModel, GeneratedModel]]:
    """A checkpoint of 240 MB and one of twice that."""
    directory = tmp_path_factory.mktemp("models")
    one = model(4)
    two = model(13)
    assert 1.9 < two.nbytes("BF16") / one.nbytes("BF16") < 2.1
    yield make(directory / "one", one), make(directory / "two", two)
    shutil.rmtree(directory)


@pytest.mark.long
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_merge_stays_under_the_bound_and_twice_the_model_takes_no_more(
    models: tuple[GeneratedModel, GeneratedModel], tmp_path: Path, io: str
) -> None:
    first, second = (peak(made, tmp_path / made.base.parent.name, "--io", io) for made in models)
    assert first < BOUND
    assert second < 1.05 * first + SLACK, f"{first / 1e6:.0f} MB grew to {second / 1e6:.0f} MB"
    # Far less than one copy of the model besides the interpreter and torch, whose own share is about 150 MB.
    assert second < 0.75 * model(13).nbytes("BF16")


@pytest.mark.long
def test_eight_outputs_in_one_pass_take_no_more_than_one(
    models: tuple[GeneratedModel, GeneratedModel], tmp_path: Path
) -> None:
    made = models[0]
    adapters = [Path(shutil.copytree(made.adapter, tmp_path / name)) for name in "abcdefgh"]
    one = peak(made, tmp_path / "one")
    line = bench_merge.merge_command(made.base, adapters[0], tmp_path / "eight")
    at = line.index(str(adapters[0]))
    line[at : at + 1] = map(str, adapters)
    eight = measure.watched(line).anonymous
    assert len(list((tmp_path / "eight").glob("*/model.safetensors"))) == 8
    assert eight < 1.05 * one + SLACK, f"{one / 1e6:.0f} MB grew to {eight / 1e6:.0f} MB"


@pytest.mark.long
def test_the_poll_sees_memory_that_is_held() -> None:
    code = "import time; held = bytearray(b'x') * 100_000_000; time.sleep(2)"
    held = measure.watched([sys.executable, "-c", code])
    idle = measure.watched([sys.executable, "-c", "import time; time.sleep(2)"])
    assert 99e6 < held.anonymous - idle.anonymous < 103e6
    assert held.hwm >= held.anonymous


def detection(
    made: GeneratedModel, out: Path, *extra: str
) -> tuple[measure.Watched, list[tuple[int, ...]]]:
    """What a detection took, and the intruders of each matrix."""
    command = [
        sys.executable,
        "-m",
        "streamer",
        "detect",
        *map(str, (made.base, made.adapter)),
        "-o",
        str(out),
        "--quiet",
        *extra,
    ]
    return measure.watched(command), [m.detection.intruders for m in load_findings(out)]


@pytest.mark.slow
def test_detection_keeps_within_its_budget_and_decides_the_same(tmp_path: Path) -> None:
    """One layer of 4096x14336: in float32 its largest matrix alone takes 235 MB."""
    made = make(tmp_path, model(1, 4096))
    free, expected = detection(made, tmp_path / "free.safetensors")
    tight, found = detection(made, tmp_path / "tight.safetensors", "--max-memory", "420M")
    assert found == expected
    assert any(expected)
    assert tight.anonymous < 420 << 20
    assert free.anonymous > tight.anonymous + 100e6
    assert all(m.detection.certified for m in load_findings(tmp_path / "tight.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["nf4", "gptq", "fp8"])
def test_codes_are_merged_a_few_rows_at_a_time(tmp_path: Path, encoding: str) -> None:
    """Twice the matrices take no more, and beyond the plan less than a quarter of one matrix of 8192x2048 in float32."""
    m = 8192
    n = 2048
    g = torch.Generator().manual_seed(vary(0))
    if encoding == "nf4":
        codes, state = bnb.quantize_4bit(
            torch.randn(m, n, generator=g), quant_type="nf4", compress_statistics=True
        )
        tensors = {
            "weight": codes,
            **{f"weight.{k}": t for k, t in state.as_dict(packed=True).items()},
        }
        config = {"quant_method": "bitsandbytes"}
    elif encoding == "gptq":
        words = torch.randint(-(2**31), 2**31, (n // 8, m), generator=g).int()
        zeros = torch.randint(-(2**31), 2**31, (n // 128, m // 8), generator=g).int()
        tensors = {
            "qweight": words,
            "qzeros": zeros,
            "scales": torch.rand(n // 128, m, generator=g).half(),
        }
        config = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    else:
        codes = torch.randn(m, n, generator=g).to(torch.float8_e4m3fn)
        tensors = {
            "weight": codes,
            "weight_scale_inv": torch.rand(m // 128, n // 128, generator=g) + 0.1,
        }
        config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    peaks = []
    for layers in (2, 4):
        base = tmp_path / f"{layers}"
        base.mkdir()
        names = [f"model.layers.{i}.up_proj" for i in range(layers)]
        save_file(
            {f"{name}.{k}": t.clone() for name in names for k, t in tensors.items()},
            base / "model.safetensors",
        )
        (base / "config.json").write_text(
            json.dumps({"model_type": "llama", "quantization_config": config})
        )
        factors = {
            name: (torch.randn(4, n, generator=g), torch.randn(m, 4, generator=g) / 1e3)
            for name in names
        }
        adapter = write_adapter(tmp_path / f"adapter{layers}", factors, 4)
        command = bench_merge.merge_command(base, adapter, tmp_path / f"out{layers}")
        command += ["--dequantize"] * (encoding != "fp8")
        planned = measure.watched([*command, "--dry-run"]).anonymous
        peaks.append(measure.watched(command).anonymous)
        written = (tmp_path / f"out{layers}" / "model.safetensors").stat().st_size
        assert written > layers * m * n * (1 if encoding == "fp8" else 2)
    assert peaks[1] < 1.05 * peaks[0] + SLACK, peaks
    assert peaks[1] - planned < m * n + SLACK, (peaks, planned)
