"""Where the time of a fit's passes goes: they run in this process, with clocks in place, and the seconds are written as JSON.

    python tools/profile_fit.py REQUEST.json OUTPUT.json

REQUEST has ``base``, ``adapter``, ``text`` (token ids, .npy), ``threads``, ``directory`` for temporary files, and ``kind``: ``measure``
runs one pass of the base, the adapter as it is and a shrink; ``inputs`` collects and solves for a fit on ``tokens`` of text, half of either
kind, within ``max_memory``. Wall and CPU seconds are those of all threads. On one thread the latter are the work itself, whatever else the
machine does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COLLECTING, SOLVING = "running layers, inputs to a file", "solving"
CORRECTING, CORRECTED = "running layers as they are corrected", "solving for corrections"
HELD = 2
"""Sequences of each text that a fit holds apart here."""
REST = "the rest"


def measure_passes(plan: Any, text: Any) -> Callable[[], Any]:
    """One pass of the base, the adapter as it is, and a shrink."""
    from streamer.measuring.task import measure
    from streamer.methods import UNCHANGED, Shrink
    from streamer.streaming.model import StreamingModel, vocabulary_block
    from streamer.streaming.values import BASE, Variant, VariantSet

    variants = Variant(BASE, None), *map(Variant.of, (UNCHANGED, Shrink(0.7)))
    model = StreamingModel(VariantSet(plan, variants, None))
    return lambda: measure(model, text, vocabulary_block(3 * len(text.ids) * text.longest))


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
) -> tuple[Callable[[], Any], int]:
    """The passes of a fit that collect them and solve, and that correct one set, and the estimate of their memory."""
    import numpy as np
    import torch

    from streamer.detection.options import Run
    from streamer.fitting import fit
    from streamer.fitting.prepare import FitOptions, prepare_fit
    from streamer.measuring.result_file import Records
    from streamer.streaming.corrected import CorrectedModel
    from streamer.streaming.spool import Spool

    fit.answers = timed(fit.answers, spent, SOLVING)
    fit.corrected = timed(fit.corrected, spent, CORRECTED)
    CorrectedModel.collect = timed(CorrectedModel.collect, spent, COLLECTING)  # type: ignore[method-assign]  # a clock around it
    CorrectedModel.correct = timed(CorrectedModel.correct, spent, CORRECTING)  # type: ignore[method-assign]  # a clock around it
    length, directory = text.longest, Path(request["directory"])
    count = request["tokens"] // (2 * length) + HELD
    paths, rng = {name: directory / f"{name}.npy" for name in ("general", "task")}, np.random.default_rng(0)
    for path in paths.values():
        np.save(path, rng.integers(int(text.ids[0].max()), size=(count, length)))
    options = FitOptions(sequences=count, length=length, holdout=HELD / count)
    prepared = prepare_fit(
        plan.base.path, plan.adapter.path, paths, options, request["max_memory"], Run(torch.device("cpu"))
    )
    run = fit.FitRun(prepared, Records(), directory)
    run._measure_new = lambda variants: None  # type: ignore[method-assign]  # measuring is left out

    def solve_and_correct() -> None:
        model, spool = CorrectedModel(plan, directory=directory), Spool(directory)
        points, _ = run._solved(model, spool)
        run._correct(model, spool, points[3], points[3].weight)

    return solve_and_correct, prepared._inputs_bytes(prepared.rows_of_inputs, prepared.matrices_bytes)


def profile(request: dict[str, Any]) -> dict[str, Any]:
    """Run the passes; wall and CPU seconds, of a fit by stage."""
    began = time.perf_counter()
    import numpy as np
    import torch

    from streamer.measuring.sequences import TextSequences
    from streamer.plan.plan import make_plan

    torch.set_num_threads(request["threads"])
    plan = make_plan(request["base"], request["adapter"])
    text = TextSequences.of(np.load(request["text"]))
    spent: dict[str, list[float]] = {}
    if request["kind"] == "inputs":
        run, estimate = inputs_passes(request, spent, plan, text)
    else:
        run, estimate = measure_passes(plan, text), 0
    out: dict[str, Any] = {"start": time.perf_counter() - began, "estimate": estimate}
    timed(run, spent, REST)()
    wall, cpu = spent[REST]
    stages = {}
    # Solving is within collecting, and both are within the rest.
    for running, solving in ((COLLECTING, SOLVING), (CORRECTING, CORRECTED)):
        if running in spent:
            (a, b), (c, d) = spent[running], spent[solving]
            stages |= {running: {"wall": a - c, "cpu": b - d}, solving: {"wall": c, "cpu": d}}
    rest = {kind: whole - sum(t[kind] for t in stages.values()) for kind, whole in (("wall", wall), ("cpu", cpu))}
    return {**out, "wall": wall, "cpu": cpu, "stages": {**stages, REST: rest}}


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    Path(sys.argv[2]).write_text(json.dumps(profile(json.loads(Path(sys.argv[1]).read_text()))))


if __name__ == "__main__":
    main()
