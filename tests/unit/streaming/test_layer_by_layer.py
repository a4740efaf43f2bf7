"""A layer that is run again as its deltas are replaced: what it changes of its own arguments is refused."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch

from streamer.errors import UnsupportedError
from streamer.streaming.corrected import _LayerByLayer
from streamer.streaming.spool import Spool


def run(changes: str | None) -> Any:
    """Run a layer with arguments of all kinds, of which it changes one."""
    given: dict[str, Any] = {name: torch.ones(2) for name in ("x", "mask", "cos", "key")}

    def forward(x: Any, positions: Any, mask: Any, shared: Any) -> Any:
        if changes is not None:
            given[changes].add_(1)
        return x + positions[0]

    layer = _LayerByLayer([[]], {}, Spool(), lambda targets, moments: None, lambda: None)
    positions, shared = (given["cos"], (torch.zeros(2), None)), UserDict({"0": (given["key"], None)})
    return layer.run_layer(forward, given["x"], positions, mask={"full": given["mask"]}, shared=shared)


@pytest.mark.parametrize("changes", ["x", "mask", "cos", "key"])
def test_a_layer_that_writes_into_its_inputs_is_refused(changes: str) -> None:
    with pytest.raises(UnsupportedError, match="layer 0 writes into its own inputs"):
        run(changes)


def test_one_that_does_not_runs() -> None:
    assert run(None).tolist() == [2.0, 2.0]
