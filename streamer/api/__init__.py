"""Offer the commands as functions of the library; and here, what messages show of inputs, without the imports that read them."""

from __future__ import annotations


def shown(path: str) -> str:
    """Return an input in printable form: an address without its password or signature."""
    from streamer.remote.inputs import parse_address

    address = parse_address(path)
    return path if address is None else address.shown
