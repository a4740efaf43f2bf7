"""Experts: LoRA on a stacked parameter, taken apart into one matrix an expert, each found in the base as it stands there.

A loaded model has the experts of a layer in one parameter (E, out, in), or (E, in, out) in some; a base has that tensor, or one tensor
an expert, or even two (gate and up), which transformers puts together on loading. Here each expert is a matrix (out, in) of its own,
whatever stands on disk: detected, mitigated and merged as any other.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from streamer.adapter import CONFIG_NAME, Adapter, LoraModule, rank_and_scale
from streamer.bases.registry import Weights
from streamer.bases.stacked import Stacked
from streamer.bases.weight import Weight
from streamer.errors import MismatchError, UnsupportedError
from streamer.names import Match
from streamer.renames import Conversion, Renames
from streamer.targets import Place, Target
from streamer.wrapped import Wrapped

MERGE, CONCATENATE, TRANSPOSE = "MergeModulelist 0", "Concatenate 1", "Transpose 1 2"
BUILT = {(MERGE,), (MERGE, CONCATENATE), (CONCATENATE,), (TRANSPOSE,)}

# Model types whose loaded experts are stored (E, in, out). Where PEFT is told so by transformers, it turns lora_A and lora_B around.
STORED_IN_OUT = {"aria_text", "gpt_oss", "llama4", "llama4_text", "openai_privacy_filter"}

# The order in which modules register their parameters; PEFT wraps them in that order.
REGISTERED = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "down_proj", "w2")


@dataclass(frozen=True)
class Stack:
    """A parameter of the loaded model that holds one matrix for each expert.

    Attributes
    ----------
    name
        Its run-time name.
    experts
        For each expert the weights of the base whose rows, one below the other, are its matrix: a name, and an index where the weight
        is a stack itself.
    shape
        (out, in) of one matrix.
    transposed
        The base stores (in, out).
    settled
        Whether every version of transformers has the same orientation at run time.
    """

    name: str
    experts: tuple[tuple[tuple[str, int | None], ...], ...]
    shape: tuple[int, int]
    transposed: bool
    settled: bool


def built_stacks(weights: Mapping[str, Weight], renames: Renames) -> dict[str, dict[str, list[tuple[int, int, str]]]]:
    """Run-time name → operations → (source, expert, weight) for every stack that a loader builds."""
    groups: defaultdict[str, list[tuple[Conversion, str, str]]] = defaultdict(list)
    for tensor, name, conversion in renames.loaded(weights):
        if conversion is not None and conversion.by in BUILT and len(conversion.to) == 1:
            groups[name].append((conversion, tensor, name))
    return {}
