"""The block Golub–Kahan process: its invariant in units of rounding, and what happens where blocks lose rank."""

import pytest
import torch
from helpers import power_law
from seeds import vary

from streamer.linalg.operators import Dense
from streamer.linalg.svd import GolubKahan

SHAPES = [(61, 67), (67, 61), (64, 64), (1, 40), (40, 1), (13, 300), (300, 13)]
DTYPES = [torch.float32, torch.float64]


def gaussian(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        rows, columns, generator=torch.Generator().manual_seed(vary(seed)), dtype=torch.float32
    ).to(dtype)


def started(M: torch.Tensor, width: int = 8, seed: int = 0) -> GolubKahan:
    return GolubKahan(Dense(M), gaussian(M.shape[1], width, M.dtype, seed))


def defects(gk: GolubKahan) -> tuple[torch.Tensor, torch.Tensor]:
    """``M P − Q B`` and ``Mᵀ Q − P Bᵀ − P₊ L Eᵀ``, in float64."""
    M = gk.op.dense().double()
    P = gk.P.double()
    Q = gk.Q.double()
    forward = M @ P - Q @ gk.B
    backward = M.T @ Q - P @ gk.B.T
    if gk.L.numel():
        backward[:, Q.shape[1] - gk.L.shape[1] :] -= gk.following.double() @ gk.L
    return forward, backward


def check_invariant(gk: GolubKahan, units: float = 50, deflated: float = 0) -> None:
    """The invariant and orthonormality, in units of rounding; `deflated` units of it may have been dropped."""
    eps = torch.finfo(gk.P.dtype).eps
    norm = float(torch.linalg.matrix_norm(gk.op.dense().double(), 2))
    for defect in defects(gk):
        assert float(torch.linalg.matrix_norm(defect)) <= units * eps * norm + min(
            gk.deflated, deflated * eps * norm
        )
    for basis in (torch.cat([gk.P, gk.following], 1).double(), gk.Q.double()):
        gram = basis.T @ basis - torch.eye(basis.shape[1])
        assert float(torch.linalg.matrix_norm(gram)) <= units * eps
    assert gk.B.shape == (gk.Q.shape[1], gk.P.shape[1])
    assert gk.P.shape[1] + gk.following.shape[1] <= gk.op.shape[1]
    assert gk.Q.shape[1] <= gk.op.shape[0]


def run_out(gk: GolubKahan) -> None:
    while not gk.exhausted:
        assert gk.steps < 500
        gk.step()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [1, 5, 16])
def test_the_invariant_holds_at_every_step(
    shape: tuple[int, int], dtype: torch.dtype, width: int
) -> None:
    gk = started(power_law(*shape).to(dtype), width)
    check_invariant(gk)
    while not gk.exhausted:
        gk.step()
        check_invariant(gk)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_exhausted_process_has_the_singular_values(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    M = power_law(*shape).to(dtype)
    gk = started(M)
    run_out(gk)
    expected = torch.linalg.svdvals(M.double())
    found = gk.ritz().S[: len(expected)]
    assert float((found - expected).abs().max()) <= 20 * torch.finfo(dtype).eps
    assert float(gk.ritz().S[len(expected) :].sum()) <= 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_ritz_triplets_have_the_residuals_that_their_tails_say(dtype: torch.dtype) -> None:
    M = power_law(80, 90).to(dtype)
    gk = started(M)
    for _ in range(4):
        gk.step()
    X, S, Y, tail = gk.ritz()
    torch.testing.assert_close((X[:, : len(S)] * S) @ Y.T, gk.B, rtol=0, atol=1e-13)
    left = gk.Q.double() @ X
    right = gk.P.double() @ Y
    eps = torch.finfo(dtype).eps
    assert float((M.double() @ right - left * S).abs().max()) <= 20 * eps
    residual = torch.linalg.vector_norm(M.double().T @ left - right * S, dim=0)
    torch.testing.assert_close(
        torch.linalg.vector_norm(tail, dim=0), residual, rtol=0, atol=20 * eps
    )
    assert float(residual[0]) < 0.01 * float(residual.max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_start_blocks_that_lack_rank_are_deflated(dtype: torch.dtype, rank: int) -> None:
    M = power_law(60, 50).to(dtype)
    start = gaussian(50, rank, dtype) @ gaussian(rank, 8, dtype, 1)
    gk = GolubKahan(Dense(M), start)
    assert gk.following.shape[1] == rank
    span = gk.following.double() @ gk.start_coefficients
    torch.testing.assert_close(span, start.double(), rtol=0, atol=50 * torch.finfo(dtype).eps * 20)
    run_out(gk)
    check_invariant(gk)
    assert (gk.steps > 5) == (rank > 0)


def clusters(*sizes: int) -> torch.Tensor:
    """A (64, 64) matrix with singular values ``len(sizes), …, 2, 1`` of these multiplicities: exactly, in float32 as in float64.

    ``H diag(S) H / 64`` with Hadamard's matrix of ±1 holds integers over 64. Made by rounded rotations, equal singular values are spread
    over some roundings, and three Krylov steps amplify that to 5 roundings of the norm in exact arithmetic: directions of the matrix
    itself, with which the process rightly goes on.
    """
    H = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(6):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    S = torch.cat([torch.full((size,), float(len(sizes) - i)) for i, size in enumerate(sizes)])
    return (H * S.double()) @ H / 64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 8, 12])
@pytest.mark.parametrize("sizes", [(64,), (24, 40), (20, 22, 22), (16, 18, 30)])
@pytest.mark.parametrize("seed", range(3))
def test_noise_is_no_direction(
    sizes: tuple[int, ...], width: int, dtype: torch.dtype, seed: int
) -> None:
    """Of an exhausted space no noise is normalised into a block, whichever kernels computed it.

    With more clusters the rounding of the first steps is amplified beyond what tells it from directions of M.
    """
    M = clusters(*sizes).to(dtype)
    gk = started(M, width, seed)
    run_out(gk)
    assert (gk.steps, gk.P.shape[1]) == (len(sizes), len(sizes) * width)
    check_invariant(gk)
    assert gk.deflated <= 20 * torch.finfo(dtype).eps * gk.norm
    S = gk.ritz().S
    exact = torch.arange(1.0, len(sizes) + 1, dtype=torch.float64)
    assert float((S[:, None] - exact).abs().amin(1).max()) <= 50 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_deflated_is_counted(dtype: torch.dtype) -> None:
    """A direction weaker than rounding is dropped, and the invariant is off by it."""
    M = clusters(20, 44).to(dtype)
    g = gaussian(64, 2, dtype, 5)
    gk = started(M + 8 * torch.finfo(dtype).eps * torch.outer(g[:, 0], g[:, 1]) / 64)
    run_out(gk)
    forward, backward = defects(gk)
    defect = float((forward.square().sum() + backward.square().sum()).sqrt())
    assert 0 < gk.deflated <= defect + 20 * torch.finfo(dtype).eps * gk.norm
    assert defect <= gk.deflated + 20 * torch.finfo(dtype).eps * gk.norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_an_invariant_start_ends_after_one_step(shape: tuple[int, int], dtype: torch.dtype) -> None:
    M = power_law(*shape)
    _, S, Vh = torch.linalg.svd(M, full_matrices=False)
    wanted = [0, 3, 17]
    gk = GolubKahan(Dense(M.to(dtype)), Vh[wanted].T.to(dtype))
    for _ in range(2):
        if not gk.exhausted:
            gk.step()
    # Vectors rounded to float32 are invariant to rounding only; what is left of them is below the tail's noise.
    first = gk.ritz()
    nearest = (first.S[:, None] - S[wanted]).abs().amin(0)
    assert float(nearest.max()) <= 50 * torch.finfo(dtype).eps
    check_invariant(gk)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_defect_estimate_is_near_the_defect(
    shape: tuple[int, int], dtype: torch.dtype, size: float
) -> None:
    """Within a factor of 3 of ‖F‖_F where that stands clear of the rounding of the probes themselves."""
    M = (power_law(*shape) * size).to(dtype)
    gk = started(M)
    for _ in range(5):
        gk.step()
    gk.B[0, 0] += 1e-3 * size  # a defect of a known size
    true = float(torch.stack([d.square().sum() for d in defects(gk)]).sum().sqrt())
    for seed in range(20):
        assert true / 2 <= gk.defect_estimate(torch.Generator().manual_seed(vary(seed))) <= 2 * true


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_defect_estimate_is_not_below_roundings_own(dtype: torch.dtype, size: float) -> None:
    M = (power_law(120, 100) * size).to(dtype)
    gk = started(M)
    for _ in range(6):
        gk.step()
        true = float(torch.stack([d.square().sum() for d in defects(gk)]).sum().sqrt())
        estimate = gk.defect_estimate(torch.Generator().manual_seed(vary(0)))
        assert true / 2 <= estimate <= 100 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (250, 250)])
def test_the_invariant_survives_restarts(shape: tuple[int, int], dtype: torch.dtype) -> None:
    M = power_law(*shape).to(dtype)
    gk = started(M, 8)
    S = torch.linalg.svdvals(M.double())
    for _ in range(6):
        for _ in range(4):
            gk.step()
            check_invariant(gk, 100)
        before = gk.ritz().S[:16]
        gk.restart(16)
        assert gk.P.shape[1] == 16
        check_invariant(gk, 100)  # each rotation of the bases adds a rounding
        torch.testing.assert_close(gk.ritz().S, before)  # nothing of what is kept is lost
    torch.testing.assert_close(gk.ritz().S[:8], S[:8], rtol=0, atol=20 * torch.finfo(dtype).eps)
