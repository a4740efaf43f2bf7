"""Draw a report's figures with matplotlib, as SVG and PNG for papers: one subject in each file, no titles, page width."""

from __future__ import annotations

import importlib
import io
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from streamer.detection.findings import Findings
from streamer.detection.matrix_finding import MatrixFinding
from streamer.errors import MissingPackageError, printable
from streamer.evaluation.evaluation import Evaluation
from streamer.methods import METHODS
from streamer.plan.name_order import natural
from streamer.report.curves import threshold_curve
from streamer.report.grid import make_grid
from streamer.report.page_data import series_of
from streamer.report.subject import Subject, scales_intruders

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

SIGN = "streamer report"
"""Text in the head of every file that identifies it as a report's figure."""

FIGURES, IMAGE_FORMATS = ("map", "similarity", "spectrum", "thresholds", "lambdas", "tradeoff"), ("svg", "png")
"""Names of all figures that a report may have, and their formats; earlier versions drew ``lambdas``."""

WIDTH = 6.75
"""Width of a figure in inches."""

LEAST_ROWS = 7
"""Fewest rows for which a map has height, so that the labels of its scales fit."""

SHOWN = 6
"""Number of matrices whose directions are drawn: those whose intruders have the most energy."""

LONGEST_NAME = 24
"""Longest name of a row, in characters, for which two maps fit side by side."""

KEPT, FORGETTING = (-0.05, 1.2), (-0.3, 1.4)
"""Range of shares that the trade-off shows, as on the page; variants outside are named below it."""

BASE, INTRUDER = "#2f6db5", "#c2410c"

Style = dict[str, Any]
MARKS: dict[bool, Style] = {
    False: {"marker": "o", "color": BASE, "markersize": 3, "linestyle": "none"},
    True: {"marker": "D", "color": INTRUDER, "markersize": 3, "linestyle": "none"},
}
"""Marks of a direction of the base and of an intruder."""

OF_BASE: Style = {"marker": "_", "color": "black", "markersize": 6, "linestyle": "none"}
EPSILON: Style = {"color": "black", "linewidth": 0.6, "linestyle": "--"}

_SIGNS = {"svg": {"Creator": SIGN, "Date": None}, "png": {"Software": SIGN}}

_SETTINGS = {
    "svg.hashsalt": SIGN,
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
}


def draw_figures(subject: Subject) -> dict[str, bytes]:
    """Draw all figures of a report; the same inputs and matplotlib version give the same bytes.

    Returns
    -------
    dict
        Content of each file by name.

    Raises
    ------
    MissingPackageError
        If matplotlib is not installed.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
        make: Callable[..., Figure] = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise MissingPackageError(
            "figures: need matplotlib, which is not installed; pip install 'intruder-streamer[plots]', or write a page, "
            "which needs nothing: -o report.html",
            "matplotlib",
        ) from None
    out: dict[str, bytes] = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's own settings
        matplotlib.rcParams.update(_SETTINGS)
        for name, draw in _drawings(subject).items():
            figure = make(figsize=(WIDTH, 2.6), layout="constrained")
            draw(figure)
            for image_format, sign in _SIGNS.items():
                file = io.BytesIO()
                figure.savefig(file, format=image_format, dpi=200, metadata=sign)
                figure.set_layout_engine("none")  # the layout is final after the first format
                out[f"{name}.{image_format}"] = file.getvalue()
    return out


def _drawings(subject: Subject) -> dict[str, Callable[[Figure], None]]:
    """List the drawing functions by file name."""
    record, findings, evaluation = subject.record, subject.findings, subject.evaluation
    if record is not None:
        rows = sorted(record["matrices"], key=lambda m: natural(m["tensor"]))
        fall = [1 - m["delta_norm_after"] / m["delta_norm"] if m["delta_norm"] > 0 else 0.0 for m in rows]
        counts = [len(m["intruders"]) for m in rows] if scales_intruders(record) else None
        names = [m["tensor"] for m in rows]
        return {"map": lambda f: _draw_output_map(f, names, counts, fall)}
    assert findings is not None
    matrices = sorted(findings, key=lambda m: natural(m.tensor))
    most = sorted(matrices, key=lambda m: -m.detection.intruder_energy * m.detection.delta_norm**2)[:SHOWN]
    drawings: dict[str, Callable[[Figure], None]] = {}
    if matrices:
        drawings["map"] = lambda f: _draw_findings_map(f, matrices)
        drawings["similarity"] = lambda f: _draw_each(
            f, most, lambda a, m: _draw_similarity(a, m, findings), [("ε: intruders are below", EPSILON)]
        )
        drawings["spectrum"] = lambda f: _draw_each(
            f, most, _draw_spectrum, [("the base's singular value of the same rank", OF_BASE)]
        )
        drawings["thresholds"] = lambda f: _draw_thresholds(f, findings)
    if evaluation is not None and any(None not in (v["kept"], v["forgetting"]) for v in evaluation.shown_variants()):
        drawings["tradeoff"] = lambda f: _draw_tradeoff(f, evaluation)
    return drawings


def _draw_findings_map(figure: Figure, matrices: Sequence[MatrixFinding]) -> None:
    found = [m.detection for m in matrices]
    norms = [d.delta_norm**2 for d in found]
    grid = make_grid([m.tensor for m in matrices])
    taken = grid.sums([d.intruder_energy * n for d, n in zip(found, norms, strict=True)])
    total = grid.sums(norms)
    energy = np.divide(taken, total, out=np.zeros_like(taken), where=total > 0)
    energy[np.isnan(total)] = np.nan
    values = {"intruders": grid.sums([len(d.intruders) for d in found]), "share of the energy": energy}
    _draw_grids(figure, grid.parts, grid.layers, values)


def _draw_output_map(figure: Figure, names: Sequence[str], counts: Sequence[int] | None, fall: Sequence[float]) -> None:
    grid = make_grid(names)
    values = {} if counts is None else {"intruders scaled": grid.sums(counts)}
    values["fall of the norm"] = grid.sums(fall) / grid.sums([1] * len(names))
    _draw_grids(figure, grid.parts, grid.layers, values)


def _draw_grids(figure: Figure, parts: Sequence[str], layers: Sequence[int | None], values: dict[str, Any]) -> None:
    """Draw maps of one grid below each other, or side by side if there are few layers with short names."""
    stacked = len(layers) > 16 or max(map(len, parts)) > LONGEST_NAME
    height = 0.5 + 0.16 * max(LEAST_ROWS, len(parts))
    figure.set_size_inches(WIDTH, (len(values) if stacked else 1) * (height + 0.2))
    axes = np.atleast_1d(figure.subplots(len(values), 1) if stacked else figure.subplots(1, len(values)))
    for ax, (label, cells) in zip(axes, values.items(), strict=True):
        image = ax.imshow(cells, aspect="auto", cmap="Reds", vmin=0, vmax=max(np.nanmax(cells), 1e-9))
        ax.set_yticks(range(len(parts)), [_plain(part) for part in parts])
        step = -(-len(layers) // 16)
        ax.set_xticks(range(0, len(layers), step), ["–" if n is None else str(n) for n in layers[::step]])
        ax.set_xlabel("layer")
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        figure.colorbar(image, ax=ax, label=label).outline.set_visible(False)


def _draw_each(
    figure: Figure,
    matrices: Sequence[MatrixFinding],
    draw: Callable[[Axes, MatrixFinding], None],
    more: Sequence[tuple[str, Style]],
) -> None:
    """Draw one subject for each matrix, with a common legend; `more` are its entries besides the directions."""
    rows = -(-len(matrices) // 3)
    figure.set_size_inches(WIDTH, 1.7 * rows + 0.25)
    axes = figure.subplots(rows, min(3, len(matrices)), squeeze=False).ravel()
    for ax, m in zip(axes, matrices, strict=False):
        ax.set_title(_plain(m.tensor.removesuffix(".weight")), fontsize=6)
        ax.set_xlabel("rank")
        draw(ax, m)
    for ax in axes[len(matrices) :]:
        ax.set_visible(False)
    entries = [("intruder", MARKS[True]), ("direction of the base", MARKS[False]), *more]
    lines = [axes[0].plot([], [], label=name, **style)[0] for name, style in entries]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(entries), frameon=False, fontsize=7)


def _draw_similarity(ax: Axes, m: MatrixFinding, findings: Findings) -> None:
    d = m.detection
    for intruder, style in MARKS.items():
        ranks = [j for j in range(len(d.similarity)) if (j in d.intruders) == intruder]
        value = np.array([d.similarity[j] for j in ranks])
        low, high = (np.array([side[j] for j in ranks]) for side in (d.similarity_low, d.similarity_high))
        bars = np.maximum(0, np.stack([value - low, high - value])) if ranks else None
        ax.errorbar([j + 1 for j in ranks], value, yerr=bars, elinewidth=0.7, capsize=1.5, **style)
    ax.axhline(findings.options.threshold_epsilon, **EPSILON)
    ax.set_ylim(0, 1.03)
    ax.set_ylabel("similarity")


def _draw_spectrum(ax: Axes, m: MatrixFinding) -> None:
    d = m.detection
    for intruder, style in MARKS.items():
        ranks = [j for j in range(len(d.singular_values)) if (j in d.intruders) == intruder]
        ax.vlines([j + 1 for j in ranks], 0, [d.singular_values[j] for j in ranks], color=style["color"], linewidth=0.8)
        ax.plot([j + 1 for j in ranks], [d.singular_values[j] for j in ranks], **style)
    ax.plot(range(1, len(d.base_singular_values) + 1), d.base_singular_values, **OF_BASE)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("singular value")


def _draw_thresholds(figure: Figure, findings: Findings) -> None:
    rows, ax = threshold_curve(findings), figure.subplots()
    x = [r["epsilon"] for r in rows]
    ax.fill_between(x, [r["least"] for r in rows], [r["most"] for r in rows], color=INTRUDER, alpha=0.25, linewidth=0)
    ax.plot(x, [r["intruders"] for r in rows], color=INTRUDER, linewidth=1.2)
    ax.axvline(findings.options.threshold_epsilon, color="black", linewidth=0.6, linestyle="--")
    ax.set(xlabel="ε", ylabel="intruder dimensions", xlim=(0, 1), ylim=(0, None))


def _draw_tradeoff(figure: Figure, evaluation: Evaluation) -> None:
    """Draw forgetting against learning kept, with standard errors. Filled points are on the front; a ring marks the suggestion.

    Variants outside the frame are named below it.
    """
    ax, best, tree = figure.subplots(), evaluation.best(), evaluation.to_dict()
    figure.set_size_inches(WIDTH / 1.5, 3.4)
    variants = evaluation.shown_variants()
    series: dict[str, list[dict[str, Any]]] = {}
    outside: list[str] = []
    labels: list[Annotation] = []
    for v, variant in zip(variants, evaluation.variants, strict=True):
        if v["kept"] is None or v["forgetting"] is None:
            continue
        if KEPT[0] <= v["kept"] <= KEPT[1] and FORGETTING[0] <= v["forgetting"] <= FORGETTING[1]:
            series.setdefault(series_of(variant), []).append(v)
        else:
            outside.append(f"{v['name']} (kept {100 * v['kept']:.0f}%, left {100 * v['forgetting']:.0f}%)")
    adapter, front = series.pop("adapter", []), set(tree["front"])
    base = series.pop("base", [])
    for name, own in [*series.items(), ("", [*base, *adapter])]:
        colour = METHODS[name].colour if name in METHODS else "#555555"
        line = sorted(own, key=lambda v: -v["kept"] if v["lambda"] is None else -v["lambda"])
        line = [*adapter, *line] if name and all(v["lambda"] is not None for v in own) else line
        if name:
            x, y = ([100 * v[key] for v in line] for key in ("kept", "forgetting"))
            ax.plot(x, y, color=colour, linewidth=0.8, label=name)
        for v in own:
            at = 100 * v["kept"], 100 * v["forgetting"]
            errors = {"xerr": 100 * v["kept_se"], "yerr": 100 * v["forgetting_se"]}
            face = colour if v["name"] in front else "white"
            ax.errorbar(*at, **errors, fmt="o", color=colour, markersize=3.5, elinewidth=0.7, markerfacecolor=face)
            label, below = v["name"] if v["lambda"] is None else f"{v['lambda']:g}", v["name"] != "base"
            text = ax.annotate(
                _plain(label), at, (4, -8 if below else 4), textcoords="offset points", fontsize=6, color=colour
            )
            suggested = best.variant is not None and v["name"] == best.variant.name
            labels.insert(0 if suggested else len(labels), text)
            if suggested:
                ax.plot(*at, "o", markersize=9, markerfacecolor="none", color=colour)
    ax.axvline(100 * best.keep, color="black", linewidth=0.6, linestyle="--")
    ax.update_datalim([(0, 0), (103, 105)])
    ax.autoscale_view()
    ax.set(xlabel="learning kept, %", ylabel="forgetting left, %")
    if outside:
        figure.supxlabel(
            "\n".join(map(_plain, textwrap.wrap(f"Outside the frame: {', '.join(outside)}.", 90))), fontsize=6
        )
    title = "numbers: λ\nhollow: another variant is better in both"
    ax.legend(frameon=False, loc="upper left", title=title, title_fontsize=6, alignment="left")
    _separate(figure, labels)


def _separate(figure: Figure, labels: list[Annotation]) -> None:
    """Move labels that overlap earlier ones, and remove those for which no place is free."""
    figure.draw_without_rendering()
    placed: list[Any] = []
    for label in labels:
        for x, y in (label.get_position(), (4, 4), (4, -8), (-4, 4), (-4, -8)):
            label.set(position=(x, y), horizontalalignment="left" if x > 0 else "right")
            if not label.get_window_extent().count_overlaps(placed):
                placed.append(label.get_window_extent())
                break
        else:
            label.remove()


def _plain(text: str) -> str:
    """Escape a name so that matplotlib does not read it as mathematics."""
    return printable(text).replace("$", r"\$")
