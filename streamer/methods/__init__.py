"""Methods of mitigation: what becomes of an adapter's delta. A new method is a file here and an entry in `METHODS`.

Everything else reads this table: the command line, the library, evaluations, reports and figures. `verification` has a formula of its own
for each name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamer.errors import UsageError
from streamer.methods.fitted import Fitted
from streamer.methods.method import Method, MethodName, Needs
from streamer.methods.nullspace import NullSpace
from streamer.methods.paper import Paper
from streamer.methods.project import Project
from streamer.methods.regmean import RegMean
from streamer.methods.shrink import Shrink

if TYPE_CHECKING:
    from streamer.detection.selection import Selection
    from streamer.methods.fit_set import FitSet
    from streamer.methods.input_map import InputMap

__all__ = [
    "BY_LAMBDA",
    "DEFAULT",
    "METHODS",
    "UNCHANGED",
    "WITHOUT_FILES",
    "Fitted",
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

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Paper, Project, Shrink, Fitted, RegMean, NullSpace)
}
"""Methods by name, in the order in which help and tables show them."""

DEFAULT = Paper
"""The method where none is named and no coefficients are given."""

BY_LAMBDA = tuple(method.name for method in METHODS.values() if method.needs is not Needs.COEFFICIENTS)
"""Names of the methods that take a λ."""

WITHOUT_FILES = tuple(name for name in BY_LAMBDA if METHODS[name].needs is not Needs.MAP)
"""Those of them that need no file but findings."""


UNCHANGED = Shrink(1.0)
"""The adapter as it is."""


def takes_findings(name: str | None) -> bool:
    """Test whether a method of this name scales intruders; a record's name may be unknown, and None is no method."""
    return name in METHODS and METHODS[name].needs is Needs.FINDINGS


def takes_coefficients(name: str | None) -> bool:
    """Test whether a method of this name uses what a fit gave."""
    return name in METHODS and METHODS[name].needs is Needs.COEFFICIENTS


def takes_map(name: str | None) -> bool:
    """Test whether a method of this name uses a map of the base's inputs."""
    return name in METHODS and METHODS[name].needs is Needs.MAP


def make_method(name: str | None, mitigation_lambda: float | None = None, scale: Selection = "all",
                coefficients: FitSet | None = None, amplify: bool = False, map: InputMap | None = None) -> Method:  # fmt: skip  # noqa: A002
    """Make a method with its options.

    Parameters
    ----------
    name
        None: `DEFAULT`, or the method of the coefficients or the map that are given.
    mitigation_lambda
        None: the method's own default.

    Raises
    ------
    UsageError
        If there is no method of this name, or it refuses an option.
    """
    if name is None:
        name = (DEFAULT if map is None else NullSpace).name if coefficients is None else coefficients.method
    if name not in tuple(METHODS):  # what has no hash is no name either
        raise UsageError(f"method: expected one of {', '.join(METHODS)}, found {name!r}")
    method = METHODS[name]
    return method(
        method.default_lambda if mitigation_lambda is None else mitigation_lambda, scale, coefficients, amplify, map
    )
