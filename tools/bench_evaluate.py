"""Time and memory of `streamer evaluate`, against loading each merged model in turn with transformers.

    python tools/bench_evaluate.py --like llama-3-8b --layers 2 --tokens 128    real shapes, few layers
    python tools/bench_evaluate.py --hidden 64 --layers 2 --tokens 16 --json    tiny: does it work?

Two sequences a text, of random tokens, under the base, the adapter and six shrinks: nothing is detected. `evaluate` is a process of its
own, its memory polled from outside (`RssAnon:`); seconds are those of its processors, which other work on the machine lengthens less than
the clock's. `merged` does the work for one variant: `streamer merge`, then a process that loads the merged model in float32 and runs both
texts. The projection counts the multiplications of all layers of the model that --like names.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import make_checkpoint
import numpy as np
from measure import machine, watched
from shapes import KNOWN, Known

LAMBDAS = "0.9,0.8,0.7,0.6,0.5,0.4"
VARIANTS, SEQUENCES = 8, 2

LOAD = """
import sys, numpy, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.from_numpy(numpy.load(sys.argv[2]))
with torch.no_grad():
    for _ in range(2):
        torch.nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
"""


def measured(command: list[str]) -> dict[str, float]:
    """Processor seconds, wall seconds and peak anonymous memory of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = watched(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": cpu, "seconds": ran.seconds, "anonymous_bytes": ran.anonymous}


def products(model: Known) -> int:
    """Multiplications for one token, the head's among them."""
    return sum(m * n for m, n in model.matrices.values()) + model.vocab * model.hidden


def bench(directory: Path, model: Known, dtype: str, tokens: int, like: str | None) -> dict[str, Any]:
    """Generate the inputs, run both, and work the figures out."""
    made = make_checkpoint.make_checkpoint(directory, model, dtype)
    text, out = directory / "text.npy", directory / "evaluation.json"
    np.save(text, np.random.default_rng(0).integers(0, model.vocab, (SEQUENCES, tokens)))
    streamer = [sys.executable, "-m", "streamer"]
    inputs = [str(made.base), str(made.adapter)]
    line = ["--general", str(text), "--task", str(text), "--method", "shrink", "--lambda", LAMBDAS]
    ours = measured([*streamer, "evaluate", *inputs, *line, "--length", str(tokens), "-o", str(out), "--quiet"])
    merge = measured(
        [
            *streamer,
            "merge",
            *inputs,
            "-o",
            str(directory / "merged"),
            "--method",
            "shrink",
            "--lambda",
            "0.9",
            "--quiet",
        ]
    )
    load = measured([sys.executable, "-c", LOAD, str(directory / "merged"), str(text)])
    rows = 2 * VARIANTS * SEQUENCES * tokens
    tree: dict[str, Any] = {"machine": machine(), "tokens": tokens, "variants": VARIANTS, "evaluate": ours, "merge": merge, "load": load,
                            "merged_cpu_seconds": VARIANTS * (merge["cpu_seconds"] + load["cpu_seconds"]),
                            "cpu_seconds_per_row": ours["cpu_seconds"] / rows}  # fmt: skip
    if like:
        tree["projected_cpu_seconds_per_row"] = tree["cpu_seconds_per_row"] * products(KNOWN[like]) / products(model)
    return tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128, help="of a sequence (default: 128)")
    parser.add_argument(
        "--work", type=Path, help="where the models are made (default: the system's temporary directory)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    make_checkpoint.add_model_options(parser)
    args = parser.parse_args()
    model = make_checkpoint.model_of(args)
    with tempfile.TemporaryDirectory(dir=args.work) as directory:
        tree = bench(Path(directory), model, make_checkpoint.DTYPES[args.dtype], args.tokens, args.like)
    if args.json:
        print(json.dumps(tree, indent=1))
        return
    ours = tree["evaluate"]
    print(f"evaluate: {VARIANTS} variants, 2 texts of {SEQUENCES * args.tokens} tokens: {ours['cpu_seconds']:.1f} s of processor time, "
          f"{ours['anonymous_bytes'] / 1e6:.0f} MB")  # fmt: skip
    print(
        f"each merged model in turn: {tree['merged_cpu_seconds']:.1f} s, {tree['load']['anonymous_bytes'] / 1e6:.0f} MB"
    )
    if "projected_cpu_seconds_per_row" in tree:
        print(f"all layers: {tree['projected_cpu_seconds_per_row']:.3f} s a token and variant")


if __name__ == "__main__":
    main()
