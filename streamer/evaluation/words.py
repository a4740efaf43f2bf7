"""Write an evaluation for people: the verdict, the reasons, the columns of the table, and the commands to run next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from streamer.detection.options import DetectionOptions
from streamer.evaluation.curve import ShrinkComparison, rounded_up
from streamer.evaluation.judgement import WORTH, Suggestion
from streamer.json_types import JsonObject
from streamer.measuring.facts import input_options
from streamer.measuring.statistics import (
    Estimate,
    EvaluatedVariant,
    Measured,
    SequenceSums,
    critical_value,
)
from streamer.methods import METHODS, NullSpace, RegMean, Shrink, takes_findings
from streamer.streaming.variants import ADAPTER_ROW
from streamer.tables import Column

VERDICTS = {
    "not learned": "no suggestion: there is no evidence that the adapter learned the task's text",
    "not forgotten": "use the adapter as it is: there is no evidence that it diverges from the base",
    "none better": "use the adapter as it is: no variant that keeps {} of what it learned diverges measurably less from the base",
    "not worth it": "use the adapter as it is: no variant that keeps {} of what it learned is worth what it gives up",
    "a shrink is better": "no suggestion yet: a shrink that was not measured is better than the measured variants",
}
"""What to say if no method is suggested, with the share to keep."""


def gain_of(text: JsonObject) -> str:
    """Name what is kept of an adapter on a text of its task."""
    return (
        "its behaviour on text that it wrote" if text.get("drawn") else "what the adapter learned"
    )


def verdict(measured: Measured, suggestion: Suggestion) -> str:
    """Say in one line which variant to use."""
    variant = suggestion.variant
    if suggestion.swapped:
        return "no suggestion: the adapter's loss on the task's text is above the base's; are the two texts swapped?"
    if variant is None or suggestion.trade is None or suggestion.reason in VERDICTS:
        return VERDICTS[suggestion.reason].format(f"{100 * suggestion.keep:g}%")
    if not measured.task.change.divides:
        trade = suggestion.trade
        return f"use {variant.name}: it {traded(cell(trade.regained), cell(trade.given_up))}"
    shares = measured.shares(measured.variants.index(variant))
    gain = gain_of(measured.facts["texts"]["task"])
    return (
        f"use {variant.name}: it keeps {percent(shares['kept'])} of {gain} and leaves {percent(shares['divergence'])} "
        "of its divergence from the base"
    )


def traded(regained: str, given_up: str) -> str:
    """Say what a variant regains and gives up."""
    return f"regains {regained} nats of KL per token of general text and gives up {given_up} of loss on the task's"


VERDICT_ON_SHRINK = {
    "better": "it is better than",
    "worse": "the variant with the least divergence is worse than",
    "not told apart": "it cannot be told apart from",
}


def reasons(measured: Measured, suggestion: Suggestion) -> list[str]:
    """Explain the suggestion, its cost, its comparison with the equal shrink, and what the table leaves out."""
    facts = measured.facts
    lines = list(_choice_reasons(measured, suggestion))
    if suggestion.shrink is not None:
        lines.append(_beside_shrink(suggestion.shrink))
    if facts["dtype"] != "float32":
        lines.append(
            f"base weights, and the inputs and results of their products, were rounded to {facts['dtype']}"
        )
    if facts.get("intruders") == 0:
        epsilon = facts["detection"]["threshold_epsilon"]
        lines.append(
            f"no intruder was found (epsilon {epsilon:g}): paper and project change nothing, and were not run"
        )
    return lines + [
        f"{name} is not shown: the adapter's own change is only {cell(change)}, and a share needs over "
        f"{2 * critical_value(change.sequences):.1f} standard errors; more text may help"
        for name, change in _hidden(measured)
    ]


def _choice_reasons(measured: Measured, suggestion: Suggestion) -> Iterator[str]:
    """Explain what is suggested, and what it costs."""
    change = measured.task.change
    if suggestion.reason == "not learned" and change.divides:  # else `_hidden` explains it
        yield f"the adapter's loss on the task's text minus the base's is {cell(change)}"
    trade = suggestion.trade
    if trade is None:
        return
    costs = traded(cell(trade.regained), cell(trade.given_up))
    if suggestion.reason == "not worth it":
        yield (
            f"{trade.name}, which diverges least, {costs}; a suggested variant regains over {WORTH:g} of what it gives up, by two "
            "standard errors"
        )
        return
    variant = suggestion.variant
    assert variant is not None
    fits = any(v.keep is not None for v in measured.variants)
    left = measured.general.share("kl", measured.variants.index(variant))
    yield (
        f"of the variants that keep {100 * suggestion.keep:g}% of what was learned"
        f"{', a fit within two standard errors' if fits else ''}, {variant.name} has the least divergence from the base, "
        f"{percent(left)} of the adapter's; it {costs}"
    )
    if variant.method == Shrink.name:
        yield "it is a shrink of the whole adapter"
    elif suggestion.shrink is None:
        yield "it was not compared with a shrink of the whole adapter: that needs --method shrink at two values of lambda"


def _beside_shrink(shrink: ShrinkComparison) -> str:
    """Compare the variant with a shrink."""
    low, high = shrink.between
    other = f"shrink {low:g}, which keeps the most"
    if low != high:
        other = f"a shrink that keeps the same share (lambda {shrink.mitigation_lambda:.3f}, interpolated between {low:g} and {high:g})"
    return f"{VERDICT_ON_SHRINK[shrink.verdict]} {other}: general loss {cell(shrink.loss)}, KL {cell(shrink.kl)}"


def _hidden(measured: Measured) -> Iterator[tuple[str, Estimate]]:
    """List the shares that the table leaves out, with their denominators, which are too small."""
    changes = {"kept": measured.task.change, "loss left": measured.general.change}
    for name, sums in measured.others.items():
        changes[f"{name} left or kept"] = sums.change
    for name, change in changes.items():
        if not change.divides:
            yield name, change
    gain = measured.top1_gain
    if math.isfinite(gain.value) and not measured.reliable()["top1_kept"]:
        yield "top-1 kept", gain


BETWEEN = "where the {} lies between the base's (0%) and the adapter's (100%)"

LEGENDS = {
    "variant": ("* no other variant has both a lower task loss and a lower divergence", 9),
    "general": ("mean loss in nats on general text", 4),
    "vs adapter": ("this loss minus the adapter's, ± the standard error, paired by sequence", 5),
    "loss left": (BETWEEN.format("general loss"), 2),
    "KL": ("divergence from the base on general text, in nats", 6),
    "KL left": ("this divergence as a share of the adapter's: the forgetting that is left", 8),
    "same top": (
        "tokens of general text for which the variant and the base have the same most likely token",
        2,
    ),
    "task": ("mean loss in nats on the task's text", 3),
    "kept": (BETWEEN.format("task loss"), 8),
    "behaviour kept": (
        "1 - KL(adapter ‖ variant) / KL(adapter ‖ base) on the task's text, which needs no labels",
        5,
    ),
    "top-1": ("tokens of the task's text that are the variant's most likely token", 1),
    "top-1 kept": (BETWEEN.format("top-1"), 5),
}
"""What each column shows, and its priority; see `Column`."""


def figures(measured: Measured) -> list[Column]:
    """Make the columns of an evaluation's table, names first; a star marks variants on the front."""
    general = measured.general
    task = measured.task
    front = measured.front()
    reliable = measured.reliable()
    cells_of = {
        "variant": [v.name + (" *" if v.name in front else "") for v in measured.variants],
        "general": _losses(general),
        "vs adapter": cells(general.means("loss", ADAPTER_ROW)),
        "loss left": _shares(general, "loss", reliable["forgetting"]),
        "KL": cells(general.means("kl")),
        "KL left": _shares(general, "kl"),
        "same top": _parts(general, "agree"),
        "task": _losses(task),
        "kept": _shares(task, "loss", reliable["kept"]),
        "behaviour kept": _shares(task, "kl_from_adapter"),
        "top-1": _parts(task, "right"),
        "top-1 kept": _shares(task, "right", reliable["top1_kept"]),
    }
    columns = [
        Column(title, own, *LEGENDS[title], left=title == "variant")
        for title, own in cells_of.items()
    ]
    for name, sums in measured.others.items():
        left = "kept" if sums.effect == "improves" else "left"
        shares = _shares(sums, "loss", sums.change.divides)
        divergence = "divergence from the base on this text, in nats"
        columns += [
            Column(name, _losses(sums), "mean loss in nats on this text", 2),
            Column(f"{name} {left}", shares, BETWEEN.format("loss on this text"), 4),
            Column(f"{name} KL", cells(sums.means("kl")), divergence, 1),
        ]
    return columns


def _losses(sums: SequenceSums) -> list[str]:
    """Write the mean losses of variants."""
    return [f"{mean.value:.4f}" for mean in sums.means("loss")]


def _parts(sums: SequenceSums, name: str) -> list[str]:
    """Write fractions of all tokens in percent, without their errors."""
    return [
        f"{100 * mean.value:.1f}%" if math.isfinite(mean.value) else "-"
        for mean in sums.means(name)
    ]


def _shares(sums: SequenceSums, name: str, shown: bool = True) -> list[str]:
    """Write the shares of variants; a dash if they are not shown."""
    return [percent(sums.share(name, row)) if shown else "-" for row in range(len(sums.loss))]


def cell(estimate: Estimate) -> str:
    """Write a figure with two digits of its error."""
    (text,) = cells([estimate])
    return text


def cells(estimates: Sequence[Estimate]) -> list[str]:
    """Write figures of one kind with as many decimals as show two digits of the largest error."""
    error = max(e.error for e in estimates)
    digits = 4
    if 0 < error < math.inf:
        digits = min(6, max(2, 1 - math.floor(math.log10(error))))
    return [
        f"{e.value:.{digits}f} ± {e.error:.{digits}f}" if math.isfinite(e.value) else "-"
        for e in estimates
    ]


def percent(share: Estimate) -> str:
    """Write a share with its error in percent; a dash if undefined."""
    if not math.isfinite(share.value):
        return "-"
    return f"{100 * share.value + 0.0:.1f}% ± {100 * share.error:.1f}"


def command_of(measured: Measured, variant: EvaluatedVariant, merges: bool = False) -> list[str]:
    """Return the command that makes a variant, with its options; the caller adds inputs, output and files.

    The command is `mitigate` if the variant can be written as an adapter without loss; else, or with `merges`, it is `merge`.
    """
    facts = measured.facts
    method = variant.method
    exact = facts["projected"] or (method in METHODS and METHODS[method].keeps_rank)
    mitigates = method is not None and exact and facts["factored"] and not merges
    words = ["mitigate" if mitigates else "merge"]
    lam = variant.mitigation_lambda
    if variant.keep is not None or lam is not None:
        words += ["--method", str(method)]
    if variant.keep is None:
        words += ["--lambda", repr(1 if lam is None else lam)]
    if takes_findings(method):
        if facts["scale"] == "first":
            words += ["--select", "first"]
        for option, key in (("--top-k", "top_k"), ("--epsilon", "threshold_epsilon")):
            used = facts["detection"][key]
            if used != getattr(DetectionOptions, key):
                words += [option, f"{used}"]
    if lam is not None and not 0 <= lam <= 1:
        words.append("--amplify")
    words += input_options(facts)
    if facts["quantized"] and not mitigates:
        words.append("--dequantize")
    return words


@dataclass(frozen=True)
class ShellWords:
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
    mitigated
        Whether the adapter already is the output of `mitigate` or `repair`, so that a merge comes next.
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
    mitigated: bool = field(default=False, kw_only=True)


UNNAMED = ShellWords()


def commands(measured: Measured, suggestion: Suggestion, names: ShellWords = UNNAMED) -> list[str]:
    """Return the command that makes the suggested variant, and at the end what to do next."""
    facts = measured.facts
    variant = suggestion.variant
    options = names.reading
    if facts["dtype"] != "float32":
        options += f" --dtype {facts['dtype']}"
    options += "".join(f" {word}" for word in input_options(facts))

    def evaluate(general: str, task: str, output: str) -> str:
        texts = {"general": general, "task": task}
        given = "".join(f" --{name} {text}" for name, text in texts.items() if text)
        projected = " --projected" if facts["projected"] else ""
        return (
            f"streamer evaluate {names.inputs}{given} -o {output}{options}{projected}{names.others}"
        )

    if suggestion.swapped:
        return [f"next: {evaluate(names.task, names.general, 'OTHER')}"]
    if suggestion.reason == "not learned":
        return [
            "next: give --task text that the adapter was trained for, or more of it (--sequences)"
        ]
    if variant is None:
        assert suggestion.shrink is not None
        again = evaluate(names.general, names.task, names.output)
        lam = rounded_up(suggestion.shrink.mitigation_lambda)
        return [f"next: {again} --method shrink --lambda {lam:g}"]
    make = _making(measured, variant, names)
    if suggestion.reason in ("not forgotten", "not worth it"):
        return ["use the adapter as it is, or merge it into the base", f"next: {make}"]
    if names.mitigated or any(v.method == RegMean.name for v in measured.variants):
        return [f"next: {make}"]
    keep = f" --keep {suggestion.keep:g}" if suggestion.keep < 1 else ""
    return [
        *([f"made by: {make}"] if suggestion.reason == "forgets least" else []),
        "a repair usually forgets much less; it needs no text, but is better with text of the task (--task), other than this",
        f"next: streamer repair {names.inputs}{keep} -o OUTPUT{options}",
    ]


def _making(measured: Measured, variant: EvaluatedVariant, names: ShellWords) -> str:
    """Write the command that makes a variant, with the names of inputs and files."""
    command, *words = command_of(measured, variant, merges=names.mitigated)
    make = " ".join(["streamer", command, names.inputs, "-o", "OUTPUT", *words])
    if names.findings and takes_findings(variant.method):
        return f"{make} --findings {names.findings}"
    if variant.method == RegMean.name:
        return f"{make} --coefficients {names.coefficients or 'COEFFICIENTS'}"
    if variant.method == NullSpace.name:
        return f"{make} --map {names.mapped or 'MAP'}"
    return make
