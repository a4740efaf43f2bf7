"""Draw lines through points as an SVG, with axes, ticks and a name at each line's end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

WIDTH = 640
HEIGHT = 360
LEFT = 56
RIGHT = 150
TOP = 20
BOTTOM = 52
COLOURS = ("#c0392b", "#2060a0", "#2e8b57", "#8e6bbf", "#c98a1b", "#555")


def line_figure(lines: Mapping[str, Sequence[tuple[float, float]]], below: str, beside: str) -> str:
    """Draw lines ``name → (x, y) …``; y begins at 0 and ends at 1 or above, x has a tick at each point.

    Parameters
    ----------
    below, beside
        What x and y are.
    """
    xs = sorted({x for points in lines.values() for x, _ in points})
    most = max(1.0, *(y for points in lines.values() for _, y in points))
    first = xs[0]
    last = xs[-1] if len(xs) > 1 else xs[0] + 1

    def across(x: float) -> float:
        return LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - y / most * (HEIGHT - TOP - BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i in range(int(most / 0.25) + 1):
        y = down(i / 4)
        out.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>'
        )
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{i / 4:g}</text>')
    out += [
        f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>'
        for x in xs
    ]
    ends = []
    for (name, points), colour in zip(lines.items(), COLOURS * len(lines), strict=False):
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [
            f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{colour}"/>'
            for x, y in points
        ]
        ends.append((down(points[-1][1]), name, colour))
    # Names stand one below another in the order of the lines' ends, so that none covers another.
    height = -1e9
    for y, name, colour in sorted(ends):
        height = max(y, height + 14)
        out.append(
            f'<text x="{WIDTH - RIGHT + 8}" y="{height + 4:.1f}" fill="{colour}">{name}</text>'
        )
    out.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">{below}</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{beside}</text>'
    )
    return "\n".join([*out, "</svg>"]) + "\n"
