"""Deltas that answer general inputs less, as verification computes them, beside the product's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from seeds import vary

from streamer.linalg.low_rank import LowRank
from streamer.linalg.null_space import Spectrum, reduced
from streamer.verification.deltas import LowRankDelta
from streamer.verification.null_space import Known, by_map

M, N, K, R = 20, 30, 6, 4


@pytest.mark.parametrize("share", [0.0, 1e-300, 1e-30, 3e-22, 1e-21, 1e-6, 0.5, 1 - 1e-12, np.nextafter(1.0, 0)])
@pytest.mark.parametrize("one_hot", [False, True])
def test_any_share_is_computed_alike(share: float, one_hot: bool) -> None:
    """Shares below what the largest ν leaves, or above what the smallest does, as well."""
    rng = np.random.default_rng(vary(0))
    L, right = rng.standard_normal((M, R)), rng.standard_normal((N, R))
    values = np.sort(np.exp(rng.uniform(-6, 3, N if one_hot else K)))[::-1].copy()
    V = None if one_hot else np.linalg.qr(rng.standard_normal((N, K)))[0]
    rest = 0.0 if one_hot else 1e-3
    spectrum = Spectrum(torch.from_numpy(values), rest, None if V is None else torch.from_numpy(V))
    made = reduced(LowRank(torch.from_numpy(L), torch.from_numpy(right)), spectrum, share)
    base: Any = SimpleNamespace(shape=(M, N))
    found = by_map(base, LowRankDelta(L, right), [Known(values, V, rest)], share)
    rows = found.rows(0, M, np.zeros((M, N)))[1]
    np.testing.assert_allclose(rows, made.dense().numpy(), atol=1e-12)
