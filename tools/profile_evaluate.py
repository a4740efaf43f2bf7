"""Where the time of `streamer evaluate` goes: it runs in this process, with clocks in place, and the seconds are written as JSON.

    python tools/profile_evaluate.py REQUEST.json OUTPUT.json

REQUEST has the arguments of `streamer.evaluate_variants` and ``threads``. Wrappers time products, reading, attention and the functions
around them; each moment of the main thread is counted for its innermost stage, as wall and as CPU seconds of that thread. On one thread the
latter are the work itself, whatever else the machine does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from profile_merge import Clocks

HEAD = "head: "
"""Begins the names of stages that belong to the head; the others but `START` belong to the layers."""

START = "start and end"
PRODUCTS, READING, DELTAS, FACTORS, ATTENTION, REST = (
    "products", "reading and upcast", "low-rank products", "mitigated factors", "attention", "norms and the rest",
)  # fmt: skip
SOFTMAX = f"{HEAD}softmax and divergence"


def install(clocks: Clocks) -> None:
    """Put the clocks around everything that a pass does."""
    from torch.nn import functional

    from streamer.measuring import task
    from streamer.streaming import installed, values
    from streamer.streaming.values import Values

    def in_head(function: Callable[..., Any], stage: str, reader_of: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that it is counted for `stage`, of the head where the reader of its weight belongs to that."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            reader = reader_of(*args)
            head = reader is not None and reader.owner.head
            with clocks.clock.stage((HEAD if head else "") + stage):
                return function(*args, **kwargs)

        return inner

    special: Any = values._SPECIAL
    special[functional.linear] = in_head(
        special[functional.linear], PRODUCTS, lambda x, weight, *_: getattr(weight, "reader", None)
    )
    reader: Any = installed._Reader
    for name in ("read", "rows", "matrix", "gather"):
        setattr(reader, name, in_head(getattr(reader, name), READING, lambda own, *_: own))
    module: Any = installed.InstalledModule
    module.run = clocks.wrap(module.run, DELTAS)
    Values.deltas = clocks.wrap(Values.deltas, FACTORS)  # type: ignore[method-assign]  # a clock around it
    functional.scaled_dot_product_attention = clocks.wrap(functional.scaled_dot_product_attention, ATTENTION)
    task._Accumulator.add = clocks.wrap(task._Accumulator.add, SOFTMAX)  # type: ignore[method-assign]  # a clock around it


def profile(arguments: dict[str, Any]) -> dict[str, Any]:
    """Evaluate in this process with clocks in place; wall and CPU seconds by stage, passes and rows of the run."""
    began = time.perf_counter()
    clocks = Clocks()
    clock = clocks.clock
    import torch

    import streamer
    from streamer.measuring import passes as of_measuring
    from streamer.measuring import task as of_pass

    torch.set_num_threads(arguments.pop("threads"))
    check, measure, passes = of_measuring.padding_changes, clocks.wrap(of_pass.measure, REST), []

    def checked(*args: Any) -> bool:
        changes = check(*args)
        install(clocks)  # the check counts as part of the start
        return changes

    def counted(model: Any, text: Any, block: int) -> Any:
        passes.append(model.batch.variants * len(text.ids) * text.longest)
        return measure(model, text, block)

    of_measuring.padding_changes, of_pass.measure = checked, counted
    streamer.evaluate_variants(**arguments)
    with clock.stage(START):
        total = time.perf_counter() - began
    stages = {
        START if name == "other" else name: {"wall": seconds, "cpu": clock.cpu[name]}
        for name, seconds in clock.seconds.items()
        if name != START
    }
    return {"seconds": total, "passes": len(passes), "rows": sum(passes), "most_rows": max(passes), "stages": stages}


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    Path(sys.argv[2]).write_text(json.dumps(profile(json.loads(Path(sys.argv[1]).read_text()))))


if __name__ == "__main__":
    main()
