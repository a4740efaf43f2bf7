"""Run the numeric tests with many seeds: ``python tests/property/many_seeds.py`` prints what fails, seed by seed.

A test that fails with some seed has found a wrong bound or a bug. Neither is mended by another seed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
UNITS = ("adapters", "detection", "evaluation", "fitting", "linalg", "output", "streaming", "verification", "weights")
NUMERIC = [str(TESTS / path) for path in (*(f"unit/{name}" for name in UNITS), "property/test_gallery.py")]


def main() -> int:
    """Run pytest once for each seed, and fail if a run does."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", default="1-50", help="the first and the last (default: %(default)s)")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after -- (default: the numeric tests)")
    args = parser.parse_args()
    first, last = map(int, args.seeds.split("-"))
    failed = False
    for seed in range(first, last + 1):
        began = time.monotonic()
        options = ["-q", "-m", "not slow", "--seed", str(seed), *(args.pytest or NUMERIC)]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options], stdout=subprocess.PIPE, text=True, check=False
        )
        print(done.stdout if done.returncode else done.stdout.splitlines()[-1])
        print(f"seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
        failed |= done.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
