"""Offer the repair of an adapter as a function of the library: fit, measure, and write what is better than a shrink."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, Unpack, cast

from streamer.api.fitting import FitRequest
from streamer.api.inputs import Inputs
from streamer.api.keywords import RepairKeywords, explained, watched
from streamer.api.options import Judged, MethodChoice, Settings, given_workers, read_path, take
from streamer.api.records import DryRun
from streamer.api.texts import BUILT_IN, general_text
from streamer.api.writing import OutputRequest
from streamer.errors import OutputExistsError, UnsupportedError, UsageError
from streamer.evaluation.evaluation_records import ReliableRecord
from streamer.events import Monitor
from streamer.fitting.options import FitOptions
from streamer.json_types import Count, State
from streamer.measuring.sequences import GENERAL, TASK
from streamer.measuring.statistics import Estimate
from streamer.methods import UNCHANGED, Method, Shrink
from streamer.methods.coefficient_set import MatrixCoefficients
from streamer.methods.coefficients import Coefficients
from streamer.output.prepare import OutputOptions
from streamer.output.records import Written
from streamer.storage.output_plan import RECORD_NAME
from streamer.workers.engine import Workers, kept

UNKNOWN: ReliableRecord = {"kept": True, "forgetting": True, "top1_kept": False}
"""What is taken to be reliable of a file of an earlier version, which does not say."""


# fmt: off
class RepairRow(TypedDict):
    """A model, as measured on the held-out sequences; the shrink is interpolated between measured ones."""
    what: Annotated[Literal["adapter", "shrink", "intruders", "repair"], "The unchanged adapter, the shrink that keeps as much, the method "
        "that scales intruders (if the findings have any), or the repair."]
    name: Annotated[str, "Its method, with lambda or share."]
    kept: Annotated[float, "Share of the learning that it keeps."]
    top1_kept: Annotated[float | None, "Share of the adapter's gain in top-1 on the task's text; null if undefined, or not measured."]
    forgetting: Annotated[float, "Share of the forgetting that it leaves."]
    divergence: Annotated[float, "Its divergence from the base on general text, as a share of the adapter's."]

class RepairRecord(TypedDict):
    """What `streamer repair --json` prints: the measurements, the choice, and the files."""
    schema: Literal["streamer.repair/1"]
    chosen: Annotated[Literal["repair", "shrink", "adapter"], "What was written."]
    why: Annotated[str, "The reason, in one line."]
    rows: Annotated[list[RepairRow], "What was measured: the adapter, the equal shrink if there is one, intruder scaling, the repair."]
    reliable: Annotated[ReliableRecord, "Whether the denominators of shares are large enough."]
    intruders: Annotated[Count | None, "Intruders in the given findings; null without findings."]
    fit: Annotated[str, "The file of the fit, beside the output."]
    output: Annotated[str, "Path of the output, as given."]
    state: State
# fmt: on


@dataclass(frozen=True)
class Repaired:
    """What was chosen, and the record of what was written."""

    record: RepairRecord
    written: Written


@dataclass(frozen=True)
class RepairRequest:
    """A repair as it is asked for.

    Attributes
    ----------
    general
        Path of the general text; None: what Python's help says of its topics.
    form
        A model or an adapter, and how it is written.
    """

    fit: FitRequest
    output: Path
    general: Path | None
    form: OutputOptions

    @classmethod
    def of(
        cls, base: str | Path, adapter: str | Path, output: str | Path, keywords: Mapping[str, Any]
    ) -> RepairRequest:
        """Make it of keywords of `repair_adapter`, or of the command line's options."""
        where = read_path("output", output)
        general = keywords.get("general")
        given = {**keywords, "general": BUILT_IN if general is None else general}
        fit = FitRequest.of(base, adapter, where.with_name(f"{where.name}.fit.safetensors"), given)
        if len(fit.options.keep) > 1:
            raise UsageError(f"keep: expected one share, found {len(fit.options.keep)}; repair writes one output")
        form = take(OutputOptions, keywords, merges=bool(keywords.get("merge")))
        if form.dequantize and not form.merges:
            raise UsageError(
                "dequantize: is of a model, and `merge=True` writes one, found dequantize alone; pass both, or neither"
            )
        return cls(fit, where, None if general is None else read_path("general", general), form)

    def run(self, monitor: Monitor, workers: Workers | None = None) -> Repaired:
        """Fit, choose, and write."""
        self._check(monitor)
        with kept(workers):
            with self._texts() as fit:
                found = fit.run(monitor, workers)
            chosen, why, method = _choice(found)
            rows = _rows(found)
            fine, intruders = found.facts.get("reliable", UNKNOWN), found.facts.get("intruders")
            measured = f"this is {why}", *(_line(row, fine) for row in rows)
            writers = workers if self.form.merges else None
            written = cast(Written, self._output(method, measured).run(monitor, writers))  # of one adapter
        record: RepairRecord = {
            "schema": "streamer.repair/1", "chosen": chosen, "why": why, "rows": rows, "reliable": fine,
            "intruders": intruders, "fit": str(self.fit.output), "output": str(self.output), "state": written["state"],
        }  # fmt: skip
        return Repaired(record, written)

    def _output(self, method: Method, measured: tuple[str, ...] = ()) -> OutputRequest:
        inputs, form = Inputs(self.fit.base, self.fit.adapter), replace(self.form, measured=measured)
        return OutputRequest(
            inputs, self.output, None, Judged(), method, form, replace(self.fit.settings, device="cpu")
        )

    def _check(self, monitor: Monitor) -> None:
        """Refuse before the fit what could not be written after it."""
        try:
            self._output(Shrink(0.5)).open(monitor)
        except UnsupportedError as e:
            more = "" if self.form.merges else "; with --merge `repair` writes a model"
            raise UnsupportedError(f"{e}{more}") from e
        fitted, settings = self.fit.output, self.fit.settings
        stands = self.output.exists() and not (self.output.is_dir() and not any(self.output.iterdir()))
        if stands and not settings.overwrite and not (fitted is not None and fitted.exists()):
            raise OutputExistsError(
                f"{self.output}: exists, and {fitted}, its fit, does not; choose another output, or pass --overwrite",
                self.output,
            )

    def forecast(self, monitor: Monitor, workers: Workers | None = None) -> DryRun:
        """Check all, and say what the fit would take, which is nearly all of it, and what is written; nothing is."""
        self._check(monitor)
        with self._texts() as fit:
            found = fit.forecast(monitor, workers)
        if found["state"] == "done" and not (self.output / RECORD_NAME).exists():
            found["state"] = "resume"  # the fit is there, and what is made of it is not
        if not self.output.exists() and (forecast := found["forecast"]) is not None:
            made = cast(
                DryRun, self._output(Shrink(0.5)).forecast(monitor)
            )  # of one adapter; whatever is written is as large
            found["files"] += made["files"]
            forecast["write_bytes"] += made["bytes"] or 0
        return {**found, "command": "repair", "output": str(self.output)}

    @contextlib.contextmanager
    def _texts(self) -> Iterator[FitRequest]:
        """Give the fit with a general text: that of the user, or Python's own."""
        with general_text(self.general) as path:
            yield replace(self.fit, texts={**self.fit.texts, GENERAL: path, TASK: self.fit.texts[TASK]})


def _choice(found: Coefficients) -> tuple[Literal["repair", "shrink", "adapter"], str, Method]:
    """Choose by what was measured: the repair if it is better than the shrink that keeps as much, else that shrink, or the adapter."""
    (one,) = found.facts["sets"]
    shrink = one["shrink"]
    if not found.facts["forgotten"]:
        return "adapter", "the adapter as it is: there is no evidence that it forgets", UNCHANGED
    held = [found.facts["texts"][text]["held"]["sequences"] for text in (GENERAL, TASK)]
    if not _is_worth_it(one, min(held)):
        trade = one["trade"]
        return "adapter", (
            f"the adapter as it is: {trade['name']} regains {trade['regained']:.4f} ± {trade['regained_se']:.4f} nats a token on general "
            f"text and gives up {trade['given_up']:.4f} ± {trade['given_up_se']:.4f} on the task's; what is written regains over "
            f"{trade['worth']:g} of what it gives up, by two errors"
        ), UNCHANGED  # fmt: skip
    values = {float(c) for m in found.sets[0].matrices.values() if isinstance(m, MatrixCoefficients) for c in m.values}
    if len(values) == 1:  # it is a shrink
        lam = round(values.pop(), 4)
        return "shrink", f"shrink {lam:g}: one coefficient for all", Shrink(lam)
    if shrink is None:
        return "adapter", "the adapter as it is: no shrink that was measured keeps as much, to compare with", UNCHANGED
    if shrink["verdict"] == "better":
        method = MethodChoice(coefficients=found).make()
        return "repair", f"{method.label}: it forgets less than the shrink that keeps as much, by loss and KL", method
    lam = round(shrink["lambda"], 4)
    why = f"shrink {lam:g}: the repair is not better than the shrink that keeps as much, by more than two standard errors of loss and KL"
    return "shrink", why, Shrink(lam)


def _is_worth_it(one: Mapping[str, Any], sequences: int) -> bool:
    """Test whether a set, or the shrink that keeps as much, regains enough for what it gives up; see `Trade`.

    Parameters
    ----------
    sequences
        Held apart of the text that has fewer.
    """
    trade, shrink = one.get("trade"), one["shrink"]
    if trade is None or trade["worth_it"] or shrink is None:  # a file of an earlier version does not say
        return trade is None or bool(trade["worth_it"])
    # The shrink gives up as much, and regains more by what the set's loss is above its.
    more = trade["regained"] + shrink["loss"] - trade["worth"] * trade["given_up"]
    error = math.hypot(trade["regained_se"], shrink["loss_se"], trade["worth"] * trade["given_up_se"])
    return Estimate(more, error, sequences).is_positive


def _rows(found: Coefficients) -> list[RepairRow]:
    facts, shares = found.facts, ("kept", "top1_kept", "forgetting", "divergence")
    (one,) = facts["sets"]
    measured: list[tuple[str, str, Mapping[str, Any]]] = [("adapter", "adapter", dict.fromkeys(one, 1.0))]
    if (shrink := one["shrink"]) is not None:
        measured.append(("shrink", f"shrink {shrink['lambda']:.3f}", {**shrink, "kept": one["kept"]}))
    if (scaling := facts.get("scaling")) is not None:
        measured.append(("intruders", scaling["name"], scaling))
    measured.append(("repair", f"{found.select().method} {one['keep']:g}", one))
    return [
        cast(RepairRow, {"what": what, "name": name, **{key: own.get(key) for key in shares}})
        for what, name, own in measured
    ]


def _line(row: RepairRow, reliable: Mapping[str, bool]) -> str:
    kept, top1, left, kl = (
        f"{100 * value:.1f} %" if value is not None and reliable.get(key, True) else "an unknown share"
        for key, value in ((key, row[key]) for key in ("kept", "top1_kept", "forgetting", "divergence"))
    )
    interpolated = " (interpolated)" if row["what"] == "shrink" else ""
    return (
        f"{row['name']}{interpolated}: keeps {kept} of what was learned ({top1} of the gain in top-1), leaves {left} of the forgetting and "
        f"{kl} of the KL"
    )


@explained(RepairKeywords, Settings, FitOptions, OutputOptions)
def repair_adapter(
    base: str | Path, adapter: str | Path, output: str | Path, *, task: str | Path, **options: Unpack[RepairKeywords]
) -> Written:
    """Write an adapter that forgets less: fit it to the inputs of its modules, measure it, and choose what is better than a shrink.

    It is never worse than the shrink of the whole adapter that keeps as much, by what was measured on sequences held apart: if the repair
    is not better by two standard errors of loss and KL, that shrink is written; if the adapter does not forget, what is regained is not
    worth what is given up, or no measured shrink keeps as much, the adapter as it is. The fit is in ``OUTPUT.fit.safetensors`` beside the
    output. It needs transformers: ``pip install 'intruder-streamer[evaluate]'``.

    Parameters
    ----------
    base
        Directory of the base model: its ``config.json``, its weights and, unless texts are token ids, its tokenizer.
    adapter
        Directory of a PEFT adapter, or of a fully fine-tuned model.
    output
        Directory to write: a PEFT adapter, or with `merge` a model.
    task
        Text of what the adapter was trained for, not trained on, in the forms that `evaluate_variants` takes.
    general
        Text of what the model could do before. None: what Python's help says of its topics; your own is better.
    findings
        From `detect_intruder_dimensions`, or the path of their file: the method ``paper`` at its default λ is measured beside the repair.
    keep
        Share of what the adapter learned that is to stay, below 1.
    merge
        Write the model with the repaired adapter merged in, in place of an adapter.
    dequantize
        With `merge`: write all that is quantized as plain tensors of the config's dtype.
    grain, objective, holdout, sequences, length, seed, steps, dtype, device
        How the fit is made, as `fit_coefficients` has them.
    max_memory
        Anonymous memory as `detect_intruder_dimensions` counts it, in bytes or as a size like ``"4G"``.
    executor
        Workers of the fit, as `fit_coefficients` has them, and of the shards of `merge`.

    Returns
    -------
    Written
        The record of what was written; its ``measured`` says what was measured.

    Raises
    ------
    MissingPackageError
        If transformers is not installed.
    StreamerError
        Of the class that says what kind of fault it is (see `streamer.errors`).
    """
    request = RepairRequest.of(base, adapter, output, {**options, "task": task})
    with watched(options) as monitor:
        return request.run(monitor, given_workers(options)).written
