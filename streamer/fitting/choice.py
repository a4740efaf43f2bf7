"""Choose what a repair writes by what was measured on held-out sequences: the fit, the shrink that keeps as much, or the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, cast

from streamer.evaluation.evaluation import gain_of, percent, traded
from streamer.json_types import Mean
from streamer.measuring.statistics import Estimate
from streamer.methods import RegMean, Shrink, share_name
from streamer.methods.files import Coefficients
from streamer.tables import Column

UNCHANGED_OPTIONS = {"method": Shrink.name, "mitigation_lambda": 1.0}
HALF_OPTIONS = {"method": Shrink.name, "mitigation_lambda": 0.5}
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

FIGURES = "kept", "behaviour_kept", "top1_kept", "forgetting", "divergence"
"""Shares in a row; the unchanged adapter's are all 1."""


class Choice(NamedTuple):
    """What to write, the reason, and the options of an output that write it."""

    what: Literal["repair", "shrink", "adapter"]
    why: str
    options: Mapping[str, Any]


def choose(fit: Coefficients) -> Choice:
    """Choose by the measurements: the repair if it is better than the shrink that keeps the same share, else that shrink or the adapter."""
    (fitted,) = fit.facts["sets"]
    shrink, reliable = fitted["shrink"], shown_shares(fit)

    def as_it_is(why: str) -> Choice:
        return Choice("adapter", f"the adapter as it is: {why}", UNCHANGED_OPTIONS)

    if not fit.facts["forgotten"]:
        return as_it_is("there is no evidence that it diverges from the base")
    trades = [measured["trade"] for measured in (fitted, shrink) if measured is not None]
    if not any(trade["worth_it"] for trade in trades):
        trade = trades[0]
        figures = (
            f"{trade[key]:.4f} ± {trade[f'{key}_se']:.4f}" for key in ("regained", "given_up")
        )
        rule = f"a written variant regains over {trade['worth']:g} of what it gives up, by two standard errors"
        return as_it_is(f"{trade['name']} {traded(*figures)}; {rule}")
    if shrink is None:
        return as_it_is("no measured shrink keeps the same share as the repair")
    if shrink["verdict"] == "better":
        other = "the adapter" if shrink["lambda"] == 1 else f"shrink {shrink['lambda']:g}"
        figure = "kept" if reliable["kept"] else "behaviour_kept"
        keeping = f", which keeps {share(shrink, figure)}," if shrink["lambda"] != 1 else ""
        why = f"{RegMean(fit).label}: it {_trade(fitted, fit)}; {other}{keeping} leaves {share(shrink, 'divergence')}"
        return Choice("repair", why, {"coefficients": fit})
    change = fit.facts["divergence"]
    difference = percent(Estimate(shrink["kl"] / change, shrink["kl_se"] / change, 0))
    what = "the adapter" if shrink["lambda"] == 1 else "a shrink that keeps as much"
    told = f"the repair leaves {share(fitted, 'divergence')}: compared with {what}, {difference}"
    told += ", which is more" if shrink["verdict"] == "worse" else ", within two standard errors"
    if shrink["lambda"] == 1:
        return as_it_is(told)
    why = f"shrink {shrink['lambda']:g}: it {_trade(shrink, fit)}; {told}"
    return Choice("shrink", why, {"method": Shrink.name, "mitigation_lambda": shrink["lambda"]})


def shown_shares(fit: Coefficients) -> dict[str, bool]:
    """Say which shares have a meaning: reliable ones, and on text that the adapter wrote only its behaviour, not its learning."""
    # In one order, whether the fit was just made or read from its file: the record of the output has it.
    reliable: dict[str, bool] = dict(sorted(fit.facts["reliable"].items()))
    if "drawn" in fit.facts["texts"]["task"]:
        reliable["kept"] = reliable["top1_kept"] = False
    return reliable


def _trade(measured: Mapping[str, Any], fit: Coefficients) -> str:
    kept = "kept" if shown_shares(fit)["kept"] else "behaviour_kept"
    text = fit.facts["texts"]["task"]
    gain = gain_of(text) if kept == "kept" or "drawn" in text else "its behaviour on the task"
    return (
        f"keeps {share(measured, kept)} of {gain} and leaves {share(measured, 'divergence')} of its "
        "divergence from the base"
    )


def share(measured: Mapping[str, Any], figure: str) -> str:
    """Write a share with its error in percent."""
    return percent(Estimate(measured[figure], measured[f"{figure}_se"] or 0.0, 0))


def repair_rows(fit: Coefficients) -> list[RepairRow]:
    """List the unchanged adapter, the shrinks and the repair, with what was measured of each."""
    (fitted,) = fit.facts["sets"]
    choice = choose(fit)
    adapter = dict.fromkeys(FIGURES, 1.0) | {f"{name}_se": 0.0 for name in FIGURES}
    rows = [{"what": "adapter", "name": "adapter", "written": choice.what == "adapter", **adapter}]
    for shrink in fitted["shrinks"]:
        written = (
            choice.options.get("method") == Shrink.name
            and choice.options["mitigation_lambda"] == shrink["lambda"]
        )
        rows.append(
            {
                "what": "shrink",
                "name": f"{Shrink.name} {shrink['lambda']:g}",
                "written": written,
                **shrink,
            }
        )
    name = f"{RegMean.name} {share_name(fitted['keep'])}"
    rows.append({"what": "repair", "name": name, "written": choice.what == "repair", **fitted})
    keys = "what", "name", "written", *adapter
    return [cast(RepairRow, {key: row[key] for key in keys}) for row in rows]


def repair_columns(record: Mapping[str, Any]) -> list[Column]:
    """Make the columns of a table of the measured models, from the record of a repair, but those without a figure."""
    rows, reliable = record["rows"], record["reliable"]

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


def repair_line(row: Mapping[str, Any], reliable: Mapping[str, bool]) -> str:
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


def _is_shown(row: Mapping[str, Any], figure: str, reliable: Mapping[str, bool]) -> bool:
    return row[figure] is not None and reliable.get(figure, True)
