"""What is fuzzed: everything that streamer reads and may have come from a download, or from a disk that went bad.

A target takes bytes, puts them where they would stand, and runs the library as a command does. `streamer.errors` may come out of it;
`Trouble` comes out where an answer is wrong without an exception.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fuzz_inputs import (
    CPU,
    NAMES,
    Target,
    Trouble,
    adapter,
    config,
    header,
    index,
    quantized,
    small_job,
)
from helpers import sealed
from learned import make_learned
from mutate import journal_bytes, mutate_journal, mutate_json, mutate_safetensors, records_of

import streamer
from streamer.adapters.finetuned import AdapterPaths
from streamer.cli.tables import evaluation_table, findings_table
from streamer.detection.detect import detect_to_files
from streamer.detection.findings import load_findings
from streamer.detection.options import DetectionOptions
from streamer.evaluation.words import ShellWords
from streamer.events import Event, Monitor
from streamer.methods import UNCHANGED, Method, Paper
from streamer.output.form import Form
from streamer.output.mitigation import Mitigation
from streamer.output.opening import open_mitigations
from streamer.output.write import plan_output, write_outputs
from streamer.plan.plan import AdapterBatch, Plan, make_plan, resident_bytes
from streamer.run import Run

OPTIONS = DetectionOptions(3, 0.5)


HALF = Paper(0.5)


def detect_file(plan: Plan, path: Path, options: DetectionOptions, monitor: Monitor) -> None:
    """Detect into a findings file."""
    batch = AdapterBatch(plan.base, (plan,))
    detect_to_files(batch, [path], options, Run(CPU, monitor=monitor), resident_bytes(batch))


def open_merge(
    base: Path, adapter: Path, method: Method, options: DetectionOptions, findings: Path | None
) -> Mitigation:
    """Open a merge."""
    found = None if findings is None else load_findings(findings)
    (mitigation,) = open_mitigations(
        base, AdapterPaths.of_one(adapter), [found], method, options, Run(CPU)
    )
    return mitigation


def findings(home: Path) -> Target:
    """A findings file: reported, and applied."""
    base, directory = small_job(home)
    path = home / "f.safetensors"
    plan = make_plan(base, directory)
    detect_file(plan, path, OPTIONS, Monitor())
    seeds = [path.read_bytes()]
    path.unlink()
    detect_file(plan, path, DetectionOptions(0.1, 0.9, "dense"), Monitor())

    def run(data: bytes) -> None:
        path.write_bytes(sealed(data))
        found = load_findings(path)
        findings_table(found)
        json.dumps(found.record())
        mitigation = open_merge(base, directory, HALF, found.options, path)
        for target in mitigation.plan.targets:
            mitigation.of(target)

    return Target([*seeds, path.read_bytes()], mutate_safetensors, run)


class _Killed(Exception):
    """Stands for the end of a process."""


def _stop_after(places: int) -> Monitor:
    seen = []

    def stop(event: Event) -> None:
        seen.append(event)
        if len(seen) > places:
            raise _Killed

    return Monitor(stop)


def _prefixes(whole: list[bytes]) -> Iterator[bytes]:
    for n in range(1, len(whole) + 1):
        yield journal_bytes(whole[:n])


def detection_journal(home: Path) -> Target:
    """The journal of an interrupted detection: taken up to the very same findings, or refused."""
    base, directory = small_job(home)
    plan = make_plan(base, directory)
    out = home / "out"
    out.mkdir()
    path = out / "f.safetensors"
    journal = out / ".f.safetensors.journal"
    try:
        detect_file(plan, path, OPTIONS, _stop_after(len(NAMES)))
    except _Killed:
        known = records_of(journal.read_bytes())
    detect_file(plan, path, OPTIONS, Monitor())
    whole = path.read_bytes()

    def run(data: bytes) -> None:
        shutil.rmtree(out)
        out.mkdir()
        journal.write_bytes(data)
        detect_file(plan, path, OPTIONS, Monitor())
        load_findings(path)
        if path.read_bytes() != whole and {*records_of(data)} <= {*known}:
            raise Trouble("other findings than an uninterrupted run's")

    return Target(list(_prefixes(known)), mutate_journal, run)


def record(home: Path) -> Target:
    """The record of a finished output: known, or refused."""
    base, directory = small_job(home)
    mitigation = open_merge(base, directory, UNCHANGED, OPTIONS, None)
    out = home / "out"
    write_outputs([plan_output("merge", mitigation, Form(), out)], Run(CPU, monitor=Monitor()))
    path = out / "streamer.json"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        write_outputs([plan_output("merge", mitigation, Form(), out)], Run(CPU, monitor=Monitor()))
        if path.read_bytes() != data:
            raise Trouble("a finished output was written to")

    return Target([path.read_bytes()], mutate_json, run)


SEQUENCES = 24


def _learned(home: Path) -> dict[str, object]:
    """A base, an adapter and two texts; the keywords of the texts."""
    make_learned(home, SEQUENCES, 16)
    return {
        "general": home / "general.npy",
        "task": home / "task.npy",
        "sequences": SEQUENCES,
        "on_event": lambda _: None,
    }


def input_map(home: Path) -> Target:
    """A map of a base's inputs: read, and applied."""
    texts = _learned(home)
    del texts["task"]
    path = home / "m.map.safetensors"
    streamer.map_inputs(home / "base", path, vectors=2, **texts)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        repr(streamer.load_map(path))
        for _ in streamer.iter_merged(home / "base", home / "adapter", map=path):
            pass

    return Target([path.read_bytes()], mutate_safetensors, run)


def coefficients(home: Path) -> Target:
    """A file of right factors: read, and applied."""
    texts = _learned(home)
    path = home / "c.fit.safetensors"
    streamer.repair_adapter(home / "base", home / "adapter", home / "c", **texts)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        for _ in streamer.iter_merged(home / "base", home / "adapter", coefficients=path):
            pass

    return Target([path.read_bytes()], mutate_safetensors, run)


def evaluation(home: Path) -> Target:
    """The file of an evaluation: read, and shown."""
    path = home / "e.json"
    streamer.evaluate_variants(
        home / "base", home / "adapter", path, methods=["shrink"], lambdas=[0.5], **_learned(home)
    )

    def run(data: bytes) -> None:
        path.write_bytes(data)
        evaluation_table(streamer.load_evaluation(path), ShellWords())

    return Target([path.read_bytes()], mutate_json, run)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "header": header,
    "index": index,
    "config": config,
    "adapter": adapter,
    "quantized": quantized,
    "findings": findings,
    "detection journal": detection_journal,
    "record": record,
    "map": input_map,
    "coefficients": coefficients,
    "evaluation": evaluation,
}
