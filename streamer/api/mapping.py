"""Offer the map of a base's inputs, and the sum of several, as functions of the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from streamer.api.keywords import MapKeywords, explained, watched
from streamer.api.options import Settings, given_workers, read_map, read_path, take
from streamer.api.records import DryRun, dry_run
from streamer.api.texts import general_text
from streamer.errors import OutputExistsError, UsageError
from streamer.events import Monitor
from streamer.fitting.mapping import MapOptions, PreparedMap, make_map, map_record, prepare_map
from streamer.forecast.forecast import on_workers
from streamer.forecast.passes import forecast_map
from streamer.methods.input_map import InputMap, add_maps
from streamer.methods.input_map_file import is_map_file
from streamer.storage.output_checks import is_taken
from streamer.workers.engine import Workers

__all__ = ["MapRequest", "add_map_files", "map_inputs", "map_record"]


@dataclass(frozen=True)
class MapRequest:
    """A map as it is asked for.

    Attributes
    ----------
    output
        Its file; None keeps it in memory.
    general
        Path of the text; None: what Python's help says of its topics.
    """

    base: str | Path
    output: Path | None
    general: Path | None
    options: MapOptions
    settings: Settings

    @classmethod
    def of(cls, base: str | Path, output: str | Path | None, keywords: Mapping[str, Any]) -> MapRequest:
        """Make it of keywords of `map_inputs`, or of the command line's options."""
        read_path("base", base)
        general = keywords.get("general")
        if is_map_file(Path(base)):
            raise UsageError(f"{base}: is a map; name the base that it is of, or two maps at least, to add them")
        given = {name: value for name, value in keywords.items() if value is not None}
        return cls(
            base,
            None if output is None else read_path("output", output),
            None if general is None else read_path("general", general),
            take(MapOptions, given),
            take(Settings, keywords),
        )

    def run(self, monitor: Monitor, workers: Workers | None = None) -> InputMap:
        """Make the map."""
        with general_text(self.general) as text:
            return make_map(self._prepared(text, monitor, workers), self.output)

    def forecast(self, monitor: Monitor, workers: Workers | None = None) -> DryRun:
        """Check all, and say what a run would do and take; nothing is written."""
        assert self.output is not None
        with general_text(self.general) as text:
            prepared = self._prepared(text, monitor, workers, peek=True)
            state = prepared.inspect(self.output)
            forecast = None if state == "done" else on_workers(forecast_map(prepared), workers, prepared.resident)
        return dry_run("map", self.output, state, 0, 1, None, forecast)

    def _prepared(self, text: Path, monitor: Monitor, workers: Workers | None, peek: bool = False) -> PreparedMap:
        base = self.settings.located(monitor, peek).path(self.base)
        run = self.settings.run_options(monitor, workers)
        return prepare_map(base, text, self.options, self.settings.memory, run)


@explained(MapKeywords, Settings, MapOptions)
def map_inputs(
    base: str | Path,
    output: str | Path | None = None,
    *,
    general: str | Path | None = None,
    **options: Unpack[MapKeywords],
) -> InputMap:
    """Map what a base's modules are given on general text, in one pass: the leading vectors of the second moments of every input.

    With it `reduce_intruder_dimension` and the other functions that take a `map` take from any adapter of this base what it answers to
    general inputs, from files alone: no text of the task, no pass, no detection. It needs transformers, with its tokenizers:
    ``pip install 'intruder-streamer[evaluate]'``.

    Parameters
    ----------
    base
        Directory of the base model: its ``config.json``, its weights and, unless the text is token ids, its tokenizer.
    output
        File to write, a safetensors file. A killed run starts over. None keeps the map in memory.
    general
        Text of what the model can do, in the forms that `evaluate_variants` takes. None: what Python's help says of its topics.
    vectors
        That are kept of each input.
    sequences, length
        Sequences of the text, and tokens of a sequence, at most.
    dtype, device
        As `evaluate_variants` has them.
    max_memory
        Anonymous memory as `detect_intruder_dimensions` counts it, in bytes or as a size like ``"4G"``; it decides how many
        sequences go together.
    executor
        Workers that run layers, as `detect_intruder_dimensions` has them: the result is byte for byte that of this process.

    Returns
    -------
    InputMap
        Of all matrices of the base that multiply inputs, and of its embeddings.

    Raises
    ------
    MissingPackageError
        If transformers is not installed.
    StreamerError
        Of the class that says what kind of fault it is (see `streamer.errors`).
    """
    request = MapRequest.of(base, output, {**options, "general": general})
    with watched(options) as monitor:
        return request.run(monitor, given_workers(options))


def add_map_files(
    maps: Sequence[InputMap | str | Path], output: str | Path, *, vectors: int | None = None, overwrite: bool = False
) -> InputMap:
    """Add maps of one base on several texts, and write the sum.

    Parameters
    ----------
    maps
        From `map_inputs`, or the paths of their files: two at least.
    output
        File to write.
    vectors
        That are kept of each input; None: as many as the map that has most.
    overwrite
        Whether to replace a map that stands there.

    Returns
    -------
    InputMap
        Each text counts by its tokens. What a text has along vectors that only another's map holds is taken as the mean of its rest.

    Raises
    ------
    MismatchError
        If they are of several bases.
    StreamerError
        Of the class that says what kind of fault it is (see `streamer.errors`).
    """
    if len(maps) < 2:
        raise UsageError(f"maps: expected two at least, found {len(maps)}")
    if vectors is not None:
        MapOptions(vectors=vectors)  # refuses what is no number of them
    if models := [one for one in maps if not isinstance(one, InputMap) and read_path("maps", one).is_dir()]:
        raise UsageError(
            f"{models[0]}: is a directory, and of several only maps are taken, to be added; map one model at a time"
        )
    path = read_path("output", output)
    if is_taken(path) and not overwrite:
        raise OutputExistsError(f"{path}: exists; choose another output, or pass --overwrite", path)
    added = add_maps([read_map(one) for one in maps], vectors)
    added.save(path, overwrite=overwrite)
    return read_map(path)
