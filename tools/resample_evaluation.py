"""Count how often an evaluation that stops early suggests what all of its sequences suggest.

    python tools/resample_evaluation.py --run evaluate BASE ADAPTER --general G --task T --sequences 128 -o all.json
    python tools/resample_evaluation.py all.json …

The first line is `streamer evaluate` without its early stop. The second puts each file's sequences in random orders. For each order, the
evaluation reads block after block until its answer is clear, as `streamer evaluate` does, and its suggestion is compared with the
suggestion of all sequences. A line for each file: the number of equal suggestions, the mean share of the sequences read, and other
suggestions, which show what an early stop costs: the divergence that they leave minus what the suggestion of all leaves, in percent of
the adapter's.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from streamer.cli.main import run as run_streamer
from streamer.evaluation import blocks
from streamer.evaluation.evaluate import BLOCK_SEQUENCES, clear
from streamer.evaluation.evaluation import Evaluation, load_evaluation
from streamer.measuring.statistics import MEASURES, SequenceSums
from streamer.streaming.variants import ADAPTER_ROW


def part(sums: SequenceSums, order: Sequence[int]) -> SequenceSums:
    """Take sequences in an order."""
    arrays = {name: getattr(sums, name)[:, order] for name in MEASURES}
    return SequenceSums(sums.tokens[order], **arrays)


def stopped(whole: Evaluation, rng: np.random.Generator) -> tuple[Evaluation, float]:
    """Read blocks of sequences in a random order until the answer is clear; also return the share of the sequences read."""
    counts = [len(sums.tokens) for sums in (whole.general, whole.task)]
    orders = [rng.permutation(count) for count in counts]
    found = whole
    end = 0
    while end < max(counts):
        end += BLOCK_SEQUENCES
        general, task = (
            part(s, o[:end]) for s, o in zip((whole.general, whole.task), orders, strict=True)
        )
        found = replace(whole, general=general, task=task)
        if clear(found):
            break
    return found, min(end, max(counts)) / max(counts)


def main() -> int:
    """Read evaluations, resample, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="*", help="evaluations of `streamer evaluate -o`")
    parser.add_argument(
        "--run",
        nargs=argparse.REMAINDER,
        default=[],
        help="a command of `streamer` to run to the end of its texts",
    )
    parser.add_argument(
        "--times", type=int, default=20, help="orders of each (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.run:
        blocks.KNOWN = 0.0
        sys.argv[1:] = args.run
        return run_streamer()
    rng = np.random.default_rng(args.seed)
    for path in args.files:
        whole = load_evaluation(path)
        names = [variant.name for variant in whole.variants]
        wanted = whole.best().variant
        runs = [stopped(whole, rng) for _ in range(args.times)]
        suggested = [run.best().variant for run, _ in runs]
        adapter = whole.general.kl[ADAPTER_ROW].sum()
        others = Counter(variant for variant in suggested if variant != wanted)
        print(
            f"{path}: {'nothing' if wanted is None else wanted.name}: {args.times - others.total()} of {args.times}, "
            f"{100 * np.mean([read for _, read in runs]):.0f} % of {len(whole.task.tokens)} sequences read"
        )
        for variant, count in others.items():
            if variant is None or wanted is None:
                print(f"    {'nothing' if variant is None else variant.name}: {count}")
                continue
            rows = [whole.general.kl[names.index(one.name)].sum() for one in (variant, wanted)]
            print(
                f"    {variant.name}: {count}, leaves {100 * (rows[0] - rows[1]) / adapter:+.1f} points"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
