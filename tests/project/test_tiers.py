"""Folders of tests hold what their names promise, by the syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

from paths import ROOT

TESTS = ROOT / "tests"
NOT_UNIT = {"subprocess", "multiprocessing", "peft", "transformers", "bitsandbytes", "compressed_tensors", "forks"}


def imports(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports anywhere, the modules of `tests/support` that these import among them."""
    found: set[str] = set()
    todo = [path]
    while todo:
        for node in ast.walk(ast.parse(todo.pop().read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            new = {n.split(".")[0] for n in names} - found
            found |= new
            todo += [p for n in new if (p := TESTS / "support" / f"{n}.py").exists()]
    return found


def test_unit_tests_start_no_process_and_load_no_model() -> None:
    files = [TESTS / "conftest.py", *(TESTS / "unit").rglob("*.py")]
    assert {
        f"{p.relative_to(TESTS)}: {', '.join(bad)}" for p in files if (bad := sorted(imports(p) & NOT_UNIT))
    } == set()


def test_unit_tests_would_be_caught() -> None:
    assert imports(TESTS / "faults" / "test_crash.py") >= {"forks", "subprocess", "command_line"}


def test_unit_tests_stand_where_the_package_has_its_folders() -> None:
    folders = {p.name for p in (ROOT / "streamer").iterdir() if (p / "__init__.py").exists()}
    assert {p.name for p in (TESTS / "unit").iterdir() if any(p.rglob("test_*.py"))} - {"test_api.py"} <= folders


def test_every_test_stands_in_a_folder_that_marks_it() -> None:
    assert list(TESTS.glob("test_*.py")) == []
