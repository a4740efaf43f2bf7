"""Quantized bases that are broken at random: decoded or refused, and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from four_bits import four_bits
from quantized import FLOATS, as_modelopt, floats_config, small_floats
from quantized_values import AWQ_WORDS, BNB, CODES, CPU, HQQ, base_of, fp8, packed, scales, torchao
from seeds import vary

from streamer.errors import InputError
from streamer.linalg.operators import RowBlocks


@pytest.mark.parametrize(
    "change",
    [
        {"blocksize": 0}, {"blocksize": "64"}, {"blocksize": 128}, {"shape": [64]}, {"shape": [64, -128]}, {"shape": None},
        {"shape": [64, 256]}, {"nested_offset": "1"}, {"nested_blocksize": None}, {"shape": [2**40, 2**40]},
    ],
)  # fmt: skip
def test_a_quant_state_that_does_not_fit(tmp_path: Path, change: dict) -> None:
    _, _, tensors = four_bits((64, 128), "nf4", True, 64, torch.float32, torch.uint8)
    key = "w.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[key].numpy().tobytes()) | change
    tensors[key] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(InputError, match=r"tensor 'w\.weight'"):
        base_of(tmp_path, tensors)["w.weight"]
    tensors[key] = torch.zeros(7, dtype=torch.uint8)
    with pytest.raises(InputError, match="is not JSON"):
        base_of(tmp_path, tensors)["w.weight"]


def test_products_with_rows_as_they_are_stored(tmp_path: Path) -> None:
    """What `--max-memory` multiplies with is the decoded matrix."""
    _, _, tensors = four_bits((64, 128), "nf4", True, 64, torch.float32, torch.uint8)
    weight = base_of(tmp_path, tensors, io="pread")["w.weight"]
    blocks = RowBlocks(weight.matrix, weight.at_hand().rows, torch.empty(0))
    assert torch.equal(blocks.dense(), weight.whole(CPU))
    assert torch.equal(blocks.T.dense(), weight.whole(CPU).T)


def healthy() -> dict[str, tuple]:
    """A small weight in every encoding, its config, and metadata if it needs them."""
    nested = four_bits((64, 128), "nf4", True, 64, torch.float32, torch.uint8)[2]
    group = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
    return {
        "fp8": ({"w.weight": fp8((64, 96)), "w.weight_scale_inv": scales((2, 3))}, {"quant_method": "fp8"}),
        "stack": ({"w.weight": fp8((2, 64, 96)), "w.weight_scale": scales((2, 1, 1))}, {"quant_method": "fp8"}),
        "nf4": (nested, BNB),
        "int8": ({"w.weight": CODES["w.weight"], "w.SCB": torch.ones(64)}, BNB),
        "gptq": (packed(g_idx=torch.zeros(64, dtype=torch.int32)), {"quant_method": "gptq", "bits": 4}),
        "awq": (packed(qweight=AWQ_WORDS), {"quant_method": "awq"}),
        "packed": (
            {
                "w.weight_packed": torch.zeros(40, 12, dtype=torch.int32),
                "w.weight_scale": torch.ones(40, 3),
                "w.weight_shape": torch.tensor([40, 96]),
                "w.weight_zero_point": torch.zeros(5, 3, dtype=torch.int32),
            },
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}},
        ),
        **{
            one: ({f"w{k}": t for k, t in small_floats(torch.randn(64, 96), one)[0].items()}, floats_config(one))
            for one in FLOATS
        },
        "modelopt": (
            {f"w{k}": t for k, t in as_modelopt(small_floats(torch.randn(64, 96), "nvfp4-pack-quantized")[0]).items()},
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        ),
        "hqq": (HQQ, {"quant_method": "hqq"}),
        "torchao-int8": torchao(
            "Int8Tensor",
            CODES["w.weight"],
            {"block_size": [1, 32]},
            scale=torch.ones(64, 3),
            zero_point=torch.zeros(64, 3, dtype=torch.int8),
        ),
        "torchao-int4": torchao(
            "Int4Tensor",
            CODES["w.weight"],
            {"block_size": [1, 64], "shape": [64, 192]},
            scale=torch.ones(3, 64),
            zero_point=torch.ones(3, 64),
        ),
        "mxfp4": (
            {
                "w_blocks": torch.zeros(2, 8, 1, 16, dtype=torch.uint8),
                "w_scales": torch.zeros(2, 8, 1, dtype=torch.uint8),
            },
            {"quant_method": "mxfp4"},
        ),
    }


def disturbed(t: torch.Tensor, rng: np.random.Generator) -> torch.Tensor | None:
    """Another tensor in the place of this one; None for none at all."""
    kind = rng.integers(6)
    if kind == 0:
        return None
    if kind == 1:
        dtypes = [torch.int8, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.float8_e4m3fn]
        return torch.zeros(t.shape, dtype=dtypes[rng.integers(len(dtypes))])
    if kind == 2:  # one size more or less somewhere
        shape = [max(0, n + int(rng.integers(-1, 2))) for n in t.shape]
        return torch.zeros(shape, dtype=t.dtype)
    if kind == 3:
        return torch.zeros([int(rng.integers(0, 70)) for _ in range(rng.integers(0, 5))], dtype=t.dtype)
    if kind == 4:  # other bytes
        raw = torch.from_numpy(rng.integers(0, 256, max(1, t.nbytes), dtype=np.uint8))
        return raw[: t.nbytes].view(t.dtype).view(t.shape) if t.dim() else t
    return t.T.contiguous() if t.dim() == 2 else t[:0] if t.dim() else t


@pytest.mark.long
@pytest.mark.parametrize("name", healthy())
def test_whatever_stands_there_is_decoded_or_refused(tmp_path: Path, name: str) -> None:
    """No disturbance of any tensor ends in anything but values of the stated shape or an error of ours."""
    rng = np.random.default_rng(vary(0))
    outcomes = Counter()
    for i in range(120):
        tensors, config, *metadata = healthy()[name]
        key = list(tensors)[rng.integers(len(tensors))]
        other = disturbed(tensors[key], rng)
        tensors = {k: t.clone() for k, t in tensors.items() if k != key} | ({} if other is None else {key: other})
        try:
            weights = base_of(tmp_path / str(i), tensors or {"x": torch.zeros(1)}, config, "mmap", *metadata)
            for logical in weights:
                weight = weights[logical]
                assert weight.whole(CPU).shape == weight.shape
                outcomes["decoded"] += 1
        except InputError:
            outcomes["refused"] += 1
    assert min(outcomes["decoded"], outcomes["refused"]) > 10, outcomes
