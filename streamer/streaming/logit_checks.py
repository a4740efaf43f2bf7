"""Check what losses rely on: tokens do not see later ones, logits come only from the head, and padding changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from streamer.errors import UnsupportedError
from streamer.methods import UNCHANGED
from streamer.plan.plan import Plan
from streamer.streaming.model import StreamingModel, vocabulary_block
from streamer.streaming.run_time import RunTimeTensor
from streamer.streaming.values import VariantSet
from streamer.streaming.variants import ADAPTER, BASE, Variant

LENGTH = 8
"""Tokens in each of the two sequences that `check_logits` runs. With two variants, rows and tokens then differ in number."""

TOLERANCE = 1e-3
"""Largest difference of logits that rounding may make, as a share of the largest logit."""

OnRead = Callable[[RunTimeTensor], None]
Ids = NDArray[np.int64]


def check_logits(job: VariantSet, ids: Ids, on_read: OnRead) -> None:
    """Check the base's logits on two short sequences that differ in the last token, and compare one vocabulary block with two.

    The adapted model runs along with the base, so a module whose input does not show the variants is refused before any pass.

    Parameters
    ----------
    job
        Supplies the plan and the device.
    ids
        Tokens of a text.
    on_read
        Called before each parameter is read; may raise to stop.

    Raises
    ------
    UnsupportedError
        If the logits differ before the last token, or a token's logit depends on which vocabulary block contains it.
    """
    variants = Variant(BASE, None), Variant(ADAPTER, UNCHANGED)
    plan = job.plan
    model = StreamingModel(VariantSet(plan, variants, None, device=job.device))
    model.batch.on_read = on_read
    pair = torch.from_numpy(np.resize(ids, (2, LENGTH)))
    pair[1] = pair[0]
    pair[1, -1] = (pair[0, -1] + 1) % model.vocabulary
    cut = max(1, model.vocabulary // 3)
    blocks = model.logits(pair, [(0, model.vocabulary), (0, cut), (cut, model.vocabulary)])
    whole = next(blocks)[2][0].clone()
    try:
        parts = [z[0].clone() for *_, z in blocks]
    except UnsupportedError as e:
        if isinstance(e.__cause__, IndexError):  # the model indexed a token outside the block
            raise _changed_by_number(plan) from e
        raise
    in_blocks = float((whole - torch.cat(parts, -1)).abs().max())
    largest = TOLERANCE * max(1.0, float(whole.abs().max()))
    if not in_blocks <= largest:
        raise _changed_by_number(plan)
    if float((whole[0, :-1] - whole[1, :-1]).abs().max()) > largest:
        raise _sees_what_follows(plan)


def changed_by_padding(job: VariantSet, ids: Ids, shorter: int, on_read: OnRead) -> bool:
    """Test whether the base's logits of a sequence's first tokens change if the sequence ends after them.

    They do in models whose attention selects some of the keys, because the number of all keys decides ties. The sequence runs whole and
    cut, through the base alone.

    Parameters
    ----------
    ids
        A sequence of a text.
    shorter
        Length of the cut sequence, in tokens.

    Raises
    ------
    UnsupportedError
        If the logits depend on which tokens follow.
    """
    if not _differ(job, ids, ids[:shorter], shorter, on_read):
        return False
    other = ids.copy()
    other[shorter:] = (ids[shorter:] == 0).astype(ids.dtype)
    if _differ(job, ids, other, shorter, on_read):
        raise _sees_what_follows(job.plan)
    return True


def _differ(job: VariantSet, one: Ids, other: Ids, tokens: int, on_read: OnRead) -> bool:
    """Test whether the base's logits of the first tokens of two sequences differ; each sequence runs by itself."""
    runs = []
    for ids in (one, other):
        model = StreamingModel(VariantSet(job.plan, (Variant(BASE, None),), None, device=job.device))
        model.batch.on_read = on_read
        blocks = model.vocabulary_blocks(vocabulary_block(len(one) + len(other)))
        runs.append(model.logits(torch.from_numpy(ids)[None], blocks))
    off, largest = 0.0, 1.0
    for (_, _, z), (_, _, z_other) in zip(*runs, strict=True):
        a, b = z[0, 0, :tokens], z_other[0, 0, :tokens]
        off, largest = max(off, float((a - b).abs().max())), max(largest, float(a.abs().max()))
    return off > TOLERANCE * largest


def _changed_by_number(plan: Plan) -> UnsupportedError:
    return UnsupportedError(
        f"{plan.base.path}: the model changes the logits of some tokens by their number, so it does not compute all logits with its head "
        "alone; not supported by evaluate and fit"
    )


def _sees_what_follows(plan: Plan) -> UnsupportedError:
    return UnsupportedError(
        f"{plan.base.path}: in this model a token sees those that follow it, so its losses do not measure prediction; "
        "evaluate and fit need a causal language model"
    )
