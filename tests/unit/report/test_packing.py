"""Numbers and names are read back from what a page embeds."""

from __future__ import annotations

import numpy as np
import pytest
from seeds import vary

from streamer.report.packing import DIGITS, LONGEST, Packed, pack, pack_names, pack_ratio, pack_share


def unpack(packed: Packed) -> list[int]:
    """What the page's script does."""
    width, codes = packed["digits"], packed["codes"]
    numbers = [DIGITS.index(c.encode()) for c in codes]
    return [
        sum(n * 64 ** (width - 1 - d) for d, n in enumerate(numbers[i : i + width]))
        for i in range(0, len(codes), width)
    ]


def unpack_names(packed: dict) -> list[str]:
    numbers = iter(packed["numbers"])
    out = []
    for i in unpack(packed["form"]):
        form = packed["forms"][i]
        out.append(form[1:] if form[:1] == "=" else "".join(str(next(numbers)) if c == "*" else c for c in form))
    return out


@pytest.mark.parametrize("values", [[], [0], [63], [0, 64, 4095, 4096], [2**40, 1]])
def test_numbers_are_read_back(values: list[int]) -> None:
    assert unpack(pack(values)) == values


def test_numbers_that_do_not_fit_are_refused() -> None:
    for values in ([64], [-1]):
        with pytest.raises(ValueError, match="1 digits do not hold"):
            pack(values, 1)


def test_an_interval_stays_one() -> None:
    rng = np.random.default_rng(vary(0))
    low = rng.random(1000)
    high = np.minimum(1, low + 1e-5 * rng.random(1000))
    down, up = (np.array(unpack(p)) / 4095 for p in (pack_share(low, 2), pack_share(high, 2, up=True)))
    assert (down <= low).all()
    assert (up >= high).all()
    assert max(low - down) < 1 / 4095 + 1e-12
    assert max(up - high) < 1 / 4095 + 1e-12


def test_ratios_are_kept_to_a_fifth_of_a_percent() -> None:
    ratios = np.geomspace(1e-6, 1, 500)
    codes = np.array(unpack(pack_ratio(ratios, 2, 1e-6)))
    assert np.abs(1e-6 ** (codes / 4095) / ratios - 1).max() < 0.002
    assert unpack(pack_ratio(np.array([0.0, 1e-9, 1.0]), 2, 1e-6)) == [4095, 4095, 0]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.12.mlp.experts.7.down_proj.weight", "model.experts.gate_up_proj[3]", "lm_head.weight", "a*b.1", "=x.1", "", "0",
        "layers.007.weight", f"layers.{'9' * (LONGEST + 1)}.weight", f"layers.{'9' * LONGEST}.weight", "conv1d.2b.3", "é.4.\x1b", "²",
    ],
)  # fmt: skip
def test_names_are_read_back(name: str) -> None:
    names = ["model.layers.3.q.weight", name, "model.layers.4.q.weight"]
    assert unpack_names(pack_names(names)) == names  # type: ignore[arg-type]


def test_names_alike_are_one_form() -> None:
    names = [f"model.layers.{i}.experts.{j}.w1.weight" for i in range(4) for j in range(8)]
    assert pack_names(names)["forms"] == ["model.layers.*.experts.*.w1.weight"]
