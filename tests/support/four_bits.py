"""Matrices that bitsandbytes quantized to four bits."""

import bitsandbytes.functional as bnb
import torch
from seeds import vary


def four_bits(shape, kind: str, nested: bool, blocksize: int, dtype: torch.dtype, storage: torch.dtype):
    """Codes, state, and the tensors that stand on disk."""
    W = torch.randn(shape, generator=torch.Generator().manual_seed(vary(0))).to(dtype)
    codes, state = bnb.quantize_4bit(
        W, quant_type=kind, compress_statistics=nested, blocksize=blocksize, quant_storage=storage
    )
    tensors = {"w.weight": codes, **{f"w.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    assert ("w.weight.nested_absmax" in tensors) == nested
    return codes, state, tensors
