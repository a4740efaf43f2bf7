"""Memory and time of `streamer fit`: collecting inputs, solving and correcting, and the pass that measures variants.

    python tools/bench_fit.py --like llama-3-8b --layers 1 --vocab 8192 --length 256 --tokens 4096 --threads 1      real shapes
    python tools/bench_fit.py --hidden 64 --layers 1 --json                                               tiny: does it work?

The text is random tokens: no time depends on what they are.

Memory. A process of each kind, from outside: every 10 ms `RssAnon:` of /proc/PID/status. Beside that of ``inputs`` stands what
`PreparedFit` estimates.

Time. In an instrumented process (see profile_fit.py). With --threads 1 the processor seconds are those of the work itself on a machine
that has other work. ``inputs`` collects the inputs of --tokens, half of either text, solves, and corrects one set; measuring is left out.
Its seconds for a whole model are those here times layers, if one that is known has the same widths.
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
from profile_fit import COLLECTING, CORRECTED, CORRECTING, SOLVING
from shapes import KNOWN, Known

TOOLS = Path(__file__).parent
INPUTS = "inputs"
KIND_NAMES = INPUTS, "measure"
SECONDS = "wall", "cpu"


def generate(args: argparse.Namespace, work: Path) -> tuple[Path, Path, Known, Path]:
    """A model, its adapter, and a text."""
    made, model = make_checkpoint.make_as_asked(work / "model", args)
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


def measure_model(args: argparse.Namespace, work: Path) -> tuple[dict[str, Any], Known]:
    """The passes on a model."""
    base, adapter, model, text = generate(args, work)
    runs = {kind: measure_run(args, work, kind, base, adapter, text) for kind in args.kinds.split(",")}
    out = {"layers": model.layers, "bytes": size_of(base), **runs}
    shutil.rmtree(work / "model")
    return out, model


def project_inputs(run: dict[str, Any], model: Known) -> dict[str, float]:
    """Seconds of collecting, solving and one correction for all layers of the known model that this has the widths of."""
    whole = next((k for k in KNOWN.values() if (k.hidden, k.intermediate) == (model.hidden, model.intermediate)), model)
    stages, times = run["stages"], whole.layers / model.layers
    return {
        kind: times * sum(stages[stage][kind] for stage in (COLLECTING, SOLVING, CORRECTING, CORRECTED))
        for kind in SECONDS
    }


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every figure, from what the options say."""
    tree: dict[str, Any] = {"schema": "streamer.bench-fit/1", "machine": machine(), "threads": args.threads,
                            "sequences": args.sequences, "length": args.length, "tokens": args.tokens}  # fmt: skip
    tree["model"], model = measure_model(args, work)
    if INPUTS in tree["model"]:
        tree["projected_inputs"] = project_inputs(tree["model"][INPUTS], model)
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
    run = tree["model"]
    for kind in filter(run.get, KIND_NAMES):
        one = run[kind]
        estimate = f"{one['estimate'] / 1e6:>10.0f}" if kind == INPUTS else f"{'':>10}"
        lines.append(f"{kind:<34}{run['layers']:>8}{run['bytes'] / 1e9:>9.2f}{one['anonymous'] / 1e6:>14.0f}{estimate}"
                     f"{one['wall']:>9.1f}{one['cpu']:>9.1f}")  # fmt: skip
    if one := run.get(INPUTS):
        lines += ["", f"{'where inputs spends it':<48}{'wall s':>9}{'CPU s':>9}{'% CPU':>8}"]
        for name, t in sorted(one["stages"].items(), key=lambda item: -item[1]["cpu"]):
            lines.append(f"{name:<48}{t['wall']:>9.2f}{t['cpu']:>9.2f}{t['cpu'] / max(one['cpu'], 1e-9):>8.1%}")
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
                        help="that are fitted on (default: 12288, twice 24 sequences of 256)")  # fmt: skip
    parser.add_argument(
        "--kinds",
        default=",".join(KIND_NAMES),
        metavar="K,K",
        help="of passes (default: inputs,measure)",
    )
    parser.add_argument("--max-memory", type=int, metavar="MIB", help="budget of inputs (default: none)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of torch (default: 2)")
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
