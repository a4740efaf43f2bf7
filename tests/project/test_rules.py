"""Rules that hold for every module, the package and the folders of tests; the layers of imports are import-linter's (pyproject.toml)."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from command_line import ENV
from paths import ROOT

import streamer

PACKAGE = ROOT / "streamer"

EXTRAS = {
    "parser.py": {"shtab"},
    "lm_eval.py": {"lm_eval"},
    "skeleton.py": {"transformers"},
}
"""Modules that import an optional dependency, inside a function, and say what to install where it is missing (but lm_eval.py)."""


def _extras(path: Path) -> set[str]:
    """Optional packages that a module may import; streamer/peft.py needs PEFT, and what comes with it."""
    return {"peft", "huggingface_hub"} if path.name == "peft.py" else EXTRAS.get(path.name, set())


HEAVY = "'torch', 'numpy', 'scipy', 'safetensors', 'tqdm', 'pandas', 'matplotlib'"


@pytest.mark.parametrize(
    "code",
    [
        "streamer",
        "streamer.storage.transaction",
        "streamer.cli.main as m; m.build_parser().format_help()",
    ],
)
def test_importing_loads_nothing_heavy(code: str) -> None:
    """So that --help and a wrong option answer at once."""
    code = f"import sys, {code}; print(*sorted({{{HEAVY}}} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=True
    )
    assert (done.stdout, done.stderr) == ("\n", "")


def test_only_the_command_line_prints_or_exits() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"print", "exit", "quit"}, f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                worker = (
                    path.name == "executors.py" and node.attr == "_exit"
                )  # ends a worker's process, not the caller's
                ends = {("sys", "exit"), ("os", "_exit")}
                assert worker or (node.value.id, node.attr) not in ends, (
                    f"{path.name}:{node.lineno}"
                )


def test_core_dependencies_are_the_five() -> None:
    names = {d.split(">")[0] for d in PROJECT["dependencies"]}
    assert names == {"safetensors", "numpy", "scipy", "torch", "tqdm"}
    allowed = names | {"streamer"} | set(sys.stdlib_module_names)
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        optional = _extras(path)
        # Of what is optional the types are named; it is loaded where it is used.
        tree.body = [
            n
            for n in tree.body
            if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
        ]
        for node in ast.walk(tree):
            roots = []
            if isinstance(node, ast.Import):
                roots = [a.name.split(".")[0] for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                roots = [node.module.split(".")[0]]
            assert set(roots) <= allowed | optional, f"{path.name}:{node.lineno}"


BUDGET = 244_820
"""Tokens of the package's code, as `tools/count_tokens.py` counts them. Every change that takes some out lowers it; none raises it."""


def test_the_package_keeps_its_budget_of_tokens() -> None:
    from tools.count_tokens import total

    tokens = total(PACKAGE).tokens
    assert tokens <= BUDGET, f"{tokens}: take out what no longer pays"
    assert tokens > 0.99 * BUDGET, f"{tokens}: lower the budget"


def test_every_data_file_is_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["streamer"]
    paths = {
        path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert paths == {
        path for pattern in patterns for path in PACKAGE.glob(pattern) if path.is_file()
    }


def test_functions_take_eight_parameters_at_most() -> None:
    wide = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            a = node.args
            names = [
                p.arg
                for p in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg)
                if p is not None
            ]
            if len(names) - (names[:1] in (["self"], ["cls"])) > 8:
                wide.add(f"{path.name}:{node.lineno}: {node.name}")
    assert wide == set()


def test_no_file_is_read_or_written_in_the_encoding_of_the_locale() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and not any(
                keyword.arg == "encoding" for keyword in node.keywords
            ):
                name = ast.unparse(node.func)
                given = [ast.unparse(arg) for arg in node.args]
                text = name == "open" and not any("b" in mode for mode in given[1:2])
                if text or (
                    name.endswith((".read_text", ".write_text"))
                    and len(given) < 1 + name.endswith(".write_text")
                ):
                    found.add(f"{path.name}:{node.lineno}")
    assert found == set()


def test_no_imports_go_in_a_circle_within_a_folder() -> None:
    """Imports inside of functions, and those that only name types, count."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    left: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {
                    full if (full := f"{node.module}.{a.name}") in modules else node.module
                    for a in node.names
                }
            elif isinstance(node, ast.Import):
                found |= {a.name for a in node.names}
        folder = name.rpartition(".")[0]
        left[name] = {
            m for m in found & modules.keys() if m.rpartition(".")[0] == folder and m != name
        }
    # A module goes if all that it imports has gone, or all that import it; what stays is in a circle, or between two.
    while free := [
        m
        for m, own in left.items()
        if not own & left.keys() or not any(m in o for o in left.values())
    ]:
        for name in free:
            del left[name]
    assert not left


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# What is declared -------------------------------------------------------------------------------------------------------


def test_versions_agree() -> None:
    version = streamer.__version__
    assert PROJECT["version"] == version
    assert re.search(
        rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE
    )
    assert re.search(
        rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )


def test_the_source_distribution_is_told_of_every_file() -> None:
    """Of what is tracked, `MANIFEST.in`, the package and pip's own rules name all but what only a checkout needs."""
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    grafted = {word for kind, *words in lines for word in words if kind == "graft"}
    included = {word for kind, *words in lines for word in words if kind == "include"}
    always = {"README.md", "LICENSE", "pyproject.toml", "MANIFEST.in", "streamer", ".gitignore"}
    always.add(".git-blame-ignore-revs")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\n")
    tops = {name.split("/")[0] for name in tracked if name}
    assert tops <= grafted | included | always


TESTS = ROOT / "tests"
NOT_UNIT = {
    "subprocess",
    "multiprocessing",
    "peft",
    "transformers",
    "bitsandbytes",
    "compressed_tensors",
    "forks",
}


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
        f"{p.relative_to(TESTS)}: {', '.join(bad)}"
        for p in files
        if (bad := sorted(imports(p) & NOT_UNIT))
    } == set()


def test_unit_tests_would_be_caught() -> None:
    assert imports(TESTS / "faults" / "test_crash.py") >= {"forks", "subprocess", "command_line"}


def test_unit_tests_stand_where_the_package_has_its_folders() -> None:
    folders = {p.name for p in (ROOT / "streamer").iterdir() if (p / "__init__.py").exists()}
    assert {p.name for p in (TESTS / "unit").iterdir() if any(p.rglob("test_*.py"))} - {
        "test_api.py"
    } <= folders


def test_every_test_stands_in_a_folder_that_marks_it() -> None:
    assert list(TESTS.glob("test_*.py")) == []
