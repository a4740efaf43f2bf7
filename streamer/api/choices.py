"""Offer what the command line needs before torch is imported: choices, cores, and printable inputs."""

from __future__ import annotations

from streamer.methods import DEFAULT, METHODS, WITHOUT_FILES
from streamer.storage.files import available_cores

__all__ = ["ABOUT", "DEFAULT_METHOD", "REMOVED", "WITHOUT_FILES", "available_cores", "shown"]

ABOUT = {name: method.about for name, method in METHODS.items()}
DEFAULT_METHOD = DEFAULT.name

CLOSED_FORM = "repair and fit now use the closed form (regmean), which keeps more and forgets less; drop the option"

REMOVED = {
    **dict.fromkeys(("--grain", "--objective", "--steps"), CLOSED_FORM),
    **dict.fromkeys(("--race", "--no-race"), "every variant runs on all sequences; drop the option"),
    **dict.fromkeys(
        (f"{command} --{name}" for command in ("evaluate", "fit", "map", "repair") for name in ("workers", "executor")),
        "one sweep reads the base once and uses all cores of this machine; drop the option",
    ),
    "--part": "use --workers N, or --executor, of detect and merge",
    "demo --keep": "use -o DIR",
    "verify --max-memory": "verify reads a few rows at a time; drop the option",
    **dict.fromkeys(
        (
            f"report --{name}"
            for name in ("keep", "architecture", "base-is-residual", "ignore-key", "io", "lora-b-layout", "remote")
        ),
        "findings and evaluations are read without their inputs; drop the option",
    ),
    "report --coefficients": "a fit holds factors now, and no coefficients of intruders; `streamer evaluate` measures it",
}
"""What to do instead of removed options, which keywords have too; if other commands still have an option, its command precedes it."""


def shown(given: str) -> str:
    """Return an input in printable form: an address without its password or signature."""
    from streamer.remote.inputs import parse_address  # its imports would double the time of --help

    address = parse_address(given)
    return given if address is None else address.shown
