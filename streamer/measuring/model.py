"""Read texts for a model, and answer questions about it that measuring needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from streamer.errors import UnsupportedError
from streamer.events import Monitor
from streamer.measuring.sequences import GENERAL, TASK, TextSequences
from streamer.measuring.texts import read_text
from streamer.measuring.tokenizer import tokenizer_directory
from streamer.plan.plan import Plan
from streamer.streaming.model import StreamingModel


def refuse_new_tokens(plan: Plan) -> None:
    """Refuse an adapter that changes the size of the vocabulary."""
    if plan.edits.vocabulary is not None:
        raise UnsupportedError(
            f"{plan.adapter.path}: changes the vocabulary to {plan.edits.vocabulary} tokens; evaluate and fit need an adapter that keeps "
            "the base's vocabulary"
        )


def chooses_keys(model: StreamingModel, texts: Mapping[str, TextSequences]) -> bool:
    """Test whether, according to the model's config, attention selects only some of the keys in a sequence of these texts."""
    keys = model.size.keys
    return keys is not None and any(text.longest > keys for text in texts.values())


def read_texts(
    model: StreamingModel, texts: Mapping[str, Path], sequences: int, length: int, monitor: Monitor, least: int = 2
) -> dict[str, TextSequences]:
    """Read texts with a model's tokenizer, and warn if two are the same; see `read_text`."""
    directory = tokenizer_directory(model.job.plan)
    read = {
        name: read_text(path, directory, sequences=sequences, length=length, least=least,
                        vocabulary=model.vocabulary, positions=model.positions)
        for name, path in texts.items()
    }  # fmt: skip
    if read[GENERAL].digest() == read[TASK].digest():
        monitor.warn(
            ("the general and the task's text are the same: kept and forgetting are then one figure; give two texts",)
        )
    for name, text in read.items():
        same = [one for one in (GENERAL, TASK) if name not in (GENERAL, TASK) and read[one].digest() == text.digest()]
        if same:
            monitor.warn((f"{name} is the same as the {same[0]} text: it adds no information",))
    return read
