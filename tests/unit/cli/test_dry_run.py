"""The line of a dry run."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamer.api.records import dry_run
from streamer.cli.layout import Screen
from streamer.cli.tables import dry_run_text


@pytest.mark.parametrize(("number", "words"), [(1, "1 file; 1 matrix"), (2, "2 files; 2 matrices")])
def test_one_file_and_one_matrix_are_singular(tmp_path: Path, number: int, words: str) -> None:
    tree = dry_run("fit", tmp_path / "c", "new", number, number, None, None)
    assert dry_run_text(tree, "fit", Screen()) == f"dry run: would write {tmp_path / 'c'}: {words}"
    assert (tree["files"], tree["matrices"]) == (number, number)
