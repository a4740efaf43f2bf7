"""Find the inputs of a command, which may be names on the hub or addresses."""

from __future__ import annotations

import argparse
from typing import Any

from streamer.events import Monitor


def locate_inputs(args: argparse.Namespace, monitor: Monitor) -> None:
    """Put the paths of BASE and ADAPTER in place of names and addresses; what was given stays in `given`.

    Only headers are read of what is inspected or forecast; `verify`, which shares no code with what it checks, reads files.
    """
    base, adapter = getattr(args, "base", None), getattr(args, "adapter", None)
    args.given = _shown(base), _shown(adapter)
    if args.command == "report" and adapter is None:  # an evaluation stands in BASE's place
        return
    if base is None:
        return
    from streamer.remote.inputs import Remote, RemoteMode

    mode: RemoteMode | None = "cache" if args.command == "verify" else args.remote
    remote = Remote(mode, args.command == "inspect" or getattr(args, "dry_run", False), monitor)
    args.base = str(remote.path(base))
    if isinstance(adapter, list):
        args.adapter = [str(path) for path in remote.paths(adapter)]
    elif adapter is not None:
        args.adapter = str(remote.path(adapter))


def _shown(given: Any) -> Any:
    """Return an input, or each of several, as it may be printed: an address without the password or signature in it."""
    from streamer.remote.addresses import parse_address

    if isinstance(given, list):
        return [_shown(one) for one in given]
    address = parse_address(given) if isinstance(given, str) else None
    return given if address is None else address.shown
