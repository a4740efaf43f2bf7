"""Where the time of a fit's passes goes: they run in this process, with clocks in place, and the seconds are written as JSON.

    python tools/profile_fit.py REQUEST.json OUTPUT.json

REQUEST has ``base``, ``adapter``, ``text`` (token ids, .npy), ``threads``, ``directory`` for temporary files, and ``kind``: ``gradient``
runs two gradient passes over the text, of which the first runs the base too; ``measure`` one of the base, the adapter as it is and a fitted
variant; ``inputs`` collects and solves for a fit by inputs on ``tokens`` of text, half of either kind, within ``max_memory``. Each moment
of the main thread is counted for its innermost stage, as wall and as CPU seconds of that thread. On one thread the latter are the work
itself, whatever else the machine does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from profile_merge import Clocks

HEAD = "head: "
"""Begins the names of stages that belong to the head."""

START = "start"
COLLECTING, SOLVING = "running layers, inputs to a file", "solving"
CORRECTING, CORRECTED = "running layers as they are corrected", "solving for corrections"
HELD = 2
"""Sequences of each text that a fit by inputs holds apart here."""
PRODUCTS, READING, LOW_RANK, FACTORS, ATTENTION, SPOOL, SOFTMAX, REST = (
    "products", "reading and upcast", "low-rank products", "directions", "attention, forward", "activations' file",
    f"{HEAD}softmax and divergence", "attention, norms and the rest, backward too",
)  # fmt: skip


def install(clocks: Clocks) -> None:
    """Put the clocks around everything that a gradient pass does."""
    from torch.nn import functional

    from streamer.streaming import gradients
    from streamer.streaming.differentiable import CoefficientDeltas, DifferentiableReader, FactoredChange
    from streamer.streaming.products import StreamedMatrix
    from streamer.streaming.spool import Spool

    latest = {"head": False}
    multiply, blocks = StreamedMatrix.multiply, DifferentiableReader._blocks

    def read(self: Any, source: Any, rows: Any) -> Iterator[Any]:
        latest["head"] = self.head
        values = blocks(self, source, rows)

        def timed() -> Iterator[Any]:
            while True:
                with clocks.clock.stage((HEAD if self.head else "") + READING):
                    block = next(values, None)
                if block is None:
                    return
                yield block

        return timed()

    def multiplied(self: Any, X: Any, transposed: bool) -> Any:
        latest["head"] = False
        own = self.blocks()
        with clocks.clock.stage((HEAD if latest["head"] else "") + PRODUCTS):
            return multiply(replace(self, blocks=lambda: own), X, transposed)

    def wrap(owner: Any, name: str, stage: str) -> None:
        setattr(owner, name, clocks.wrap(getattr(owner, name), stage))

    DifferentiableReader._blocks = read  # type: ignore[method-assign]  # a clock around it
    StreamedMatrix.multiply = multiplied  # type: ignore[method-assign]  # a clock around it
    for owner, name, stage in (
        (FactoredChange, "add_product", LOW_RANK), (CoefficientDeltas, "_factors", FACTORS),
        (Spool, "write", SPOOL), (Spool, "read", SPOOL),
        (functional, "scaled_dot_product_attention", ATTENTION), (gradients, "_probabilities", SOFTMAX),
    ):  # fmt: skip
        wrap(owner, name, stage)


def gradient_passes(plan: Any, text: Any, coefficients: Any, directory: Path) -> tuple[list[Callable[[], Any]], int]:
    """Two gradient passes, of which the first runs the base, too, and the estimate of their memory."""
    from streamer.fitting.fit_memory import gradient_bytes
    from streamer.plan.batch import AdapterBatch
    from streamer.plan.memory_estimate import resident_bytes
    from streamer.streaming.gradients import GradientModel

    model = GradientModel(plan, directory=directory)
    values = {name: matrix.values for name, matrix in coefficients.matrices.items()}
    rows = len(text.ids) * text.longest
    estimate = gradient_bytes(model.size, resident_bytes(AdapterBatch(plan.base, (plan,))), rows, text.longest)
    return 2 * [lambda: model.gradient(text, values, "base")], estimate


def measure_passes(plan: Any, text: Any, coefficients: Any) -> list[Callable[[], Any]]:
    """One pass of the base, the adapter as it is, and a fitted variant."""
    from streamer.measuring.losses import measure
    from streamer.methods import UNCHANGED, Fitted
    from streamer.streaming.model import StreamingModel, vocabulary_block
    from streamer.streaming.values import VariantSet
    from streamer.streaming.variants import BASE, Variant

    options = UNCHANGED, Fitted(coefficients=coefficients)
    variants = Variant(BASE, None), *map(Variant.of, options)
    model = StreamingModel(VariantSet(plan, variants, None))
    return [lambda: measure(model, text, vocabulary_block(3 * len(text.ids) * text.longest))]


def timed(function: Callable[..., Any], spent: dict[str, list[float]], stage: str) -> Callable[..., Any]:
    """Count the wall and CPU seconds of all threads for a stage, as layers run in threads of their own."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter(), time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            now, own = (time.perf_counter(), time.process_time()), spent.setdefault(stage, [0.0, 0.0])
            own[:] = [seconds + b - a for seconds, a, b in zip(own, began, now, strict=True)]

    return wrapper


def inputs_passes(
    request: dict[str, Any], spent: dict[str, list[float]], plan: Any, text: Any
) -> tuple[list[Callable[[], Any]], int]:
    """The passes of a fit by inputs that collect them and solve, and that correct one set, and the estimate of their memory."""
    import numpy as np
    import torch

    from streamer.detection.options import Run, RunOptions
    from streamer.fitting import inputs
    from streamer.fitting.options import FitOptions
    from streamer.fitting.prepare import prepare_fit
    from streamer.measuring.result_file import Records
    from streamer.streaming.corrected import CorrectedModel
    from streamer.streaming.spool import Spool

    inputs.answers = timed(inputs.answers, spent, SOLVING)
    inputs.corrected = timed(inputs.corrected, spent, CORRECTED)
    CorrectedModel.collect = timed(CorrectedModel.collect, spent, COLLECTING)  # type: ignore[method-assign]  # a clock around it
    CorrectedModel.correct = timed(CorrectedModel.correct, spent, CORRECTING)  # type: ignore[method-assign]  # a clock around it
    length, directory = text.longest, Path(request["directory"])
    count = request["tokens"] // (2 * length) + HELD
    paths, rng = {name: directory / f"{name}.npy" for name in ("general", "task")}, np.random.default_rng(0)
    for path in paths.values():
        np.save(path, rng.integers(int(text.ids[0].max()), size=(count, length)))
    options = FitOptions(grain="inputs", sequences=count, length=length, holdout=HELD / count)
    prepared = prepare_fit(
        plan.base.path, plan.adapter.path, paths, options, request["max_memory"], Run(RunOptions(torch.device("cpu")))
    )
    run = inputs.InputsRun(prepared, Records(), directory)
    run._measure_new = lambda variants: None  # type: ignore[method-assign]  # measuring is left out

    def solve_and_correct() -> None:
        model, spool = CorrectedModel(plan, directory=directory), Spool(directory)
        points, _ = run._solved(model, spool)
        run._correct(model, spool, points[3], points[3].weight)

    return [solve_and_correct], prepared._inputs_bytes(prepared.rows_of_inputs, prepared.matrices_bytes)


def profile(request: dict[str, Any]) -> dict[str, Any]:
    """Run the passes with clocks in place; wall and CPU seconds of each, by stage."""
    began = time.perf_counter()
    clocks = Clocks()
    import numpy as np
    import torch

    from streamer.measuring.sequences import TextSequences
    from streamer.methods.coefficient_set import CoefficientSet, MatrixCoefficients, directions
    from streamer.plan.plan import make_plan

    torch.set_num_threads(request["threads"])
    plan = make_plan(request["base"], request["adapter"])
    text = TextSequences.of(np.load(request["text"]))
    found = {t.tensor: directions(plan.delta(t)) for t in plan.targets}
    coefficients = CoefficientSet(0.9, {n: MatrixCoefficients(s, np.full(len(s), 0.7)) for n, s in found.items()})
    spent: dict[str, list[float]] = {}
    if request["kind"] == "gradient":
        install(clocks)
        passes, estimate = gradient_passes(plan, text, coefficients, Path(request["directory"]))
    elif request["kind"] == "inputs":
        passes, estimate = inputs_passes(request, spent, plan, text)
    else:
        passes, estimate = measure_passes(plan, text, coefficients), 0
    out: dict[str, Any] = {"start": time.perf_counter() - began, "estimate": estimate, "passes": []}
    for run in passes:
        with clocks.clock.stage(START):
            began = time.perf_counter(), time.process_time()
        clocks.clock.seconds.clear()
        clocks.clock.cpu.clear()
        run()
        with clocks.clock.stage(START):
            seconds = time.perf_counter() - began[0], time.process_time() - began[1]
        stages = {
            REST if name == "other" else name: {"wall": wall, "cpu": clocks.clock.cpu[name]}
            for name, wall in clocks.clock.seconds.items()
            if name != START
        }
        if spent:  # solving is within collecting, and both are of threads that the clocks do not count
            times, rest = dict[str, tuple[float, float]](), seconds
            for running, solving in ((COLLECTING, SOLVING), (CORRECTING, CORRECTED)):
                (a, b), (c, d) = spent[running], spent[solving]
                times |= {running: (a - c, b - d), solving: (c, d)}
                rest = rest[0] - a, rest[1] - b
            times[REST] = rest
            stages = {name: {"wall": wall, "cpu": cpu} for name, (wall, cpu) in times.items()}
        out["passes"].append({"wall": seconds[0], "cpu": seconds[1], "stages": stages})
    return out


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    Path(sys.argv[2]).write_text(json.dumps(profile(json.loads(Path(sys.argv[1]).read_text()))))


if __name__ == "__main__":
    main()
