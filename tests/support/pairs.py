"""A base and an adapter on it in one call, what is written of them, and what transformers and float64 SVDs say of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from causal_models import make_adapter, make_base
from matrix_cases import judged
from torch import Tensor

import streamer


def make_pair(
    name: str, home: Path, targets: list[str] | str, **options: Any
) -> tuple[Any, Path, Path]:
    """Save a tiny causal model and an adapter; returns its class, ``base`` and ``adapter``."""
    cls = make_base(name, home / "base")
    return (
        cls,
        home / "base",
        make_adapter(cls, home / "base", home / "adapter", targets, **options),
    )


def merge(base: Path, adapter: Path, out: Path, lam: float, **options: Any) -> Any:
    return streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, out, mitigation_lambda=lam, **options
    )


def mitigate(base: Path, adapter: Path, out: Path, lam: float, **options: Any) -> Any:
    return streamer.reduce_intruder_dimension(base, adapter, out, mitigation_lambda=lam, **options)


def opened(cls: Any, path: Path, **options: Any) -> Any:
    """Load a model whose files have every tensor of its class, and no others."""
    model, info = cls.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    return model


def assert_decided(
    found: Any, W0: Tensor, W: Tensor, rtol: float = 1e-4, atol: float = 1e-5
) -> int:
    """Shape, singular values, and the decisions that rounding does not turn; returns the number of intruders."""
    detection = found.detection
    W0 = W0.double()
    W = W.double()
    assert found.shape == tuple(W0.shape), found.tensor
    values = torch.tensor(detection.singular_values, dtype=torch.float64)
    torch.testing.assert_close(values, torch.linalg.svdvals(W)[: len(values)], rtol=rtol, atol=atol)
    clear, intruders = judged(W0.numpy(), W.numpy(), len(values))
    assert [j for j in detection.intruders if j in clear] == intruders, found.tensor
    return len(detection.intruders)
