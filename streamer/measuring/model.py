"""Read texts for a model, and answer what measuring needs to know of it."""

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


def is_factored(plan: Plan) -> bool:
    """Test whether all deltas are the product of LoRA's factors, so that `mitigate` writes an adapter of the same kind."""
    return not plan.adapter.describes_model and all(target.module.factors for target in plan.targets)


def stays_quantized(plan: Plan) -> bool:
    """Test whether the adapter changes a quantized weight that a merge can only write plain."""
    weights = plan.weights
    return any(name in weights.quantized_names and not weights.requantizes(name) for name in plan.by_weight)


def refuse_new_tokens(plan: Plan) -> None:
    """Refuse an adapter that gives the model tokens which the base does not have."""
    if plan.edits.vocabulary is not None:
        raise UnsupportedError(
            f"{plan.adapter.path}: gives the model {plan.edits.vocabulary} tokens, which the base does not have; evaluate and fit "
            "take adapters that keep the vocabulary"
        )


def chooses_keys(model: StreamingModel, texts: Mapping[str, TextSequences]) -> bool:
    """Test whether the model's config says that attention chooses some of the keys in a sequence of these texts."""
    keys = model.size.keys
    return keys is not None and any(text.longest > keys for text in texts.values())


def read_texts(
    model: StreamingModel, texts: Mapping[str, Path], sequences: int, length: int, monitor: Monitor, least: int = 2
) -> dict[str, TextSequences]:
    """Read texts with the tokenizer of a model, and warn where two are the same; see `read_text`."""
    directory = tokenizer_directory(model.job.plan)
    read = {
        name: read_text(path, directory, sequences=sequences, length=length, least=least,
                        vocabulary=model.vocabulary, positions=model.positions)
        for name, path in texts.items()
    }  # fmt: skip
    if read[GENERAL].digest() == read[TASK].digest():
        monitor.warn(
            ("the general and the task's text are the same: what is kept and what is forgotten are then one figure",)
        )
    for name, text in read.items():
        same = [one for one in (GENERAL, TASK) if name not in (GENERAL, TASK) and read[one].digest() == text.digest()]
        if same:
            monitor.warn((f"{name} is the {same[0]} text as well: it shows nothing more",))
    return read
