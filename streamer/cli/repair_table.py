"""Format a repair's measurements and what it wrote."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from streamer.api.views import input_options, record_lines
from streamer.cli.layout import Column, Screen, fit, table
from streamer.cli.tables import stood

if TYPE_CHECKING:
    from streamer.api.repair import RepairRecord


def repair_table(record: RepairRecord, written: Mapping[str, Any], inputs: tuple[str, str], screen: Screen) -> str:
    """Format the measured models, the choice, and the command that measures the output, unless it is the unchanged adapter.

    Parameters
    ----------
    inputs
        Base and adapter, as given.
    """
    rows, reliable = record["rows"], record["reliable"]

    def percents(name: str) -> list[str]:
        values = [cast(Mapping[str, Any], row)[name] for row in rows]
        return ["-" if value is None or not reliable.get(name, True) else f"{100 * value:.1f}%" for value in values]

    columns = [
        Column("model", [row["name"] + (" *" if row["what"] == record["chosen"] else "") for row in rows], "* was written", 9, left=True),
        Column("kept", percents("kept"), "share of the learning that it keeps", 8),
        Column("top-1 kept", percents("top1_kept"), "share of the adapter's gain in top-1 on the task's text that it keeps", 4),
        Column("KL left", percents("divergence"), "its divergence from the base on general text; 100% is the adapter's", 8),
        Column("loss left", percents("forgetting"), "the rise of the loss on general text; 100% is the adapter's", 5),
    ]  # fmt: skip
    more = "".join(f" {word}" for word in input_options(written))
    adapter = record.get("lora", inputs[1])
    words = shlex.join([inputs[0], adapter, "--general", "TEXT", "--task", "TEXT", "-o", "FILE"])
    what = {
        "repair": f"--coefficients {shlex.quote(record['fit'])}",
        "shrink": f"--method shrink --lambda {written['lambda']}",
        "adapter": "",
    }[record["chosen"]]
    then = [f"next, on text that nothing was trained or fitted on: streamer evaluate {words} {what}{more}"]
    told = {"kept": reliable["kept"], "top-1 kept": reliable["top1_kept"], "loss left": reliable["forgetting"]}
    why = dict.fromkeys(told, "the adapter's change is too small to measure on this text; more text may help")
    if rows[0]["top1_kept"] is None:
        why["top-1 kept"] = "the fit is of an earlier version, which did not measure it"
    none = "the findings have no intruder: scaling them changes nothing, and was not measured"
    converted = f"converted first: {adapter} is {inputs[1]} as a LoRA adapter, and was repaired in its place"
    page = (
        f"a page with these figures: streamer report {shlex.join([record['output'], '-o', record['output'] + '.html'])}"
    )
    lines = [
        f"writes {record['why']}",
        *([none] if record["intruders"] == 0 else []),
        *(f"{name} is not shown: {why[name]}" for name, fine in told.items() if not fine),
        *record_lines(written, stood(record["output"], record["state"])),
        *([converted] if "lora" in record else []),
        page,
        *(then if what else []),
    ]
    return "\n\n".join([table(columns, screen), "\n".join(fit(line, screen.width) for line in lines)])
