"""Run a pass of the model over some sequences under some variants, and put the sums of several passes together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from streamer.errors import NumericError
from streamer.evaluation.losses import measure
from streamer.evaluation.memory import Pass
from streamer.evaluation.sequences import TextSequences
from streamer.evaluation.statistics import MEASURES, SequenceSums
from streamer.events import Monitor
from streamer.plan.plan import Plan
from streamer.streaming.logit_checks import changed_by_padding, check_logits
from streamer.streaming.model import StreamingModel, vocabulary_block
from streamer.streaming.run_time import RunTimeTensor


class Reading:
    """Heed a request to stop before each parameter that a pass reads, and tell how far the pass is.

    Parameters
    ----------
    products
        Multiplications for a token of each parameter that counts, by name.
    tell
        Called with a parameter's name and the multiplications done before it.
    times
        How often the pass reads each parameter.
    """

    def __init__(
        self, monitor: Monitor, products: Mapping[str, int], tell: Callable[[str, int], None], times: int = 1
    ) -> None:
        self._monitor, self._products, self._tell, self._times = monitor, products, tell, times
        self._begun = Counter[str]()
        self._done = 0

    def __call__(self, tensor: RunTimeTensor) -> None:
        """Take the parameter that is read next."""
        self._monitor.checkpoint()
        name = tensor.name
        if name in self._products and self._begun[name] < self._times:
            self._tell(name, self._done)
            self._begun[name] += 1
            self._done += self._products[name]


def longest_padded(groups: Iterable[TextSequences]) -> tuple[NDArray[np.int64], int] | None:
    """Find the longest sequence that others are padded to, and the length of the longest of these.

    Parameters
    ----------
    groups
        Sequences that run together.

    Returns
    -------
    tuple or None
        None if nothing is padded.
    """
    found = None
    for text in groups:
        lengths = sorted({len(ids) for ids in text.ids})
        if len(lengths) > 1 and (found is None or lengths[-1] > len(found[0])):
            found = max(text.ids, key=len), lengths[-2]
    return found


def checked_tokens(groups: Iterable[TextSequences]) -> int:
    """Count the tokens of the base alone by which `padding_changes` compares padded sequences, where any are."""
    padded = longest_padded(groups)
    return 0 if padded is None else len(padded[0]) + padded[1]


def padding_changes(plan: Plan, groups: Sequence[TextSequences], on_read: Callable[[RunTimeTensor], None]) -> bool:
    """Check the logits of a model, and test whether they change by the padding of sequences that are to run together.

    Raises
    ------
    UnsupportedError
        If losses would say nothing; see `check_logits`.
    """
    check_logits(plan, groups[0].ids[0], on_read)
    padded = longest_padded(groups)
    return padded is not None and changed_by_padding(plan, *padded, on_read)


def run_pass(
    model: StreamingModel, text: TextSequences, where: str, on_read: Callable[[RunTimeTensor], None]
) -> SequenceSums:
    """Measure all variants of a model on sequences that run together.

    Parameters
    ----------
    where
        The text, for messages.

    Raises
    ------
    NumericError
        If a sum is not finite, or the pass did not use all that the adapter changes.
    InputChangedError
        If an input changed.
    """
    plan = model.job.plan
    model.batch.on_read = on_read
    sums = measure(model, text, vocabulary_block(model.batch.variants * sum(map(len, text.ids))))
    model.check_all_used()
    plan.check_unchanged()
    for name in MEASURES:
        if not np.isfinite(getattr(sums, name)).all():
            v = int(np.argwhere(~np.isfinite(getattr(sums, name)))[0][0])
            raise NumericError(
                f"{plan.base.path}: variant {model.job.variants[v].name!r} has a {name} of NaN or Inf on the {where} text; "
                "check the adapter's scale"
            )
    return sums


def together(
    passes: Sequence[Pass], sums: Mapping[int, SequenceSums], text: str, variants: int, sequences: int
) -> SequenceSums:
    """Put the sums of a text's passes, by their numbers, in the order of variants and sequences."""
    shape = variants, sequences
    tokens, arrays = np.zeros(sequences), {name: np.zeros(shape) for name in MEASURES}
    for number, one in enumerate(passes):
        if one.text == text:
            own = sums[number]
            at = np.ix_((0, *one.variants) if one.variants[0] == 1 else one.variants, one.sequences)
            tokens[list(one.sequences)] = own.tokens
            for name in MEASURES:
                values = getattr(own, name)
                arrays[name][at] = values if one.variants[0] == 1 else values[1:]
    return SequenceSums(tokens, **arrays)
