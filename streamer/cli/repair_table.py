"""Format what a repair measured, and what it wrote."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from streamer.api.views import input_options, record_lines
from streamer.cli.layout import Column, Screen, fit, table
from streamer.cli.tables import stood

if TYPE_CHECKING:
    from streamer.api.repair import RepairRecord


def repair_table(record: RepairRecord, written: Mapping[str, Any], inputs: tuple[str, str], screen: Screen) -> str:
    """Format the models that were measured, the choice, and the command that checks the output.

    Parameters
    ----------
    inputs
        Base and adapter, as they were given.
    """
    rows = record["rows"]
    columns = [
        Column("model", [row["name"] + (" *" if row["what"] == record["chosen"] else "") for row in rows], "* is written", 9, left=True),
        Column("kept", [f"{100 * row['kept']:.1f}%" for row in rows], "share of what was learned that it keeps", 8),
        Column("forgetting", [f"{100 * row['forgetting']:.1f}%" for row in rows], "share of what was forgotten that it leaves", 8),
        Column("KL", [f"{100 * row['divergence']:.1f}%" for row in rows], "its divergence from the base; 100% is the adapter's", 5),
    ]  # fmt: skip
    more = "".join(f" {word}" for word in input_options(written))
    words = shlex.join([*inputs, "--general", "TEXT", "--task", "TEXT", "-o", "FILE", "--coefficients", record["fit"]])
    lines = [
        f"writes {record['why']}",
        *record_lines(written, stood(record["output"], record["state"])),
        f"next, on text that nothing was trained or fitted on: streamer evaluate {words}{more}",
    ]
    return "\n\n".join([table(columns, screen), "\n".join(fit(line, screen.width) for line in lines)])
