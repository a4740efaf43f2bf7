"""Divide a fit into passes, and again if the logits show that only sequences of one length may run together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from streamer.fitting.costs import expected_costs
from streamer.fitting.prepare import PreparedFit
from streamer.measuring.passes import measure_variants, needs_one_length
from streamer.measuring.progress import RunProgress
from streamer.measuring.result_file import Records
from streamer.measuring.statistics import SequenceSums
from streamer.streaming.values import VariantSet
from streamer.streaming.variants import Variant


class DividedFit:
    """A fit that is divided into passes, and its progress.

    Parameters
    ----------
    records
        Records of an interrupted run, extended by this run.
    """

    def __init__(self, prepared: PreparedFit, records: Records) -> None:
        self.records, self.monitor = records, prepared.run.monitor
        self._divide(prepared)

    def check(self) -> None:
        """Check the logits, and divide the work again if padding changes them."""
        own = self.prepared
        one_length = needs_one_length(own.model.job, own.one_length, own.groups, self.records, self.progress)
        if one_length != own.one_length:
            self._divide(replace(own, one_length=one_length))

    def measure(self, variants: Sequence[Variant], key: Callable[[int], str]) -> dict[str, SequenceSums]:
        """Measure variants together on the held-out sequences; return their sums by text."""
        own = self.prepared

        def job(chosen: tuple[Variant, ...]) -> VariantSet:
            return replace(own.model.job, variants=chosen, findings=own.findings)

        passes = own.passes(len(variants))
        return measure_variants(passes, own.held_out, variants, job, key, self.records, self.progress, own.run)

    def _divide(self, prepared: PreparedFit) -> None:
        """Set the division of the work, and start counting."""
        self.prepared, self.progress = prepared, RunProgress(self.monitor, prepared.model.size, "fit")
        expected = expected_costs(prepared)
        self.progress.expect([*expected.gradients, *expected.passes])
