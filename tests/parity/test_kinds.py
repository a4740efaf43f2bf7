"""Every kind of adapter, route by route, against PEFT (see `kinds_cases`)."""

from __future__ import annotations

from pathlib import Path

import kinds_cases
import pytest
import torch


@pytest.mark.parametrize("dtype", kinds_cases.DTYPES)
@pytest.mark.parametrize("kind", kinds_cases.KINDS)
def test_a_kind(kind: str, dtype: str, tmp_path: Path) -> None:
    figures = kinds_cases.measure(kind, kinds_cases.DTYPES[dtype], tmp_path)
    eps = torch.finfo(kinds_cases.DTYPES[dtype]).eps
    assert figures.merge <= (
        eps if dtype == "bf16" else 4 * eps
    )  # value by value it is held to half a unit, and float32 sums
    assert figures.merge_in_dtype <= 4 * eps
    assert figures.sigma < 2e-6
    assert figures.decisions > 0
    assert figures.half <= max(eps, 2e-5)  # singular vectors in float32, and their gaps
    if dtype == "bf16":
        assert figures.off_by_one < 2e-3  # float32 sums that fall on the other side of a tie
    if figures.mitigate is not None:
        assert figures.mitigate <= 4 * eps  # the factors were rounded as well
