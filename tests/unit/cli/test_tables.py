"""The table of findings says what is open, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import streamer
from streamer.cli.tables import findings_table


@pytest.mark.parametrize(
    ("solver", "precision", "certified", "decided", "reason"),
    [
        ("dense", "float32", True, "dense", False),
        ("dense", "float64", True, "dense, float64", False),
        ("dense", "float64", False, "dense, float64, open", False),
        ("dense", "float32", False, "dense, open", True),
        ("certified", "float32", False, "certified, open", True),
        ("certified", "float64", False, "certified, float64, open", True),  # no room for a full SVD
    ],
)
def test_who_decided_and_what_more_memory_may_settle(
    job: tuple[Path, Path], solver: str, precision: str, certified: bool, decided: str, reason: bool
) -> None:
    found = streamer.detect_intruder_dimensions(*job)
    # Whatever this seed's own matrices took to decide: one next to the threshold takes float64.
    first, *rest = (
        replace(m, detection=replace(m.detection, solver="dense", precision="float32", certified=True))
        for m in found.matrices
    )
    changed = replace(
        first, detection=replace(first.detection, solver=solver, precision=precision, certified=certified)
    )
    text = findings_table(replace(found, matrices=(changed, *rest)))
    rows = [line for line in text.splitlines() if first.tensor in line and "not certified" not in line]
    assert ("decided" in text) == (decided != "dense")
    assert [row.rstrip().endswith(decided) for row in rows] == [decided != "dense"]
    assert (f"not certified: {first.tensor}" in text) == (not certified)
    assert ("1 of these for lack of memory: with a larger --max-memory" in text) == reason


def test_memory_settles_no_matrix_whose_full_svds_are_not_repeated(job: tuple[Path, Path]) -> None:
    found = streamer.detect_intruder_dimensions(*job)
    first = found.matrices[0]
    large = replace(
        first, shape=(4096, 14336), detection=replace(first.detection, precision="float32", certified=False)
    )
    assert "want of memory" not in findings_table(replace(found, matrices=(large,)))
