"""Memory and time of `streamer evaluate`, what a whole model would take, and the time of loading each merged model in turn instead.

    python tools/bench_evaluate.py --like llama-3-8b --layers 2 --double --threads 1       real shapes, and twice the layers
    python tools/bench_evaluate.py --hidden 2048 --layers 4 --sequences 16 --length 128 --peer 2        against merged models
    python tools/bench_evaluate.py BASE ADAPTER --sequences 64 --length 128 --peer 2       takes what is there
    python tools/bench_evaluate.py --hidden 64 --layers 1 --peer 1 --json                  tiny: does it work?

Texts are random tokens, the same number of general and of task text, and findings are made first; no time depends on what the tokens
are. The variants are the base, the adapter, and each of --method at each of --lambda.

Memory. The run of the profile, from outside: every 10 ms `RssAnon:` of /proc/PID/status. --double runs a model of twice the layers besides.
Beside it stands what `--dry-run` forecasts.

Profile. One run in an instrumented process: see profile_evaluate.py. A row is a token of a variant. With --threads 1 the processor
seconds are those of the work itself on a machine that has other work; wall seconds are not.

Projection, of a Llama. The profile's seconds as they grow with what they depend on: products, attention and norms with rows and the layers'
weights, reading with passes and weights, the head with rows and its own. Passes are those that no budget asks to be smaller. Texts are
twice 64 sequences of 512 tokens. Weights are read at the profile's pace: from memory, if the measured model fits there.

Peer. `streamer merge` writes each variant, and evaluate_peer.py loads them one by one; both take turns with `streamer evaluate`, --peer
times, in processes of their own, from start to end. A round gives ratios, with and without the merges' time. Given as well are the
processor seconds of all threads, which other work on the machine disturbs less, and how far apart the mean losses are: as far as the merged
weights are rounded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import make_checkpoint
import numpy as np
from measure import machine, size_of, spread, watched
from profile_evaluate import ATTENTION, DELTAS, FACTORS, HEAD, PRODUCTS, READING, REST, SOFTMAX, START
from shapes import KNOWN, Known, Mixture

from streamer.measuring.task import ROWS

TOOLS = Path(__file__).parent
METHODS, LAMBDAS = "paper,project,shrink", "0.75,0.5"
PROJECTED = "llama-3-8b", "llama-3-70b"
PROJECTED_SEQUENCES, PROJECTED_LENGTH = 64, 512
TEXTS = "general", "task"
KINDS = "wall", "cpu"


class Inputs(NamedTuple):
    """What is evaluated: directories and files, and what was generated, if it was."""

    base: Path
    adapter: Path
    findings: Path
    texts: dict[str, Path]
    model: Known | None


class Work(NamedTuple):
    """Rows that go through a model of these weights, in so many passes."""

    rows: int
    passes: int
    layers: int
    head: int
    vocabulary: int

    @classmethod
    def of(cls, model: Known, rows: int, passes: int) -> Work:
        """The work on a Llama."""
        layers = sum(m * n for m, n in model.matrices.values())
        return cls(rows, passes, layers, model.vocab * model.hidden, model.vocab)


def streamer(*arguments: object) -> list[str]:
    """A command of the product, by this interpreter."""
    return [sys.executable, "-m", "streamer", *map(str, arguments), "-qq"]


def variants_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Method and λ of each variant but the base, in the order of the evaluation."""
    return [("shrink", "1"), *((m, lam) for m in args.method.split(",") for lam in args.lambdas.split(","))]


def prepare(args: argparse.Namespace, work: Path, times: int = 1) -> Inputs:
    """The model as given, or generated with so many times the layers; texts, and findings on it."""
    model = None
    base, adapter = args.base, args.adapter
    if base is None:
        made, model = make_checkpoint.make_as_asked(work / "model", args, times)
        base, adapter = made.base, made.adapter
    config = json.loads((base / "config.json").read_text())
    generator = np.random.default_rng(args.seed)
    texts = {name: work / f"{name}.npy" for name in TEXTS}
    for path in texts.values():
        np.save(path, generator.integers(config["vocab_size"], size=(args.sequences, args.length)))
    findings = work / "findings.safetensors"
    threads = "--threads", args.threads
    subprocess.run(streamer("detect", base, adapter, "-o", findings, "--overwrite", *threads), check=True)
    return Inputs(base, adapter, findings, texts, model)


def evaluate_command(args: argparse.Namespace, inputs: Inputs, out: Path, *more: str) -> list[str]:
    """`streamer evaluate` of all variants."""
    texts = [word for name, path in inputs.texts.items() for word in (f"--{name}", path)]
    return streamer(
        "evaluate", inputs.base, inputs.adapter, *texts, "--findings", inputs.findings, "-o", out, "--method", args.method,
        "--lambda", args.lambdas, "--sequences", args.sequences, "--length", args.length, "--threads", args.threads,
        "--keep", 1, *more,  # so that no other shrink is measured
    )  # fmt: skip


def measure_profile(args: argparse.Namespace, inputs: Inputs, work: Path) -> dict[str, Any]:
    """One instrumented run and its peak memory, and what was forecast."""
    done = subprocess.run(
        evaluate_command(args, inputs, work / "none", "--dry-run", "--json"), check=True, stdout=subprocess.PIPE
    )
    request = {
        "base": str(inputs.base), "adapter": str(inputs.adapter), "findings": str(inputs.findings), "threads": args.threads,
        **{name: str(path) for name, path in inputs.texts.items()}, "methods": args.method.split(","),
        "lambdas": [float(lam) for lam in args.lambdas.split(",")], "sequences": args.sequences, "length": args.length,
        "keep": 1.0,
    }  # fmt: skip
    (work / "request.json").write_text(json.dumps(request))
    load = os.getloadavg()[0]
    peak = watched(
        [sys.executable, *map(str, (TOOLS / "profile_evaluate.py", work / "request.json", work / "profile.json"))]
    )
    return {
        "bytes": size_of(inputs.base), "anonymous": peak.anonymous, "hwm": peak.hwm, "load": load,
        "forecast": json.loads(done.stdout)["forecast"], **json.loads((work / "profile.json").read_text()),
    }  # fmt: skip


def per_row(profile: dict[str, Any], kind: str) -> float:
    """Seconds of the passes for a row."""
    return float(sum(t[kind] for name, t in profile["stages"].items() if name != START) / profile["rows"])


def project(profile: dict[str, Any], model: Known, variants: int) -> dict[str, dict[str, Any]]:
    """Seconds that an evaluation of whole models would take, from the profile of this one; see the module's docstring."""
    there = Work.of(model, profile["rows"], profile["passes"])
    sequences = max(1, ROWS // variants // (PROJECTED_LENGTH + 1))
    passes = len(TEXTS) * -(-PROJECTED_SEQUENCES // sequences)
    rows = len(TEXTS) * PROJECTED_SEQUENCES * PROJECTED_LENGTH * variants
    out = {}
    for name in PROJECTED:
        here = Work.of(KNOWN[name], rows, passes)
        row, turn = here.rows / there.rows, here.passes / there.passes
        layers, head = here.layers / there.layers, here.head / there.head
        growth = {
            PRODUCTS: row * layers, DELTAS: row * layers, ATTENTION: row * layers, REST: row * layers,
            READING: turn * layers, FACTORS: turn * layers, HEAD + PRODUCTS: row * head, HEAD + READING: turn * head,
            SOFTMAX: row * here.vocabulary / there.vocabulary, START: 1.0,
        }  # fmt: skip
        stages = {stage: {kind: t[kind] * growth[stage] for kind in KINDS} for stage, t in profile["stages"].items()}
        sums = {kind: sum(t[kind] for t in stages.values()) for kind in KINDS}
        out[name] = {"passes": passes, "rows": rows, **sums, "stages": stages}
    return out


def clocked(command: list[str]) -> tuple[float, float, bytes]:
    """Wall seconds, processor seconds of all threads, and what a command that must succeed prints."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, used, done.stdout


def measure_peer(args: argparse.Namespace, inputs: Inputs, work: Path) -> dict[str, Any]:
    """Seconds of `evaluate`, of the merges and of the peer, by turns, and how far apart the losses are."""
    out, merged = work / "evaluation.json", work / "merged"
    models = [merged / str(number) for number, _ in enumerate(variants_of(args))]
    printed: dict[str, bytes] = {}

    def evaluate() -> tuple[float, float]:
        out.unlink(missing_ok=True)
        wall, cpu, printed["evaluate"] = clocked(evaluate_command(args, inputs, out, "--json"))
        return wall, cpu

    def merge() -> tuple[float, float]:
        shutil.rmtree(merged, ignore_errors=True)
        each = [
            clocked(streamer("merge", inputs.base, inputs.adapter, "-o", path, "--method", method, "--lambda", lam,
                             "--findings", inputs.findings, "--threads", args.threads))[:2]
            for path, (method, lam) in zip(models, variants_of(args), strict=True)
        ]  # fmt: skip
        return sum(wall for wall, _ in each), sum(cpu for _, cpu in each)

    def load() -> tuple[float, float]:
        command = [
            sys.executable,
            TOOLS / "evaluate_peer.py",
            args.threads,
            *inputs.texts.values(),
            inputs.base,
            *models,
        ]
        wall, cpu, printed["peer"] = clocked([str(word) for word in command])
        return wall, cpu

    turns: dict[str, Callable[[], tuple[float, float]]] = {"evaluate": evaluate, "merge": merge, "load": load}
    rounds = []
    for number in range(args.peer):
        seconds = {
            name: turns[name]() for name in (("evaluate", "merge", "load"), ("merge", "load", "evaluate"))[number % 2]
        }
        row: dict[str, float] = {}
        for i, kind in enumerate(("", ", CPU")):
            row |= {name + kind: seconds[name][i] for name in turns}
            row["evaluate/load" + kind] = seconds["evaluate"][i] / seconds["load"][i]
            row["evaluate/(merge + load)" + kind] = seconds["evaluate"][i] / (seconds["merge"][i] + seconds["load"][i])
        rounds.append(row)
    own, theirs = json.loads(printed["evaluate"])["variants"], json.loads(printed["peer"])
    apart = {
        key: max(abs(v[text][key] - w[text][key]) for v, w in zip(own, theirs, strict=True) for text in TEXTS)
        for key in ("loss", "kl")
    }
    bytes_of_one = size_of(models[0])
    shutil.rmtree(merged)
    return {"rounds": rounds, "spread": {key: spread([r[key] for r in rounds]) for key in rounds[0]}, "apart": apart,
            "merged_bytes": bytes_of_one * len(models)}  # fmt: skip


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every figure, from what the options say."""
    inputs = prepare(args, work)
    variants = 1 + len(variants_of(args))
    tree: dict[str, Any] = {"schema": "streamer.bench-evaluate/1", "machine": machine(), "threads": args.threads, "variants": variants,
                            "sequences": args.sequences, "length": args.length}  # fmt: skip
    tree["profile"] = profile = measure_profile(args, inputs, work)
    tree["seconds_per_row"] = {kind: per_row(profile, kind) for kind in KINDS}
    if inputs.model is not None and not isinstance(inputs.model, Mixture):
        tree["projected"] = project(profile, inputs.model, variants)
    if args.peer:
        tree["peer"] = measure_peer(args, inputs, work)
    if args.double:
        shutil.rmtree(work / "model")
        tree["double"] = measure_profile(args, prepare(args, work, times=2), work)
    return tree


def table(tree: dict[str, Any]) -> str:
    """The result for people."""
    m, profile = tree["machine"], tree["profile"]
    lines = [
        f"{m['cores']} cores ({m['cpu']}), load {profile['load']:.1f}, {m['memory'] / 2**30:.0f} GiB memory, torch {m['torch']}, "
        f"{tree['threads']} threads",
        f"{tree['variants']} variants, two texts of {tree['sequences']} sequences of {tree['length']} tokens: "
        f"{profile['rows']} rows in {profile['passes']} passes of at most {profile['most_rows']}",
        "",
        f"{'a run, and what is forecast':<32}{'base GB':>9}{'anonymous MB':>14}{'forecast':>10}{'s':>9}{'forecast':>10}",
    ]
    for name, run in (("the model", profile), ("twice its layers", tree.get("double"))):
        if run:
            memory, seconds = run["forecast"]["peak_memory_bytes"], run["forecast"]["seconds"]
            lines.append(f"{name:<32}{run['bytes'] / 1e9:>9.2f}{run['anonymous'] / 1e6:>14.0f}{memory / 1e6:>10.0f}"
                         f"{run['seconds']:>9.1f}{seconds:>10.1f}")  # fmt: skip
    cpu = profile["rows"] * tree["seconds_per_row"]["cpu"]
    lines += ["", f"{'where the time goes':<32}{'s':>9}{'CPU s':>9}{'% CPU':>8}"]
    for name, t in sorted(profile["stages"].items(), key=lambda item: (item[0] == START, -item[1]["cpu"])):
        share = "" if name == START else f"{t['cpu'] / cpu:>8.1%}"
        lines.append(f"{name:<32}{t['wall']:>9.2f}{t['cpu']:>9.2f}{share}")
    each = (1e3 * tree["seconds_per_row"][kind] for kind in KINDS)
    lines.append("".join([f"{'ms of the passes for a row':<32}", *(f"{ms:>9.2f}" for ms in each)]))
    for name, p in tree.get("projected", {}).items():
        largest = sorted(p["stages"].items(), key=lambda item: -item[1]["cpu"])[:4]
        lines += [f"{name}, projected: {p['rows']} rows in {p['passes']} passes, {p['wall'] / 3600:.1f} h; "
                  f"{p['cpu'] / 3600:.1f} CPU h of the main thread",
                  "    " + ", ".join(f"{stage} {t['cpu'] / p['cpu']:.1%}" for stage, t in largest)]  # fmt: skip
    if "peer" in tree:
        peer = tree["peer"]
        lines += ["", f"{'against merged models':<28}{'median':>9}{'min':>9}{'max':>9}"]
        lines += [f"{key:<28}{s['median']:>9.2f}{s['min']:>9.2f}{s['max']:>9.2f}" for key, s in peer["spread"].items()]
        lines.append(f"mean losses are {peer['apart']['loss']:.1e} apart at most, divergences {peer['apart']['kl']:.1e}; the merged "
                     f"models take {peer['merged_bytes'] / 1e9:.2f} GB of disk")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "base", metavar="BASE", nargs="?", type=Path, help="measure this model instead of a generated one"
    )
    parser.add_argument("adapter", metavar="ADAPTER", nargs="?", type=Path, help="with this adapter")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where all is written that is removed afterwards (default: the "
                        "system's directory for temporary files)")  # fmt: skip
    parser.add_argument("--method", default=METHODS, metavar="M,M", help=f"of the variants (default: {METHODS})")
    parser.add_argument("--lambda", dest="lambdas", default=LAMBDAS, metavar="L,L", help=f"(default: {LAMBDAS})")
    parser.add_argument("--sequences", type=int, default=2, metavar="N", help="of each text (default: 2)")
    parser.add_argument("--length", type=int, default=64, metavar="N",
                        help="tokens of a sequence (default: 64, so that 8 variants of 2 sequences are 1,024 rows)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of torch (default: 2)")
    parser.add_argument("--double", action="store_true", help="memory for twice the layers as well; not with BASE")
    parser.add_argument("--peer", type=int, default=0, metavar="ROUNDS",
                        help="compare with merged models, so many times (default: 0, not at all)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object; seconds and bytes")
    make_checkpoint.add_file_options(parser)
    make_checkpoint.add_model_options(parser)
    args = parser.parse_args()
    if (args.base is None) != (args.adapter is None):
        parser.error("BASE and ADAPTER come together")
    if args.double and args.base is not None:
        parser.error("--double needs a generated model: leave BASE out")
    if min(args.sequences, args.length) < 2 or args.threads < 1 or args.peer < 0:
        parser.error("--sequences and --length: at least 2; --threads: at least 1; --peer: at least 0")
    with tempfile.TemporaryDirectory(prefix="bench-evaluate-", dir=args.work) as directory:
        tree = measure(args, Path(directory))
    print(json.dumps(tree, indent=1) if args.json else table(tree))


if __name__ == "__main__":
    main()
