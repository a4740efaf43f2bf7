"""Products stay in float32 where the process has asked for less, and what it asked for comes back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import intruding_factors, power_law

from streamer.detection.intruders import detect
from streamer.detection.options import DetectionOptions
from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Dense
from streamer.linalg.torch_state import bfloat16_products, full_float32, has_fast_bfloat16


@pytest.fixture
def reduced() -> Iterator[None]:
    """A process that multiplies in bf16 where the hardware can."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("reduced")
def test_it_is_switched_on_and_back() -> None:
    M, X = power_law(600, 600).float(), power_law(600, 16).float()
    with full_float32():
        error = float((M @ X - M.double() @ X.double()).abs().max())
    assert error < 1e-5
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.usefixtures("reduced")
def test_it_is_switched_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="stop"), full_float32():
        raise ValueError("stop")
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.skipif(not has_fast_bfloat16(), reason="this processor has no instructions for bfloat16")
def test_factors_are_rounded_to_bfloat16_and_sums_are_float32() -> None:
    x, w = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(0))
    exact, rounded = x.double() @ w.double().T, x.bfloat16().double() @ w.bfloat16().double().T
    with full_float32():
        with bfloat16_products():
            found = x @ w.T
        again = x @ w.T
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), rounded, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(again.double(), exact, rtol=1e-5, atol=1e-4)
    assert (rounded - exact).abs().max() > 1e-2


@pytest.mark.usefixtures("reduced")
@pytest.mark.parametrize("solver", ["certified", "dense"])
def test_detection_does_not_depend_on_it(solver: str) -> None:
    A, B = intruding_factors(300, 400, 4)
    base, delta = Dense(power_law(300, 400).float()), LowRank(B.float(), A.T.float())
    found = detect(base, delta, DetectionOptions(solver=solver))
    torch.set_float32_matmul_precision("highest")
    again = detect(base, delta, DetectionOptions(solver=solver))
    assert found.similarity == again.similarity
    assert torch.equal(found.U, again.U)
