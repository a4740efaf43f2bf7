"""Refuse models whose losses would be others than theirs or tell nothing: tokens see those that follow, logits are changed by number."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from streamer.errors import UnsupportedError
from streamer.events import Monitor
from streamer.plan.plan import Plan
from streamer.streaming.model import StreamingModel
from streamer.streaming.values import Job
from streamer.streaming.variants import BASE, Variant

LENGTH = 8
"""Tokens that are tried; two sequences of them are read."""

TOLERANCE = 1e-3
"""Difference of logits, as a share of the largest, that rounding may make."""


def check_logits(plan: Plan, ids: NDArray[np.int64], monitor: Monitor) -> None:
    """Compare the base's logits on two sequences that differ in their last token, and computed in one block with those in two.

    Parameters
    ----------
    ids
        Tokens of a text.
    monitor
        Asked for a stop before each parameter is read.

    Raises
    ------
    UnsupportedError
        If they differ before it, or a block's depend on which tokens of the vocabulary are in it.
    """
    model = StreamingModel(Job(plan, (Variant(BASE, None),), None))
    model.batch.on_read = lambda tensor: monitor.checkpoint()
    pair = torch.from_numpy(np.resize(ids, (2, LENGTH)))
    pair[1] = pair[0]
    pair[1, -1] = (pair[0, -1] + 1) % model.vocabulary
    cut = max(1, model.vocabulary // 3)
    try:
        whole, *parts = [z for *_, z in model.logits(pair, [(0, model.vocabulary), (0, cut), (cut, model.vocabulary)])]
        in_blocks = float((whole - torch.cat(parts, -1)).abs().max())
    except IndexError as e:  # of a token that is not in the block
        raise _changed_by_number(plan) from e
    largest = TOLERANCE * max(1.0, float(whole.abs().max()))
    if not in_blocks <= largest:
        raise _changed_by_number(plan)
    if float((whole[0, 0, :-1] - whole[0, 1, :-1]).abs().max()) > largest:
        raise UnsupportedError(
            f"{plan.base.path}: in this model a token sees those that follow it, so that its losses say nothing of what it predicts; "
            "evaluate and fit take causal language models"
        )


def _changed_by_number(plan: Plan) -> UnsupportedError:
    return UnsupportedError(
        f"{plan.base.path}: the model changes the logits of some tokens by their number: it computes them otherwise than by its head; "
        "evaluate and fit do not do it"
    )
