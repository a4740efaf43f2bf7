"""Define the mitigation methods, which change an adapter's delta. A new method is a file here and an entry in `METHODS`.

The command line, the library, evaluations, reports and figures read this table. Only `verification` has its own formula for each name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamer.errors import UsageError
from streamer.methods.method import Method, MethodName, Needs
from streamer.methods.nullspace import NullSpace
from streamer.methods.paper import Paper
from streamer.methods.project import Project
from streamer.methods.regmean import RegMean
from streamer.methods.shrink import Shrink

if TYPE_CHECKING:
    from streamer.detection.selection import Selection
    from streamer.methods.factors import FactorSet
    from streamer.methods.input_map import InputMap

__all__ = [
    "BY_LAMBDA",
    "DEFAULT",
    "METHODS",
    "UNCHANGED",
    "WITHOUT_FILES",
    "Method",
    "MethodName",
    "Needs",
    "NullSpace",
    "Paper",
    "Project",
    "RegMean",
    "Shrink",
    "make_method",
    "takes_coefficients",
    "takes_findings",
    "takes_map",
]  # fmt: skip

METHODS: dict[str, type[Method]] = {method.name: method for method in (Paper, Project, Shrink, RegMean, NullSpace)}
"""Methods by name, in the order in which help and tables show them."""

DEFAULT = Paper
"""Method used if none is named and neither coefficients nor a map are given."""

BY_LAMBDA = tuple(method.name for method in METHODS.values() if method.needs is not Needs.COEFFICIENTS)
"""Names of the methods with a λ."""

WITHOUT_FILES = tuple(name for name in BY_LAMBDA if METHODS[name].needs is not Needs.MAP)
"""Names of the methods with a λ that need no file other than findings."""


UNCHANGED = Shrink(1.0)
"""Method that leaves the adapter unchanged."""


def takes_findings(name: str | None) -> bool:
    """Test whether the method with this name scales intruders; False if the name is unknown, or None."""
    return name in METHODS and METHODS[name].needs is Needs.FINDINGS


def takes_coefficients(name: str | None) -> bool:
    """Test whether the method with this name uses the result of a fit."""
    return name in METHODS and METHODS[name].needs is Needs.COEFFICIENTS


def takes_map(name: str | None) -> bool:
    """Test whether the method with this name uses a map of the base's inputs."""
    return name in METHODS and METHODS[name].needs is Needs.MAP


def make_method(name: str | None, mitigation_lambda: float | None = None, select: Selection = "all",
                coefficients: FactorSet | None = None, amplify: bool = False, map: InputMap | None = None) -> Method:  # fmt: skip  # noqa: A002
    """Make a method with its options.

    Parameters
    ----------
    name
        By default, the method of the given coefficients or map, else `DEFAULT`.
    mitigation_lambda
        By default, the method's own default.

    Raises
    ------
    UsageError
        If no method has this name, or if the method refuses an option.
    """
    if name is None:
        name = (RegMean if coefficients is not None else DEFAULT if map is None else NullSpace).name
    if name not in tuple(METHODS):  # a tuple also handles unhashable values
        raise UsageError(f"method: expected one of {', '.join(METHODS)}, found {name!r}")
    method = METHODS[name]
    return method(
        method.default_lambda if mitigation_lambda is None else mitigation_lambda, select, coefficients, amplify, map
    )
