"""A matrix that float32 leaves open near ε is done once more in float64, where memory allows it: against numpy's float64 SVD."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import intruding_factors, power_law, write_adapter
from raw_adapter import MODULE
from safetensors.torch import save_file
from scipy.sparse.linalg import svds
from seeds import vary

from streamer.detection import detect as memory
from streamer.detection.detect import (
    best_way,
    detect_matrix,
    detection_bytes,
    float64_way,
    is_repeated,
)
from streamer.detection.intruders import Detection
from streamer.detection.options import DetectionOptions
from streamer.detection.solvers import Way
from streamer.plan.plan import AdapterBatch, Plan, make_batch, resident_bytes

SHAPES = [(96, 64), (64, 96), (80, 80)]
CPU = torch.device("cpu")


def make_plan(
    home: Path,
    W0: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    more: dict | None = None,
    **config,
) -> Plan:
    """A plan of a base of one matrix, and an adapter on it."""
    home.mkdir(exist_ok=True)
    save_file({f"{MODULE}.weight": W0.contiguous()}, home / "model.safetensors")
    write_adapter(home / "adapter", {MODULE: (A, B)}, len(A), more=more, **config)
    return make_batch(home, [home / "adapter"]).plans[0]


def detected(plan: Plan, epsilon: float, k: int = 10, **options) -> Detection:
    chosen = DetectionOptions(top_k=k, threshold_epsilon=epsilon, **options)
    return detect_matrix(plan, plan.targets[0], chosen, CPU, resident(plan)).detection


def resident(plan: Plan) -> int:
    return resident_bytes(AdapterBatch(plan.base, (plan,)))


def oracle(W0: torch.Tensor, delta: np.ndarray, k: int = 10) -> np.ndarray:
    """The similarities, in float64."""
    base = W0.double().numpy()
    U0 = np.linalg.svd(base, full_matrices=False)[0]
    U = np.linalg.svd(base + delta, full_matrices=False)[0][:, :k]
    return np.abs(U0.T @ U).max(0)


def product(A: torch.Tensor, B: torch.Tensor, scaling: float) -> np.ndarray:
    """``scaling · B @ A`` in float64."""
    return scaling * (B.double().numpy() @ A.double().numpy())


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("distance", [1e-3, 1e-4, 1e-5, 2e-6, 1e-7, 0.0])
def test_a_similarity_near_epsilon_is_settled(
    tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype, distance: float
) -> None:
    """With rsLoRA's scaling, which float32 rounds."""
    W0 = power_law(*shape).to(dtype)
    A, B = intruding_factors(*shape, 3)
    plan = make_plan(tmp_path, W0, A, B, alpha=3, use_rslora=True)
    exact = oracle(W0, product(A, B, 3 / 3**0.5))
    for j in range(3):
        for epsilon in (float(exact[j]) - distance, float(exact[j]) + distance):
            if epsilon > 1:
                continue
            found = detected(plan, epsilon)
            assert found.precision == "float64"
            assert (found.solver, found.escalated) == ("dense", False)
            assert found.U.dtype == found.S.dtype == found.Vh.dtype == torch.float32
            assert all(np.array(found.similarity_low) <= exact)
            assert all(exact <= np.array(found.similarity_high))
            np.testing.assert_allclose(found.similarity, exact, atol=1e-9)
            assert max(np.subtract(found.similarity_high, found.similarity_low)) < 1e-6
            near = np.abs(exact - epsilon)
            assert found.certified == bool((near > 1e-7).all()) or 1e-8 < near.min() < 1e-6
            if found.certified:
                assert list(found.intruders) == [i for i, s in enumerate(exact) if s < epsilon]
            if distance == 0:
                assert not found.certified


def test_what_float32_settles_is_not_done_again(tmp_path: Path) -> None:
    W0 = power_law(80, 80).float()
    A, B = intruding_factors(80, 80, 3)
    similarity = np.sort(oracle(W0, product(A, B, 1.0)))
    widest = np.diff(similarity).argmax()  # no similarity is near the middle of the widest gap
    found = detected(make_plan(tmp_path, W0, A, B), float(similarity[widest : widest + 2].mean()))
    assert found.certified
    assert found.precision == "float32"


def test_a_base_of_float64_is_done_once(tmp_path: Path) -> None:
    W0 = power_law(80, 80)
    A, B = intruding_factors(80, 80, 3)
    plan = make_plan(tmp_path, W0, A, B)
    exact = oracle(W0, product(A, B, 1.0))
    for epsilon, certified in ((exact[1] + 1e-5, True), (exact[1], False)):
        found = detected(plan, float(epsilon))
        assert found.precision == "float64"
        assert found.certified == certified
        assert found.U.dtype == torch.float64


@pytest.mark.parametrize("apart", [0.0, 2.0**-21])
def test_only_a_true_degeneracy_stays_open(tmp_path: Path, apart: float) -> None:
    """Two equal blocks; and two that differ by four roundings, which float32's SVD mixes and float64's does not."""
    block = power_law(20, 20).float()
    W0 = torch.block_diag(block, block * (1 + apart))
    zero = torch.zeros(1, 40)
    A = zero.clone()
    B = zero.T.clone()
    A[0, 0] = 1.0
    found = detected(make_plan(tmp_path, W0, A, B), 0.9, k=6)
    assert found.precision == "float64"
    assert found.certified == bool(apart)
    assert found.degenerate == (() if apart else tuple(range(6)))
    assert found.intruders == () or not apart


def test_a_dense_delta_is_computed_in_float64_as_well(tmp_path: Path) -> None:
    """DoRA: the lengths of rows, and the scaling."""
    W0 = power_law(64, 96).bfloat16()
    A, B = intruding_factors(64, 96, 3)
    magnitude = torch.linspace(0.5, 1.5, 64)
    more = {f"base_model.model.{MODULE}.lora_magnitude_vector": magnitude}
    plan = make_plan(tmp_path, W0, A, B, more, alpha=3, use_rslora=True, use_dora=True)
    total = W0.double().numpy() + product(A, B, 3 / 3**0.5)
    factor = magnitude.double().numpy() / np.linalg.norm(total, axis=1)
    exact = oracle(W0, total * factor[:, None] - W0.double().numpy())
    for sign in (-1, 1):
        epsilon = float(exact[2]) + sign * 5e-6
        found = detected(plan, epsilon)
        assert found.precision == "float64"
        assert found.certified
        np.testing.assert_allclose(found.similarity, exact, atol=1e-9)
        assert list(found.intruders) == [i for i, s in enumerate(exact) if s < epsilon]


def test_without_room_for_float64_a_matrix_stays_open(tmp_path: Path) -> None:
    W0 = power_law(400, 400).bfloat16()
    A, B = intruding_factors(400, 400, 3)
    plan = make_plan(tmp_path, W0, A, B)
    target = plan.targets[0]
    epsilon = float(oracle(W0, product(A, B, 1.0))[1]) + 1e-4
    options = DetectionOptions(threshold_epsilon=epsilon)
    needed = float64_way(plan, target, options, resident(plan), "dense")
    assert needed is not None
    assert needed == (
        Way.DENSE,
        detection_bytes(plan, target, options, resident(plan), 8)[Way.DENSE],
    )
    assert needed[1] > detection_bytes(plan, target, options, resident(plan))[Way.DENSE]
    enough, short = (replace(options, max_memory=needed[1] - less) for less in (0, 1))
    assert best_way(plan, target, short, resident(plan)) is Way.DENSE
    assert float64_way(plan, target, short, resident(plan), "dense") is None
    settled, open_ = (detected(plan, epsilon, max_memory=o.max_memory) for o in (enough, short))
    assert (settled.certified, settled.precision) == (True, "float64")
    assert (open_.certified, open_.precision) == (False, "float32")


@pytest.mark.parametrize(
    ("shape", "repeated"), [((4096, 4096), True), ((4096, 4097), False), ((80, 10**6), True)]
)
def test_full_svds_are_repeated_up_to_a_size(shape: tuple[int, int], repeated: bool) -> None:
    assert is_repeated(shape) == is_repeated(shape[::-1]) == repeated


def test_a_larger_matrix_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    W0, (A, B) = power_law(80, 96).float(), intruding_factors(80, 96, 3)
    plan = make_plan(tmp_path, W0, A, B)
    epsilon = float(oracle(W0, product(A, B, 1.0))[1]) + 1e-5
    monkeypatch.setattr(memory, "REPEATED_CUBE", 80 * 80 * 96)
    assert detected(plan, epsilon).certified
    monkeypatch.setattr(memory, "REPEATED_CUBE", 80 * 80 * 96 - 1)
    found = detected(plan, epsilon)
    assert (found.certified, found.precision) == (False, "float32")
    # Products are repeated whatever the size.
    assert (
        float64_way(plan, plan.targets[0], DetectionOptions(), resident(plan), "certified")
        is not None
    )


def leaning(home: Path, shape: tuple[int, int], outlier: float, lean: float) -> tuple[Plan, float]:
    """A diagonal base, whose singular vectors are the unit vectors, under a direction that leans on one deep in the bulk.

    Returns the plan, and the similarity by ARPACK.
    """
    W0 = torch.zeros(shape)
    W0.diagonal().copy_(torch.linspace(1.5, 1, min(shape)))
    W0[0, 0] = outlier
    u = torch.randn(shape[0], generator=torch.Generator().manual_seed(vary(1)))
    u[[0, 300]] = 0.0
    u[min(shape) :] = 0.0
    u *= (1 - lean**2) ** 0.5 / u.norm()
    u[300] = lean
    v = torch.nn.functional.normalize(
        torch.randn(1, shape[1], generator=torch.Generator().manual_seed(vary(2)))
    )
    A = v
    B = 40 * outlier * u[:, None]
    W = W0.double().numpy() + product(A, B, 1.0)
    exact = np.abs(svds(W, k=1, v0=np.ones(min(shape)))[0][: min(shape)]).max()
    return make_plan(home, W0, A, B), float(exact)


@pytest.mark.long
@pytest.mark.parametrize(("shape", "outlier"), [((2600, 2300), 4000.0), ((2300, 2600), 30000.0)])
def test_products_in_float64_settle_what_hangs_on_rounding_alone(
    tmp_path: Path, shape: tuple[int, int], outlier: float
) -> None:
    """One singular value is thousands of times the others: its rounding in float32 is as large as what the bound has to tell."""
    plan, exact = leaning(tmp_path, shape, outlier, 0.2)
    options = DetectionOptions(top_k=1)
    needed = detection_bytes(plan, plan.targets[0], options, resident(plan), 8)[Way.BLOCKS]
    assert needed < detection_bytes(plan, plan.targets[0], options, resident(plan))[Way.DENSE]
    found = detected(plan, 0.5, k=1, max_memory=needed)
    assert (found.solver, found.precision) == ("certified", "float64")
    assert found.certified
    assert found.intruders == (0,)
    assert found.similarity_low[0] <= exact <= found.similarity_high[0] < 0.5
