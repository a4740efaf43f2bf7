"""Run the algorithm that fits coefficients, and answer its requests; a journal of the answers lets a killed run resume."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from streamer.evaluation.steps import answered
from streamer.fitting import algorithm
from streamer.fitting.algorithm import Answer, Gradient, Measure, Request, Slope, fit_steps
from streamer.fitting.costs import GRADIENT, gradient_costs
from streamer.fitting.division import DividedFit
from streamer.fitting.inputs import InputsRun
from streamer.fitting.parameters import Parameters
from streamer.fitting.prepare import PreparedFit
from streamer.fitting.records import inspect, key, result_file
from streamer.fitting.result import FoundSet, adapter_facts, doubts, misses, scaling_facts, set_facts, shrinks
from streamer.fitting.tasks import gradients_on_workers
from streamer.measuring.result_file import Arrays, Records, computing
from streamer.measuring.sequences import GENERAL, TASK
from streamer.measuring.statistics import SequenceSums
from streamer.methods import Fitted, Shrink
from streamer.methods.coefficient_set import Floats
from streamer.methods.coefficients import Coefficients, load_coefficients
from streamer.streaming.gradients import Against, GradientModel, TextGradient
from streamer.streaming.variants import ADAPTER, BASE, Variant
from streamer.workers.engine import kept


class HeldOutText:
    """Measure the base and every requested θ on the held-out sequences of both texts, and keep their sums."""

    def __init__(self, divided: DividedFit, parameters: Parameters) -> None:
        self._divided, self._parameters = divided, parameters
        self._rows: dict[bytes, Mapping[str, SequenceSums]] = {}
        """The sums of one variant by text, under θ as bytes. The key of the base is empty, also for θ = 0 where that equals the base."""

    @property
    def adapter(self) -> Floats:
        """Return the unchanged adapter's parameters, which are all 1."""
        return np.ones(self._parameters.count)

    def missing(self, asked: Sequence[Floats]) -> list[Floats]:
        """List the parameters that have not been measured yet, without duplicates."""
        measured = {b"", *self._rows}
        return list({self._key(theta): theta for theta in asked if self._key(theta) not in measured}.values())

    def measure(self, request: int, asked: Sequence[Floats], others: Sequence[Variant] = ()) -> None:
        """Measure the parameters that have not been measured yet, all in the same passes.

        Parameters
        ----------
        request
            Number of the request, which identifies its records in the journal.
        others
            Variants to measure in the same passes; `of_variant` returns their sums.
        """
        new = self.missing([self.adapter, *asked])
        if not new:
            return
        fitted = (Fitted(coefficients=self._parameters.coefficient_set(1.0, theta)) for theta in new)
        variants = [Variant(BASE, None), *map(Variant, map(self._name, new), fitted), *others]
        whole = self._divided.measure(variants, lambda i: key(request, i, new))
        for v, row in enumerate([b"", *map(self._key, new), *(one.name.encode() for one in others)]):
            self._rows[row] = {text: of.take([v]) for text, of in whole.items()}

    def sums(self, text: str, asked: Sequence[Floats]) -> SequenceSums:
        """Return the sums on one text of the base, the unchanged adapter and these parameters, which must have been measured."""
        return self._joined(text, [b"", *map(self._key, [self.adapter, *asked])])

    def of_variant(self, name: str) -> tuple[SequenceSums, SequenceSums]:
        """Return the sums on both texts of the base, the unchanged adapter and a variant that was measured with them."""
        keys = [b"", self._key(self.adapter), name.encode()]
        return self._joined(GENERAL, keys), self._joined(TASK, keys)

    def _joined(self, text: str, keys: Sequence[bytes]) -> SequenceSums:
        first, *others = (self._rows[one][text] for one in keys)
        return first.joined(*others)

    def _key(self, theta: Floats) -> bytes:
        return b"" if not theta.any() and not self._divided.prepared.unchanged else theta.tobytes()

    @staticmethod
    def _name(theta: Floats) -> str:
        """Name the model with these parameters, for messages."""
        if (theta == theta[:1]).all():
            return ADAPTER if (theta == 1).all() else Shrink(float(theta[0])).label
        return Fitted.name


def fit(prepared: PreparedFit, output: Path | None) -> Coefficients:
    """Fit all sets of coefficients; write them to a file if an output is given."""
    if output is None:
        return _result(prepared, Records(), None)
    file = result_file(prepared, output)
    if inspect(prepared, output) == "done":
        file.left()
        standing = load_coefficients(output)
        prepared.run.monitor.warn([*doubts(standing.facts), *misses(standing.facts)])
        return standing
    with file.written() as records:
        made = _result(prepared, records, output.parent)
        prepared.plan.check_unchanged()
        made.save(output, overwrite=True)  # `inspect` has already approved replacing an existing file
    return made


def _result(prepared: PreparedFit, records: Records, directory: Path | None) -> Coefficients:
    with kept(prepared.run.workers):
        return (InputsRun if prepared.by_inputs else _Run)(prepared, records, directory).result()


class _Run(DividedFit):
    """Carry out one fit of coefficients.

    Parameters
    ----------
    records
        Records of an interrupted run; this run adds its own.
    directory
        Directory for temporary files; None for the system's default.
    """

    def __init__(self, prepared: PreparedFit, records: Records, directory: Path | None) -> None:
        super().__init__(prepared, records)
        self.directory, self.parameters = directory, prepared.parameters
        self.gradients = 0
        """Number of gradients computed or read from the journal."""

    def result(self) -> Coefficients:
        """Run the fit, and remove temporary files even if it is interrupted."""
        try:
            return self._result()
        finally:
            if "model" in self.__dict__:  # only if a gradient was computed
                self.model.close()

    def _result(self) -> Coefficients:
        self.prepared.warn()
        with computing(self.records.threads, self.monitor):
            self.check()
            self.progress.resume(self.records.taken_up)
            # Measure these first, so that refusals and doubts come before the expensive work.
            baseline = shrinks(self.parameters.count)
            self.held_out.measure(0, baseline, self.prepared.scaling)
            of_adapter = adapter_facts(*self._held_sums([]), self.prepared.texts[TASK].whole.name)
            self.monitor.warn(doubts(of_adapter))
            numbers = itertools.count(1)

            def answer(request: Request) -> Answer:
                number = next(numbers)
                return self._slope(number, request) if isinstance(request, Gradient) else self._losses(number, request)

            found = answered(fit_steps(self.prepared.of_algorithm), answer)
            thetas = [one.coefficients for one in found]
            self.held_out.measure(next(numbers), thetas)
        self.progress.finish()
        sets = [FoundSet(one.keep, one.weight, Fitted.name, one.coefficients) for one in found]
        facts = {
            **self.prepared.facts,
            "parameters": self.parameters.count,
            "gradients": self.gradients,
            **of_adapter,
            **scaling_facts(self.prepared.scaling, self.held_out.of_variant),
            "sets": set_facts(*self._held_sums([*baseline, *thetas]), sets),
        }
        self.monitor.warn(misses(facts))
        made = tuple(self.parameters.coefficient_set(one.keep, one.coefficients) for one in found)
        return Coefficients(made, facts)

    def _slope(self, number: int, request: Gradient) -> Slope:
        """Compute the mean of the minimized quantity over a text's tokens, and its gradient with respect to θ."""
        theta, costs = request.coefficients, gradient_costs(self.prepared, request.text)
        keys = [key(number, chunk, [theta]) for chunk in range(len(costs))]
        found, todo = dict[int, Arrays](), list[int]()
        for chunk, cost in enumerate(costs):
            if (known := self.records.find(keys[chunk])) is None:
                todo.append(chunk)
            else:
                found[chunk] = known
                self.progress.advance(cost)
        with contextlib.closing(self._gradients(request, todo, costs)) as stream:
            for chunk, own in stream:
                sums = np.array([own.value, own.tokens])
                self.prepared.plan.check_unchanged()
                found[chunk] = {"sums": sums, "gradient": self.parameters.gather(own.gradient)}
                self.records.add(keys[chunk], found[chunk])
                self.progress.advance(costs[chunk])
        self.gradients += 1
        sums, gradient = np.zeros(2), np.zeros(self.parameters.count)
        for chunk in range(len(costs)):  # in a fixed order, whichever arrived first
            sums, gradient = sums + found[chunk]["sums"], gradient + found[chunk]["gradient"]
        return Slope(float(sums[0] / sums[1]), gradient / sums[1])

    def _gradients(
        self, request: Gradient, chunks: Sequence[int], costs: Sequence[int]
    ) -> Generator[tuple[int, TextGradient], None, None]:
        """Compute the gradient on chunks of a text, here or on workers, and yield each chunk's index with its gradient."""
        prepared, objective = self.prepared, self.prepared.options.made_small
        against: Against = "labels" if objective == "loss" else "base" if request.text == GENERAL else "adapter"
        text, coefficients = prepared.texts[request.text].fitted, self.parameters.coefficients(request.coefficients)
        own = {chunk: text.take(prepared.chunks[request.text][chunk]) for chunk in chunks}
        if prepared.run.workers is not None and own:
            yield from gradients_on_workers(
                prepared, self.directory, coefficients, against, own, self.records.threads, self.progress.begin
            )
            return
        for chunk, sequences in own.items():
            self.model.batch.on_read = self.progress.reading(costs[chunk], GRADIENT)
            yield chunk, self.model.gradient(sequences, coefficients, against)

    def _losses(self, number: int, request: Measure) -> algorithm.HeldOutAnswer:
        """Measure the requested coefficients on the held-out sequences."""
        self.held_out.measure(number, request.coefficients)
        return algorithm.HeldOutAnswer(*self._held_sums(request.coefficients))

    def _held_sums(self, thetas: Sequence[Floats]) -> tuple[SequenceSums, SequenceSums]:
        """Return the sums on both texts of the base, the unchanged adapter and these measured parameters."""
        return self.held_out.sums(GENERAL, thetas), self.held_out.sums(TASK, thetas)

    @cached_property
    def model(self) -> GradientModel:
        """Make the model that computes gradients, when it is first needed."""
        job = self.prepared.model.job
        return GradientModel(job.plan, rounds_products=job.rounds_products, directory=self.directory, device=job.device)

    @cached_property
    def held_out(self) -> HeldOutText:
        """Return the held-out measurements; call `check` first, because it may divide the work again."""
        return HeldOutText(self, self.parameters)
