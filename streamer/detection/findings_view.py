"""Present findings: matrices by name or pattern, a short text, an HTML table, data frames."""

from __future__ import annotations

import difflib
import fnmatch
import html
import importlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from streamer.detection.findings_records import FindingsRecord, MatrixRecord
from streamer.errors import MissingPackageError, UnknownNameError, UsageError, printable
from streamer.units import counted, format_size, listed

if TYPE_CHECKING:
    import pandas

SHOWN = 10
"""Number of matrices in the HTML table."""

Names = Sequence[tuple[str, str]]
"""The names of each matrix: the base tensor's and the adapter module's."""


def is_pattern(key: str) -> bool:
    """Test whether a key is a pattern; ``[3]`` alone is an expert's number."""
    return "*" in key or "?" in key or re.search(r"\[(?!\d+\])", key) is not None


def index_of(names: Names, key: str) -> int:
    """Find one matrix by its tensor's name, its module's name, or an end of either that no other matrix shares.

    Raises
    ------
    UnknownNameError
        If no matrix or several match.
    """
    for fits in (
        [i for i, pair in enumerate(names) if key in pair],
        [i for i, pair in enumerate(names) if any(name.endswith(f".{key}") for name in pair)],
    ):
        if len(fits) == 1:
            return fits[0]
        if fits:
            found = listed(names[i][0] for i in fits)
            raise UnknownNameError(
                f"findings: {key!r} fits {len(fits)} matrices: {found}; use a longer name, or '*{key}*' for all"
            )
    close = difflib.get_close_matches(key, [name for pair in names for name in pair], 1, 0.5)
    near = f"did you mean {close[0]!r}?" if close else f"there are {listed((t for t, _ in names), 2)}"
    raise UnknownNameError(f"findings: no matrix is called {key!r}; {near}")


def indices_of(names: Names, pattern: str) -> list[int]:
    """Find the matrices whose tensor or module matches a pattern, with ``*``, ``?`` and ``[…]`` as in file names.

    Raises
    ------
    UnknownNameError
        If no matrix matches.
    """
    literal = re.sub(r"\[(\d+)\]", r"[[]\1]", pattern)  # expert numbers have this form
    fits = [re.compile(fnmatch.translate(p)).match for p in dict.fromkeys((pattern, literal))]
    found = [i for i, pair in enumerate(names) if any(fit(name) for fit in fits for name in pair)]
    if not found:
        there = listed((t for t, _ in names), 2)
        raise UnknownNameError(f"findings: no matrix fits {pattern!r}; there are {there}")
    return found


def summary_lines(tree: FindingsRecord) -> list[str]:
    """Summarise in three lines the result, the options and the inputs."""
    t, o, matrices = tree["totals"], tree["options"], tree["matrices"]
    with_any = sum(bool(m["intruders"]) for m in matrices)
    files = tree["base"].get("files", [])
    size = format_size(sum(f["bytes"] for f in files))
    base = f"{listed((f['file'] for f in files), 1)} ({size})" if files else "unknown"
    trained_on = tree["adapter"].get("base_model_name_or_path")
    names = " … ".join(dict.fromkeys(m["tensor"] for m in (*matrices[:1], *matrices[-1:])))
    lines = [
        f"{counted(t['intruders'], 'intruder')} in {with_any} of {counted(len(matrices), 'matrix')}, {t['certified']} certified; "
        f"top_k={o['top_k']}, threshold_epsilon={o['threshold_epsilon']}, solver={o['solver']}",
        f"base {base}" + (f", adapter trained on {trained_on!r}" if trained_on else ""),
        names or "no matrices",
    ]
    return [printable(line) for line in lines]


HEAD = ("matrix", "shape", "intruders", "ranks (1 = largest)", "least similarity", "σ₁", "‖Δ‖", "energy", "certified")


def _cells(m: MatrixRecord) -> tuple[str, ...]:
    """Format a matrix as one cell for each entry of `HEAD`."""
    return (printable(m["tensor"]), "×".join(map(str, m["shape"])), str(len(m["intruders"])),
            " ".join(str(j + 1) for j in m["intruders"]), f"{min(m['similarity']):.3f}", f"{m['singular_values'][0]:.4g}",
            f"{m['delta_norm']:.4g}", f"{m['intruder_energy']:.1%}", "yes" if m["certified"] else "no")  # fmt: skip


def findings_text(tree: FindingsRecord) -> str:
    """Format all matrices as a text table of any width, followed by a summary."""
    rows = [HEAD, *map(_cells, tree["matrices"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", *summary_lines(tree)[:2]])


def findings_html(tree: FindingsRecord) -> str:
    """Format the matrices with the most intruders as a small HTML table for notebooks."""
    most = sorted(tree["matrices"], key=lambda m: (-len(m["intruders"]), -m["intruder_energy"]))[:SHOWN]
    rows = [_cells(m) for m in most]
    left = len(tree["matrices"]) - len(most)
    more = f"<p>and {counted(left, 'matrix')} more, with no more intruders than these</p>" if left else ""
    caption = "<br>".join(map(html.escape, summary_lines(tree)[:2]))
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in HEAD)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><caption>{caption}</caption><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>{more}"


def findings_frame(tree: FindingsRecord, by: Literal["matrix", "direction"]) -> pandas.DataFrame:
    """Make a data frame of the figures, with one row for each matrix or each leading direction."""
    if by not in ("matrix", "direction"):
        raise UsageError(f"by: expected 'matrix' or 'direction', found {by!r}")
    try:
        library = importlib.import_module("pandas")
    except ImportError:
        raise MissingPackageError(
            "to_pandas: needs pandas, which is not installed; pip install 'intruder-streamer[pandas]'", "pandas"
        ) from None
    rows = [row for m in tree["matrices"] for row in ([_matrix_row(m)] if by == "matrix" else _direction_rows(m))]
    return library.DataFrame(rows)


def _matrix_row(m: MatrixRecord) -> dict[str, Any]:
    own = {key: value for key, value in m.items() if not isinstance(value, list)}
    return {
        "tensor": own.pop("tensor"),
        "module": own.pop("module"),
        "rows": m["shape"][0],
        "columns": m["shape"][1],
        "intruder_count": len(m["intruders"]),
        "intruders": tuple(m["intruders"]),
        "least_similarity": min(m["similarity"]),
        "largest_singular_value": m["singular_values"][0],
        **own,
    }


def _direction_rows(m: MatrixRecord) -> list[dict[str, Any]]:
    keys = ("singular_values", "similarity", "similarity_low", "similarity_high")
    return [
        {"tensor": m["tensor"], "module": m["module"], "direction": j, "singular_value": value, "similarity": similarity,
         "similarity_low": low, "similarity_high": high, "intruder": j in m["intruders"], "degenerate": j in m["degenerate"]}
        for j, (value, similarity, low, high) in enumerate(zip(*(m[key] for key in keys), strict=True))  # type: ignore[literal-required]  # all four are keys of a record
    ]  # fmt: skip
