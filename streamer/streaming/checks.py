"""Check that a model's logits are those of a causal language model, and whether padding changes them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from streamer.errors import NumericError, UnsupportedError
from streamer.plan.plan import Plan
from streamer.streaming.groups import Group
from streamer.streaming.sweep import SweepModel
from streamer.streaming.turn import Stop

LENGTH = 8
"""Tokens in each of the two sequences that `check_logits` runs."""

LOGIT_TOLERANCE = 1e-3
"""Largest difference of logits that rounding may make, as a share of the largest logit."""

Ids = NDArray[np.int64]


def check_logits(model: SweepModel, ids: Ids, stop: Stop) -> None:
    """Check the base's logits on two short sequences that differ in the last token, and compare one vocabulary block with two.

    Parameters
    ----------
    ids
        Tokens of a text.
    stop
        Called before each parameter is read; may raise to stop.

    Raises
    ------
    NumericError
        If a logit is NaN or Inf.
    UnsupportedError
        If the logits differ before the last token, or a token's logit depends on which vocabulary block contains it.
    """
    plan = model.job.plan
    pair = np.resize(ids, (2, LENGTH))
    pair[1] = pair[0]
    pair[1, -1] = (pair[0, -1] + 1) % model.vocabulary
    cut = max(1, model.vocabulary // 3)
    group = Group(torch.from_numpy(pair), 0)
    try:
        model.run([group], stop)
        ranges = [(0, model.vocabulary), (0, cut), (cut, model.vocabulary)]
        logits, *parts = (z[0] for *_, z in model.logits([[group]], ranges, stop))
    except UnsupportedError as e:
        if isinstance(e.__cause__, IndexError):  # the model indexed a token outside the block
            raise _changed_by_number(plan) from e
        raise
    if not bool(logits.isfinite().all()):
        raise NumericError(
            f"{plan.base.path}: its logits are NaN or Inf on the texts; check its weights"
        )
    in_blocks = float((logits - torch.cat(parts, -1)).abs().max())
    largest = LOGIT_TOLERANCE * max(1.0, float(logits.abs().max()))
    if not in_blocks <= largest:
        raise _changed_by_number(plan)
    if float((logits[0, :-1] - logits[1, :-1]).abs().max()) > largest:
        raise _sees_what_follows(plan)


def changed_by_padding(model: SweepModel, ids: Ids, shorter: int, block: int, stop: Stop) -> bool:
    """Test whether the base's logits of a sequence's first tokens change if the sequence ends after them.

    They do in models whose attention selects some of the keys, because the number of all keys decides ties. The sequence runs whole and
    cut, through the base alone.

    Parameters
    ----------
    ids
        A sequence of a text.
    shorter
        Length of the cut sequence, in tokens.
    block
        Number of tokens of the vocabulary to compute together.

    Raises
    ------
    UnsupportedError
        If the logits depend on which tokens follow.
    """

    def differ(*sequences: Ids) -> bool:
        parts = [[Group(torch.from_numpy(tokens)[None], 0)] for tokens in sequences]
        model.run([group for (group,) in parts], stop)
        off = 0.0
        largest = 1.0
        first = torch.empty(0)
        for _, _, number, logits in model.logits(parts, block, stop):
            same = logits[0, 0, :shorter]
            if number == 0:
                first = same
            else:
                off = max(off, float((first - same).abs().max()))
                largest = max(largest, float(first.abs().max()))
        return off > LOGIT_TOLERANCE * largest

    if not differ(ids, ids[:shorter]):
        return False
    other = ids.copy()
    other[shorter:] = (ids[shorter:] == 0).astype(ids.dtype)
    if differ(ids, other):
        raise _sees_what_follows(model.job.plan)
    return True


def _changed_by_number(plan: Plan) -> UnsupportedError:
    return UnsupportedError(
        f"{plan.base.path}: the model changes the logits of some tokens by their number, so it does not compute all logits with its head "
        "alone; not supported by evaluate and repair"
    )


def _sees_what_follows(plan: Plan) -> UnsupportedError:
    return UnsupportedError(
        f"{plan.base.path}: in this model a token sees those that follow it, so its losses do not measure prediction; "
        "evaluate and repair need a causal language model"
    )
