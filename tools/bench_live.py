"""Live PEFT models: differences from files and from PEFT over all kinds of adapters, time against PEFT's function, and memory.

    python tools/bench_live.py                    all three
    python tools/bench_live.py --only kinds       worst differences over all kinds that tests make
    python tools/bench_live.py --only time --size 4096 --repeats 3
    python tools/bench_live.py --only memory --size 4096 --layers 4

Kinds. Each is made, trained for a few steps and saved, as tests/parity/kinds_cases.py has them. Compared are findings and the adapter
mitigated at λ = 0.5 in the live model and on its files, the merge at λ = 0.5 in both, and the outputs of the merged model at λ = 1 with
those of PEFT's model. What is refused is listed with its reason.

Time. One float32 layer of --size squared with a rank 16 adapter: `streamer.peft.reduce_intruder_dimension` and PEFT's function, by
turns; medians of the wall's seconds. PEFT's is run once where it takes more than 20 s.

Memory. A model of --layers such layers in bfloat16; growth of anonymous memory (`RssAnon:`) while `reduce_intruder_dimension` runs,
beside one matrix in float32 and the old adapter's factors.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from measure import kilobytes, machine
from peft.tuners.lora.intruders import reduce_intruder_dimension as of_peft
from torch import nn

import streamer
import streamer.peft as live

TESTS = Path(__file__).parents[1] / "tests"
SLOW = 20.0


def kinds() -> None:
    """Print the worst differences over all kinds, and what is refused."""
    sys.path[:0] = [str(TESTS / "parity"), str(TESTS / "support")]
    import kinds_cases
    from live import adapter_state, load_state, loaded

    counts = {"findings": 0, "adapters": 0, "merges": 0}
    worst = dict.fromkeys(("adapter", "merge", "outputs"), 0.0)
    refused = {}
    for name in kinds_cases.KINDS:
        with tempfile.TemporaryDirectory() as directory, kinds_cases.quiet():
            home = Path(directory)
            made = kinds_cases.make(name, torch.float32, home)
            options: dict[str, Any] = {"mitigation_lambda": 0.5, **made.kind.options}
            on_files = streamer.detect_intruder_dimensions(
                made.base, made.adapter, **made.kind.options
            )
            model = loaded(made)
            found = live.detect_intruder_dimensions(model).by_tensor
            counts["findings"] += all(found[m.tensor].detection == m.detection for m in on_files)
            try:
                live.reduce_intruder_dimension(model, mitigation_lambda=0.5)
                streamer.reduce_intruder_dimension(made.base, made.adapter, home / "out", **options)
                theirs = load_state(home / "out")
                for key, tensor in adapter_state(model, "intruder_reduced").items():
                    worst["adapter"] = max(
                        worst["adapter"], kinds_cases.relative(tensor, theirs[key])
                    )
                counts["adapters"] += 1
            except streamer.StreamerError as e:
                refused[name] = str(e)
            merged = live.merge_and_unload_with_reduced_intruder_dimensions(
                loaded(made), mitigation_lambda=0.5
            )
            theirs = dict(streamer.iter_merged(made.base, made.adapter, **options))
            for key, tensor in kinds_cases.by_disk(merged.state_dict(), theirs).items():
                worst["merge"] = max(worst["merge"], kinds_cases.relative(tensor, theirs[key]))
            counts["merges"] += 1
            model = loaded(made)
            x = kinds_cases.inputs(model)
            with torch.no_grad():
                expected = kinds_cases.values(model(*x))
                ours = live.merge_and_unload_with_reduced_intruder_dimensions(
                    model, mitigation_lambda=1.0
                ).eval()
                off = kinds_cases.relative(kinds_cases.values(ours(*x)), expected)
                theirs_off = kinds_cases.relative(
                    kinds_cases.values(loaded(made).merge_and_unload()(*x)), expected
                )
            if theirs_off > 1e-3:
                print(
                    f"{name}: PEFT's own merge is off its layers by {theirs_off:.1e}, ours by {off:.1e}"
                )
            if min(off, theirs_off) <= 1e-3:
                worst["outputs"] = max(worst["outputs"], off)
    print(f"{len(kinds_cases.KINDS)} kinds: findings equal to the last bit in {counts['findings']}")
    print(f"mitigated in {counts['adapters']}: worst difference from files {worst['adapter']:.1e}")
    print(f"merged in {counts['merges']}: worst difference from files {worst['merge']:.1e}")
    print(
        f"outputs of the model merged at λ = 1 and of PEFT's model: worst difference {worst['outputs']:.1e}"
    )
    for name, reason in refused.items():
        print(f"  mitigation refused, {name}: {reason}")


class Layers(nn.Module):
    """Square linear layers."""

    def __init__(self, size: int, count: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Linear(size, size, bias=False, dtype=dtype) for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run one after the other."""
        for layer in self.layers:
            x = layer(x)
        return x


def adapted(size: int, count: int, dtype: torch.dtype) -> peft.PeftModel:
    """Make such layers with an adapter of rank 16 that has intruders."""
    config = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=[f"layers.{i}" for i in range(count)],
        init_lora_weights=False,
    )
    torch.manual_seed(1)
    return peft.get_peft_model(Layers(size, count, dtype), config)


def timed(act: Callable[[], object]) -> float:
    """Return the wall's seconds."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def speed(size: int, repeats: int) -> None:
    """Print the time of both functions on one layer."""
    ours = []
    theirs = []
    live.reduce_intruder_dimension(adapted(64, 1, torch.float32))  # imports
    for _ in range(repeats):
        model = adapted(size, 1, torch.float32)
        ours.append(timed(lambda: live.reduce_intruder_dimension(model)))  # noqa: B023  # called here
        if not theirs or theirs[0] < SLOW:
            peer = adapted(size, 1, torch.float32)
            theirs.append(timed(lambda: of_peft(peer, logging_sink=None)))  # noqa: B023  # called here
    a = statistics.median(ours)
    b = statistics.median(theirs)
    print(
        f"one {size}x{size} float32 layer, rank 16: {a:.2f} s; PEFT's function {b:.1f} s: {b / a:.0f} times as long"
    )


def memory(size: int, count: int) -> None:
    """Print the growth of anonymous memory while a model's adapter is mitigated."""
    model = adapted(size, count, torch.bfloat16)
    live.reduce_intruder_dimension(adapted(64, 1, torch.float32))
    factors = sum(p.nbytes for n, p in model.named_parameters() if "lora_" in n)
    before = kilobytes("/proc/self/status", "RssAnon:")
    peak = 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, kilobytes("/proc/self/status", "RssAnon:"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        live.reduce_intruder_dimension(model)
    finally:
        stop.set()
        watcher.join()
    mib = 1 << 20
    print(
        f"{count} bfloat16 layers of {size}x{size}, {count * size * size * 2 / mib:.0f} MiB: {(peak - before) / mib:.0f} MiB beside "
        f"the model; a matrix in float32 is {size * size * 4 / mib:.0f}, the factors {factors / mib:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("kinds", "time", "memory"))
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    print(machine())
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if given.only in (None, "time"):
            speed(given.size, given.repeats)
        if given.only in (None, "memory"):
            memory(given.size, given.layers)
        if given.only in (None, "kinds"):
            kinds()


if __name__ == "__main__":
    main()
