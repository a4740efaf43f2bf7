"""Files of fits and maps: no bit of them changes unnoticed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from fitted import random_map
from seeds import vary

from streamer.errors import FormatError
from streamer.methods.files import Coefficients, load_coefficients, load_map

FACTS = {
    "base": {"files": []},
    "adapter": {"modules": 2},
    "sets": [{"keep": 0.9, "shrink": {"lambda": 0.67}}],
}


@pytest.fixture(params=["fit", "map"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[[Path], Any]]:
    path = tmp_path / "f.safetensors"
    if request.param == "map":
        random_map(*helpers.three_shards(tmp_path / "inputs")).save(path)
        return path, load_map
    factors = {name: torch.randn(40, 4) for name in ("a.weight", "b.weight")}
    Coefficients(0.9, factors, FACTS).save(path)
    return path, load_coefficients


def test_every_flipped_bit_is_refused(file: tuple[Path, Callable[[Path], Any]]) -> None:
    path, load = file
    raw = path.read_bytes()
    rng = random.Random(vary(0))
    header = 8 + int.from_bytes(raw[:8], "little")
    for at in [
        *range(8),
        *rng.choices(range(header), k=200),
        *rng.choices(range(header, len(raw)), k=100),
    ]:
        changed = bytearray(raw)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(FormatError):
            load(path)
    path.write_bytes(raw)
    load(path)
