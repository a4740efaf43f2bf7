"""Refuse a model in which a token sees those that follow it: its losses would tell nothing of what it predicts."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from streamer.errors import UnsupportedError
from streamer.evaluation.model import StreamingModel
from streamer.evaluation.values import Job
from streamer.evaluation.variants import BASE, Variant
from streamer.events import Monitor
from streamer.plan.plan import Plan

LENGTH = 8
"""Tokens that are tried; two sequences of them are read."""

TOLERANCE = 1e-3
"""Difference of logits, as a share of the largest, that rounding may make."""


def check_causal(plan: Plan, ids: NDArray[np.int64], monitor: Monitor) -> None:
    """Compare the base's logits on two sequences that differ in their last token.

    Parameters
    ----------
    ids
        Tokens of a text.
    monitor
        Asked for a stop before each parameter is read.

    Raises
    ------
    UnsupportedError
        If they differ before it.
    """
    model = StreamingModel(Job(plan, (Variant(BASE, None),), None))
    model.batch.on_read = lambda tensor: monitor.checkpoint()
    pair = torch.from_numpy(np.resize(ids, (2, LENGTH)))
    pair[1] = pair[0]
    pair[1, -1] = (pair[0, -1] + 1) % model.vocabulary
    difference = largest = 0.0
    for _, _, z in model.logits(pair, model.vocabulary):
        difference = float((z[0, 0, :-1] - z[0, 1, :-1]).abs().max())
        largest = float(z.abs().max())
    if difference > TOLERANCE * max(1.0, largest):
        raise UnsupportedError(
            f"{plan.base.path}: in this model a token sees those that follow it, so that its losses say nothing of what it predicts; "
            "evaluate compares causal language models"
        )
