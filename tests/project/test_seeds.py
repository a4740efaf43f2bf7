"""Every random number of the tests depends on the seed of the run, and a failure prints it."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

TESTS = ROOT / "tests"
OTHERS = {"seeds.py", "fuzz.py", "survival.py", "survival_servers.py"}
"""`seeds` itself, and scripts that take a seed of their own."""

DRAWS = """
import random, numpy, pytest, torch
from hypothesis import given, strategies

@pytest.fixture(scope="module")
def shared():
    return random.random(), numpy.random.rand(), torch.rand(1).item()

def test_one(shared):
    print("shared", *shared)

def test_two(shared):
    print("shared", *shared)
    print("own", random.random(), numpy.random.rand(), torch.rand(1).item())
    assert 0

@given(strategies.integers(10**6, 10**9))
def test_three(n):
    print("example", n)
"""


def test_every_seed_varies_with_the_run() -> None:
    fixed = []
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path.name not in OTHERS else ():
            if isinstance(node, ast.Call) and re.fullmatch(
                r"(.*\.)?(manual_seed|default_rng|RandomState|Random)", ast.unparse(node.func)
            ):
                seed = node.args[0] if node.args else ast.Constant(None)
                if not re.match(r"vary\(|FitOptions\.seed", ast.unparse(seed)):  # or what the fit draws is drawn again
                    fixed.append(f"{path.relative_to(TESTS)}:{node.lineno}")
    assert fixed == []


@pytest.fixture
def draws(tmp_path: Path) -> Path:
    (tmp_path / "tests" / "unit").mkdir(parents=True)
    shutil.copy(TESTS / "conftest.py", tmp_path / "tests")
    file = tmp_path / "tests" / "unit" / "test_draws.py"
    file.write_text(DRAWS)
    return file


RUNS = """
import json, pytest, sys
for arguments in json.loads(sys.argv[1]):
    assert pytest.main(arguments) == 1
    print("\f")
"""


def printed(file: Path, *runs: list[str]) -> list[list[str]]:
    """The random numbers that the tests print in each run, and the seed that their failures name."""
    always = ["-q", "-p", "no:cacheprovider", "-rP", "--rootdir", str(file.parents[2]), str(file)]
    command = [sys.executable, "-c", RUNS, json.dumps([[*always, *own] for own in runs])]
    path = os.pathsep.join([str(TESTS / "support"), *sys.path])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    numbers = re.compile(r"^(?:(?:shared|own|example) \d|--seed).*", re.MULTILINE)
    return [numbers.findall(text) for text in done.stdout.split("\f")[:-1]]


def test_a_failure_prints_the_seed_that_draws_the_same_again_after_others_or_not(draws: Path) -> None:
    """Fixtures that a test shares with others draw the same too, whichever asks first."""
    first, other, again = printed(draws, ["--seed", "3"], ["--seed", "4"], ["--seed", "3", "-k", "not test_one"])
    assert set(first) == set(again)
    assert {line.split()[0] for line in first} == {"shared", "own", "example", "--seed"}
    for kind in ("shared", "own", "example"):
        assert [line for line in first if line.startswith(kind)] != [line for line in other if line.startswith(kind)]
    assert "--seed 3 draws the same random numbers" in first
