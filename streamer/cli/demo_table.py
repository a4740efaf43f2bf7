"""Format the demo's result for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from streamer.api.views import DetectionOptions, natural
from streamer.cli.layout import Column, Screen, fit, table
from streamer.cli.tables import NO_LIMIT

if TYPE_CHECKING:
    from streamer.api.demo import DemoRecord

NEXT = """\
next: streamer repair BASE ADAPTER --general TEXT --task TEXT -o OUTPUT   makes yours forget less; without text,
      streamer mitigate BASE ADAPTER --method shrink --lambda 0.75 -o OUTPUT   does"""


def demo_table(result: DemoRecord, screen: Screen = NO_LIMIT) -> str:
    """Format the demo's result for people."""

    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.3f}"

    t, strength, top_k = result["totals"], result["lambda"], DetectionOptions().top_k
    rows = sorted(result["matrices"], key=lambda r: natural(r["tensor"]))
    counts: dict[Literal["planted", "found", "gone"], str] = {
        "planted": "intruders planted in this matrix",
        "found": f"intruders among the {top_k} largest directions, by `streamer detect`",
        "gone": f"no longer found in the adapter that `streamer mitigate --method project --lambda {strength:g}` wrote",
    }
    columns = [
        Column("matrix", [r["tensor"] for r in rows], left=True, names=True, foot=f"all {t['matrices']} matrices")
    ]
    for key, about in counts.items():
        columns.append(Column(key, [str(r[key]) for r in rows], about, priority=9, foot=str(t[key])))
    before = [number(r["sigma_before"]) for r in rows]
    columns.append(Column("sigma", before, "singular value of the largest one; the base's own largest is 1", 3))
    if t["left"]:
        after = [number(r["sigma_after"]) for r in rows]
        columns.append(
            Column("sigma left", after, "singular value of the largest one found in the new adapter; `-` if none", 5)
        )
    told = (
        f"{t['planted']} planted, {t['found']} found, {t['gone']} gone, {t['left']} left; lambda {strength:g}: that share of the adapter's "
        "part of an intruder is kept"
    )
    return "\n\n".join((table(columns, screen), fit(told, screen.width), fit(NEXT, screen.width, 6)))
