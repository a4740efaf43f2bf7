"""Measure models of chosen parameters on the sequences that are held apart, each once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from streamer.evaluation.passes import measure_variants
from streamer.evaluation.progress import RunProgress
from streamer.evaluation.result_file import Records
from streamer.evaluation.statistics import SequenceSums
from streamer.fitting.parameters import Parameters
from streamer.fitting.prepare import PreparedFit
from streamer.fitting.records import key
from streamer.methods import Fitted, Shrink
from streamer.methods.coefficients import Floats
from streamer.streaming.values import Job
from streamer.streaming.variants import ADAPTER, BASE, Variant


class HeldOut:
    """Sums on the held-out sequences of both texts, of the base and of every θ that was asked about."""

    def __init__(self, prepared: PreparedFit, parameters: Parameters, records: Records, progress: RunProgress) -> None:
        self._prepared, self._parameters, self._records = prepared, parameters, records
        self._progress = progress
        self._rows: dict[bytes, Mapping[str, SequenceSums]] = {}
        """By θ, in bytes: sums of one variant, by text; of the base under an empty key, which is also that of θ = 0 where this is the
        base."""

    @property
    def adapter(self) -> Floats:
        """Parameters of the adapter as it is: 1."""
        return np.ones(self._parameters.count)

    def missing(self, asked: Sequence[Floats]) -> list[Floats]:
        """List those that were not measured yet, each once."""
        measured = {b"", *self._rows}
        return list({self._key(theta): theta for theta in asked if self._key(theta) not in measured}.values())

    def measure(self, request: int, asked: Sequence[Floats]) -> None:
        """Measure those of the parameters that were not measured before; they run together.

        Parameters
        ----------
        request
            Number of the request, for the records.
        """
        prepared, new = self._prepared, self.missing([self.adapter, *asked])
        if not new:
            return
        fitted = (Fitted.of(self._parameters.coefficient_set(1.0, theta)) for theta in new)
        variants = [Variant(BASE, None), *map(Variant, map(self._name, new), fitted)]

        def job(chosen: tuple[Variant, ...]) -> Job:
            return Job(prepared.plan, chosen, None, rounds_products=prepared.options.dtype == "bf16")

        whole = measure_variants(prepared.passes(len(variants)), prepared.held, variants, job,
                                 lambda i: key(request, i, new), self._records, self._progress)  # fmt: skip
        for v, row in enumerate([b"", *map(self._key, new)]):
            self._rows[row] = {text: of.take([v]) for text, of in whole.items()}

    def sums(self, text: str, asked: Sequence[Floats]) -> SequenceSums:
        """Return the sums of a text, of the base, the adapter as it is, and these parameters, which were measured."""
        keys = [b"", *map(self._key, [self.adapter, *asked])]
        first, *others = (self._rows[one][text] for one in keys)
        return first.joined(*others)

    def _key(self, theta: Floats) -> bytes:
        return b"" if not theta.any() and not self._prepared.unchanged else theta.tobytes()

    @staticmethod
    def _name(theta: Floats) -> str:
        """Name a model, for messages."""
        if (theta == theta[:1]).all():
            return ADAPTER if (theta == 1).all() else Shrink(float(theta[0])).label
        return Fitted.name
