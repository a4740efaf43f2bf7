"""Offer what the command line needs before torch is imported: choices, cores, and printable inputs."""

from __future__ import annotations

from streamer.forecast.cores import available_cores
from streamer.methods import DEFAULT, METHODS, WITHOUT_FILES, Fitted
from streamer.remote.addresses import parse_address

__all__ = ["ABOUT", "COEFFICIENTS_METHOD", "DEFAULT_METHOD", "WITHOUT_FILES", "available_cores", "shown"]

ABOUT = {name: method.about for name, method in METHODS.items()}
DEFAULT_METHOD, COEFFICIENTS_METHOD = DEFAULT.name, Fitted.name


def shown(given: str) -> str:
    """Return an input in printable form: an address without its password or signature."""
    address = parse_address(given)
    return given if address is None else address.shown
