"""Offer the repair of an adapter as a function of the library: fit, measure, and write the repair if it beats a shrink."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, Unpack, cast

from streamer.api.fitting import BUILT_IN, FitRequest, general_text
from streamer.api.keywords import RepairKeywords, explained, watched
from streamer.api.options import Inputs, Judged, MethodChoice, Settings, read_path, take
from streamer.api.records import DryRun
from streamer.api.writing import OutputRequest
from streamer.errors import OutputExistsError, UsageError
from streamer.evaluation.losses import ReliableRecord
from streamer.events import Event, Monitor
from streamer.fitting.prepare import FitOptions, refuse_dense
from streamer.json_types import Count, State
from streamer.measuring.sequences import GENERAL, TASK
from streamer.measuring.statistics import Estimate
from streamer.methods import UNCHANGED, Method, RegMean, Shrink
from streamer.methods.files import Coefficients
from streamer.output.job import Written
from streamer.output.write import OutputOptions
from streamer.plan.plan import make_plan
from streamer.storage.transaction import RECORD_NAME


# fmt: off
class RepairRow(TypedDict):
    """A model, as measured on the held-out sequences; the shrink is interpolated between measured ones."""
    what: Annotated[Literal["adapter", "shrink", "intruders", "repair"], "The unchanged adapter, the shrink that keeps the same share, the "
        "method that scales intruders (if the findings have any), or the repair."]
    name: Annotated[str, "Its method, with lambda or share."]
    kept: Annotated[float, "Share of the learning that it keeps."]
    top1_kept: Annotated[float | None, "Share of the adapter's gain in top-1 on the task's text; null if undefined, or not measured."]
    forgetting: Annotated[float, "Share of the rise of the general loss that it leaves."]
    divergence: Annotated[float, "Share of the forgetting that it leaves: its divergence from the base on general text as a share of the "
        "adapter's."]

class RepairRecord(TypedDict):
    """What `repair_adapter` returns and `streamer repair --json` prints: the measurements, the choice, and the files."""
    schema: Literal["streamer.repair/1"]
    chosen: Annotated[Literal["repair", "shrink", "adapter"], "What was written."]
    why: Annotated[str, "The reason, in one line."]
    rows: Annotated[list[RepairRow], "What was measured: the adapter, the equal shrink if there is one, intruder scaling, the repair."]
    reliable: Annotated[ReliableRecord, "Whether the denominators of shares are large enough."]
    intruders: Annotated[Count | None, "Intruders in the given findings; null without findings."]
    fit: Annotated[str, "The file of the fit, beside the output."]
    lora: NotRequired[Annotated[str, "With --to-lora: the adapter as a LoRA adapter, beside the output, which was repaired in its place."]]
    output: Annotated[str, "Path of the output, as given."]
    state: State
# fmt: on


@dataclass(frozen=True)
class Repaired:
    """The record of a repair, with the choice, and the record of the output."""

    record: RepairRecord
    written: Written


@dataclass(frozen=True)
class RepairRequest:
    """A requested repair.

    Attributes
    ----------
    general
        Path of the general text; None uses Python's help on its topics.
    form
        Whether to write a model or an adapter, and how; with `to_lora` the adapter is converted first.
    lora
        Path of the converted adapter, if this is its repair.
    """

    fit: FitRequest
    output: Path
    general: Path | None
    form: OutputOptions
    lora: str | None = None

    @classmethod
    def of(
        cls, base: str | Path, adapter: str | Path, output: str | Path, keywords: Mapping[str, Any]
    ) -> RepairRequest:
        """Make a request from keywords of `repair_adapter`, or from options of the command line."""
        where = read_path("output", output)
        general = keywords.get("general")
        given = {**keywords, "general": BUILT_IN if general is None else general}
        fit = FitRequest.of(base, adapter, where.with_name(f"{where.name}.fit.safetensors"), given)
        if len(fit.options.keep) > 1:
            raise UsageError(f"keep: expected one share, found {len(fit.options.keep)}; repair writes one output")
        form = take(OutputOptions, keywords, merges=bool(keywords.get("merge")))
        if form.dequantize and not form.merges:
            raise UsageError(
                "dequantize: applies only to a model, which `merge=True` writes, found dequantize alone; pass both, or neither"
            )
        return cls(fit, where, None if general is None else read_path("general", general), form)

    def run(self, monitor: Monitor) -> Repaired:
        """Convert the adapter if requested, fit, choose, and write."""
        if self.form.to_lora is not None:
            self._refuse_standing()
            self._conversion.run(monitor)
            return self._converted.run(monitor)
        self._check(monitor)
        with self._texts() as fit:
            found = fit.run(monitor)
        chosen, why, method = _choice(found)
        rows = _rows(found)
        fine, intruders = found.facts["reliable"], found.facts.get("intruders")
        measured = why, *(_line(row, fine) for row in rows)
        written = cast(Written, self._output(method, measured).run(monitor))  # of one adapter
        record: RepairRecord = {
            "schema": "streamer.repair/1", "chosen": chosen, "why": why, "rows": rows, "reliable": fine,
            "intruders": intruders, "fit": str(self.fit.output), "output": str(self.output), "state": written["state"],
        }  # fmt: skip
        if self.lora is not None:
            record["lora"] = self.lora
        return Repaired(record, written)

    def _output(self, method: Method, measured: tuple[str, ...] = ()) -> OutputRequest:
        inputs, form = Inputs(self.fit.base, self.fit.adapter), replace(self.form, measured=measured)
        return OutputRequest(
            inputs, self.output, None, Judged(), method, form, replace(self.fit.settings, device="cpu")
        )

    @property
    def _conversion(self) -> OutputRequest:
        """Return the request that writes the adapter as a LoRA adapter beside the output."""
        output, form = self.output.with_name(f"{self.output.name}.lora"), OutputOptions(False, self.form.to_lora)
        return replace(self._output(UNCHANGED), output=output, form=form)

    @property
    def _converted(self) -> RepairRequest:
        """Return the repair of the adapter that the conversion writes."""
        lora = self._conversion.output
        form, fit = replace(self.form, to_lora=None), replace(self.fit, adapter=lora)
        return replace(self, fit=fit, form=form, lora=str(lora))

    def _check(self, monitor: Monitor) -> None:
        """Refuse, before the fit, an adapter that cannot be fitted, and an output that could not be written after it."""
        settings = self.fit.settings
        base, adapter = settings.located(monitor, True).paths(self.fit.base, self.fit.adapter)
        plan = make_plan(base, adapter, settings.io, settings.stated, settings.architecture)
        lacking = [t for t in plan.targets if not (t.module.low_rank if self.form.merges else t.module.factors)]
        refuse_dense(plan, lacking)
        self._output(Shrink(0.5)).open(monitor)
        self._refuse_standing()

    def _refuse_standing(self) -> None:
        """Refuse an output that no repair made."""
        fitted = self.fit.output
        stands = self.output.exists() and not (self.output.is_dir() and not any(self.output.iterdir()))
        if stands and not self.fit.settings.overwrite and not (fitted is not None and fitted.exists()):
            raise OutputExistsError(
                f"{self.output}: exists, and {fitted}, its fit, does not; choose another output, or pass --overwrite",
                self.output,
            )

    def forecast(self, monitor: Monitor) -> DryRun:
        """Check everything, and forecast the fit, which needs nearly all the time, and the output, without writing anything.

        An adapter that is not yet converted shows only what its conversion needs.
        """
        if self.form.to_lora is not None:
            first = cast(DryRun, self._conversion.forecast(monitor))
            if first["state"] == "done":
                return self._converted.forecast(monitor)
            monitor.emit(Event("note", f"forecast only of {self._conversion.output}, which the fit needs"))
            return {**first, "command": "repair", "output": str(self.output)}
        self._check(monitor)
        with self._texts() as fit:
            found = fit.forecast(monitor)
        if found["state"] == "done" and not (self.output / RECORD_NAME).exists():
            found["state"] = "resume"  # the fit exists, but not its output
        if not self.output.exists() and (forecast := found["forecast"]) is not None:
            made = cast(
                DryRun, self._output(Shrink(0.5)).forecast(monitor)
            )  # one adapter; every possible output has the same size
            found["files"] += made["files"]
            forecast["write_bytes"] += made["bytes"] or 0
        return {**found, "command": "repair", "output": str(self.output)}

    @contextlib.contextmanager
    def _texts(self) -> Iterator[FitRequest]:
        """Yield the fit with its general text: the user's, or Python's help."""
        with general_text(self.general) as path:
            yield replace(self.fit, texts={**self.fit.texts, GENERAL: path, TASK: self.fit.texts[TASK]})


def _choice(found: Coefficients) -> tuple[Literal["repair", "shrink", "adapter"], str, Method]:
    """Choose by the measurements: the repair if it is better than the shrink that keeps the same share, else that shrink or the adapter."""
    (one,) = found.facts["sets"]
    shrink = one["shrink"]
    if not found.facts["forgotten"]:
        return "adapter", "the adapter as it is: there is no evidence that it diverges from the base", UNCHANGED
    held_out = [found.facts["texts"][text]["held"]["sequences"] for text in (GENERAL, TASK)]
    if not _is_worth_it(one, min(held_out)):
        trade = one["trade"]
        return "adapter", (
            f"the adapter as it is: {trade['name']} regains {trade['regained']:.4f} ± {trade['regained_se']:.4f} nats of KL per token of "
            f"general text and gives up {trade['given_up']:.4f} ± {trade['given_up_se']:.4f} of loss on the task's; a written variant "
            f"regains over {trade['worth']:g} of what it gives up, by two standard errors"
        ), UNCHANGED  # fmt: skip
    if shrink is None:
        return "adapter", "the adapter as it is: no measured shrink keeps the same share as the repair", UNCHANGED
    shares = one["kept"], one["divergence"], shrink["divergence"], shrink["kept"]
    kept, left, of_shrink, shrink_kept = (f"{100 * share:.1f} %" for share in shares)
    if shrink["verdict"] == "better":
        method = MethodChoice(coefficients=found).make()
        what = "that keeps as much" if shrink["kept"] >= one["kept"] else f"that keeps most, {shrink_kept},"
        return "repair", (
            f"{method.label}: it keeps {kept} of what the adapter learned and leaves {left} of its divergence from the base; the shrink "
            f"{what} leaves {of_shrink}"
        ), method  # fmt: skip
    lam = round(shrink["lambda"], 4)
    if lam == 1:
        why = f"the adapter as it is: the repair leaves {left} of its divergence from the base, which is not less by two standard errors"
        return "adapter", why, UNCHANGED
    return "shrink", (
        f"shrink {lam:g}: it keeps {shrink_kept} of what the adapter learned and leaves {of_shrink} of its divergence from the base; the "
        f"repair leaves {left}, which is not less by two standard errors"
    ), Shrink(lam)  # fmt: skip


def _is_worth_it(one: Mapping[str, Any], sequences: int) -> bool:
    """Test whether a set, or the shrink that keeps the same share, regains enough for what it gives up; see `Trade`.

    Parameters
    ----------
    sequences
        The smaller of the two texts' numbers of held-out sequences.
    """
    trade, shrink = one.get("trade"), one["shrink"]
    if trade is None or trade["worth_it"] or shrink is None:  # files of earlier versions have no trade
        return trade is None or bool(trade["worth_it"])
    # The shrink gives up as much, and regains more by the difference of the divergences.
    more = trade["regained"] + shrink["kl"] - trade["worth"] * trade["given_up"]
    error = math.hypot(trade["regained_se"], shrink["kl_se"], trade["worth"] * trade["given_up_se"])
    return Estimate(more, error, sequences).is_positive


def _rows(found: Coefficients) -> list[RepairRow]:
    facts, shares = found.facts, ("kept", "top1_kept", "forgetting", "divergence")
    (one,) = facts["sets"]
    measured: list[tuple[str, str, Mapping[str, Any]]] = [("adapter", "adapter", dict.fromkeys(one, 1.0))]
    if (shrink := one["shrink"]) is not None:
        measured.append(("shrink", f"shrink {shrink['lambda']:.3f}", {"kept": one["kept"], **shrink}))
    if (scaling := facts.get("scaling")) is not None:
        measured.append(("intruders", scaling["name"], scaling))
    measured.append(("repair", f"{RegMean.name} {one['keep']:g}", one))
    return [
        cast(RepairRow, {"what": what, "name": name, **{key: own.get(key) for key in shares}})
        for what, name, own in measured
    ]


def _line(row: RepairRow, reliable: Mapping[str, bool]) -> str:
    def share(key: Literal["kept", "top1_kept", "forgetting", "divergence"], words: str) -> str:
        value = row[key]
        return words.format(f"{100 * value:.1f} %") if value is not None and reliable.get(key, True) else ""

    interpolated = " (interpolated)" if row["what"] == "shrink" else ""
    kept = share("kept", "keeps {} of what was learned") + share("top1_kept", " ({} of the gain in top-1)")
    left = share("divergence", "leaves {} of the divergence from the base") + share(
        "forgetting", " and {} of the rise of the loss"
    )
    return f"{row['name']}{interpolated}: {', '.join(filter(None, (kept, left)))}"


@explained(RepairKeywords, Settings, FitOptions, OutputOptions)
def repair_adapter(
    base: str | Path, adapter: str | Path, output: str | Path, *, task: str | Path, **options: Unpack[RepairKeywords]
) -> RepairRecord:
    """Write an adapter that forgets less: fit it to texts, measure it, and write it if it is better than a shrink.

    Forgetting is the divergence from the base on held-out sequences of general text. If the repair does not diverge less than the shrink of
    the whole adapter that keeps the same share, by two standard errors, that shrink is written. The unchanged adapter is written if it does
    not forget, if the gain is not worth the loss, or if no measured shrink keeps the same share. The fit is written to
    ``OUTPUT.fit.safetensors`` beside the output. This needs transformers: ``pip install 'intruder-streamer[evaluate]'``.

    Parameters
    ----------
    base
        Directory of the base model: its ``config.json``, its weights and, unless all texts are token ids, its tokenizer.
    adapter
        Directory of a PEFT adapter, or of a fully fine-tuned model; without LoRA factors it needs `to_lora`.
    output
        Directory to write: a PEFT adapter, or a model with `merge`.
    task
        Text of the kind that the adapter was trained for, but not used in training, in a format of `evaluate_variants`.
    general
        Text that shows what the model could do before. None uses Python's help on its topics; your own text is better.
    findings
        Findings from `detect_intruder_dimensions`, or the path of their file: ``paper`` at its default λ is then measured for comparison.
    keep
        Share of the learning to keep, below 1.
    merge
        Write the model with the repaired adapter merged in, instead of an adapter.
    dequantize
        With `merge`: write all quantized weights as plain tensors of the config's dtype.
    to_lora
        Write the adapter first as a LoRA adapter of this rank, as for `reduce_intruder_dimension`, into ``OUTPUT.lora`` beside the output,
        and repair that one: for DoRA, LoHa, LoKr, a fine-tuned model and all other adapters without LoRA factors.
    weights, holdout, sequences, length, seed, dtype, device
        Options of the fit, as for `fit_coefficients`.
    max_memory
        Budget of anonymous memory, in bytes or as a size like ``"4G"``, counted as in `detect_intruder_dimensions`.

    Returns
    -------
    RepairRecord
        What was measured and written, as ``streamer repair --json`` prints it.

    Raises
    ------
    MissingPackageError
        If transformers is not installed.
    StreamerError
        Its class names the kind of error (see `streamer.errors`).
    """
    request = RepairRequest.of(base, adapter, output, {**options, "task": task})
    with watched(options) as monitor:
        return request.run(monitor).record
