"""Fuzz all that is read: ``python tests/property/fuzz.py --minutes 30`` prints executions and crashes for each target.

A crash is an exception outside `streamer.errors`, a message of more than one line, an answer other than the safetensors library's or an
uninterrupted run's, more than five seconds of computing, more than a gigabyte, or the end of the process. An input whose failure has a
traceback or words not seen before is kept and changed further: that leads into the depths of a parser without counting lines.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import pickle
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from fuzz_targets import TARGETS, Target

from streamer.errors import StreamerError

SECONDS = 5
MEMORY = 1 << 30
LONGEST = 200_000
"""Bytes of an input: longer ones are dropped."""

CORPUS = 500
"""Inputs that are kept."""


class Hang(BaseException):
    """Raised by the timer; not an `Exception`, so that nothing catches it."""


@dataclass
class Crash:
    """What came out, and an input that brings it about."""

    what: str
    data: bytes


@dataclass
class Result:
    """What became of a target."""

    executions: int = 0
    refused: int = 0
    kinds: int = 0
    crashes: dict[Hashable, Crash] = field(default_factory=dict)


def where(e: BaseException) -> tuple[Hashable, ...]:
    """The type of an exception and the lines that it passed through, those of the one behind it too."""
    found: list[Hashable] = []
    at: BaseException | None = e
    while at is not None:
        # Not extract_tb, which asks the disk for each file: that was a third of the time.
        frames = (
            (frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(at.__traceback__)
        )
        found += [
            type(at).__name__,
            *((os.path.basename(file), line) for file, line in frames if file != __file__),
        ]
        at = at.__cause__ or at.__context__
    return tuple(found)


def kind(e: BaseException) -> tuple[Hashable, ...]:
    """What tells an outcome from others: where it came from, and for an error of streamer's its words but for what it quotes."""
    words = (
        re.sub(r"'[^']*'|\"[^\"]*\"|\[.*\]|\{.*\}|/\S*|\d+", "", str(e))
        if isinstance(e, StreamerError)
        else ""
    )
    return where(e), words[:200]


def fault(e: BaseException) -> str:
    """What is wrong with an exception that came out; nothing if it is one of streamer's, in one line."""
    if not isinstance(e, StreamerError):
        return f"{type(e).__name__}: {str(e)[:300]}"
    text = str(e)
    if any(c in text for c in "\n\r\x1b\0"):
        return f"a message of more than a line: {text[:300]!r}"
    if len(text) > 4000:
        return f"a message of {len(text)} characters: {text[:300]}"
    return f"an error of our own: {text[:300]}" if "please report this" in text else ""


def attempt(target: Target, data: bytes) -> BaseException | None:
    """Run an input; what came out."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.run(data)
    except (Exception, Hang) as e:
        return e
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def prepare_process() -> None:
    """Time and memory end with an exception."""

    def hang(signum: int, frame: object) -> None:
        raise Hang(f"over {SECONDS} seconds")

    signal.signal(signal.SIGPROF, hang)
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.RLIM_INFINITY))
    torch.set_num_threads(1)


def fuzz(
    target: Target, seed: str, seconds: float, executions: int, current: mmap.mmap | None = None
) -> Result:
    """Run changed inputs for so many seconds of computing, or so often; `current` holds the one in hand, for who finds us dead."""
    rng = random.Random(seed)
    result = Result()
    seen = set()
    until = time.process_time() + seconds
    corpus = list(target.seeds)
    for data in corpus:
        if e := attempt(target, data):
            seen.add(kind(e))
    while result.executions < executions and time.process_time() < until:
        data = rng.choice(corpus if rng.random() < 0.7 else target.seeds)
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = target.mutate(rng, data, corpus)
        if len(data) > LONGEST:
            continue
        if current is not None:
            current[: len(data) + 8] = len(data).to_bytes(8, "little") + data
        result.executions += 1
        e = attempt(target, data)
        if e is None:
            continue
        result.refused += 1
        if (what := kind(e)) not in seen:
            seen.add(what)
            if len(corpus) < CORPUS:
                corpus.append(data)
            if wrong := fault(e):
                result.crashes.setdefault(where(e), Crash(wrong + _last_line(e), data))
    result.kinds = len(seen)
    return result


def _last_line(e: BaseException) -> str:
    ours = [f for f in traceback.extract_tb(e.__traceback__) if "streamer" in f.filename]
    return f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""


def in_a_process(name: str, seed: str, seconds: float, executions: int) -> Result:
    """The same in a process of its own, begun again where an input ends it."""
    current = mmap.mmap(-1, LONGEST + 8)
    total = Result()
    for turn in range(10):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(read)
                # In memory where there is such a place: what fsync costs is no concern here.
                place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
                with tempfile.TemporaryDirectory(prefix="fuzz-", dir=place) as home:
                    target = TARGETS[name](Path(home))
                    prepare_process()
                    found = fuzz(target, f"{seed} {turn}", seconds / 2**turn, executions, current)
                with open(write, "wb") as f:
                    f.write(pickle.dumps(found))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(write)
        with open(read, "rb") as f:
            answer = f.read()
        _, status = os.waitpid(pid, 0)
        if answer:
            found = pickle.loads(answer)
            total.executions += found.executions
            total.refused += found.refused
            total.kinds += found.kinds
            total.crashes |= found.crashes
            return total
        ended = os.waitstatus_to_exitcode(status)
        if ended > 0:
            raise RuntimeError(f"{name}: the fuzzer itself failed; its traceback stands above")
        data = bytes(current[8 : 8 + int.from_bytes(current[:8], "little")])
        total.crashes["ended", turn] = Crash(f"the process ended with {ended}", data)
    return total


def main() -> int:
    """Fuzz the targets by turns, print the table, and fail if there was a crash."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=30,
        help="of computing in all, shared equally by the targets",
    )
    parser.add_argument("--executions", type=int, default=1 << 60, help="at most, of each target")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--keep", type=Path, help="directory for the inputs that crash")
    args = parser.parse_args()
    names = args.targets.split(",")
    total = Result()
    print(
        f"{'target':20} {'executions':>12} {'refused':>10} {'kinds of refusal':>17} {'crashes':>8}",
        flush=True,
    )
    for name in names:
        result = in_a_process(name, args.seed, args.minutes * 60 / len(names), args.executions)
        print(
            f"{name:20} {result.executions:12,} {result.refused:10,} {result.kinds:17,} {len(result.crashes):8,}",
            flush=True,
        )
        for crash in result.crashes.values():
            print(f"    {crash.what}")
            if args.keep:
                args.keep.mkdir(parents=True, exist_ok=True)
                kept = (
                    args.keep
                    / f"{name.replace(' ', '-')}-{hashlib.sha256(crash.data).hexdigest()[:12]}"
                )
                kept.write_bytes(crash.data)
                print(f"        {kept}")
        total.executions += result.executions
        total.refused += result.refused
        total.kinds += result.kinds
        total.crashes |= {(name, key): crash for key, crash in result.crashes.items()}
    print(
        f"{'all':20} {total.executions:12,} {total.refused:10,} {total.kinds:17,} {len(total.crashes):8,}"
    )
    return bool(total.crashes)


if __name__ == "__main__":
    sys.exit(main())
