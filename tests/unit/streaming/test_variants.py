"""The variants that are compared."""

from typing import Any

import pytest

from streamer.api.texts import EvaluateRequest
from streamer.errors import UsageError
from streamer.methods.files import Coefficients
from streamer.streaming.variants import make_variants


def test_base_and_adapter_come_first() -> None:
    variants = make_variants(("paper", "shrink"), (0.75, 0), "first")
    assert [v.name for v in variants] == [
        "base",
        "adapter",
        "paper 0.75",
        "paper 0",
        "shrink 0.75",
        "shrink 0",
    ]
    assert [(v.method, v.mitigation_lambda) for v in variants[:3]] == [
        (None, None),
        (None, None),
        ("paper", 0.75),
    ]
    base, adapter, paper = (v.mitigation for v in variants[:3])
    assert base is None
    assert adapter is not None
    assert adapter.mitigation_lambda == 1
    assert paper is not None
    assert paper.select == "first"


def test_coefficients_are_a_variant() -> None:
    coefficients = Coefficients(0.9, {}, {"base": {"files": []}})
    variants = make_variants(("regmean", "shrink"), (0.5,), "all", coefficients)
    assert [v.name for v in variants] == ["base", "adapter", "shrink 0.5", "regmean 0.9"]
    last = variants[-1]
    assert (last.method, last.mitigation_lambda, last.keep) == ("regmean", None, 0.9)
    assert last.mitigation is not None
    assert last.mitigation.coefficients is not None
    assert last.mitigation.coefficients.facts == coefficients.facts
    assert [v.keep for v in variants[:3]] == [None, None, None]
    alone = make_variants(("regmean",), (0.5,), "all", coefficients)
    assert [v.name for v in alone] == ["base", "adapter", "regmean 0.9"]
    amplified = make_variants(("shrink",), (2, -0.5), "all", amplify=True)
    assert [v.mitigation_lambda for v in amplified[2:]] == [2, -0.5]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"methods": "shrink"}, "methods: expected a list, found 'shrink'"),
    ({"keep": 10**400}, r"keep: expected a share in \(0, 1\], found 1000"),
    ({"other": [3]}, r"other: expected a path, or a list of paths, found \[3\]"),
    ({"lambdas": 0.5}, r"lambdas: expected a list, such as \[0.75, 0.5\], found 0.5"),
    ({"methods": ()}, "method: expected at least one"),
    ({"methods": ("paper", "paper")}, "method: expected different values"),
    (
        {"methods": ("average",)},
        "method: expected one of paper, project, shrink, regmean, nullspace, found 'average'",
    ),
    (
        {"methods": ("regmean",)},
        "method 'regmean' needs coefficients; make them with `streamer repair`",
    ),
    ({"lambdas": ()}, "lambda: expected at least one"),
    ({"lambdas": (0.5, 0.5)}, "lambda: expected different values"),
    ({"lambdas": (0.5, 1.0)}, "lambda: 1 is the unchanged adapter"),
    ({"lambdas": (float("nan"),)}, "lambda must be a finite number, got nan"),
    ({"lambdas": (0.5, 50)}, "got 50; `amplify=True` allows"),
    ({"sequences": 1}, "sequences: expected a whole number from 2"),
    ({"length": 1}, "length: expected a whole number from 2"),
    ({"keep": 0}, "keep: expected a share in"),
    ({"keep": 1.5}, "keep: expected a share in"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EvaluateRequest(base="b", adapter="a", general="g", task="t", **options)


def test_names_and_scale_are_checked_beside_coefficients() -> None:
    coefficients = Coefficients(0.9, {}, {"base": {"files": []}})
    with pytest.raises(
        UsageError,
        match="method: expected one of paper, project, shrink, regmean, nullspace, found 'papr'",
    ):
        make_variants(("papr", "shrink"), (0.5,), "all", coefficients)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="select: expected one of all, first, found 'some'"):
        EvaluateRequest(
            base="b", adapter="a", general="g", task="t", select="some", coefficients=coefficients
        )
