"""Layers that run on another model, which is given and gives copies, the last group's first."""

from collections.abc import Iterator, Mapping

from streamer.plan.plan import Plan
from streamer.streaming.corrected import CorrectedModel
from streamer.streaming.run_time import LayerResult, LayerRun
from streamer.workers import Packed


class Away:
    """Runs layers, and counts those that came back with a result."""

    def __init__(self, plan: Plan) -> None:
        self.model, self.ran = CorrectedModel(plan), 0

    def __call__(self, runs: Mapping[int, LayerRun]) -> Iterator[tuple[int, LayerResult | None]]:
        for number in reversed(runs):
            result = Packed(self.model.run_layer(Packed(runs[number]).value)).value
            self.ran += result is not None
            yield number, result
