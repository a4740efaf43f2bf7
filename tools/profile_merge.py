"""Where the time of `streamer merge` goes: it runs in this process, with clocks in place, and the seconds are printed as JSON.

    python tools/profile_merge.py BASE ADAPTER OUT FINDINGS LAMBDA

A torch dispatch mode times the four operations on blocks, wrappers time system calls, hashing and the functions around them. Each
moment of the main thread is counted for its innermost stage, as wall and as CPU seconds; they differ where it waits, for the disk,
for the threads that hash and write, or for a core that another process has. Those threads' seconds run beside the main one's and
are shown apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar


class Clock:
    """Wall and CPU seconds of one thread by stage: each moment belongs to the innermost stage."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.cpu: defaultdict[str, float] = defaultdict(float)
        self.stack = ["other"]
        self._since = time.perf_counter(), time.thread_time()

    def _turn(self) -> None:
        now = time.perf_counter(), time.thread_time()
        self.seconds[self.stack[-1]] += now[0] - self._since[0]
        self.cpu[self.stack[-1]] += now[1] - self._since[1]
        self._since = now

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside for `name`."""
        self._turn()
        self.stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self.stack.pop()


class Clocks(threading.local):
    """A clock for each thread; every one is in `all`, by thread name."""

    all: ClassVar[dict[str, Clock]] = {}

    def __init__(self) -> None:
        self.clock = self.all.setdefault(threading.current_thread().name, Clock())

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, counted for `name` in whatever thread it runs."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            with self.clock.stage(name):
                return function(*args, **kwargs)

        return inner


def profile(
    base: str, adapter: str, out: str, findings: str, mitigation_lambda: str
) -> dict[str, Any]:
    """Merge in this process with clocks in place; wall and CPU seconds by stage, and those of the threads beside."""
    began = time.perf_counter()
    clocks = Clocks()
    clock = clocks.clock
    with clock.stage("import"):
        from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

        from streamer.adapters.finetuned import AdapterPaths
        from streamer.detection.detect import choose_device
        from streamer.detection.findings import load_findings
        from streamer.methods import Paper
        from streamer.output import write as outputs
        from streamer.output.form import Form
        from streamer.output.mitigation import Mitigated, Mitigation
        from streamer.output.opening import open_mitigations
        from streamer.run import Run
        from streamer.storage import atomic_file, checkpoint, files

    stages = {"addmm_": "addmm", "aminmax": "finite check", "isfinite": "finite check"}

    class Blocks(TorchDispatchMode):
        """Times the operations on a block: copied in, summed, copied out rounded, checked."""

        summed = False

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            op = func.overloadpacket.__name__
            name = (
                ("round" if self.summed else "read and upcast") if op == "copy_" else stages.get(op)
            )
            if name is None:
                return func(*args, **(kwargs or {}))
            self.summed = op == "addmm_"
            with clock.stage(name):
                return func(*args, **(kwargs or {}))

    def unwatched(function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with the mode off: under one, torch's linear algebra loads its Python implementations."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return inner

    class Sha256:
        """SHA-256 with a clock."""

        def __init__(self, data: bytes = b"") -> None:
            self._hash = hashlib.sha256(data)
            self.digest = self._hash.digest
            self.hexdigest = self._hash.hexdigest

            self.update = clocks.wrap(self._hash.update, "sha256")

    atomic_file.os = SimpleNamespace(**vars(os) | {"write": clocks.wrap(os.write, "write")})
    atomic_file.hashlib = SimpleNamespace(**vars(hashlib) | {"sha256": Sha256})
    files.sync = clocks.wrap(files.sync, "fsync")
    files.reserve = clocks.wrap(files.reserve, "reserve")
    files.read_at = clocks.wrap(files.read_at, "read")
    atomic_file.AtomicFile.append = clocks.wrap(
        atomic_file.AtomicFile.append, "wait for the write"
    )  # of the piece before
    Mitigated.metrics = clocks.wrap(unwatched(Mitigated.metrics), "factors and figures")
    Mitigation.of = clocks.wrap(unwatched(Mitigation.of), "factors and figures")
    # The map; its pages come with the upcast.
    checkpoint.TensorFile.view = clocks.wrap(checkpoint.TensorFile.view, "read and upcast")
    with clock.stage("plan and identity"):
        found = load_findings(findings)
        method = Paper(float(mitigation_lambda))
        run = Run(choose_device("cpu"))
        (mitigation,) = open_mitigations(
            Path(base), AdapterPaths.of_one(Path(adapter)), [found], method, found.options, run
        )
        planned = [outputs.plan_output("merge", mitigation, Form(), Path(out))]
    with Blocks():
        outputs.write_outputs(planned, run)
    with clock.stage("other"):
        total = time.perf_counter() - began
    beside: dict[str, dict[str, float]] = {}
    for other in clocks.all.values():
        for name in other.seconds if other is not clock else ():
            if name != "other":  # waiting for work
                both = beside.setdefault(name, {"wall": 0.0, "cpu": 0.0})
                both["wall"] += other.seconds[name]
                both["cpu"] += other.cpu[name]
    stages = {
        name: {"wall": seconds, "cpu": clock.cpu[name]} for name, seconds in clock.seconds.items()
    }
    return {"seconds": total, "stages": stages, "beside": beside}


def main() -> None:
    if len(sys.argv) != 6:
        raise SystemExit(__doc__)
    print(json.dumps(profile(*sys.argv[1:])))


if __name__ == "__main__":
    main()
