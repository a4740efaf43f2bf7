"""Define the options of a fit, and divide its texts into a part for fitting and a held-out part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from streamer.errors import FormatError, UsageError
from streamer.evaluation.options import ProductDtype, check_dtype
from streamer.evaluation.suggestion import check_keep
from streamer.fitting import algorithm
from streamer.measuring.sequences import GENERAL, TASK, TextSequences
from streamer.methods.fit_set import share_name

Objective = Literal["divergence", "loss"]
"""What a fit minimises: divergences from the base and from the unchanged adapter, or the losses of both texts."""

Grain = Literal["inputs", "direction", "matrix", "all"]
"""What is fitted: right factors, to the inputs of each module; or coefficients, one per direction, one per matrix, or one for all."""

LEAST = 2
"""Least number of sequences in each part of a text."""

WEIGHTS = (0.05, 0.2, 0.6, 2.0, 6.0)
"""Weights μ of the general text that are measured with grain ``inputs``; Δ' is interpolated between neighbours."""

ALGORITHM = 2
"""Version of the algorithm that fits factors to inputs: another version gives another fit of the same inputs. Version 2 corrects."""

CORRECTIONS = 2
"""Most corrections of a share's factors, at two weights."""


@dataclass(frozen=True)
class FitOptions:
    """Options of a fit, all of which affect its result: keywords of `api.fit_coefficients`, which explains them."""

    keep: tuple[float, ...] = (0.9,)
    objective: Objective | None = None
    grain: Grain | None = None
    holdout: float = 0.25
    sequences: int = 64
    length: int = 512
    seed: int = 0
    steps: int | None = None
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
        for name, choices in (("objective", Objective), ("grain", Grain)):
            if getattr(self, name) not in (None, *get_args(choices)):
                raise UsageError(
                    f"{name}: expected one of {', '.join(get_args(choices))}, found {getattr(self, name)!r}"
                )
        if isinstance(self.holdout, bool) or not isinstance(self.holdout, Real) or not 0 < self.holdout < 1:
            raise UsageError(f"holdout: expected a share between 0 and 1, found {self.holdout!r}")
        for name, least in (("sequences", 2 * LEAST), ("length", 2), ("seed", 0), ("steps", 1)):
            value = getattr(self, name)
            if name == "steps" and value is None:
                continue
            if type(value) is not int or value < least:
                raise UsageError(f"{name}: expected a whole number from {least}, found {value!r}")
        check_dtype(self.dtype)
        for name in ("steps", "objective"):
            if self.grain == "inputs" and getattr(self, name) is not None:
                raise UsageError(
                    f"{name}: applies to coefficients, but grain 'inputs' fits none, found {getattr(self, name)!r}; leave it out"
                )

    @property
    def made_small(self) -> Objective:
        """Return what coefficients minimise."""
        return self.objective or "divergence"

    def of_algorithm(self, count: int, base_at_zero: bool = True) -> algorithm.Problem:
        """Make the algorithm's options for this many parameters; see `algorithm.Problem`."""
        objective: Literal["kl", "loss"] = "kl" if self.made_small == "divergence" else "loss"
        return algorithm.Problem(count, self.keep, objective, self.steps, base_at_zero)

    def as_dict(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        tree = {**asdict(self), "keep": list(self.keep), "objective": self.made_small}
        if self.grain == "inputs":
            return {name: value for name, value in tree.items() if name not in ("objective", "steps")}
        return {**tree, "steps": self.of_algorithm(1).step_count}


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
