"""Format an evaluation for people: the verdict, its table, the reasons, and the commands to run next.

Make the columns of an evaluation's table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from streamer.evaluation.losses import VariantLosses
from streamer.evaluation.suggestion import WORTH, ShrinkComparison, Suggestion, Trade, rounded_up
from streamer.measuring.result_file import ADAPTER_ROW, BASE_ROW, input_options
from streamer.measuring.statistics import QUANTILES, Estimate, SequenceSums, telling
from streamer.methods import NullSpace, RegMean, Shrink, takes_findings


@dataclass(frozen=True)
class Figures:
    """A column of figures: its title, a cell for each variant, its meaning, and its priority if the terminal is narrow."""

    head: str
    cells: Sequence[str]
    about: str
    priority: int


def figures(evaluation: VariantLosses, every: bool = False) -> list[Figures]:
    """Make the columns of an evaluation's table, names first; a star marks variants on the front.

    Parameters
    ----------
    every
        Whether to include the figures of llama-perplexity and of PEFT's method comparison.
    """
    general, task, numbers = evaluation.general, evaluation.task, range(len(evaluation.variants))
    best, gained = set(evaluation.front()), evaluation.reliable()["top1_kept"]
    return [
        Figures("variant", [v.name + " *" * (v.name in best) for v in evaluation.variants],
                "* no other variant has both a lower task loss and a lower divergence", 9),
        Figures("general", [f"{general.mean(general.loss[v]).value:.4f}" for v in numbers], "mean loss in nats on general text", 4),
        Figures("vs adapter", cells([general.loss_difference(v, ADAPTER_ROW) for v in numbers]),
                "this loss minus the adapter's, ± the standard error, paired by sequence", 5),
        Figures("loss left", _shares(general, numbers),
                "where the general loss lies between the base's (0%) and the adapter's (100%)", 2),
        Figures("KL", cells([general.mean(general.kl[v]) for v in numbers]), "divergence from the base on general text, in nats", 6),
        Figures("KL left", [percent(general.kl_fraction(v)) for v in numbers],
                "this divergence as a share of the adapter's: the forgetting that is left", 8),
        Figures("same top", [percent_of(general.mean(general.agree[v])) for v in numbers],
                "tokens of general text for which the variant and the base have the same most likely token", 2),
        *_accuracies("general", general, numbers, left=True),
        Figures("task", [f"{task.mean(task.loss[v]).value:.4f}" for v in numbers], "mean loss in nats on the task's text", 3),
        Figures("kept", _shares(task, numbers), "where the task loss lies between the base's (0%) and the adapter's (100%)", 8),
        Figures("top-1", [percent_of(task.mean(task.right[v])) for v in numbers],
                "tokens of the task's text that are the variant's most likely token", 1),
        Figures("top-1 kept", [percent(task.top1_fraction(v)) if gained else "-" for v in numbers],
                "where top-1 lies between the base's (0%) and the adapter's (100%)", 5),
        *_accuracies("task", task, numbers, left=False),
        *(column for name, sums in evaluation.others.items() for column in _other(evaluation, name, sums)),
        *(field_figures(general) if every else ()),
    ]  # fmt: skip


def field_figures(general: SequenceSums) -> list[Figures]:
    """Make the columns that llama-perplexity and PEFT's method comparison report, on general text."""
    variants = range(len(general.loss))
    return [
        Figures("CE rise", cells([general.loss_difference(v, BASE_ROW) for v in variants]),
                "mean loss on general text minus the base's, which PEFT's method comparison calls forgetting", 0),
        Figures("PPL ratio", cells([general.perplexity_ratio(v) for v in variants]), "perplexity on general text divided by the base's", 0),
        *(Figures(f"KL {100 * share:g}%", [_four(general.kl_quantile(v, share)) for v in variants],
                  f"KL that {100 * share:g}% of general text's tokens do not exceed, within 1%", 0) for share in QUANTILES.values()),
        Figures("KL max", [_four(general.kl_largest(v)) for v in variants], "the largest KL of a token of general text", 0),
        Figures("mean Δp", cells([_in_percent(general.mean(general.p_change[v])) for v in variants]),
                "mean change in the probability of general text's tokens, in %", 0),
        Figures("RMS Δp", cells([_in_percent(general.p_rms(v)) for v in variants]), "root mean square of this change, in %", 0),
    ]  # fmt: skip


def _four(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def _in_percent(estimate: Estimate) -> Estimate:
    return Estimate(100 * estimate.value, 100 * estimate.error, estimate.sequences)


def _other(evaluation: VariantLosses, name: str, sums: SequenceSums) -> list[Figures]:
    """Make the columns of another text."""
    variants, left = range(len(evaluation.variants)), sums.effect != "improves"
    return [
        Figures(name, [f"{sums.mean(sums.loss[v]).value:.4f}" for v in variants], "mean loss in nats on this text", 2),
        Figures(f"{name} {'left' if left else 'kept'}", _shares(sums, variants),
                "where the loss on this text lies between the base's (0%) and the adapter's (100%)", 4),
        Figures(f"{name} KL", cells([sums.mean(sums.kl[v]) for v in variants]), "divergence from the base on this text, in nats", 1),
        *_accuracies(name, sums, variants, left),
    ]  # fmt: skip


def _accuracies(name: str, sums: SequenceSums, variants: Sequence[int], left: bool) -> list[Figures]:
    """Make the columns of a text of questions; none for other texts."""
    if sums.acc is None:
        return []
    percents = [percent(sums.accuracy_fraction("acc", v)) for v in variants]
    if (change := sums.accuracy("acc", ADAPTER_ROW, BASE_ROW)).divides:
        left = change.value < 0
    return [
        Figures(f"{name} acc", [percent(sums.accuracy("acc", v)) for v in variants], "questions whose right choice is the most likely", 6),
        Figures(f"{name} acc vs adapter", [percent(sums.accuracy("acc", v, ADAPTER_ROW)) for v in variants],
                "this share minus the adapter's, ± the standard error, paired by question", 4),
        Figures(f"{name} acc {'left' if left else 'kept'}", percents,
                "where this share lies between the base's (0%) and the adapter's (100%)", 5),
        Figures(f"{name} acc_norm", [percent(sums.accuracy("acc_norm", v)) for v in variants],
                "the same, by the log-likelihood per character of a choice", 1),
    ]  # fmt: skip


def _shares(sums: SequenceSums, variants: Sequence[int]) -> list[str]:
    """Write the shares of variants; a dash if the denominator is too small."""
    return [percent(sums.fraction(v)) if sums.change.divides else "-" for v in variants]


def cell(estimate: Estimate) -> str:
    """Write a figure with two digits of its error."""
    return cells([estimate])[0]


def cells(estimates: Sequence[Estimate]) -> list[str]:
    """Write figures of one kind with as many decimals as show two digits of the largest error."""
    error = max(e.error for e in estimates)
    digits = min(6, max(2, 1 - math.floor(math.log10(error)))) if 0 < error < math.inf else 4
    return [f"{e.value:.{digits}f} ± {e.error:.{digits}f}" if math.isfinite(e.value) else "-" for e in estimates]


def percent_of(part: Estimate) -> str:
    """Write a fraction of all tokens in percent, without its error."""
    return f"{100 * part.value:.1f}%" if math.isfinite(part.value) else "-"


def percent(share: Estimate) -> str:
    """Write a share with its error in percent; a dash if undefined."""
    return f"{100 * share.value + 0.0:.1f}% ± {100 * share.error:.1f}" if math.isfinite(share.value) else "-"


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
    changes = {"kept": evaluation.task.change, "loss left": evaluation.general.change}
    changes |= {f"{name} left or kept": sums.change for name, sums in evaluation.others.items()}
    for name, sums in evaluation.answered.items():
        changes[f"{name} acc left or kept"] = sums.accuracy("acc", ADAPTER_ROW, BASE_ROW)
    small = {of: change for of, change in changes.items() if not change.divides}
    if math.isfinite((gain := evaluation.task.top1_gain).value) and not evaluation.reliable()["top1_kept"]:
        small["top-1 kept"] = gain
    lines += [
        f"{of} is not shown: the adapter's own change is only {cell(change)}, and a share needs over "
        f"{2 * telling(change.sequences):.1f} standard errors; more text may help"
        for of, change in small.items()
    ]
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
            return [*lines, "it is a shrink of the whole adapter"]
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
    if low == high:
        return f"{words[found.verdict]} shrink {low:g}, which keeps the most: general loss {cell(found.loss)}, KL {cell(found.kl)}"
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
