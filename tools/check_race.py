"""How often a race suggests what a run of all variants on all sequences does, and what it costs.

    python tools/check_race.py EVALUATION.json ...        of `streamer evaluate --no-race`, with shrinks at several λ

The sequences of each text are drawn anew, with replacement, --resamples times; every time, the steps of an evaluation run with and
without a race on the sums of the drawn ones. For a shrink at any λ a polynomial through the file's shrinks answers, sequence by sequence.
A suggestion is the same if its reason and variant are; of shrinks, which each run places for itself, the method is enough.

A cost of 1 is that of one variant on all sequences of all texts. Of the runs of all variants it has what they take to place a shrink.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import KroghInterpolator

from streamer.evaluation.evaluation import Evaluation, load_evaluation
from streamer.evaluation.options import EvaluationOptions
from streamer.evaluation.race import WHOLE, rounds_of
from streamer.evaluation.steps import Request, Sums, Wanted, answered, evaluation_steps
from streamer.evaluation.suggestion import Suggestion
from streamer.measuring.sequences import of_eighths
from streamer.measuring.statistics import MEASURES, Floats, SequenceSums
from streamer.measuring.variants import ADAPTER_ROW, BASE_ROW, EvaluatedVariant
from streamer.methods import MethodName, Shrink
from streamer.streaming.variants import Variant

APART = 0.02
"""Difference of the λ of shrinks below which a polynomial takes one of them."""


@dataclass(frozen=True)
class Stored(Variant):
    """A variant of which the file has the sums."""

    own: EvaluatedVariant

    @property
    def method(self) -> MethodName | None:
        """Its method."""
        return self.own.method

    @property
    def mitigation_lambda(self) -> float | None:
        """Its λ."""
        return self.own.mitigation_lambda

    @property
    def keep(self) -> float | None:
        """The share that its coefficients keep."""
        return self.own.keep


class World:
    """Sums on sequences that were drawn, which answer the requests of an evaluation's steps."""

    def __init__(self, evaluation: Evaluation, rng: np.random.Generator) -> None:
        self.variants, self.cost = evaluation.variants, 0.0
        self.sums = {}
        for text, own in evaluation.sums.items():
            drawn = rng.integers(len(own.tokens), size=len(own.tokens))
            self.sums[text] = SequenceSums(own.tokens[drawn], **{m: getattr(own, m)[:, drawn] for m in MEASURES})
        nodes = [
            (0.0, BASE_ROW),
            *((v.mitigation_lambda or 0.0, i) for i, v in enumerate(self.variants) if v.method == Shrink.name),
        ]
        nodes = sorted([*nodes, (1.0, ADAPTER_ROW)], reverse=True)
        self.nodes = [node for k, node in enumerate(nodes) if k == 0 or nodes[k - 1][0] - node[0] > APART]

    def run(
        self, variants: Sequence[Variant], keep: float, rounds: Sequence[range], facts: Mapping[str, Any]
    ) -> Evaluation:
        """Run the steps of an evaluation, and count what they cost."""
        self.cost = 0.0
        return answered(evaluation_steps(Wanted(variants, keep, rounds), None, facts), self.answer)

    def answer(self, request: Request) -> Sums:
        """Give the sums of a request."""
        weights, out = np.array([self.weights(EvaluatedVariant.of(v)) for v in request.variants]), {}
        for text, own in self.sums.items():
            there = of_eighths(len(own.tokens), request.eighths)
            arrays = {name: np.full((len(weights), len(own.tokens)), np.nan) for name in MEASURES}
            for name, array in arrays.items():
                array[:, there] = weights @ getattr(own, name)[:, there]
            out[text] = SequenceSums(own.tokens, **arrays)
            self.cost += len(weights) * len(there) / len(own.tokens) / len(self.sums)
        return out

    def weights(self, variant: EvaluatedVariant) -> Floats:
        """Say which variants of the file make one."""
        unit = np.eye(len(self.variants))
        if variant in self.variants:
            return np.asarray(unit[self.variants.index(variant)])
        polynomial = KroghInterpolator([lam for lam, _ in self.nodes], unit[[row for _, row in self.nodes]])
        return np.asarray(polynomial(variant.mitigation_lambda))


def same(one: Suggestion, other: Suggestion) -> bool:
    """Test whether two suggestions are the same."""
    names = [
        s.variant and (s.variant.method if s.variant.method == Shrink.name else s.variant.name) for s in (one, other)
    ]
    return one.reason == other.reason and names[0] == names[1]


def check(evaluation: Evaluation, args: argparse.Namespace) -> tuple[float, list[float], list[float]]:
    """Compare both over resamples: how often they suggest the same, and what each cost."""
    rng = np.random.default_rng(args.seed)
    stored = [Stored(own.name, None, own) for own in evaluation.variants]
    options = EvaluationOptions(keep=args.keep)
    grid = [Variant.of(Shrink(lam)) for lam in options.lambdas]
    rest = [v for v in stored if v.method != Shrink.name]
    of_race = [v for v in options.variants if v.method == Shrink.name]
    agreed, race, whole = 0, [], []
    for _ in range(args.resamples):
        world = World(evaluation, rng)
        rounds = rounds_of([len(own.tokens) for own in world.sums.values()])
        found = [world.run([*rest, *grid], args.keep, WHOLE, evaluation.facts).best(args.keep)]
        whole.append(world.cost)
        found.append(world.run([*rest, *of_race], args.keep, rounds, evaluation.facts).best(args.keep))
        race.append(world.cost)
        agreed += same(*found)
    return agreed / args.resamples, race, whole


def main() -> int:
    """Check each file, and print a table; the exit code is 1 if a suggestion is the same less often than --least."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", metavar="EVALUATION", nargs="+", type=Path)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--keep", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=0.95, help="share of the resamples (default: %(default)s)")
    args = parser.parse_args()
    print(f"{'evaluation':<28}{'variants':>9}{'same':>8}{'race costs':>12}{'of 20':>8}{'all cost':>10}")
    least = 1.0
    for path in args.evaluations:
        evaluation = load_evaluation(path)
        agreed, race, whole = check(evaluation, args)
        least = min(least, agreed)
        print(f"{path.stem:<28}{len(evaluation.variants):>9}{agreed:>8.1%}{np.mean(race):>12.2f}{np.quantile(race, 0.95):>8.2f}"
              f"{np.mean(whole):>10.2f}", flush=True)  # fmt: skip
    return int(least < args.least)


if __name__ == "__main__":
    sys.exit(main())
