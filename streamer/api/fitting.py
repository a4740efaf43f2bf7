"""Offer the fit of factors as a function of the library.

Provide a general text if the user names none: Python's own help on its topics.

Offer the map of a base's inputs, and the sum of several, as functions of the library.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Unpack

from streamer.adapters.finetuned import One
from streamer.api.keywords import FitKeywords, MapKeywords, explained, watched
from streamer.api.options import Settings, read_path, take
from streamer.api.records import DryRun, dry_run
from streamer.detection.findings import Findings
from streamer.errors import UsageError
from streamer.events import Monitor
from streamer.fitting.fit import checked_file, fit
from streamer.fitting.mapping import MapOptions, PreparedMap, make_map, map_record, prepare_map
from streamer.fitting.prepare import FitOptions, PreparedFit, prepare_fit
from streamer.forecast import forecast_fit, forecast_map
from streamer.methods.files import MAP, Coefficients, InputMap
from streamer.output.write import load_given
from streamer.storage.atomic_file import write_atomic

BUILT_IN = "python-help.txt"
"""Name of the text."""


@contextlib.contextmanager
def general_text(given: Path | None) -> Iterator[Path]:
    """Yield the path of the user's text, or of a temporary file with Python's help."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="streamer-") as directory:
        path = Path(directory) / BUILT_IN
        write_atomic(path, built_in_text().encode())
        yield path


def built_in_text() -> str:
    """Return Python's help on its topics: half a megabyte of English prose about programming."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True)
class FitRequest:
    """A requested fit.

    Attributes
    ----------
    output
        File of factors; None keeps them in memory.
    texts
        Paths of the ``general`` and the ``task`` text.
    findings
        Findings whose intruders are scaled for comparison; None measures no comparison.
    """

    base: str | Path
    adapter: str | Path
    output: Path | None
    texts: Mapping[str, Path]
    options: FitOptions
    settings: Settings
    findings: Findings | str | Path | None = None

    @classmethod
    def of(
        cls, base: str | Path, adapter: str | Path, output: str | Path | None, keywords: Mapping[str, Any]
    ) -> FitRequest:
        """Make a request from keywords of `fit_coefficients`, or from options of the command line."""
        keep = keywords.get("keep", FitOptions.keep)
        several = keep if isinstance(keep, Iterable) and not isinstance(keep, str) else [keep]
        weights = {"weights": tuple(keywords["weights"])} if keywords.get("weights") is not None else {}
        shares = tuple(float(one) if isinstance(one, Real) else one for one in several)
        texts = {name: read_path(name, keywords[name]) for name in ("general", "task")}
        where = None if output is None else read_path("output", output)
        _ = read_path("base", base), read_path("adapter", adapter)
        options, settings = take(FitOptions, keywords, keep=shares, **weights), take(Settings, keywords)
        return cls(base, adapter, where, texts, options, settings, keywords.get("findings"))

    def run(self, monitor: Monitor) -> Coefficients:
        """Run the fit."""
        return fit(self._prepared(monitor), self.output)

    def forecast(self, monitor: Monitor) -> DryRun:
        """Check everything and forecast a run, without writing anything."""
        assert self.output is not None
        prepared = self._prepared(monitor, peek=True)
        state = checked_file(prepared, self.output).state()
        if state != "done":
            prepared.warn()
        forecast = None if state == "done" else forecast_fit(prepared)
        return dry_run("fit", self.output, state, len(prepared.plan.targets), 1, None, forecast)

    def _prepared(self, monitor: Monitor, peek: bool = False) -> PreparedFit:
        base, adapter = self.settings.located(monitor, peek).paths(self.base, self.adapter)
        run, memory = self.settings.make_run(monitor), self.settings.memory
        (found,) = load_given(self.findings, One(Path(adapter)))
        return prepare_fit(Path(base), Path(adapter), self.texts, self.options, memory, run, found)


@explained(FitKeywords, Settings, FitOptions)
def fit_coefficients(
    base: str | Path,
    adapter: str | Path,
    output: str | Path | None = None,
    *,
    general: str | Path,
    task: str | Path,
    **options: Unpack[FitKeywords],
) -> Coefficients:
    """Fit new right factors of an adapter to texts, in one sweep over the base's layers.

    The fit keeps at least a share of the learning, by the loss on the task's text, with as little divergence from the base as possible.
    With ``Δ = L Rᵀ``, new right factors R' make ``Δ' = L R'ᵀ`` respond to the task's inputs as Δ does, and to general inputs as little as
    possible. No model is built: each weight is read once. This needs transformers with its tokenizers:
    ``pip install 'intruder-streamer[evaluate]'``.

    Parameters
    ----------
    base
        Directory of the base model: its ``config.json``, its weights and, unless all texts are token ids, its tokenizer.
    adapter
        Directory of a PEFT adapter with LoRA factors. Completely saved modules, biases and tokens stay unchanged.
    output
        File of factors to write; a killed run resumes between two layers and gives the same bytes. None keeps the result in memory.
    general, task
        Texts in a format of `evaluate_variants`: what the model could do before, and what the adapter was trained for.
    keep
        Least share of the learning to keep, below 1; several shares give several sets of factors.
    weights
        Weights μ of the general text against the task's, in rising order: the candidates that are fitted and measured.
    holdout
        Share of each text's sequences to hold out; they choose among the candidates, and give the figures.
    sequences, length
        Most sequences of each text, and most tokens of each sequence.
    seed
        Seed for choosing the held-out sequences.
    dtype, device
        As for `evaluate_variants`.
    max_memory
        Budget of anonymous memory, in bytes or as a size like ``"4G"``, counted as in `detect_intruder_dimensions`; it limits how many
        sequences run together, and may move their states to a temporary file.

    Returns
    -------
    Coefficients
        A set for each share; `facts` contains the figures measured on the held-out sequences.

    Raises
    ------
    MissingPackageError
        If transformers is not installed.
    StreamerError
        Its class names the kind of error (see `streamer.errors`): `UnsupportedError` for a model or adapter that cannot be fitted,
        `FormatError` for a text too short to hold sequences out, `NumericError` for a loss of NaN.
    """
    request = FitRequest.of(base, adapter, output, {**options, "general": general, "task": task})
    with watched(options) as monitor:
        return request.run(monitor)


__all__ = ["MapRequest", "map_inputs", "map_record"]


@dataclass(frozen=True)
class MapRequest:
    """A requested map.

    Attributes
    ----------
    output
        File to write; None keeps the map in memory.
    general
        Path of the text; None uses Python's help on its topics.
    """

    base: str | Path
    output: Path | None
    general: Path | None
    options: MapOptions
    settings: Settings

    @classmethod
    def of(cls, base: str | Path, output: str | Path | None, keywords: Mapping[str, Any]) -> MapRequest:
        """Make a request from keywords of `map_inputs`, or from options of the command line."""
        read_path("base", base)
        general = keywords.get("general")
        if MAP.is_at(Path(base)):
            raise UsageError(f"{base}: is a map; name the base to map")
        given = {name: value for name, value in keywords.items() if value is not None}
        return cls(
            base,
            None if output is None else read_path("output", output),
            None if general is None else read_path("general", general),
            take(MapOptions, given),
            take(Settings, keywords),
        )

    def run(self, monitor: Monitor) -> InputMap:
        """Make the map."""
        with general_text(self.general) as text:
            return make_map(self._prepared(text, monitor), self.output)

    def forecast(self, monitor: Monitor) -> DryRun:
        """Check everything and forecast a run, without writing anything."""
        assert self.output is not None
        with general_text(self.general) as text:
            prepared = self._prepared(text, monitor, peek=True)
            state = prepared.inspect(self.output)
            forecast = None if state == "done" else forecast_map(prepared)
        return dry_run("map", self.output, state, 0, 1, None, forecast)

    def _prepared(self, text: Path, monitor: Monitor, peek: bool = False) -> PreparedMap:
        base = self.settings.located(monitor, peek).path(self.base)
        run = self.settings.make_run(monitor)
        return prepare_map(base, text, self.options, self.settings.memory, run)


@explained(MapKeywords, Settings, MapOptions)
def map_inputs(
    base: str | Path,
    output: str | Path | None = None,
    *,
    general: str | Path | None = None,
    **options: Unpack[MapKeywords],
) -> InputMap:
    """Map the inputs of a base's modules on general text, in one sweep: the leading eigenvectors of each input's second moments.

    With the map, `reduce_intruder_dimension` and the other functions with the keyword `map` reduce any adapter's response to general inputs
    on this base. They then need only files: no text of the task, no sweep, no detection. Making the map needs transformers with its
    tokenizers: ``pip install 'intruder-streamer[evaluate]'``.

    Parameters
    ----------
    base
        Directory of the base model: its ``config.json``, its weights and, unless the text is token ids, its tokenizer.
    output
        Safetensors file to write; a killed run starts over. None keeps the map in memory.
    general
        Text that shows what the model can do, in a format of `evaluate_variants`. None uses Python's help on its topics.
    vectors
        Number of vectors to keep for each input.
    sequences, length
        Most sequences of the text, and most tokens of each sequence.
    dtype, device
        As for `evaluate_variants`.
    max_memory
        Budget of anonymous memory, in bytes or as a size like ``"4G"``, counted as in `detect_intruder_dimensions`; it limits how many
        sequences run together, and may move their states to a temporary file.

    Returns
    -------
    InputMap
        Map for all matrices of the base that multiply inputs, and for its embeddings.

    Raises
    ------
    MissingPackageError
        If transformers is not installed.
    StreamerError
        Its class names the kind of error (see `streamer.errors`).
    """
    request = MapRequest.of(base, output, {**options, "general": general})
    with watched(options) as monitor:
        return request.run(monitor)
