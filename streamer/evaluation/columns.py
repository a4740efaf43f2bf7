"""Make the columns of an evaluation's table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from streamer.evaluation.variant_losses import VariantLosses
from streamer.measuring.statistics import QUANTILES, Estimate, SequenceSums
from streamer.measuring.variants import ADAPTER_ROW, BASE_ROW


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
