"""Define what runs in turns while inputs are collected: texts, each through the base, base + adapter, or a model being corrected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamer.streaming.run_time import RunTimeTensor

if TYPE_CHECKING:
    from streamer.measuring.sequences import TextSequences

GENERAL_AS, TASK_AS, GENERAL_CORRECTED, TASK_CORRECTED = range(4)
"""Streams: general text through the base, task text through base + adapter, and both through a model whose deltas are being replaced."""


@dataclass(frozen=True)
class Group:
    """Sequences of one length that run together.

    Attributes
    ----------
    stream
        The stream, such as `GENERAL_AS`.
    on_read
        Called before each parameter is read.
    """

    text: TextSequences
    stream: int
    on_read: Callable[[RunTimeTensor], None]


def tokens_of(groups: Sequence[Group]) -> dict[int, int]:
    """Count the tokens of each stream."""
    tokens: dict[int, int] = {}
    for group in groups:
        tokens[group.stream] = tokens.get(group.stream, 0) + sum(map(len, group.text.ids))
    return tokens
