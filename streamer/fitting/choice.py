"""Choose what a repair writes by what was measured on held-out sequences: the fit, the shrink that keeps as much, or the adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, NamedTuple, TypedDict, cast

from streamer.errors import MismatchError
from streamer.evaluation.curve import ShrinkComparison, against_shrink
from streamer.evaluation.judgement import Trade, ask_swapped
from streamer.evaluation.words import gain_of, percent, traded
from streamer.json_types import JsonObject, Mean
from streamer.measuring.statistics import (
    Estimate,
    Measured,
    SequenceSums,
    critical_value,
    flattened,
)
from streamer.methods import RegMean, Shrink, share_name
from streamer.methods.files import Coefficients
from streamer.streaming.variants import ADAPTER_ROW, BASE_ROW
from streamer.tables import Column

NEAR_SHRINK = 0.9
"""A fit that leaves at least this share of a shrink's forgetting has gained little: texts of one kind give a shrink."""

MISSED = 0.01
"""A fit misses its share if it keeps less by more than this."""


def check_learning(task: SequenceSums, name: str) -> None:
    """Check that the adapter learned a text.

    Parameters
    ----------
    task
        Sums of the base and the adapter on held-out sequences of the text.
    name
        Name of the text, for messages.

    Raises
    ------
    MismatchError
        If there is no evidence of it, so that there is no learning to keep.
    """
    learning = task.mean("loss", BASE_ROW, ADAPTER_ROW)
    if learning.is_negative:
        raise MismatchError(f"{name}: {ask_swapped(task)}")
    if not learning.is_positive:
        raise MismatchError(
            f"{name}: there is no evidence that the adapter learned this text, so there is nothing to keep: its loss less the base's is "
            f"{-learning.value:.4f} ± {learning.error:.4f} on {learning.sequences} held-out sequences, where only "
            f"{critical_value(learning.sequences):.1f} standard errors are evidence; give more text, raise --sequences, or give text of "
            "its task"
        )


def adapter_facts(measured: Measured) -> JsonObject:
    """Describe what the unchanged adapter has learned and forgotten on the held-out sequences, in nats per token.

    Returns
    -------
    dict
        ``forgotten`` says whether the divergence is significant; ``learning`` is the fall of the loss on the task's text, ``top1_gain`` the
        rise of the share of its tokens that are the likeliest, ``forgetting`` the rise of the loss on general text, and ``divergence`` the
        mean ``KL(base ‖ adapter)`` there. ``reliable`` says which of them can be denominators of shares.
    """
    divergence = measured.general.mean("kl", ADAPTER_ROW)
    return flattened(
        forgotten=divergence.is_positive,
        learning=measured.task.mean("loss", BASE_ROW, ADAPTER_ROW),
        top1_gain=measured.top1_gain,
        forgetting=measured.general.change,
        divergence=divergence,
        reliable=measured.reliable(),
    )


def set_facts(measured: Measured, keep: float, weight: float) -> JsonObject:
    """Describe the fitted factors, the last variant of an evaluation, and compare them with the shrink that keeps as much.

    Returns
    -------
    dict
        Shares are relative to the adapter: ``kept`` of the learning, ``behaviour_kept`` of its divergence from the base on the task's text,
        ``top1_kept`` of its gain in top-1, ``forgetting`` of the rise of the
        general loss, ``divergence`` of its divergence. ``missed`` says that less is kept than `keep`. ``shrinks`` has the figures of
        the measured shrinks, the mildest first. ``shrink`` describes the measured
        shrink that keeps most nearly as much, and at least `keep`; its ``loss`` and ``kl`` are the factors' minus those of the shrink that
        keeps exactly as much on general text, and ``verdict`` judges them. It is null if there is no such shrink.
    """
    row = len(measured.variants) - 1
    kept = measured.task.share("loss", row).value
    comparison = against_shrink(measured, row)
    shrinks = [
        {"lambda": variant.mitigation_lambda, **_figures(measured, row)}
        for row, variant in enumerate(measured.variants)
        if variant.method == Shrink.name
    ]
    return {
        "keep": keep,
        "missed": kept < keep - MISSED,
        "mu": weight,
        **_figures(measured, row),
        "shrinks": sorted(shrinks, key=lambda shrink: -shrink["lambda"]),
        "shrink": comparison and _shrink_facts(measured, comparison, keep, kept),
    }


def _shrink_facts(
    measured: Measured, comparison: ShrinkComparison, keep: float, kept: float
) -> JsonObject:
    """Describe the shrink, or the adapter, that keeps at least one share and most nearly another."""
    shares = {
        row: measured.task.share("loss", row).value
        for row, variant in enumerate(measured.variants)
        if row == ADAPTER_ROW or variant.method == Shrink.name
    }
    enough = [row for row, share in shares.items() if share >= keep]
    nearest = min(enough, key=lambda row: abs(shares[row] - kept))
    lam = measured.variants[nearest].mitigation_lambda
    return {
        "lambda": 1.0 if lam is None else lam,
        **_figures(measured, nearest),
        **flattened(loss=comparison.loss, kl=comparison.kl, verdict=comparison.verdict),
    }


def _figures(measured: Measured, row: int) -> JsonObject:
    return {"trade": Trade.of(measured, row).record(), **flattened(**measured.shares(row))}


def doubts(facts: JsonObject) -> Iterator[str]:
    """Warn if there is no evidence that the adapter forgets."""
    if not facts["forgotten"]:
        yield (
            f"there is no evidence that the adapter forgets, so it can be used as it is (more text may show more): its divergence from the "
            f"base on general text is {facts['divergence']:.4f} ± {facts['divergence_se']:.4f} on the held-out sequences"
        )


def misses(facts: JsonObject) -> Iterator[str]:
    """Warn if the factors keep less than requested, or diverge nearly as much as the shrink that keeps as much."""
    (fitted,) = facts["sets"]  # a list in the file
    if not facts["reliable"]["kept"]:
        return
    asked = f"{100 * fitted['keep']:g}%"
    shrink = fitted["shrink"]
    if fitted["missed"]:
        yield (
            f"{asked} was to be kept, and {100 * fitted['kept']:.1f}% is, on the held-out sequences; ask for a larger share, or give more "
            "text"
        )
    if facts["forgotten"] and shrink and fitted["divergence"] >= NEAR_SHRINK * shrink["divergence"]:
        yield (
            f"{asked}: the result is close to the shrink that keeps the same share, and diverges nearly as much from the base; the texts "
            "may be too similar: give general text of another kind than the task's"
        )


UNCHANGED_OPTIONS = {"method": Shrink.name, "mitigation_lambda": 1.0}
HALF_OPTIONS = {**UNCHANGED_OPTIONS, "mitigation_lambda": 0.5}
"""Options that leave the adapter unchanged, or scale it by half."""


# fmt: off
class RepairRow(TypedDict):
    """A model, as measured on the held-out sequences."""
    what: Annotated[Literal["adapter", "shrink", "repair"], "The unchanged adapter, a shrink, or the repair."]
    name: Annotated[str, "Its method, with lambda or share."]
    written: Annotated[bool, "Whether this was written."]
    kept: Annotated[Mean, "Share of the learning that it keeps."]
    behaviour_kept: Annotated[Mean, "1 - KL(adapter || model) / KL(adapter || base) on the task's text."]
    top1_kept: Annotated[Mean | None, "Share of the adapter's gain in top-1 on the task's text; null if undefined."]
    forgetting: Annotated[Mean | None, "Share of the rise of the general loss that it leaves; null if undefined."]
    divergence: Annotated[Mean, "Share of the forgetting that it leaves: its divergence from the base on general text as a share of the "
        "adapter's."]
# fmt: on

SHARES_MEASURED = "kept", "behaviour_kept", "top1_kept", "forgetting", "divergence"
"""Shares in a row; the unchanged adapter's are all 1."""


class Choice(NamedTuple):
    """What to write, the reason, and the options of an output that write it."""

    what: Literal["repair", "shrink", "adapter"]
    why: str
    options: JsonObject


def choose(fit: Coefficients) -> Choice:
    """Choose by the measurements: the repair if it is better than the shrink that keeps the same share, else that shrink or the adapter."""
    (fitted,) = fit.facts["sets"]
    shrink = fitted["shrink"]
    if not fit.facts["forgotten"]:
        return _as_it_is("there is no evidence that it diverges from the base")
    trades = [measured["trade"] for measured in (fitted, shrink) if measured is not None]
    if not any(trade["worth_it"] for trade in trades):
        trade, *_ = trades
        figures = (
            f"{trade[key]:.4f} ± {trade[f'{key}_se']:.4f}" for key in ("regained", "given_up")
        )
        rule = f"a written variant regains over {trade['worth']:g} of what it gives up, by two standard errors"
        return _as_it_is(f"{trade['name']} {traded(*figures)}; {rule}")
    if shrink is None:
        return _as_it_is("no measured shrink keeps the same share as the repair")
    lam = shrink["lambda"]
    if shrink["verdict"] == "better":
        other = "the adapter"
        if lam != 1:
            figure = "kept" if shown_shares(fit)["kept"] else "behaviour_kept"
            other = f"shrink {lam:g}, which keeps {share(shrink, figure)},"
        left = f"{other} leaves {share(shrink, 'divergence')}"
        why = f"{RegMean(fit).label}: it {_trade(fitted, fit)}; {left}"
        return Choice("repair", why, {"coefficients": fit})
    change = fit.facts["divergence"]
    difference = percent(Estimate(shrink["kl"] / change, shrink["kl_se"] / change, 0))
    what = "the adapter" if lam == 1 else "a shrink that keeps as much"
    beyond = "which is more" if shrink["verdict"] == "worse" else "within two standard errors"
    told = f"the repair leaves {share(fitted, 'divergence')}: compared with {what}, {difference}, {beyond}"
    if lam == 1:
        return _as_it_is(told)
    why = f"shrink {lam:g}: it {_trade(shrink, fit)}; {told}"
    return Choice("shrink", why, {**UNCHANGED_OPTIONS, "mitigation_lambda": lam})


def _as_it_is(why: str) -> Choice:
    return Choice("adapter", f"the adapter as it is: {why}", UNCHANGED_OPTIONS)


def shown_shares(fit: Coefficients) -> dict[str, bool]:
    """Say which shares have a meaning: reliable ones, and on text that the adapter wrote only its behaviour, not its learning."""
    # In one order, whether the fit was just made or read from its file: the record of the output has it.
    reliable: dict[str, bool] = dict(sorted(fit.facts["reliable"].items()))
    if "drawn" in fit.facts["texts"]["task"]:
        reliable["kept"] = reliable["top1_kept"] = False
    return reliable


def _trade(measured: JsonObject, fit: Coefficients) -> str:
    text = fit.facts["texts"]["task"]
    learning = shown_shares(fit)["kept"]
    gain = gain_of(text) if learning or "drawn" in text else "its behaviour on the task"
    kept = share(measured, "kept" if learning else "behaviour_kept")
    return f"keeps {kept} of {gain} and leaves {share(measured, 'divergence')} of its divergence from the base"


def share(measured: JsonObject, figure: str) -> str:
    """Write a share with its error in percent."""
    return percent(Estimate(measured[figure], measured[f"{figure}_se"] or 0.0, 0))


def repair_rows(fit: Coefficients) -> list[RepairRow]:
    """List the unchanged adapter, the shrinks and the repair, with what was measured of each."""
    (fitted,) = fit.facts["sets"]
    choice = choose(fit)
    adapter = dict.fromkeys(SHARES_MEASURED, 1.0) | {f"{name}_se": 0.0 for name in SHARES_MEASURED}

    def row(what: str, name: str, measured: JsonObject, written: bool) -> RepairRow:
        figures = {key: measured[key] for key in adapter}
        return cast(RepairRow, {"what": what, "name": name, "written": written, **figures})

    rows = [row("adapter", "adapter", adapter, choice.what == "adapter")]
    for shrink in fitted["shrinks"]:
        lam = shrink["lambda"]
        written = choice.options.get("mitigation_lambda") == lam
        rows.append(row("shrink", f"{Shrink.name} {lam:g}", shrink, written))
    name = f"{RegMean.name} {share_name(fitted['keep'])}"
    return [*rows, row("repair", name, fitted, choice.what == "repair")]


def repair_columns(record: JsonObject) -> list[Column]:
    """Make the columns of a table of the measured models, from the record of a repair, but those without a figure."""
    rows = record["rows"]
    reliable = record["reliable"]

    def percents(figure: str) -> list[str]:
        return [share(row, figure) if _is_shown(row, figure, reliable) else "-" for row in rows]

    names = [row["name"] + (" *" if row["written"] else "") for row in rows]
    columns = [
        Column("model", names, "* was written", 9, left=True),
        Column("kept", percents("kept"), "share of the learning that it keeps", 8),
        Column(
            "behaviour kept",
            percents("behaviour_kept"),
            "1 - KL(adapter ‖ model) / KL(adapter ‖ base) on the task's text, which needs no labels",
            6,
        ),
        Column(
            "top-1 kept",
            percents("top1_kept"),
            "share of the adapter's gain in top-1 on the task's text that it keeps",
            4,
        ),
        Column(
            "KL left",
            percents("divergence"),
            "its divergence from the base on general text; 100% is the adapter's",
            8,
        ),
        Column(
            "loss left",
            percents("forgetting"),
            "the rise of the loss on general text; 100% is the adapter's",
            5,
        ),
    ]
    return [column for column in columns if {*column.cells} != {"-"}]


def repair_line(row: JsonObject, reliable: Mapping[str, bool]) -> str:
    """Describe a measured model in one line."""

    def words(figure: str, sentence: str) -> str:
        return sentence.format(share(row, figure)) if _is_shown(row, figure, reliable) else ""

    kept = words("kept", "keeps {} of what was learned") or words(
        "behaviour_kept", "keeps {} of its behaviour on the task"
    )
    kept += words("top1_kept", " ({} of the gain in top-1)")
    left = words("divergence", "leaves {} of the divergence from the base")
    left += words("forgetting", " and {} of the rise of the loss")
    return f"{row['name']}: {', '.join(filter(None, (kept, left)))}"


def _is_shown(row: JsonObject, figure: str, reliable: Mapping[str, bool]) -> bool:
    return row[figure] is not None and reliable.get(figure, True)
