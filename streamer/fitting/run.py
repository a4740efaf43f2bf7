"""Fit coefficients: drive the algorithm, answer its requests chunk by chunk, and journal each, so that a killed run resumes."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from streamer.evaluation.evaluation import GENERAL, TASK
from streamer.evaluation.suggestion import ADAPTER_ROW
from streamer.events import Event
from streamer.fitting.algorithm import Fitted, Gradient, Measure, fit_steps
from streamer.fitting.costs import GRADIENT, expected_costs, gradient_costs
from streamer.fitting.held_out import HeldOut
from streamer.fitting.prepare import PreparedFit
from streamer.fitting.progress import FitProgress
from streamer.fitting.records import InMemory, Journalled, inspect, key, result_file
from streamer.fitting.result import doubts, held_out_facts, shrinks
from streamer.linalg.torch_state import full_float32, threads
from streamer.output.coefficients import Coefficients, Floats
from streamer.output.coefficients_file import load_coefficients
from streamer.streaming.gradients import Against, GradientModel
from streamer.streaming.logit_checks import check_logits


def fit(prepared: PreparedFit, output: Path | None) -> Coefficients:
    """Fit all sets of coefficients, into memory, or into a file where an output is named."""
    made = _Run(prepared, InMemory(), None).result() if output is None else _to_file(prepared, output)
    prepared.run.monitor.warn(doubts(made.facts))
    return made


def _to_file(prepared: PreparedFit, output: Path) -> Coefficients:
    file = result_file(prepared, output)
    if inspect(prepared, output) == "done":
        file.left()
        return load_coefficients(output)
    with file.written() as journal:
        made = _Run(prepared, Journalled(journal), output.parent).result()
        prepared.plan.check_unchanged()
        made.save(output, overwrite=True)  # of what stands there, `inspect` has permitted it
    return made


class _Run:
    """One fit under way.

    Parameters
    ----------
    records
        What an interrupted run recorded, and what this one does.
    directory
        Where temporary files have their blocks; None for the system's.
    """

    def __init__(self, prepared: PreparedFit, records: InMemory, directory: Path | None) -> None:
        self.prepared, self.records, self.directory, self.monitor = prepared, records, directory, prepared.run.monitor
        self.parameters = prepared.parameters
        self.progress = FitProgress(self.monitor, prepared.model.size)
        self.held = HeldOut(prepared, self.parameters, records, self.progress, self._check_logits)
        self._checked = False
        self.gradients = 0
        """Gradients that were asked for."""

    def result(self) -> Coefficients:
        """Run to the end."""
        count = self.records.threads
        if count != torch.get_num_threads():
            self.monitor.emit(Event("note", f"goes on with {count} threads, as it began; --no-resume starts over"))
        self.prepared.warn()
        with threads(count), full_float32():
            expected = expected_costs(self.prepared)
            self.progress.expect([*expected.gradients, *expected.passes])
            requests, found = self._drive()
            shown = [*shrinks(self.parameters.count), *(one.theta for one in found)]
            self.held.measure(requests, shown)
        self.progress.finish()
        general, task = (self.held.sums(text, shown) for text in (GENERAL, TASK))
        facts = {
            **self.prepared.facts,
            "parameters": self.parameters.count,
            "gradients": self.gradients,
            **held_out_facts(general, task, found),
        }
        sets = tuple(self.parameters.coefficient_set(one.keep, one.theta) for one in found)
        return Coefficients(sets, facts)

    def _drive(self) -> tuple[int, list[Fitted]]:
        """Answer the algorithm's requests until it has what it wants; return how many there were, and what it found."""
        steps, number = fit_steps(self.prepared.options.keep, self.parameters.count), 0
        request = next(steps)
        while True:
            answer = self._gradient(number, request) if isinstance(request, Gradient) else self._shares(number, request)
            number += 1
            try:
                request = steps.send(answer)
            except StopIteration as end:
                return number, end.value

    def _gradient(self, number: int, request: Gradient) -> tuple[float, Floats]:
        """Compute the mean over a text's tokens of what is made small there, and its gradient."""
        text, objective = self.prepared.texts[request.text].fitted, self.prepared.options.objective
        against: Against = "labels" if objective == "loss" else "base" if request.text == GENERAL else "adapter"
        value, tokens, gradient = 0.0, 0.0, np.zeros(self.parameters.count)
        chunks = self.prepared.chunks[request.text]
        for chunk, (rows, cost) in enumerate(zip(chunks, gradient_costs(self.prepared, request.text), strict=True)):
            name = key(number, chunk, [request.theta])
            found = self.records.find(name)
            if found is None:
                self._check_logits()
                self.model.batch.on_read = self.progress.reading(cost, GRADIENT)
                own = self.model.gradient(text.take(rows), self.parameters.coefficients(request.theta), against)
                self.prepared.plan.check_unchanged()
                found = {"sums": np.array([own.value, own.tokens]), "gradient": self.parameters.gather(own.gradient)}
                self.records.add(name, found)
            value, tokens = value + found["sums"][0], tokens + found["sums"][1]
            gradient += found["gradient"]
            self.progress.advance(cost)
        self.gradients += 1
        return value / tokens, gradient / tokens

    def _shares(self, number: int, request: Measure) -> list[tuple[float, float]]:
        """Measure the share of the forgetting that is left, and of the learning that is kept, on the sequences held apart."""
        self.held.measure(number, request.thetas)
        general, task = (self.held.sums(text, request.thetas) for text in (GENERAL, TASK))
        rows = range(ADAPTER_ROW + 1, ADAPTER_ROW + 1 + len(request.thetas))
        return [(general.share(v).value, task.share(v).value) for v in rows]

    @cached_property
    def model(self) -> GradientModel:
        """The model that gradients are computed by, made when the first is."""
        rounds = self.prepared.options.dtype == "bf16"
        return GradientModel(self.prepared.plan, rounds_products=rounds, directory=self.directory)

    def _check_logits(self) -> None:
        """Check once, before the first pass, that losses of this model tell something."""
        if not self._checked:
            check_logits(self.prepared.plan, self.prepared.texts[GENERAL].fitted.ids[0], self.monitor)
            self._checked = True
