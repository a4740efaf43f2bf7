"""Format a fit as a table that fits the screen, and list the next steps."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from streamer.api.views import input_options, share_name
from streamer.cli.layout import Column, Screen, fit, table
from streamer.cli.tables import NO_LIMIT


def fitting_table(facts: Mapping[str, Any], inputs: tuple[str, str], output: str, screen: Screen = NO_LIMIT) -> str:
    """Format the figures of every set beside its equal shrink, and the commands that use the sets.

    Parameters
    ----------
    facts
        Facts of the fit.
    inputs, output
        Base, adapter and the file of the fit, as given.
    """
    sets: Sequence[Mapping[str, Any]] = facts["sets"]
    reliable, shrinks = facts.get("reliable", {}), [one["shrink"] for one in sets]
    held_out = [facts["texts"][text]["held"]["sequences"] for text in ("general", "task")]
    columns = [
        Column("keep", [f"{100 * one['keep']:g}%" for one in sets], "share of the learning to keep", priority=9),
        Column("kept", [_share(one, "kept", reliable) for one in sets],
               "fall of the task's loss below the base's; 100% is the adapter's", priority=8),
        Column("top-1 kept", [_share(one, "top1_kept", reliable) for one in sets],
               "gain in top-1 on the task's text; 100% is the adapter's", priority=5),
        Column("KL left", [_share(one, "divergence", reliable) for one in sets], "its divergence from the base; 100% is the adapter's", 7),
        Column("loss left", [_share(one, "forgetting", reliable) for one in sets],
               "rise of the general loss above the base's; 100% is the adapter's", priority=4),
        Column("shrink", ["-" if s is None else f"{s['lambda']:.3f}" for s in shrinks],
               "lambda of the shrink of the whole adapter that keeps the same share", priority=3),
        Column("its KL left", ["-" if s is None else _percent(s["divergence"]) for s in shrinks], "that shrink's KL left", priority=5),
        Column("mu", ["-" if one["mu"] is None else f"{one['mu']:.3g}" for one in sets], "weight of the general text", priority=0),
    ]  # fmt: skip
    lines = [
        f"measured on {held_out[0]} general and {held_out[1]} task held-out sequences, on which the set was chosen",
        *_verdicts(sets),
        *unreliable(facts),
        *_commands(facts, shlex.join(inputs), shlex.quote(output)),
    ]
    return "\n\n".join([table(columns, screen), "\n".join(fit(line, screen.width) for line in lines)])


def unreliable(facts: Mapping[str, Any]) -> list[str]:
    """State which shares are not shown, and why."""
    return [
        f"{column} is not shown: the adapter {what} by {facts[of]:.4f} ± {facts[f'{of}_se']:.4f}, too little to measure on this text; "
        "more text may help"
        for column, what, of in (
            ("kept", "lowers the task's loss", "learning"),
            ("top-1 kept", "raises top-1 on the task's text", "top1_gain"),
            ("loss left", "raises the general loss", "forgetting"),
        )
        if not facts.get("reliable", {}).get(
            {"top-1 kept": "top1_kept", "loss left": "forgetting"}.get(column, column), True
        )
    ]


def _verdicts(sets: Sequence[Mapping[str, Any]]) -> list[str]:
    """State whether each set is better than its equal shrink, and which sets probably cost more than they gain."""
    words = {"better": "diverges less than that shrink from the base", "worse": "diverges more than that shrink from the base",
             "not told apart": "does not differ significantly from that shrink in divergence"}  # fmt: skip
    lines = [f"{100 * one['keep']:g}%: {words[one['shrink']['verdict']]}" for one in sets if one["shrink"] is not None]
    for one in sets:
        if (trade := one.get("trade")) is not None and not trade["worth_it"]:
            numbers = [f"{trade[key]:.4f} ± {trade[f'{key}_se']:.4f}" for key in ("regained", "given_up")]
            lines.append(
                f"{100 * one['keep']:g}%: probably not worth it: it regains {numbers[0]} nats of KL per token of general text and gives "
                f"up {numbers[1]} of loss on the task's"
            )
    return lines


def _commands(facts: Mapping[str, Any], inputs: str, output: str) -> list[str]:
    """List the commands that use the first set: `mitigate` if the adapter has factors, else `merge`."""
    sets = facts["sets"]
    keep = f" --keep {share_name(sets[0]['keep'])}" if len(sets) > 1 else ""
    more = "".join(f" {word}" for word in input_options(facts))
    plain = " --dequantize" if facts["quantized"] else ""
    made = "mitigate" if facts["factored"] else "merge"
    return [
        f"next: streamer {made} {inputs} -o OUTPUT --coefficients {output}{keep}{more}{plain if made == 'merge' else ''}",
        f"then, on text that nothing was trained or fitted on: streamer evaluate {inputs} --general TEXT --task TEXT -o FILE "
        f"--coefficients {output}{more}",
    ]


def _share(one: Mapping[str, Any], name: str, reliable: Mapping[str, bool]) -> str:
    value, error = one.get(name), one.get(f"{name}_se")
    return (
        "-"
        if value is None or error is None or not reliable.get(name, True)
        else f"{_percent(value)} ± {100 * error:.1f}"
    )


def _percent(value: float) -> str:
    return f"{100 * value + 0.0:.1f}%"
