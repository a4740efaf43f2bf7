"""Format an evaluation for people: the verdict, its table, the reasons, and the commands to run next."""

from __future__ import annotations

import math
from dataclasses import dataclass

from streamer.evaluation.columns import cell, figures, percent
from streamer.evaluation.shrinks import ShrinkComparison, placed, rounded_up
from streamer.evaluation.suggestion import WORTH, Suggestion, Trade
from streamer.evaluation.variant_losses import VariantLosses
from streamer.measuring.identity import input_options
from streamer.measuring.statistics import telling
from streamer.measuring.variants import ADAPTER_ROW, BASE_ROW
from streamer.methods import NullSpace, RegMean, Shrink, takes_findings

_RULE = f"a suggested variant regains over {WORTH:g} of what it gives up, by two standard errors"


@dataclass(frozen=True)
class Names:
    """Words of the commands to show, quoted for a shell.

    Attributes
    ----------
    inputs, general, task, output
        Base and adapter, the two texts, and the file of the evaluation.
    findings, coefficients, mapped
        Files of findings, coefficients and map; empty if unknown.
    reading
        Options that set how much of the texts is read, each with a space before it.
    others
        Options that name the other texts, in the same form.
    """

    inputs: str = "BASE ADAPTER"
    general: str = "GENERAL"
    task: str = "TASK"
    output: str = "EVALUATION"
    findings: str = ""
    coefficients: str = ""
    mapped: str = ""
    reading: str = ""
    others: str = ""


def table_text(evaluation: VariantLosses, suggestion: Suggestion) -> str:
    """Format the verdict, the table, its legend, the reasons and the commands as text of unlimited width."""
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
    words = *reasons(evaluation, suggestion), *commands(evaluation, suggestion)
    return "\n".join([verdict(evaluation, suggestion), "", *lines, "", *legend, "", *words])


def verdict(evaluation: VariantLosses, suggestion: Suggestion) -> str:
    """Say in one line which variant to use."""
    variant, keep = suggestion.variant, f"{100 * suggestion.keep:g}%"
    if suggestion.swapped:
        return "no suggestion: the adapter's loss on the task's text is above the base's; are the two texts swapped?"
    if suggestion.reason == "not learned":
        return "no suggestion: there is no evidence that the adapter learned the task's text"
    if suggestion.reason == "not forgotten":
        return "use the adapter as it is: there is no evidence that it diverges from the base"
    if suggestion.reason == "none better":
        return f"use the adapter as it is: no variant that keeps {keep} of what it learned diverges measurably less from the base"
    if suggestion.reason == "not worth it":
        return f"use the adapter as it is: no variant that keeps {keep} of what it learned is worth what it gives up"
    if variant is None:
        return "no suggestion yet: a shrink that was not measured is better than the measured variants"
    v = evaluation.variants.index(variant)
    if not evaluation.task.change.divides:
        return f"use {variant.name}: it {_trade(Trade.of(evaluation.general, evaluation.task, v))}"
    kept, left = percent(evaluation.task.fraction(v)), percent(evaluation.general.kl_fraction(v))
    return f"use {variant.name}: it keeps {kept} of what the adapter learned and leaves {left} of its divergence from the base"


def reasons(evaluation: VariantLosses, suggestion: Suggestion) -> list[str]:
    """Explain the suggestion, its cost, its comparison with the equal shrink, and what the table leaves out."""
    return [*_reasons(evaluation, suggestion), *left_out(evaluation)]


def left_out(evaluation: VariantLosses) -> list[str]:
    """Explain what the table does not show: rounding, methods that were not run, and shares whose denominator is too small."""
    lines = []
    if evaluation.facts["dtype"] != "float32":
        lines.append(f"base weights and activations were rounded to {evaluation.facts['dtype']} for their products")
    if evaluation.facts.get("intruders") == 0:
        epsilon = evaluation.facts["detection"]["threshold_epsilon"]
        lines.append(f"no intruder was found (epsilon {epsilon:g}): paper and project change nothing, and were not run")
    others = ((f"{name} left or kept", name, sums) for name, sums in evaluation.others.items())
    for of, on, sums in (
        ("kept", "the task's text", evaluation.task),
        ("loss left", "general text", evaluation.general),
        *others,
    ):
        if not (change := sums.change).divides:
            lines.append(
                f"{of} is not shown: the adapter changes the loss on {on} by only {cell(change)}, less than "
                f"{2 * telling(change.sequences):.1f} standard errors; longer texts may help"
            )
    for name, sums in evaluation.answered.items():
        if not (change := sums.accuracy("acc", ADAPTER_ROW, BASE_ROW)).divides:
            lines.append(
                f"{name} acc left or kept is not shown: the adapter changes the accuracy by only {percent(change)}, and a share needs "
                f"over {2 * telling(change.sequences):.1f} standard errors; more questions may help"
            )
    gain = evaluation.task.top1_gain
    if math.isfinite(gain.value) and not evaluation.reliable()["top1_kept"]:
        lines.append(
            f"top-1 kept is not shown: the adapter raises top-1 on the task's text by {100 * gain.value:.2f} ± {100 * gain.error:.2f} "
            f"points, and a share needs a gain of over {2 * telling(gain.sequences):.1f} standard errors; longer texts may help"
        )
    return lines


def _trade(trade: Trade) -> str:
    return f"regains {cell(trade.regained)} nats of KL per token of general text and gives up {cell(trade.given_up)} of loss on the task's"


def _reasons(evaluation: VariantLosses, suggestion: Suggestion) -> list[str]:
    general, task, variant = evaluation.general, evaluation.task, suggestion.variant
    if suggestion.reason == "not learned":  # `left_out` explains a change that is too small to divide
        return (
            [f"the adapter's loss on the task's text minus the base's is {cell(task.change)}"]
            if task.change.divides
            else []
        )
    if suggestion.declined is not None:
        trade = Trade.of(general, task, evaluation.variants.index(suggestion.declined))
        return [f"{suggestion.declined.name}, which diverges least, {_trade(trade)}; {_RULE}"]
    lines = []
    if suggestion.reason == "forgets least" and variant is not None:
        v = evaluation.variants.index(variant)
        lines.append(
            f"of the variants that keep {100 * suggestion.keep:g}% of what was learned, {variant.name} has the least divergence from the "
            f"base, {percent(general.kl_fraction(v))} of the adapter's; it {_trade(Trade.of(general, task, v))}"
        )
        if variant.method == Shrink.name:
            methods = dict.fromkeys(v.method for v in evaluation.variants if v.mitigation_lambda is not None)
            near = [
                f"{name} {lam:g}"
                for name in map(str, methods)
                if (lam := placed(evaluation.variants, task, suggestion.keep, name)[1]) is not None
                and not evaluation.lost(name, suggestion.keep)
            ]
            also = f"; not measured, and perhaps better: {', '.join(near)}" if near else ""
            return [*lines, f"it is a shrink of the whole adapter{also}"]
        if suggestion.shrink is None:
            lines.append(
                "it was not compared with a shrink of the whole adapter: that needs --method shrink at two values of lambda"
            )
    return lines if suggestion.shrink is None else [*lines, _shrink_line(suggestion.shrink)]


def _shrink_line(found: ShrinkComparison) -> str:
    words = {
        "better": "it is better than",
        "worse": "the variant with the least divergence is worse than",
        "not told apart": "it cannot be told apart from",
    }
    low, high = found.between
    return (
        f"{words[found.verdict]} a shrink that keeps the same share (lambda {found.mitigation_lambda:.3f}, interpolated between {low:g} "
        f"and {high:g}): general loss {cell(found.loss)}, KL {cell(found.kl)}"
    )


def commands(evaluation: VariantLosses, suggestion: Suggestion, names: Names | None = None) -> list[str]:
    """Return the command that makes the suggested variant, and at the end what to do next."""
    names, variant, reason = names or Names(), suggestion.variant, suggestion.reason
    facts = evaluation.facts
    options = names.reading + (f" --dtype {facts['dtype']}" if facts["dtype"] != "float32" else "")
    options += "".join(f" {word}" for word in input_options(facts))
    projected = " --projected" if facts["projected"] else ""
    evaluate = f"streamer evaluate {names.inputs} --general {{}} --task {{}} -o {{}}{options}{projected}{names.others}"
    if suggestion.swapped:
        return [f"next: {evaluate.format(names.task, names.general, 'OTHER')}"]
    if reason == "not learned":
        return ["next: give --task text that the adapter was trained for, or more of it (--sequences)"]
    if suggestion.shrink is not None and variant is None:
        lam = rounded_up(suggestion.shrink.mitigation_lambda)
        return [f"next: {evaluate.format(names.general, names.task, names.output)} --method shrink --lambda {lam:g}"]
    assert variant is not None
    command, *words = evaluation.command(variant)
    made = " ".join(["streamer", command, names.inputs, "-o", "OUTPUT", *words])
    if names.findings and takes_findings(variant.method):
        made += f" --findings {names.findings}"
    elif variant.method == RegMean.name:
        made += f" --coefficients {names.coefficients or 'COEFFICIENTS'}"
    elif variant.method == NullSpace.name:
        made += f" --map {names.mapped or 'MAP'}"
    if reason == "not forgotten" or suggestion.declined is not None:
        return ["use the adapter as it is, or merge it into the base", f"next: {made}"]
    if any(v.method == RegMean.name for v in evaluation.variants):
        return [f"next: {made}"]
    keep = f" --keep {suggestion.keep:g}" if suggestion.keep < 1 else ""
    return [
        *([f"made by: {made}"] if reason == "forgets least" else []),
        "a repair usually forgets much less; fit it on other text than this, on which its result can then be measured",
        f"next: streamer repair {names.inputs} --general TEXT --task TEXT{keep} -o OUTPUT{options}",
    ]
