"""The table of findings says what is open, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import streamer
from streamer.cli.tables import findings_table


@pytest.mark.parametrize(
    ("precision", "certified", "decided", "reason"),
    [
        ("float32", True, "dense", False),
        ("float64", True, "dense, float64", False),
        ("float64", False, "dense, float64, open", False),
        ("float32", False, "dense, open", True),
        (None, False, "dense, open", False),  # an earlier version's
    ],
)
def test_who_decided_and_what_more_memory_would_settle(
    job: tuple[Path, Path], precision: str | None, certified: bool, decided: str, reason: bool
) -> None:
    found = streamer.detect_intruder_dimensions(*job)
    first, *rest = found.matrices
    changed = replace(first, detection=replace(first.detection, precision=precision, certified=certified))
    text = findings_table(replace(found, matrices=(changed, *rest)))
    rows = [line for line in text.splitlines() if first.tensor in line and "not certified" not in line]
    assert ("decided" in text) == (decided != "dense")
    assert [row.rstrip().endswith(decided) for row in rows] == [decided != "dense"]
    assert (f"not certified: {first.tensor}" in text) == (not certified)
    assert ("1 of these for want of memory: with a larger --max-memory" in text) == reason
