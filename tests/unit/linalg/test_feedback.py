"""Corrections of deltas whose left factors have few directions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from streamer.linalg.feedback import InputPair, WeightDelta, corrected
from streamer.linalg.regmean import DIRECT_BYTES
from streamer.linalg.second_moments import RowMoments

N, M, TOKENS = 24, 20, 200


def pair(before: torch.Tensor, now: torch.Tensor) -> InputPair:
    def moments(x: torch.Tensor) -> RowMoments:
        def blocks() -> Iterator[torch.Tensor]:
            yield from x.split(64)

        return RowMoments(N, TOKENS, float((x**2).sum()) / TOKENS, blocks)

    return InputPair(moments(before), moments(now))


@pytest.mark.parametrize("memory", [DIRECT_BYTES, 0])
def test_a_factor_of_fewer_directions_than_columns_gives_the_delta_of_those_that_it_has(memory: int) -> None:
    W, L, R = torch.randn(M, N), torch.randn(M, 3), torch.randn(N, 3)
    task, general = torch.randn(TOKENS, N), torch.randn(TOKENS, N)
    pairs = pair(task, task + 0.1 * torch.randn(TOKENS, N)), pair(general, general + 0.1 * torch.randn(TOKENS, N))

    def of(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        found = corrected([WeightDelta(left, right, lambda Q: W.double().T @ Q)], *pairs, 0.5, memory)
        assert found is not None
        return left.double() @ found[0].T

    expected = of(L, R)
    assert float((expected - L.double() @ R.double().T).norm()) > 0.01 * float(expected.norm())
    wide = torch.cat([L, L[:, :1], torch.zeros(M, 1), 1e-9 * torch.randn(M, 1)], 1)
    found = of(wide, torch.cat([R, torch.zeros(N, 2), torch.randn(N, 1)], 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.norm()))
