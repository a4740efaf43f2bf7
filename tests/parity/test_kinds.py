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
    assert figures.merge <= eps
    assert figures.merge_in_dtype <= 4 * eps
    assert figures.sigma < 2e-6
    assert figures.decisions > 0
    if dtype == "bf16":
        assert figures.off_by_one < 2e-3  # float32 sums that fall on the other side of a tie
    if figures.mitigate is not None:
        assert figures.mitigate <= 4 * eps  # the factors were rounded as well
