"""Memory and time of the passes of `streamer fit`: a gradient pass, the pass that measures a fitted variant, and a fit by inputs.

    python tools/bench_fit.py --like llama-3-8b --layers 2 --double --threads 1     real shapes, and twice the layers
    python tools/bench_fit.py --like llama-3-8b --layers 1 --vocab 8192 --kinds inputs --max-memory 1200
    python tools/bench_fit.py --hidden 64 --layers 1 --json                         tiny: does it work?

The text is random tokens: no time depends on what they are. Coefficients are 0.7 everywhere; the gradient is that of the divergence from
the base.

Memory. A process of each kind, from outside: every 10 ms `RssAnon:` of /proc/PID/status. --double runs a model of twice the layers besides.
Beside it stands what `fitting.fit_memory.gradient_bytes` estimates.

Time. Two gradient passes in an instrumented process (see profile_fit.py): the first runs the base, too, the second finds its last hidden
states in a file. With --threads 1 the processor seconds are those of the work itself on a machine that has other work.

Projection, of a Llama. The second pass' seconds as they grow with what they depend on: products and the rest with tokens and the layers'
weights, reading with chunks and weights, the head with its own. The text is --tokens long, which go in chunks of `fitting.fit_memory.ROWS`.

A fit by inputs collects the inputs of --tokens, half of either text, solves, and corrects one set. Its seconds for a whole model are
those here times layers, if one that is known has the same widths. Measuring is left out, as it is of the gradient's.

On paper, for one GPU. Multiplications of a pass, of layers three times (forward, again, backward), of the head four times (for the sum over
the vocabulary, for the gradient, the reference's, backward), at --tflops; and the weights read for each at --read GB/s; whichever is
slower.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import make_checkpoint
import numpy as np
from measure import machine, size_of, watched
from profile_fit import COLLECTING, CORRECTED, CORRECTING, HEAD, PRODUCTS, READING, SOFTMAX, SOLVING
from shapes import KNOWN, Known, Mixture

from streamer.fitting.fit_memory import ROWS

TOOLS = Path(__file__).parent
KIND_NAMES = "gradient", "measure"
INPUTS = "inputs"
PROJECTED = "llama-3-8b", "llama-3-70b"
SECONDS = "wall", "cpu"
LAYER_PRODUCTS, HEAD_PRODUCTS = 3, 4


def weights_of(model: Known) -> tuple[int, int]:
    """Weights of all layers' matrices, and of the head."""
    return sum(m * n for m, n in model.matrices.values()), model.vocab * model.hidden


def generate(args: argparse.Namespace, work: Path, times: int = 1) -> tuple[Path, Path, Known, Path]:
    """A model with so many times the layers, its adapter, and a text."""
    made, model = make_checkpoint.make_as_asked(work / "model", args, times)
    text = work / "text.npy"
    np.save(text, np.random.default_rng(args.seed).integers(model.vocab, size=(args.sequences, args.length)))
    return made.base, made.adapter, model, text


def measure_run(
    args: argparse.Namespace, work: Path, kind: str, base: Path, adapter: Path, text: Path
) -> dict[str, Any]:
    """One instrumented process of a kind, and its peak memory."""
    request = {"base": str(base), "adapter": str(adapter), "text": str(text), "threads": args.threads, "kind": kind,
               "directory": str(work), "tokens": args.tokens, "max_memory": args.max_memory and args.max_memory << 20}  # fmt: skip
    (work / "request.json").write_text(json.dumps(request))
    peak = watched(
        [sys.executable, *map(str, (TOOLS / "profile_fit.py", work / "request.json", work / "profile.json"))]
    )
    return {"anonymous": peak.anonymous, "hwm": peak.hwm, **json.loads((work / "profile.json").read_text())}


def measure_model(args: argparse.Namespace, work: Path, times: int = 1) -> tuple[dict[str, Any], Known]:
    """The passes on a model; of one with more layers, which is measured for its memory, gradient passes alone."""
    base, adapter, model, text = generate(args, work, times)
    kinds = args.kinds.split(",") if times == 1 else KIND_NAMES[:1]
    runs = {kind: measure_run(args, work, kind, base, adapter, text) for kind in kinds}
    out = {"layers": model.layers, "bytes": size_of(base), **runs}
    shutil.rmtree(work / "model")
    return out, model


def project(args: argparse.Namespace, run: dict[str, Any], model: Known) -> dict[str, dict[str, Any]]:
    """Seconds that a gradient pass of whole models takes, from one of this, and on paper; see the module's docstring."""
    rows, chunks = args.tokens / (args.sequences * args.length), -(-args.tokens // ROWS)
    layers, head = weights_of(model)
    out = {}
    for name in PROJECTED:
        here = weights_of(KNOWN[name])
        layer_growth, head_growth = here[0] / layers, here[1] / head
        growth = {
            READING: chunks * layer_growth, HEAD + PRODUCTS: rows * head_growth, HEAD + READING: chunks * head_growth,
            SOFTMAX: rows * KNOWN[name].vocab / model.vocab,
        }  # fmt: skip
        stages = run["gradient"]["passes"][1]["stages"]
        seconds = {
            kind: sum(t[kind] * growth.get(stage, rows * layer_growth) for stage, t in stages.items())
            for kind in SECONDS
        }
        products = 2.0 * args.tokens * (LAYER_PRODUCTS * here[0] + HEAD_PRODUCTS * here[1])
        read = 2.0 * chunks * (LAYER_PRODUCTS * here[0] + HEAD_PRODUCTS * here[1])
        paper = {"products": products / (1e12 * args.tflops), "read": read / (1e9 * args.read)}
        out[name] = {**seconds, "chunks": chunks, "gpu": {**paper, "seconds": max(paper.values())}}
    return out


def project_inputs(run: dict[str, Any], model: Known) -> dict[str, float]:
    """Seconds of collecting, solving and one correction for all layers of the known model that this has the widths of."""
    whole = next((k for k in KNOWN.values() if (k.hidden, k.intermediate) == (model.hidden, model.intermediate)), model)
    stages, times = run["passes"][0]["stages"], whole.layers / model.layers
    return {
        kind: times * sum(stages[stage][kind] for stage in (COLLECTING, SOLVING, CORRECTING, CORRECTED))
        for kind in SECONDS
    }


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every figure, from what the options say."""
    tree: dict[str, Any] = {"schema": "streamer.bench-fit/1", "machine": machine(), "threads": args.threads,
                            "sequences": args.sequences, "length": args.length, "tokens": args.tokens, "tflops": args.tflops,
                            "read": args.read}  # fmt: skip
    tree["model"], model = measure_model(args, work)
    if not isinstance(model, Mixture) and "gradient" in tree["model"]:
        tree["projected"] = project(args, tree["model"], model)
    if INPUTS in tree["model"]:
        tree["projected_inputs"] = project_inputs(tree["model"][INPUTS], model)
    if args.double:
        tree["double"], _ = measure_model(args, work, times=2)
    return tree


def table(tree: dict[str, Any]) -> str:
    """The result for people."""
    m = tree["machine"]
    lines = [
        f"{m['cores']} cores ({m['cpu']}), {m['memory'] / 2**30:.0f} GiB memory, torch {m['torch']}, {tree['threads']} threads; "
        f"{tree['sequences']} sequences of {tree['length']} tokens",
        "",
        f"{'passes':<34}{'layers':>8}{'base GB':>9}{'anonymous MB':>14}{'estimate':>10}{'wall s':>9}{'CPU s':>9}",
    ]
    for run in filter(None, (tree["model"], tree.get("double"))):
        for kind in (*KIND_NAMES, INPUTS):
            for number, one in enumerate(run.get(kind, {}).get("passes", ())):
                name = f"{kind}, the base too" if kind == "gradient" and number == 0 else kind
                estimate = f"{run[kind]['estimate'] / 1e6:>10.0f}" if kind != "measure" else f"{'':>10}"
                lines.append(f"{name:<34}{run['layers']:>8}{run['bytes'] / 1e9:>9.2f}{run[kind]['anonymous'] / 1e6:>14.0f}{estimate}"
                             f"{one['wall']:>9.1f}{one['cpu']:>9.1f}")  # fmt: skip
    for kind in ("gradient", INPUTS):
        if kind not in tree["model"]:
            continue
        one = tree["model"][kind]["passes"][-1]
        lines += ["", f"{f'where {kind} spends it':<48}{'wall s':>9}{'CPU s':>9}{'% CPU':>8}"]
        for name, t in sorted(one["stages"].items(), key=lambda item: -item[1]["cpu"]):
            lines.append(f"{name:<48}{t['wall']:>9.2f}{t['cpu']:>9.2f}{t['cpu'] / max(one['cpu'], 1e-9):>8.1%}")
    for name, p in tree.get("projected", {}).items():
        gpu = p["gpu"]
        lines.append(
            f"{name}, a gradient pass over {tree['tokens']} tokens in {p['chunks']} chunks: {p['cpu'] / 3600:.1f} CPU h; on paper "
            f"{gpu['seconds'] / 60:.1f} min with a GPU of {tree['tflops']:g} TFLOP/s, weights read at {tree['read']:g} GB/s"
        )
    if "projected_inputs" in tree:
        lines.append(
            f"all layers, collecting, solving and one correction: {tree['projected_inputs']['cpu'] / 3600:.1f} CPU h"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, metavar="DIR", help="where all is written that is removed afterwards (default: the "
                        "system's directory for temporary files)")  # fmt: skip
    parser.add_argument("--sequences", type=int, default=2, metavar="N", help="that run together (default: 2)")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens of a sequence (default: 128)")
    parser.add_argument("--tokens", type=int, default=12288, metavar="N",
                        help="of the text of the projection (default: 12288, twice 24 sequences of 256)")  # fmt: skip
    parser.add_argument(
        "--kinds",
        default=",".join(KIND_NAMES),
        metavar="K,K",
        help="of passes (default: gradient,measure); inputs: a fit by inputs",
    )
    parser.add_argument("--max-memory", type=int, metavar="MIB", help="budget of a fit by inputs (default: none)")
    parser.add_argument("--tflops", type=float, default=100, help="of a GPU's bf16 products, on paper (default: 100)")
    parser.add_argument("--read", type=float, default=5, help="GB/s of reading weights, on paper (default: 5)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of torch (default: 2)")
    parser.add_argument("--double", action="store_true", help="memory for twice the layers as well")
    parser.add_argument("--json", action="store_true", help="print one JSON object; seconds and bytes")
    make_checkpoint.add_file_options(parser)
    make_checkpoint.add_model_options(parser)
    args = parser.parse_args()
    if min(args.sequences, args.length) < 2 or args.threads < 1:
        parser.error("--sequences and --length: at least 2; --threads: at least 1")
    with tempfile.TemporaryDirectory(prefix="bench-fit-", dir=args.work) as directory:
        tree = measure(args, Path(directory))
    print(json.dumps(tree, indent=1) if args.json else table(tree))


if __name__ == "__main__":
    main()
