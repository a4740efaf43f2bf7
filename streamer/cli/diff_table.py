"""Format the fates of intruders as a table that fits the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamer.api.views import FATES, fates_counted, natural
from streamer.cli.layout import Column, Screen, fit, table
from streamer.cli.tables import MANY, SHOWN
from streamer.units import counted, listed

if TYPE_CHECKING:
    from streamer.report.diff import Direction, FindingsDiff, IntruderFate

_MEANING = {
    "kept": "remains: the same direction is an intruder in both",
    "mixed": "mixed: it lies mostly in the span of the second's intruders, but matches none",
    "gone": "gone: the second findings have no such intruder",
    "new": "new: the first findings have no such intruder",
}


def diff_table(diff: FindingsDiff, screen: Screen) -> str:
    """Format one line for each intruder, or the ten that changed most if there are many, and counts."""
    every = sorted(diff.intruders, key=lambda one: (natural(one.tensor), one.before is None, _rank(one)))
    cut = len(every) > MANY and not screen.every
    changed = [one for one in every if _is_changed(one)]
    shown = sorted(changed, key=lambda one: -abs(_value(one.after) - _value(one.before)))[:SHOWN] if cut else every
    columns = [
        Column("matrix", [one.tensor for one in shown], left=True, names=True, among=[one.tensor for one in every]),
        Column("fate", ["remains" if one.fate == "kept" else one.fate for one in shown], priority=9, left=True),
        Column("rank", [_cell(one.before, "rank") for one in shown], "its rank in the first findings; 1 is the largest", priority=5),
        Column("sigma", [_cell(one.before, "sigma") for one in shown], "its singular value there", priority=6),
        Column("after", [_cell(one.after, "rank") for one in shown], "its rank in the second", priority=4),
        Column("sigma after", [_cell(one.after, "sigma") for one in shown], "its singular value there", priority=7),
        Column("overlap", [f"{one.overlap:.3f}" for one in shown], "with the nearest intruder of the other findings", priority=3),
        Column("share", [f"{100 * one.share:.0f}%" for one in shown], "its part in the span of the other findings' intruders", priority=2),
    ]  # fmt: skip
    parts = [table(columns, screen)] if shown else []
    if cut:
        words = f"none of {len(every)} intruders has changed"
        if changed:
            which = "that have changed" if len(shown) == len(changed) else "whose singular values changed most"
            words = f"the {len(shown)} {which}, of {len(every)}"
        parts.append(fit(f"{words}; --all shows every one", screen.width))
    counts = [fate for fate in FATES if diff.count(fate)]
    lines = [
        f"{counted(diff.first['intruders'], 'intruder')} before, {diff.second['intruders']} after, "
        f"in {counted(diff.matrices, 'matrix')} of both: " + fates_counted(diff.to_dict()["totals"]),
        *(_MEANING[fate] for fate in counts),
    ]
    for where, names in (("first", diff.only_first), ("second", diff.only_second)):
        if names:
            lines.append(f"only in the {where} findings: {counted(len(names), 'matrix')}: {listed(names)}")
    return "\n\n".join([*parts, "\n".join(fit(line, screen.width) for line in lines)])


def _is_changed(one: IntruderFate) -> bool:
    """Test whether the table shows any difference of an intruder between the two findings."""
    sides = [[_cell(side, what) for what in ("rank", "sigma")] for side in (one.before, one.after)]
    return one.fate != "kept" or sides[0] != sides[1]


def _rank(one: IntruderFate) -> int:
    found = one.before or one.after
    return found.rank if found else 0


def _value(direction: Direction | None) -> float:
    return direction.singular_value if direction else 0.0


def _cell(direction: Direction | None, what: str) -> str:
    if direction is None:
        return "-"
    return str(direction.rank + 1) if what == "rank" else f"{direction.singular_value:#.4g}"
