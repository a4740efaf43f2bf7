"""Run the generated matrix of cases: every model class that transformers registers × what is adapted × kinds of adapters × bases on disk.

python tests/parity/matrix.py                            # the whole; prints the table
python tests/parity/matrix.py --classes 'Llama|Mixtral'  # some classes
python tests/parity/matrix.py --case LlamaForCausalLM/head/lora/tied/file/current --keep /tmp/case

Each case is compared three ways with others: all tensors of `merge` at λ = 1 with PEFT's merge, the logits of the merged directory as
transformers loads it with those of PEFT's model, and decisions with a float64 SVD. It is right, refused (with the reason), wrong (what),
or not made: PEFT or transformers itself cannot. An exception that is no refusal is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

LIMIT = 60
"""Seconds of processor time that a case may take."""

QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|\[[^]]*\]|\d+|/\S+")


def start() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    signal.signal(signal.SIGPROF, _too_long)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"longer than {LIMIT} s of processor time")


def run_class(name: str, number: int, task: str, seed: int) -> list[dict[str, Any]]:
    """The results of a class's cases; one of a class that cannot be built."""
    import zoo
    from matrix_cases import cases_of

    try:
        model = zoo.build(name)
    except Exception as error:
        said = f"transformers, tiny config: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        none = {"status": "not built", "said": said, "seconds": 0.0}
        return [{"case": name, "cls": name, "task": task, **none}]
    return [run_case(case, task, seed) for case in cases_of(name, number, task, model)]


def run_case(case: Any, task: str, seed: int, home: str | None = None) -> dict[str, Any]:
    from matrix_cases import Result, judge

    begun = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        try:
            result = judge(case, Path(home or scratch), seed)
        except Exception as error:  # of the oracle itself
            result = Result(
                "wrong", f"oracle: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return {
        "case": case.name,
        **case.record(),
        "task": task,
        **vars(result),
        "seconds": round(time.process_time() - begun, 2),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Counts by status, task, kind and layout; refusals by reason; all that is wrong."""
    lines = [
        f"{len(results)} cases of {len({r['cls'] for r in results})} classes, {sum(r['seconds'] for r in results):.0f} s of processor time"
    ]
    statuses = ("right", "refused", "wrong", "not made", "not built")
    lines.append(f"{'':28}" + "".join(f"{s:>10}" for s in statuses))
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {"all": {"": results}}
    for key in ("task", "kind", "part", "tied", "layout"):
        by: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for r in results:
            by[str(r.get(key, "-"))].append(r)
        groups[key] = dict(sorted(by.items()))
    for key, by in groups.items():
        for value, members in by.items():
            counts = Counter(m["status"] for m in members)
            lines.append(f"{key + ' ' + value:28}" + "".join(f"{counts[s]:10}" for s in statuses))
    right = [r for r in results if r["status"] == "right"]
    whole = sum(not r["said"] for r in right)
    lines.append(
        f"right: {whole} wholly compared, {len(right) - whole} in part; {sum(not r['matrices'] for r in right)} without a decision"
    )
    lines.append(
        f"decisions: {sum(r.get('directions', 0) for r in results)} directions of {sum(r.get('matrices', 0) for r in results)} matrices"
    )
    for status in ("right", "refused", "not made", "not built"):
        reasons: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for r in results:
            if r["status"] == status and r["said"]:
                reasons[QUOTED.sub("…", r["said"])[:160]].append(r)
        for _, members in sorted(reasons.items(), key=lambda item: -len(item[1])):
            partly = ", in part compared" if status == "right" else ""
            lines.append(
                f"{status}{partly} {len(members)}: {members[0]['said'][:300]}\n    {members[0]['case']}"
            )
    lines += [
        f"wrong: {r['case']}\n    {r['said'][:500]}" for r in results if r["status"] == "wrong"
    ]
    return "\n".join(lines)


def run_all(work: list[tuple[Any, ...]], jobs: int, record: Any) -> Iterable[dict[str, Any]]:
    with ProcessPoolExecutor(jobs, initializer=start) as pool:
        futures = [(item, pool.submit(run_class, *item)) for item in work]
        for item, future in futures:
            try:
                results = future.result()
            except BrokenProcessPool:
                died = {"status": "wrong", "said": "the process died", "seconds": 0.0}
                results = [{"case": item[0], "cls": item[0], "task": item[2], **died}]
            for r in results:
                record.write(json.dumps(r) + "\n")
            record.flush()
            yield from results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--classes", default="", help="a regular expression that a class's name has"
    )
    parser.add_argument("--case", help="one case, by its name")
    parser.add_argument("--keep", help="directory for the one case's base, adapter and output")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--results", type=Path, help="a JSONL of results, which a later run takes up"
    )
    args = parser.parse_args()
    start()
    from matrix_cases import case_of, numbered_classes

    classes = numbered_classes()
    if args.case:
        case = case_of(args.case)
        result = run_case(case, classes[case.cls][1], args.seed, args.keep)
        print(json.dumps(result, indent=1))
        return int(result["status"] == "wrong")
    results: list[dict[str, Any]] = []
    if args.results and args.results.exists():
        results = [json.loads(line) for line in args.results.read_text().splitlines()]
    done = {r["cls"] for r in results}
    work = [
        (n, i, task, args.seed)
        for n, (i, task) in classes.items()
        if re.search(args.classes, n) and n not in done
    ]
    with open(args.results or os.devnull, "a") as record:
        results += run_all(work, args.jobs, record)
    print(table(results))
    return int(any(r["status"] == "wrong" for r in results))


if __name__ == "__main__":
    sys.exit(main())
