"""The rules of the house: imports point down, the two wings do not know each other, only the command line prints."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "streamer"

# Each name may import from floors below its own; modules on one floor only as listed in WITHIN.
FLOORS = [
    {"errors", "__init__"},
    {"events", "units", "identities"},
    {"storage", "linalg", "patterns"},
    {
        "encodings",
        "kinds",
        "renames",
        "names",
        "provenance",
        "sources",
        "stamps",
        "task_heads",
        "wrapped",
        "scales",
        "dora",
        "methods",
        "modules",
        "carried",
        "adapter",
        "solvers",
        "findings_records",
        "intruders",
        "bases",
    },
    {"targets", "experts", "changes", "tied", "tuned", "support", "plan"},
    {
        "findings_file",
        "findings_view",
        "matrix_finding",
        "findings",
        "findings_writer",
        "staging",
        "merging",
        "merged",
        "budget",
        "side_files",
        "several",
        "pipeline",
    },
    {"records", "figures", "advice", "model_card", "apply", "outputs", "adapted", "converted"},
    {"verification"},
    {"api"},
    {"cli"},
    {"__main__"},
]
WITHIN = [
    ["storage.streams"],
    ["storage.header", "storage.atomic", "storage.place", "storage.absent"],
    ["storage.tensorfile", "storage.old_output"],
    ["storage.checkpoint", "storage.shards"],
    ["storage.output_plan"],
    ["storage.transaction"],
    ["linalg.operators", "linalg.precision"],
    ["linalg.krylov", "linalg.deltas"],
    ["linalg.christoffel"],
    ["linalg.svd", "linalg.overlaps"],
    [
        "encodings",
        "methods",
        "renames",
        "wrapped",
        "scales",
        "dora",
        "solvers",
        "provenance",
        "task_heads",
        "findings_records",
    ],
    ["kinds", "modules"],
    ["bases.weight"],
    ["carried"],
    ["names", "adapter", "intruders"],
    ["sources"],
    ["stamps"],
    ["bases.plain", "bases.below", "bases.scaled", "bases.bnb", "bases.grouped"],
    ["bases.fp8", "bases.mxfp4"],
    ["bases.registry"],
    ["bases.dequantize"],
    ["findings_file", "findings_view"],
    ["matrix_finding"],
    ["targets", "findings", "changes", "support"],
    ["experts", "findings_writer", "tied"],
    ["tuned"],
    ["records"],
    ["plan", "staging", "merging", "figures", "several", "model_card"],
    ["merged", "budget", "side_files"],
    ["pipeline"],
    ["apply"],
    ["adapted", "converted"],
    ["advice"],
    ["outputs"],
    ["verification.result"],
    ["verification.hashing", "verification.tensors"],
    ["verification.record"],
    ["verification.rounding", "verification.formulas", "verification.directory"],
    ["verification.inputs", "verification.spectrum"],
    ["verification.mitigation"],
    ["verification.matrices"],
    ["verification.findings"],
    ["verification.run"],
    ["cli.cores"],
    ["cli.completion", "cli.errors_json", "cli.signals", "cli.layout", "cli.calibration", "cli.verification"],
    ["cli.parser", "cli.progress", "cli.tables", "cli.threads"],
    ["cli.json_events", "cli.forecast", "cli.demo", "cli.summary"],
    ["cli.json_report"],
    ["cli.commands"],
    ["cli.main"],
]
LAZY = {"__init__"}  # resolves its names when they are used


EXTRAS = {"completion.py": {"shtab"}}
"""Modules that import an optional dependency, inside a function, and say what to install where it is missing."""


def floor(module: str) -> int:
    top = module.split(".", maxsplit=1)[0]
    return next(i for i, names in enumerate(FLOORS) if top in names)


def room(module: str) -> int:
    return next((i for i, names in enumerate(WITHIN) if module in names), -1)


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "streamer":
            tail = node.module.removeprefix("streamer").lstrip(".")
            found |= (
                {tail} if tail else {a.name if (PACKAGE / f"{a.name}.py").exists() else "__init__" for a in node.names}
            )
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("streamer.") for a in node.names if a.name.startswith("streamer.")}
    return found


def violations(modules: dict[str, set[str]]) -> list[str]:
    bad = []
    for module, used in modules.items():
        for other in used:
            same_wing = module.split(".")[0] == other.split(".")[0] and "." in module
            if module in LAZY:
                continue
            if {module.split(".")[0], other.split(".")[0]} == {"storage", "linalg"}:
                bad.append(f"{module} imports {other}, from the other wing")
            elif same_wing or floor(module) == floor(other):
                if not 0 <= room(other) < room(module):
                    bad.append(f"{module} imports {other}, which is not below it in its wing or floor")
            elif floor(other) > floor(module):
                bad.append(f"{module} imports {other}, from a floor above")
    return bad


def all_modules() -> dict[str, set[str]]:
    paths = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): imports(path) for name, path in paths.items()}


def test_imports_point_down() -> None:
    assert violations(all_modules()) == []


@pytest.mark.parametrize(
    ("module", "used"),
    [
        ("storage.header", "linalg.operators"),
        ("linalg.svd", "storage.header"),
        ("errors", "storage.atomic"),
        ("storage.header", "storage.shards"),
        ("linalg.operators", "linalg.svd"),
        ("intruders", "pipeline"),
        ("apply", "api"),
        ("adapter", "targets"),
        ("plan", "__main__"),
        ("plan", "records"),
        ("pipeline", "records"),
        ("storage.checkpoint", "findings_records"),
        ("linalg.svd", "linalg.overlaps"),
    ],
)
def test_the_check_can_fail(module: str, used: str) -> None:
    assert len(violations({module: {used}})) == 1


def test_every_module_has_a_floor() -> None:
    for module in all_modules():
        floor(module)


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
