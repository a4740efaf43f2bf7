"""FP8 with scales of any granularity, without a library."""

from pathlib import Path

import pytest
import torch
from quantized_values import FP8_CONFIG, assert_decodes, base_of, fp8, scales

from streamer.weights.codes import exponents


def test_exponents_are_what_torch_has() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(exponents(codes)[:255], codes.view(torch.float8_e8m0fnu).float()[:255])
    assert exponents(codes)[255].isnan()


@pytest.mark.parametrize("shape", [(200, 300), (128, 130), (130, 128), (7, 5)])
def test_fp8_blocks_at_the_edges(tmp_path: Path, shape: tuple[int, int]) -> None:
    """The last block of a row or column may be smaller, as in DeepSeek's kernels; transformers does not load such a shape."""
    code = fp8(shape)
    scale = scales((-(-shape[0] // 128), -(-shape[1] // 128)))
    weights = base_of(tmp_path, {"w.weight": code, "w.weight_scale_inv": scale}, FP8_CONFIG)
    rows = torch.arange(shape[0]) // 128
    columns = torch.arange(shape[1]) // 128
    assert_decodes(weights, "w.weight", code.float() * scale[rows][:, columns])


@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        ((), torch.float32),
        ((1,), torch.float32),
        ((64,), torch.bfloat16),
        ((64, 1), torch.bfloat16),
    ],
)
def test_fp8_with_one_scale_or_one_a_row(
    tmp_path: Path, grid: tuple[int, ...], dtype: torch.dtype
) -> None:
    """compressed-tensors and modelopt: ``weight_scale`` multiplies; the scale of activations is no part of the weight."""
    code = fp8((64, 96))
    scale = scales(grid).to(dtype)
    tensors = {"w.weight": code, "w.weight_scale": scale, "w.input_scale": torch.tensor(0.5)}
    weights = base_of(
        tmp_path, tensors, {"quant_method": "compressed-tensors", "format": "float-quantized"}
    )
    assert_decodes(
        weights,
        "w.weight",
        code.float() * (scale.float()[:, None] if len(grid) == 1 else scale.float()),
    )
