"""The line of a dry run."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamer.cli.json_report import dry_run


@pytest.mark.parametrize(("number", "words"), [(1, "1 file; 1 matrix"), (2, "2 files; 2 matrices")])
def test_one_file_and_one_matrix_are_singular(tmp_path: Path, number: int, words: str) -> None:
    tree, line = dry_run("fit", tmp_path / "c", "new", number, number, None, None)
    assert line == f"dry run: would write {tmp_path / 'c'}: {words}"
    assert (tree["files"], tree["matrices"]) == (number, number)
