"""Factors as a fit would write them, nearly those of a shrink, for the base and the adapter of a test."""

from pathlib import Path

import numpy as np
import torch
from seeds import vary

from streamer.linalg.operators import LowRank
from streamer.methods.files import Coefficients, InputMap, MappedInput
from streamer.plan.plan import make_plan


def random_coefficients(base: Path, adapter: Path, keep: float = 0.9) -> Coefficients:
    """Make factors for a share."""
    plan = make_plan(base, adapter)
    matrices = {}
    for target in plan.targets:
        delta = plan.delta(target)
        generator = torch.Generator().manual_seed(vary(f"{target.tensor} {keep}"))
        assert isinstance(delta, LowRank)
        matrices[target.tensor] = (
            0.2 * delta.R.float() * (1 + 0.1 * torch.randn(delta.R.shape, generator=generator))
        )
    facts = {"base": {**plan.base_identity}, "adapter": {**plan.adapter_identity}}
    return Coefficients(keep, matrices, facts)


def coefficients_file(path: Path, base: Path, adapter: Path, keep: float = 0.9) -> Path:
    """Write such factors."""
    random_coefficients(base, adapter, keep).save(path)
    return path


def random_map(
    base: Path, adapter: Path, vectors: int = 5, *, lacks: str = "nothing", seed: str = ""
) -> InputMap:
    """Make a map of the inputs of the adapter's matrices, each its own, but for those whose names contain `lacks`."""
    plan = make_plan(base, adapter)
    inputs = []
    for target in plan.targets:
        if lacks in target.tensor:
            continue
        n = target.module.shape[1]
        drawn = np.random.default_rng(vary(f"{target.tensor} {seed}"))
        if target.is_embedding:
            values = torch.from_numpy(drawn.integers(0, 9, n) / 200)
            inputs.append(MappedInput((target.tensor,), 200, n, float(values.sum()), values, None))
            continue
        V = (
            torch.linalg.qr(torch.from_numpy(drawn.normal(size=(n, vectors))))[0]
            .T.to(torch.bfloat16)
            .contiguous()
        )
        values = torch.from_numpy(np.sort(drawn.gamma(1.0, 30.0, vectors))[::-1].copy())
        inputs.append(
            MappedInput(
                (target.tensor,), 200, n, float(values.sum()) + 0.3 * (n - vectors), values, V
            )
        )
    facts = {
        "base": {**plan.base_identity},
        "configs": {"base": {"rms_norm_eps": 1e-6}},
        "texts": [{"name": f"random{seed}.txt", "sha256": f"{seed}0"}],
        "vectors": vectors,
    }
    return InputMap(tuple(inputs), facts)


def energy_form(one: MappedInput) -> np.ndarray:
    """``C`` (n, n) of what a map says of an input."""
    if one.vectors is None:
        return np.diag(one.values.numpy())
    Q = np.linalg.qr(one.vectors.double().numpy().T)[0]
    rest = (one.trace - float(one.values.sum())) / max(1, one.size - len(one.values))
    return (Q * (one.values.numpy() - rest)) @ Q.T + rest * np.eye(one.size)


def answer(delta: np.ndarray, C: np.ndarray, share: float) -> np.ndarray:
    """``Δ (I + ν C)^(−1/4)`` in float64 by the spectrum of the whole matrix, ν by bisection such that this share of the energy stays."""
    values, V = np.linalg.eigh(C)
    before = np.sum((delta @ C) * delta)
    low = -300.0
    high = 300.0
    for _ in range(200):
        nu = 2 ** ((low + high) / 2)
        after = (delta @ V * (1 + nu * np.maximum(values, 0)) ** -0.25) @ V.T
        left = np.sum((after @ C) * after)
        low, high = ((low + high) / 2, high) if left > share * before else (low, (low + high) / 2)
    return after
