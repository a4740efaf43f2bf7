"""Divide a detection into parts, each with its own findings file beside the whole one's path, and join them.

The first of four parts of ``f.safetensors`` is ``f.part-1-of-4.safetensors``: ordinary findings for some of the matrices.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from streamer.detection.findings import Findings, load_findings
from streamer.detection.findings_file import FindingsHead, remove_leftovers
from streamer.detection.options import DetectionOptions
from streamer.errors import FormatError, InputError, MismatchError, MissingInputError, UsageError
from streamer.plan.batch import AdapterBatch
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.storage.files import remove_file
from streamer.units import listed


@dataclass(frozen=True)
class Part:
    """One part of a detection: `number`, from 1, of `count`."""

    number: int
    count: int

    def path(self, whole: Path) -> Path:
        """Return the part's file, given the whole one's."""
        return whole.with_name(f"{whole.stem}.part-{self.number}-of-{self.count}{whole.suffix}")

    def of(self, plan: Plan, options: DetectionOptions) -> Plan:
        """Reduce a plan to the part's matrices.

        Raises
        ------
        UsageError
            If there are fewer matrices than parts.
        """
        return replace(plan, targets=_divided(plan.targets, options, self.count)[self.number - 1])

    def take(
        self, batch: AdapterBatch, paths: Sequence[Path], options: DetectionOptions
    ) -> tuple[AdapterBatch, list[Path]]:
        """Reduce plans and the paths of their findings to the part."""
        plans = tuple(self.of(plan, options) for plan in batch.plans)
        return AdapterBatch(batch.base, plans), [self.path(path) for path in paths]


def _divided(targets: Sequence[Target], options: DetectionOptions, count: int) -> list[tuple[Target, ...]]:
    """Divide targets into parts of about equal cost, each in the given order: assign the costliest first, to the cheapest part."""
    if count > len(targets):
        raise UsageError(f"--part: expected {len(targets)} parts at most, as many as matrices, found {count}")
    costs = [options.cost(target.module.shape) for target in targets]
    work, groups = [0] * count, [list[int]() for _ in range(count)]
    for i in sorted(range(len(targets)), key=lambda i: -costs[i]):
        least = work.index(min(work))
        work[least] += costs[i]
        groups[least].append(i)
    return [tuple(targets[i] for i in sorted(group)) for group in groups]


def finished_parts(plan: Plan, path: Path, options: DetectionOptions) -> list[Findings]:
    """Open the parts of the findings at a path: all of them, or an empty list if no part exists.

    Raises
    ------
    MissingInputError
        If only some parts exist.
    FormatError
        If a part is damaged.
    MismatchError
        If a part has findings for other inputs or options.
    """
    there = _there(path)
    if not there:
        return []
    # If parts with several counts exist, use the complete set, or the one closest to complete.
    count = min(there, key=lambda n: (n - len(there[n]), n))
    missing = [n for n in range(1, count + 1) if n not in there[count]]
    if missing:
        raise MissingInputError(
            f"{path}: parts {listed(map(str, missing))} of {count} are missing; run the same command with "
            f"--part {missing[0]}/{count} and so on, or with --no-resume to detect without the parts",
            Part(missing[0], count).path(path),
        )
    return [_checked(plan, Part(n, count), path, options) for n in range(1, count + 1)]


def remove_parts(plan: Plan, path: Path, options: DetectionOptions) -> None:
    """Remove the parts of findings that are complete at a path; keep parts for other inputs or options."""
    for count, numbers in _there(path).items():
        for number in numbers:
            part = Part(number, count)
            try:
                _checked(plan, part, path, options)
            except (InputError, UsageError):
                continue
            remove_leftovers(part.path(path))
            remove_file(part.path(path))


def _there(path: Path) -> dict[int, set[int]]:
    """List the numbers of the parts beside a path, by count."""
    pattern = re.compile(rf"{re.escape(path.stem)}\.part-([1-9]\d*)-of-([1-9]\d*){re.escape(path.suffix)}")
    found: dict[int, set[int]] = {}
    for other in path.parent.iterdir() if path.parent.is_dir() else ():
        if (match := pattern.fullmatch(other.name)) and int(match[1]) <= int(match[2]):
            found.setdefault(int(match[2]), set()).add(int(match[1]))
    return found


def _checked(plan: Plan, part: Part, path: Path, options: DetectionOptions) -> Findings:
    where, run = part.path(path), f"run the same command with --part {part.number}/{part.count} --overwrite"
    advice = f"{run}, or with --no-resume to detect without the parts"
    try:
        findings = load_findings(where)
    except FormatError as e:
        raise FormatError(f"{where}: is damaged, or not findings that this version reads; {advice}") from e
    targets = part.of(plan, options).targets
    if findings.made_from() != FindingsHead.of(plan, options).digest(target.tensor for target in targets):
        raise MismatchError(f"{where}: holds findings of other inputs or options; {advice}")
    return findings
