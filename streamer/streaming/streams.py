"""What runs by turns as inputs are collected: texts, each as the base, as base + adapter, or as a model in the making."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamer.streaming.run_time import RunTimeTensor

if TYPE_CHECKING:
    from streamer.measuring.sequences import TextSequences

GENERAL_AS, TASK_AS, GENERAL_CORRECTED, TASK_CORRECTED = range(4)
"""What runs: general text as the base, the task's as base + adapter, and both as a model whose deltas are being replaced."""


@dataclass(frozen=True)
class Group:
    """Sequences of one length that run together.

    Attributes
    ----------
    stream
        What runs: `GENERAL_AS` or another.
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
