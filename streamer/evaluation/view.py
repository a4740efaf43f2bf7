"""Format an evaluation for people: the cells of its table, and its suggestion in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamer.evaluation.statistics import Estimate
from streamer.evaluation.suggestion import ADAPTER_ROW, BASE_ROW, EvaluatedVariant, ShrinkComparison, Suggestion

if TYPE_CHECKING:
    from streamer.evaluation.evaluation import Evaluation


@dataclass(frozen=True)
class Figures:
    """A column of figures: its title, a cell for each variant, its meaning, and how long it stays where room is scarce."""

    head: str
    cells: Sequence[str]
    about: str
    keep: int


def figures(evaluation: Evaluation) -> list[Figures]:
    """Make the columns of an evaluation's table, the first of them names; a star marks those of the front."""
    general, task, numbers = evaluation.general, evaluation.task, range(len(evaluation.variants))
    best = set(evaluation.front())
    return [
        Figures("variant", [v.name + (" *" if v.name in best else "") for v in evaluation.variants],
                "* no other variant has both a lower loss on the task and a lower divergence", 9),
        Figures("general", [f"{general.mean(general.loss[v]).value:.4f}" for v in numbers], "mean loss in nats on general text", 4),
        Figures("vs adapter", _cells([general.loss_difference(v, ADAPTER_ROW) for v in numbers]),
                "that loss less the adapter's, ± the standard error, paired by sequence", 5),
        Figures("forgetting", [_percent(general.share(v)) for v in numbers],
                "rise of that loss above the base's; 100% is the adapter's", 7),
        Figures("KL", _cells([general.mean(general.kl[v]) for v in numbers]), "divergence from the base on general text, in nats", 6),
        Figures("same top", [f"{100 * general.mean(general.agree[v]).value:.1f}%" for v in numbers],
                "tokens of general text whose likeliest next one is the base's", 2),
        Figures("task", [f"{task.mean(task.loss[v]).value:.4f}" for v in numbers], "mean loss in nats on the task's text", 3),
        Figures("kept", [_percent(task.share(v)) for v in numbers], "fall of that loss below the base's; 100% is the adapter's", 8),
    ]  # fmt: skip


def table_text(evaluation: Evaluation, suggestion: Suggestion) -> str:
    """Format the table, its legend and the suggestion as text of any width."""
    columns = figures(evaluation)
    widths = [max(map(len, (c.head, *c.cells))) for c in columns]
    rows = [
        [c.head for c in columns],
        ["-" * width for width in widths],
        *zip(*(c.cells for c in columns), strict=True),
    ]
    lines = ["  ".join([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    indent = max(len(c.head) for c in columns) + 2
    legend = [f"{c.head:<{indent}}{c.about}" for c in columns]
    return "\n".join([*lines, "", *legend, "", *suggestion_lines(evaluation, suggestion)])


def suggestion_lines(
    evaluation: Evaluation, suggestion: Suggestion, inputs: str = "BASE ADAPTER", more: str = ""
) -> list[str]:
    """Say what is suggested, why, what it costs, how it is made, and whether it is better than the equal shrink.

    Parameters
    ----------
    inputs
        Base and adapter as the command that is shown has them.
    more
        Its further options, such as ``--findings F``.
    """
    general, task, variant = evaluation.general, evaluation.task, suggestion.variant
    share = f"{100 * suggestion.keep:g}%"
    if variant is None:
        change = _cell(task.loss_difference(ADAPTER_ROW, BASE_ROW))
        return [
            f"no suggestion: it is not told that the adapter has learned the task's text (more text may tell): its loss there "
            f"less the base's is {change}"
        ]
    if suggestion.reason == "not forgotten":
        change = _cell(general.loss_difference(ADAPTER_ROW, BASE_ROW))
        return [
            f"ship the adapter as it is: it is not told that it forgets (more text may tell): its loss on general text "
            f"less the base's is {change}"
        ]
    if suggestion.reason == "none better":
        return [
            f"ship the adapter as it is: none that keeps {share} of what was learned forgets less by more than the error"
        ]
    v = evaluation.variants.index(variant)
    command, *options = evaluation.command(variant)
    cost = task.loss_difference(v, ADAPTER_ROW)
    lines = [
        f"of the variants that keep {share} of what was learned, {variant.name} forgets least, by its divergence from the base",
        f"it leaves {_percent(general.share(v))} of the forgetting ({_percent(general.kl_share(v))} of the divergence), keeps "
        f"{_percent(task.share(v))} of what was learned, and costs {_cell(cost)} of the task's loss",
    ]
    if suggestion.least_loss is not None:
        difference = general.loss_difference(v, evaluation.variants.index(suggestion.least_loss))
        lines.append(
            f"by its loss on general text {suggestion.least_loss.name} forgets least: {_cell(difference)} lower"
        )
    lines.append(_shrink_line(variant, suggestion.shrink, share))
    lines.append(f"made by: {' '.join(['streamer', command, inputs, '-o', 'OUTPUT', *options])}{more}")
    return lines


def _shrink_line(variant: EvaluatedVariant, found: ShrinkComparison | None, share: str) -> str:
    if variant.method == "shrink":
        return f"it is a shrink of the whole adapter: no variant that keeps {share} and scales intruders alone forgets less"
    if found is None:
        return "against a shrink of the whole adapter: not compared, which takes two at least that were evaluated and enclose what it keeps"
    low, high = found.between
    words = {
        "better": "it is better than",
        "worse": "it is worse than",
        "not told apart": "it is not told apart from",
    }[found.verdict]
    better = f"; evaluate that one too: --method shrink --lambda {found.mitigation_lambda:.2f}"
    return (
        f"{words} a shrink that keeps the same (lambda {found.mitigation_lambda:.3f}, interpolated between {low:g} and {high:g}): "
        f"general loss {_cell(found.loss)}, KL {_cell(found.kl)}{better if found.verdict == 'worse' else ''}"
    )


def _cell(estimate: Estimate) -> str:
    """Write a figure with two digits of its error."""
    return _cells([estimate])[0]


def _cells(estimates: Sequence[Estimate]) -> list[str]:
    """Write figures of one kind with as many digits as the largest of their errors has, two of its own."""
    error = max(e.error for e in estimates)
    digits = min(6, max(2, 1 - math.floor(math.log10(error)))) if 0 < error < math.inf else 4
    return [f"{e.value:.{digits}f} ± {e.error:.{digits}f}" for e in estimates]


def _percent(share: Estimate) -> str:
    return f"{100 * share.value + 0.0:.1f}% ± {100 * share.error:.1f}" if math.isfinite(share.value) else "-"
