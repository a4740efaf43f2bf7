"""Measure time, memory and reading of the commands that run text, and project them to whole models.

    python tools/bench_sweep.py --like llama-3-8b --layers 1,2 --threads 1                       real shapes, some minutes
    python tools/bench_sweep.py --like llama-3-8b --layers 2,4 --commands repair --options "--max-memory 1600M"
    python tools/bench_sweep.py --hidden 64 --layers 1,2 --sequences 8 --length 16 --json        tiny: does it work?

For each number of layers, a model is generated and `streamer repair`, `evaluate` and `map` run on it, each in a process of its own, with
its default options, on texts of random tokens. `generate` is the part of `repair` in which the adapter writes its own text. The base is
not in the page cache when a command starts, as far as the system drops it.

- CPU seconds are those of all threads. With --threads 1, other work on the machine disturbs them little; wall seconds it does.
- Memory is the peak of `RssAnon`, polled every 10 ms; beside it stands what `--dry-run` forecasts.
- Reading: `read_bytes` of /proc/PID/io, which the disk delivered, for mapped files too; and `rchar`, which calls of `read` returned, from
  the page cache as well.
- A row is a token of a variant or of a stream of the fit, or one that is written, in as many sweeps as tokens. `repair` runs a second
  sweep if it interpolates between two weights; `evaluate` stops early if the answer is clear.
- The start takes what `--dry-run` takes: imports, opening the inputs, a second of probing. The seconds of a layer are the difference
  between two models by the difference of their layers; what is left are the embedding and the head. In another model, a layer and
  the head take longer in proportion to their weights: attention is taken to grow as products do.

`repair` refuses an adapter that has learned nothing, so this one learns the texts, which consist of a few tokens: in the first layer,
v_proj recognizes the inputs of these tokens, and o_proj adds a state from which the head expects them. Both changes are of rank one
and take the place of one direction of the generated adapter. As both texts have the same tokens, strong weights forget the task, and
`repair` interpolates.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import make_checkpoint
import numpy as np
import torch
from measure import children_cpu, cold, machine, size_of, watched
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shapes import KNOWN, Known, Mixture
from torch import Tensor

from streamer.methods.files import load_coefficients
from streamer.options import EvaluateOptions

COMMANDS = "repair", "generate", "evaluate", "map"
DEFAULTS = {"repair": (24, 64), "generate": (24, 64), "evaluate": (32, 128), "map": (32, 128)}
"""Sequences and tokens of each."""

PROJECTED = "llama-3-8b", "llama-3-70b"
LEARNED = 8.0
"""Norm of the state that the adapter adds, in units of the square root of the number of modules that add to the states."""


GENERATE = """
import json, sys, torch
from dataclasses import asdict
from streamer.api.texts import RepairRequest
from streamer.events import Monitor
from streamer.forecast import forecast_texts
base, adapter, output, sequences, length, threads, *dry = sys.argv[1:]
torch.set_num_threads(int(threads))
request = RepairRequest(base=base, adapter=adapter, output=output, sequences=int(sequences), length=int(length))
monitor = Monitor(lambda event: None)
if dry:
    print(json.dumps({"forecast": asdict(forecast_texts(request.own_text(monitor, peek=True), request.own_path))}))
else:
    request.write_own_text(monitor)
"""
"""Lets the adapter write its text, and nothing else."""


def first_rows(base: Path, name: str, count: int) -> Tensor:
    """Read the first rows of a matrix of the base."""
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118  # not a dict
                return file.get_slice(name)[:count].double()
    raise KeyError(name)


def solved(rows: Tensor) -> Tensor:
    """Return the shortest vector whose product with each row is 1."""
    return rows.T @ torch.linalg.solve(rows @ rows.T, torch.ones(len(rows), dtype=rows.dtype))


def teach(base: Path, adapter: Path, model: Known, tokens: int) -> None:
    """Let an adapter raise the logits of the first tokens wherever it sees them; see the module's docstring."""
    embedded = first_rows(base, "model.embed_tokens.weight", tokens)
    seen = solved(embedded / embedded.square().mean(1, keepdim=True).sqrt())
    added = solved(first_rows(base, "lm_head.weight", tokens))
    added *= LEARNED * (2 * model.layers) ** 0.5 / added.norm()
    width = model.linears["self_attn.v_proj"][0] // model.kv_heads
    value = torch.randn(model.kv_heads, width, dtype=seen.dtype) / (model.kv_heads * width) ** 0.5
    attended = value.repeat_interleave(model.heads // model.kv_heads, 0).flatten()
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, left, right in (
        ("v_proj", value.flatten(), seen),
        ("o_proj", added, attended / attended.square().sum()),
    ):
        at = f"base_model.model.model.layers.0.self_attn.{name}"
        tensors[f"{at}.lora_A.weight"][-1] = right
        tensors[f"{at}.lora_B.weight"][:, -1] = left / make_checkpoint.SCALE
    save_file(tensors, path, metadata={"format": "pt"})


def arguments(name: str, args: argparse.Namespace, work: Path, out: Path) -> list[str]:
    """Return the command line of a command."""
    if name == "generate":
        size = [args.sequences or DEFAULTS[name][0], args.length or DEFAULTS[name][1]]
        return [
            sys.executable,
            "-c",
            GENERATE,
            *map(str, (work / "base", work / "adapter", out, *size, args.threads)),
        ]
    inputs = [
        work / "base",
        *([work / "adapter", "--task", work / "task.npy"] if name != "map" else []),
    ]
    given = {
        "--sequences": args.sequences,
        "--length": args.length,
        "--threads": args.threads,
    }
    more = [
        word for option, value in given.items() if value is not None for word in (option, value)
    ]
    line = [name, *inputs, "--general", work / "general.npy", "-o", out, *more, *args.options]
    return [sys.executable, "-m", "streamer", *map(str, line)]


def rows_of(name: str, out: Path, sweeps: int, sequences: int, length: int) -> int:
    """Count the rows of a command's sweeps, from what it wrote."""
    if name in ("map", "generate"):
        return sequences * length
    if name == "evaluate":
        tree = json.loads(out.read_text())
        variants = len(tree["variants"])
        # The shrink that keeps the share has sweeps of its own, with the base.
        placed = variants > 2 + len(EvaluateOptions.lambdas)
        return length * (variants + placed) * sum(map(len, tree["tokens"].values()))
    facts = load_coefficients(out.with_name(f"{out.name}.fit.safetensors")).facts
    fitted, held = (
        sum(text[part]["sequences"] for text in facts["texts"].values())
        for part in ("fitted", "held")
    )
    candidates = len(facts["weights"])
    return length * ((1 + candidates) * fitted + (candidates + 4 + (sweeps > 1)) * held)


def measure_command(name: str, args: argparse.Namespace, work: Path, layers: int) -> dict[str, Any]:
    """Run a command."""
    out = work / f"{name}.out"
    before = children_cpu()
    line = arguments(name, args, work, out)
    events = work / "events.jsonl"
    asks = ["dry"] if name == "generate" else ["--dry-run", "--json", "-qq"]
    dry = subprocess.run([*line, *asks], check=True, stdout=subprocess.PIPE)
    start = children_cpu() - before
    forecast = json.loads(dry.stdout)["forecast"]
    cached = cold(work / "base")
    try:
        with events.open("w") as file:
            run = watched([*line, *([] if name == "generate" else ["--json-events"])], file)
    except SystemExit:
        sys.stderr.write("".join(events.read_text().splitlines(keepends=True)[-2:]))
        raise
    sequences, length = (
        given or own
        for given, own in zip((args.sequences, args.length), DEFAULTS[name], strict=True)
    )
    sweeps = length - 1
    if name != "generate":
        progress = [
            event
            for text in events.read_text().splitlines()
            if "items" in (event := json.loads(text))
        ]
        sweeps = max(
            event["items"] for event in progress if event["stage"] in ("fit", "evaluate", "map")
        ) // (layers + 1)
    return {
        "command": name,
        "layers": layers,
        "rows": rows_of(name, out, sweeps, sequences, length),
        "sweeps": sweeps,
        "start": start,
        "cpu": run.cpu,
        "wall": run.seconds,
        "anonymous": run.anonymous,
        "forecast": forecast["peak_memory_bytes"],
        "forecast_wall": forecast["seconds"],
        "base": size_of(work / "base"),
        "cached": cached,
        "read": run.read,
        "rchar": run.rchar,
    }


def measure_model(
    args: argparse.Namespace, layers: int, work: Path
) -> tuple[Known, list[dict[str, Any]]]:
    """Generate a model and run all commands."""
    made, model = make_checkpoint.make_as_asked(
        work, argparse.Namespace(**{**vars(args), "layers": layers})
    )
    tokens = max(4, model.hidden // 16)
    torch.manual_seed(args.seed)
    teach(made.base, made.adapter, model, tokens)
    generator = np.random.default_rng(args.seed)
    for name in ("general", "task"):
        sequences, length = (
            given or most
            for given, most in zip((args.sequences, args.length), (32, 128), strict=True)
        )
        np.save(work / f"{name}.npy", generator.integers(tokens, size=(sequences, length)))
    return model, [measure_command(name, args, work, layers) for name in args.commands]


def projected(runs: list[dict[str, Any]], model: Known, like: str | None) -> dict[str, Any]:
    """Derive the seconds of the start, a layer and the head from runs with a rising number of layers, and project whole models."""
    few = runs[0]
    many = runs[-1]
    less = few["cpu"] - few["start"]
    more = (many["cpu"] - many["start"]) * few["rows"] / many["rows"]
    layer = (more - less) / (many["layers"] - few["layers"])
    head = less - few["layers"] * layer
    models = {}
    for name in PROJECTED if not isinstance(model, Mixture) else filter(None, [like]):
        whole = KNOWN[name]
        weights, own = (
            sum(m * n for m, n in one.matrices.values()) / one.layers for one in (whole, model)
        )
        wider = whole.vocab * whole.hidden / (model.vocab * model.hidden)
        models[name] = few["start"] + whole.layers * layer * weights / own + head * wider
    return {
        "rows": few["rows"],
        "start": few["start"],
        "layer": layer,
        "head": head,
        "models": models,
    }


def measure(args: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Measure all commands on all models."""
    runs: list[dict[str, Any]] = []
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=home) as directory:
            model, own = measure_model(args, layers, Path(directory))
        runs += own
    by_command = {name: [run for run in runs if run["command"] == name] for name in args.commands}
    return {
        "schema": "streamer.bench-sweep/1",
        "machine": machine(),
        "threads": args.threads,
        "runs": runs,
        "projected": {name: projected(own, model, args.like) for name, own in by_command.items()}
        if len(args.layers) > 1
        else {},
    }


def table(tree: dict[str, Any]) -> str:
    """Format the result."""
    m = tree["machine"]
    lines = [
        f"{m['cores']} cores ({m['cpu']}), {m['memory'] / 2**30:.0f} GiB memory, torch {m['torch']}, {tree['threads']} threads",
        "",
    ]
    heads = (
        "layers",
        "rows",
        "sweeps",
        "CPU s",
        "wall s",
        "forecast",
        "anon MB",
        "forecast",
        "base MB",
        "read MB",
        "rchar MB",
    )
    lines.append(f"{'command':<10}" + "".join(f"{head:>10}" for head in heads))
    for run in tree["runs"]:
        counts = "".join(f"{run[key]:>10}" for key in ("layers", "rows", "sweeps"))
        seconds = "".join(f"{run[key] or 0:>10.1f}" for key in ("cpu", "wall", "forecast_wall"))
        sizes = "".join(
            f"{run[key] / 1e6:>10.0f}" for key in ("anonymous", "forecast", "base", "read", "rchar")
        )
        lines.append(f"{run['command']:<10}{counts}{seconds}{sizes}")
    lines.append("")
    for name, one in tree["projected"].items():
        parts = ", ".join(f"{part} {one[part]:.2f}" for part in ("start", "layer", "head"))
        models = "; ".join(
            f"{model} {seconds / 3600:.2f} CPU h" for model, seconds in one["models"].items()
        )
        lines.append(f"{name}, {one['rows']} rows, CPU s: {parts}; projected: {models}")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )
    make_checkpoint.add_file_options(parser)
    make_checkpoint.add_model_options(parser)
    parser.add_argument(
        "--layers", default="1,2", metavar="N,N", help="numbers of layers, rising (default: 1,2)"
    )
    parser.add_argument(
        "--commands",
        default=",".join(COMMANDS),
        metavar="C,C",
        help=f"(default: {','.join(COMMANDS)})",
    )
    parser.add_argument(
        "--options",
        type=shlex.split,
        default=[],
        help="more options of the commands, quoted (default: none)",
    )
    parser.add_argument(
        "--sequences", type=int, metavar="N", help="of each text (default: the command's)"
    )
    parser.add_argument(
        "--length", type=int, metavar="N", help="tokens of a sequence (default: the command's)"
    )
    parser.add_argument(
        "--threads", type=int, default=2, metavar="N", help="of torch (default: %(default)s)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="where models are generated, which are removed afterwards",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; seconds and bytes"
    )
    args = parser.parse_args()
    args.commands = args.commands.split(",")
    layers = args.layers.split(",")
    if not {*args.commands} <= {*COMMANDS}:
        parser.error(f"--commands: expected some of {', '.join(COMMANDS)}")
    if not all(one.isdigit() for one in layers) or not all(
        0 < a < b for a, b in pairwise([0.5, *map(int, layers)])
    ):
        parser.error("--layers: expected rising numbers from 1 on, such as 1,2")
    args.layers = [*map(int, layers)]
    if min(args.sequences or 4, args.length or 4, 4 * args.threads) < 4:
        parser.error("--sequences and --length: at least 4; --threads: at least 1")
    with tempfile.TemporaryDirectory(prefix="bench-sweep-", dir=args.work) as directory:
        tree = measure(args, Path(directory))
    print(json.dumps(tree, indent=1) if args.json else table(tree))


if __name__ == "__main__":
    main()
