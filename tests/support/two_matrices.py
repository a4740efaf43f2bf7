"""A base of a tall and a wide matrix, and adapters on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from helpers import intruding_factors, power_law, write_adapter, write_sharded

SHAPES = {"a.0": (260, 200), "a.1": (200, 260)}
"""Modules: a tall matrix and a wide one."""

OPTIONS = {"solver": "certified"}
"""They are small: the dense solver would be cheaper."""


def make_base(home: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A base of `SHAPES`."""
    tensors = {f"{name}.weight": power_law(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    return write_sharded(home / "base", [tensors])


def make_adapters(home: Path, count: int, r: int = 4, **config: object) -> list[Path]:
    """Adapters n0, n1, … on all modules, each with one intruder."""
    return [make_adapter(home / f"n{seed}", seed, r, **config) for seed in range(count)]


def make_adapter(path: Path, seed: int, r: int = 4, modules: Sequence[str] = tuple(SHAPES), **config: object) -> Path:
    """An adapter on some modules."""
    factors = {name: intruding_factors(*SHAPES[name], r, seed=seed, sigma=0.7 + 0.05 * seed) for name in modules}
    return write_adapter(path, factors, r, **config)
