"""Every kind of adapter, route by route, against PEFT (see `kinds_cases`)."""

from __future__ import annotations

from pathlib import Path

import kinds_cases
import pytest
from kinds import APART, DTYPES
from verified import lines

# In bf16 by default what differs there: whose rounding it is, and what else is rounded than a sum.
IN_BF16 = {
    "linear", "embedding", "conv2d", "modules_to_save", "lora_bias", "trainable tokens", "DoRA", "tied, embedding", "LoHa", "OFT",
}  # fmt: skip
# Variants of a kind that differ in their shapes alone.
SLOW = {"rslora", "lora_bias, bias=all", "bias=lora_only", "conv1d", "conv3d", "DoRA, conv1d", "DoRA, conv3d", "DoRA, saved modules",
        "OLoRA", "LoHa, conv2d", "LoKr, large rank", "LoKr, conv2d", "AdaLoRA, conv2d", "VeRA, shapes", "OFT, three terms", "BOFT, conv2d",
        "MiSS, uneven", "HRA, orthogonal",
        "tied, one delta of lm_head", "tied, GPT-2", "trainable tokens by name"}  # fmt: skip
CASES = [
    pytest.param(
        kind,
        dtype,
        marks=[]
        if kind in (IN_BF16 if dtype == "bf16" else kinds_cases.KINDS.keys() - SLOW)
        else [pytest.mark.slow],
    )
    for kind in kinds_cases.KINDS
    for dtype in DTYPES
    if (kind, dtype) not in APART
]


@pytest.mark.long
@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_every_kind_equals_peft_and_the_dense_formula(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    kinds_cases.compare(kind, DTYPES[dtype], tmp_path)
    for name in ("merged", "merged-half", "same", "half", "lora"):
        if (tmp_path / name).exists():
            found = lines(tmp_path / name, tmp_path / "base", tmp_path / "adapter", sample="all")
            unknown = kind.startswith(("OFT", "BOFT", "MiSS", "SHiRA", "DeLoRA", "HRA"))
            assert "for which verify has no formula" in found[0] if unknown else found == []
