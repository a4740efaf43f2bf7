"""The table of methods, and that everything that needs an entry for each method has one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

import streamer
from streamer.errors import UsageError
from streamer.methods import (
    METHODS,
    UNCHANGED,
    WITHOUT_FILES,
    MethodName,
    NullSpace,
    RegMean,
    make_method,
    options_of,
    takes_findings,
)
from streamer.methods.files import Coefficients, InputMap
from streamer.verification.verify import NEEDS

PACKAGE = Path(streamer.__file__).parent


def test_each_name_is_one_of_a_method_and_has_a_witness() -> None:
    assert (
        list(METHODS) == list(get_args(MethodName)) == [method.name for method in METHODS.values()]
    )
    assert {name: method.needs for name, method in METHODS.items() if method.missing} == NEEDS
    assert [name for name in METHODS if takes_findings(name)] == [
        name for name, method in METHODS.items() if method.needs == "findings"
    ]
    assert not takes_findings(None)


def test_the_page_has_a_colour_for_each_method() -> None:
    light = re.findall(
        r"--s(\d): (#\w+);", (PACKAGE / "report" / "page.css").read_text().split("@media")[0]
    )
    assert len({colour for _, colour in light}) >= len(METHODS)


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_a_method_has_its_default_and_a_label(name: MethodName) -> None:
    method = make_method(name)
    assert (method.mitigation_lambda, method.label) == (0.75, f"{name} 0.75")
    assert method == METHODS[name](0.75)
    assert method != UNCHANGED


def test_no_method_is_the_default_unless_coefficients_are_given() -> None:
    assert make_method(None).name == "paper"
    with pytest.raises(UsageError, match="method 'regmean' needs coefficients"):
        make_method(RegMean.name)
    with pytest.raises(UsageError, match="method 'nullspace' needs a map of the base's inputs"):
        make_method(NullSpace.name)


def test_a_map_chooses_its_method_and_no_other_takes_it() -> None:
    mapped = InputMap((), {"vectors": 16})
    assert make_method(None, map=mapped).label == "nullspace 0.3"
    for lam in (1.5, -0.1):
        with pytest.raises(
            UsageError, match=r"^lambda must be between 0 \(remove\) and 1 \(keep\), got [-0-9.]+$"
        ):
            make_method(None, mitigation_lambda=lam, map=mapped)


def test_a_method_refuses_the_options_that_it_lacks() -> None:
    """One line for all, from the fields of the methods; each takes its own."""
    given = {
        "mitigation_lambda": 0.5,
        "select": "first",
        "amplify": True,
        "coefficients": Coefficients(0.9, {}),
        "map": InputMap((), {"vectors": 16}),
    }
    taken = {
        "paper": {"mitigation_lambda", "select", "amplify"},
        "project": {"mitigation_lambda", "select", "amplify"},
        "shrink": {"mitigation_lambda", "amplify"},
        "regmean": {"coefficients"},
        "nullspace": {"mitigation_lambda", "map"},
    }
    for name, method in METHODS.items():
        assert set(options_of(method)) == taken[name]
        own = {option: value for option, value in given.items() if option in taken[name]}
        assert make_method(name, **own).as_json()["method"] == name
        for option in given.keys() - taken[name]:
            said = f"^{option.removeprefix('mitigation_')}: method '{name}' has no such option; leave it out"
            with pytest.raises(UsageError, match=said):
                make_method(name, **own, **{option: given[option]})


def test_methods_are_named_in_few_other_files() -> None:
    """A new method is a class and an entry. These files name keys of JSON that are called like a method, or the hinted shrink."""
    quoted = re.compile(rf"""["'](?:{"|".join(METHODS)})["']""")
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in ("methods", "verification")
        and quoted.search(path.read_text())
    }
    assert found == {
        "evaluation/evaluation.py",
        "fitting/choice.py",
        "cli/tables.py",
        "api/texts.py",
    }


def test_what_is_no_name_is_refused() -> None:
    for name in ("papr", ["paper"], 1):
        with pytest.raises(
            UsageError,
            match=r"^method: expected one of paper, project, shrink, regmean, nullspace, found ",
        ):
            make_method(name)  # type: ignore[arg-type]
