"""The seed of a test run, on which everything that the tests draw depends."""

import random
import zlib

import numpy as np
import torch

RUN = 0
"""The option ``--seed`` of this run, set before any test file is imported."""


def vary(seed: int | str) -> int:
    """Return the seed that this run uses for `seed`: `seed` itself in run 0, another number in each other run."""
    number = zlib.crc32(seed.encode()) if isinstance(seed, str) else seed
    return number + 1_000_003 * RUN


def seed_everything(name: str) -> None:
    """Seed the global generators of `random`, numpy and torch for what has this name."""
    seed = vary(name)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
