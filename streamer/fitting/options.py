"""Define the options of a fit, and divide its texts into a part for fitting and a held-out part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from streamer.errors import FormatError, UsageError
from streamer.evaluation.options import ProductDtype, check_dtype
from streamer.evaluation.suggestion import check_keep
from streamer.measuring.sequences import GENERAL, TASK, TextSequences
from streamer.methods import share_name

LEAST = 2
"""Least number of sequences in each part of a text."""

WEIGHTS = (0.05, 0.2, 0.6, 2.0, 6.0)
"""Weights μ of the general text that are measured; Δ' is interpolated between neighbours."""

ALGORITHM = 2
"""Version of the algorithm: another version gives another fit of the same inputs. Version 2 corrects."""

CORRECTIONS = 2
"""Most corrections of a share's factors, at two weights."""


@dataclass(frozen=True)
class FitOptions:
    """Options of a fit, all of which affect its result: keywords of `api.fit_coefficients`, which explains them."""

    keep: tuple[float, ...] = (0.9,)
    holdout: float = 0.25
    sequences: int = 64
    length: int = 512
    seed: int = 0
    dtype: ProductDtype = "float32"

    def __post_init__(self) -> None:
        if not self.keep:
            raise UsageError("keep: expected at least one share, found none")
        for share in self.keep:
            check_keep(share)
            if share_name(share) == "1":
                raise UsageError(f"keep: {share!r} is the unchanged adapter, which needs no fit; give smaller shares")
        if len({share_name(share) for share in self.keep}) < len(self.keep):
            raise UsageError(f"keep: expected shares that differ in six digits, found {list(self.keep)}")
        if isinstance(self.holdout, bool) or not isinstance(self.holdout, Real) or not 0 < self.holdout < 1:
            raise UsageError(f"holdout: expected a share between 0 and 1, found {self.holdout!r}")
        for name, least in (("sequences", 2 * LEAST), ("length", 2), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UsageError(f"{name}: expected a whole number from {least}, found {value!r}")
        check_dtype(self.dtype)

    def as_dict(self) -> dict[str, Any]:
        """Return the options as JSON values, with the method's name in files of version 0.2."""
        return {**asdict(self), "keep": list(self.keep), "grain": "inputs"}


@dataclass(frozen=True)
class Division:
    """A text in two parts.

    Attributes
    ----------
    whole
        The whole text.
    fitted, held_out
        Sequences used for fitting, and held-out sequences.
    """

    whole: TextSequences
    fitted: TextSequences
    held_out: TextSequences


def divide(texts: Mapping[str, TextSequences], paths: Mapping[str, Path], options: FitOptions) -> dict[str, Division]:
    """Divide the sequences of each text by the seed; texts of the same kind with as many sequences are divided in the same way.

    In running text, consecutive sequences are held out, wrapping around at the end: neighbours usually come from one document, and a fit on
    one half of a document would look better on the other half than on other text. JSON lines are separate documents and are held out one by
    one. A repeated sequence is used once: both held out and fitted on, it would look better than other text.

    Parameters
    ----------
    paths
        Paths from which the texts were read.

    Raises
    ------
    FormatError
        If a text has too few different sequences.
    """
    out = {}
    for name in (GENERAL, TASK):
        text = texts[name]
        first: dict[bytes, int] = {}
        for row, ids in enumerate(text.ids):
            first.setdefault(ids.tobytes(), row)
        rows, count = np.array(list(first.values())), len(first)
        if count < 2 * LEAST:
            raise FormatError(
                f"{paths[name]}: expected {2 * LEAST} different sequences at least, {LEAST} to fit on and {LEAST} to hold out, found "
                f"{count}; give more"
            )
        held_out = min(count - LEAST, max(LEAST, round(options.holdout * count)))
        rng = np.random.default_rng(options.seed)
        documents = paths[name].suffix == ".jsonl"
        order = rows[rng.permutation(count) if documents else np.roll(np.arange(count), rng.integers(count))]
        out[name] = Division(text, text.take(sorted(order[held_out:])), text.take(sorted(order[:held_out])))
    return out
