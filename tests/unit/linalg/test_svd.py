"""Dense triplets and their errors, against numpy."""

import numpy as np
import pytest
import torch
from helpers import power_law, spectrum_matrix
from matrices import random
from seeds import vary

from streamer.linalg.operators import Dense, all_finite
from streamer.linalg.overlap_bounds import dense_overlaps
from streamer.linalg.svd import dense_triplets, residuals


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64)])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_dense_triplets_satisfy_their_identities(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    W = (power_law(*shape) * scale).to(dtype)
    t = dense_triplets(Dense(W), 10)
    eps = torch.finfo(dtype).eps
    sigma1 = float(t.S[0])
    assert float(t.residuals.max()) <= 50 * eps * sigma1
    torch.testing.assert_close(t.U.T @ t.U, torch.eye(10, dtype=dtype), rtol=0, atol=50 * eps)
    torch.testing.assert_close(t.Vh @ t.Vh.T, torch.eye(10, dtype=dtype), rtol=0, atol=50 * eps)
    expected = np.linalg.svd(W.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(t.S.double(), expected[:10], rtol=100 * eps)
    gaps = np.minimum(
        np.abs(expected[:-1] - expected[1:])[:10], np.r_[np.inf, np.abs(expected[:-1] - expected[1:])[:9]]
    )
    np.testing.assert_allclose(t.gaps, gaps, rtol=1e-3)


def test_residuals_see_a_wrong_vector() -> None:
    W = Dense(power_law(30, 20))
    t = dense_triplets(W, 3)
    spoiled = t.U.clone()
    spoiled[:, 1] = torch.nn.functional.normalize(spoiled[:, 1] + 1e-3 * random(30), dim=0)
    r = residuals(W, spoiled, t.S, t.Vh)
    assert float(r[1]) > 1e-5
    assert float(r[0]) < 1e-13


def test_angle_error_is_large_in_a_cluster_only() -> None:
    sigma = torch.tensor([3.0, 2.0, 1.0 + 1e-9, 1.0, 0.5, 0.25])
    t = dense_triplets(Dense(spectrum_matrix(6, 8, sigma).float()), 5)
    error = t.angle_error_estimate
    assert float(error[2]) > 0.1
    assert float(error[3]) > 0.1
    assert float(error[[0, 1, 4]].max()) < 1e-5


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)])
def test_dense_overlaps_equal_numpys(shape: tuple[int, int]) -> None:
    W0 = power_law(*shape)
    U = torch.linalg.qr(random(shape[0], 6)).Q
    U0 = np.linalg.svd(W0.numpy(), full_matrices=False)[0]
    bounds, similarity = dense_overlaps(Dense(W0), U, torch.Generator().manual_seed(vary(0)))
    expected = np.abs(U0.T @ U.numpy()).max(0)
    np.testing.assert_allclose(similarity, expected, atol=1e-9)
    assert (bounds.low.numpy() <= expected).all()
    assert (bounds.high.numpy() >= expected).all()
    assert float((bounds.high - bounds.low).max()) < 0.02


def test_all_finite() -> None:
    assert all_finite(torch.empty(0))
    assert all_finite(torch.tensor([1e38, -1e38]))
    for bad in (float("nan"), float("inf"), -float("inf")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert not all_finite(torch.tensor([0.0, bad, 1.0], dtype=dtype))
