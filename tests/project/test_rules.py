"""Rules that hold for every module; the layers of imports are import-linter's (pyproject.toml)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "streamer"

EXTRAS = {"completion.py": {"shtab"}}
"""Modules that import an optional dependency, inside a function, and say what to install where it is missing."""


@pytest.mark.parametrize("name", ["streamer", "streamer.cli.main", "streamer.storage.transaction"])
def test_importing_loads_nothing_heavy(name: str) -> None:
    code = f"import sys, {name}; print(*sorted({{'torch', 'numpy', 'scipy', 'tqdm', 'pandas', 'matplotlib'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_only_the_command_line_prints_or_exits() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"print", "exit", "quit"}, f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("sys", "exit"), ("os", "_exit")}, (
                    f"{path.name}:{node.lineno}"
                )


def test_core_dependencies_are_the_four() -> None:
    import tomllib

    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    names = {d.split(">")[0] for d in project["dependencies"]}
    assert names == {"safetensors", "numpy", "scipy", "torch"}
    allowed = names | {"streamer"} | set(sys.stdlib_module_names)
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        # Of what is optional the types are named; it is loaded where it is used (findings_view).
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
        for node in ast.walk(tree):
            roots = []
            if isinstance(node, ast.Import):
                roots = [a.name.split(".")[0] for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                roots = [node.module.split(".")[0]]
            assert set(roots) <= allowed | EXTRAS.get(path.name, set()), f"{path.name}:{node.lineno}"
