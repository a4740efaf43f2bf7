"""Every random number of the tests depends on the seed of the run."""

import ast
import re

import pytest
import seeds
from paths import ROOT

TESTS = ROOT / "tests"
OTHERS = {"seeds.py", "fuzz.py", "survival.py", "survival_servers.py"}
"""`seeds` itself, and scripts that take a seed of their own."""


def test_every_seed_varies_with_the_run() -> None:
    fixed = []
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path.name not in OTHERS else ():
            if isinstance(node, ast.Call) and re.fullmatch(
                r"(.*\.)?(manual_seed|default_rng|RandomState|Random)", ast.unparse(node.func)
            ):
                seed = node.args[0] if node.args else ast.Constant(None)
                if not re.match(
                    r"vary\(|RepairOptions\.seed", ast.unparse(seed)
                ):  # or what the fit draws is drawn again
                    fixed.append(f"{path.relative_to(TESTS)}:{node.lineno}")
    assert fixed == []


def test_a_failure_prints_the_seed_of_the_run(request: pytest.FixtureRequest) -> None:
    failed = pytest.CallInfo.from_call(lambda: pytest.fail("as told"), "call")
    report = request.node.ihook.pytest_runtest_makereport(item=request.node, call=failed)
    assert ("seed", f"--seed {seeds.RUN} draws the same random numbers") in report.sections
