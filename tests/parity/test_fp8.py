"""FP8 is decoded as transformers decodes it, with one scale for a tensor, a row or a block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantized_values import FP8_CONFIG, assert_decodes, base_of, fp8, scales
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from streamer.errors import UnsupportedError

COMPRESSED_BLOCKS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "block_structure": "128x128"}}},
}
"""As compressed-tensors up to 0.10 writes it."""


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize(
    ("shape", "grid", "config"),
    [
        ((256, 384), (2, 3), FP8_CONFIG),
        ((64, 96), (2, 3), {"quant_method": "fp8", "weight_block_size": [32, 32]}),
        ((64, 96), (64, 3), {"quant_method": "mxfp8", "weight_block_size": [1, 32]}),
        ((64, 96), (64, 1), {"quant_method": "fbgemm_fp8"}),
        ((64, 96), (1, 1), {"quant_method": "fp8"}),
    ],
)
def test_fp8_is_what_transformers_decodes(tmp_path: Path, shape, grid, config: dict, io: str) -> None:
    code, scale = fp8(shape), scales(grid)
    weights = base_of(tmp_path, {"w.weight": code, "w.weight_scale_inv": scale}, config, io)
    assert_decodes(weights, "w.weight", Fp8Dequantize(None)._dequantize_one(code, scale, torch.float32))
    assert list(weights) == ["w.weight"]


@pytest.mark.parametrize(
    ("grid", "config"),
    [
        ((2, 3), {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ((2, 3), COMPRESSED_BLOCKS),
        ((2, 1, 3, 1), {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}),
    ],
)
def test_fp8_blocks_that_do_not_divide_the_rows(tmp_path: Path, grid: tuple[int, ...], config: dict) -> None:
    """192 rows are one and a half blocks, not two of 96."""
    code, scale = fp8((192, 384)), scales(grid)
    weights = base_of(tmp_path, {"w.weight": code, "w.weight_scale": scale}, config)
    by_value = scale.reshape(2, 3).repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)
    assert_decodes(weights, "w.weight", code.float() * by_value)


def test_fp8_blocks_of_unknown_size(tmp_path: Path) -> None:
    weights = base_of(
        tmp_path, {"w.weight": fp8((192, 384)), "w.weight_scale": scales((2, 3))}, {"quant_method": "fp8"}
    )
    with pytest.raises(
        UnsupportedError, match=r"blocks of 96x128 and of 128x128 fit shape \[192, 384\] and scale \[2, 3\]"
    ):
        _ = weights["w.weight"]


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_fp8_with_exponents_for_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    code = fp8((64, 96))
    scale = torch.randint(100, 130, (64, 3), dtype=torch.uint8).view(dtype)
    config = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [1, 32]}
    weights = base_of(tmp_path, {"w.weight": code, "w.weight_scale_inv": scale}, config)
    assert_decodes(weights, "w.weight", Fp8Dequantize(None)._dequantize_one(code, scale, torch.float32))


def test_a_stack_of_fp8_matrices(tmp_path: Path) -> None:
    code, scale = fp8((3, 64, 96)), scales((3, 2, 3))
    config = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    weights = base_of(tmp_path, {"experts.up": code, "experts.up_scale_inv": scale}, config)
    expected = Fp8Dequantize(None)._dequantize_one(code, scale, torch.float32)
    assert_decodes(weights, "experts.up", expected)
    assert torch.equal(weights["experts.up"].slice(2).rows(5, 40), expected[2, 5:40])
