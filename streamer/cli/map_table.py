"""Describe a map of a base's inputs and the next step."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamer.cli.layout import Screen, fit
from streamer.cli.tables import stood
from streamer.units import counted, listed


def map_text(record: Mapping[str, Any], base: str, screen: Screen) -> str:
    """Describe what was mapped, on which text, and the command that uses it.

    Parameters
    ----------
    base
        The base as given.
    """
    texts = listed(f"{text['name']} ({counted(text['tokens'], 'token')})" for text in record["texts"])
    inputs, matrices = counted(record["inputs"], "input"), counted(record["matrices"], "matrix")
    file = shlex.quote(record["output"])
    lines = [
        f"{counted(record['vectors'], 'leading vector')} of {inputs} of {matrices}, on {texts}",
        f"next, for any adapter of this base: streamer mitigate {shlex.quote(base)} ADAPTER -o OUTPUT --map {file}",
        stood(Path(record["output"]), record["state"]),
    ]
    return "\n".join(fit(line, screen.width) for line in lines)
