"""A layer that is run again as its deltas are replaced: what it changes of its own arguments is refused."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from streamer.errors import UnsupportedError
from streamer.streaming.corrected import STREAMS, _LayerByLayer
from streamer.streaming.spool import Spool


def run(changes: str | None) -> Any:
    """Run a layer with arguments of all kinds, of which it changes one."""
    given: dict[str, Any] = {name: torch.ones(2) for name in ("x", "mask", "cos", "key")}

    def forward(x: Any, positions: Any, mask: Any, shared: Any) -> Any:
        if changes is not None:
            given[changes].add_(1)
        return x + positions[0]

    layer = _LayerByLayer([[]], {}, Spool(), lambda targets, moments: None, lambda: None, None)
    positions, shared = (given["cos"], (torch.zeros(2), None)), UserDict({"0": (given["key"], None)})
    return layer.run_layer("", forward, given["x"], positions, mask={"full": given["mask"]}, shared=shared)


@pytest.mark.parametrize("changes", ["x", "mask", "cos", "key"])
def test_a_layer_that_writes_into_its_inputs_is_refused(changes: str) -> None:
    with pytest.raises(UnsupportedError, match="layer 0 writes into its own inputs"):
        run(changes)


def test_one_that_does_not_runs() -> None:
    assert run(None).tolist() == [2.0, 2.0]


class Paused(Exception):
    """Ends a group's turn."""


def test_a_layer_in_which_some_sequences_stop_elsewhere_is_refused() -> None:
    """One sequence of the last stream does not reach the matrix: its moments would be of too few tokens."""

    def pause() -> None:
        raise Paused

    target: Any = SimpleNamespace(tensor="w")
    layer = _LayerByLayer([[[target]]], dict.fromkeys(STREAMS, 4), Spool(), lambda targets, moments: None, pause, None)
    for group, stream in enumerate(STREAMS):
        layer.group, layer.stream = group, stream
        with pytest.raises(Paused):
            layer.run_layer("", lambda x: layer.take(target, x), torch.ones(3 if stream == STREAMS[-1] else 4, 2))
    with pytest.raises(UnsupportedError, match="layer 0 runs its matrices in a different order"):
        layer.between()
