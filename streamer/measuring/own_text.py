"""Let an adapter write the text of its own task: base + adapter, sampled from start tokens, brings its modules the inputs of its task.

The file has a JSON object for each sequence: ``ids``; ``start``, the number of tokens that were given; ``text``, if there is a tokenizer.
It is a text like any other, and its first line also has ``facts``, what it was made from.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import Tensor

from streamer.errors import FormatError, MissingInputError, UnsupportedError, UsageError
from streamer.events import Monitor
from streamer.json_types import JsonObject
from streamer.linalg.torch_state import CPU
from streamer.measuring.batches import Work, sweep_cost
from streamer.measuring.facts import identities, model_facts, with_digest
from streamer.measuring.lines import read_prompts
from streamer.measuring.losses import SweepProgress
from streamer.measuring.prepared import ENDS, Prepared, Records, model_of
from streamer.measuring.texts import sample_digest
from streamer.measuring.tokenizer import Tokenizer, load_tokenizer, tokenizer_directory
from streamer.options import Texts
from streamer.plan.plan import make_plan
from streamer.run import Run
from streamer.storage.atomic_file import write_atomic
from streamer.storage.files import read_regular, strict_json
from streamer.streaming.generation import Prompt, check_generates, write_text
from streamer.streaming.skeleton import require_transformers
from streamer.streaming.sweep import SweepModel

OWN_TEXT_SCHEMA: Final = "streamer.own_text/1"

SAMPLING_BYTES = 32
"""Bytes for each logit of a sequence's next token while it is drawn: the logits, their copies, and the noise in float64."""

LAYER_COPIES = 2
"""Copies of a layer's keys and values while it runs, besides those that attention makes for the heads that share them."""


@dataclass(frozen=True)
class OwnText:
    """Text that an adapter wrote.

    Attributes
    ----------
    facts
        What it was made from.
    lines
        An object for each sequence; see this module.
    """

    facts: JsonObject
    lines: list[JsonObject]

    def to_json(self) -> str:
        """Write the lines."""
        first, *others = self.lines
        lines = ({**first, "facts": self.facts}, *others)
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def load_own_text(path: Path) -> OwnText:
    """Read text that an adapter wrote.

    Raises
    ------
    FormatError
        If it is another text.
    """
    raw = read_regular(path, "text that an adapter wrote")
    try:
        lines = [strict_json(line) for line in raw.splitlines()]
        facts = lines[0].pop("facts")
        if facts["schema"] != OWN_TEXT_SCHEMA:
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise FormatError(
            f"{path}: expected text that an adapter wrote ({OWN_TEXT_SCHEMA}), found another text"
        ) from e
    return OwnText(facts, lines)


@dataclass(frozen=True, eq=False)
class PreparedOwnText(Prepared[OwnText]):
    """Text that an adapter is to write, whose inputs are open and checked.

    Attributes
    ----------
    prompts
        Tokens with which each sequence begins.
    file
        Digest of the file of prompts; empty if there is none.
    tokenizer
        Turns tokens into text; None if there is no tokenizer.
    """

    options: Texts
    prompts: Sequence[Prompt]
    file: str
    tokenizer: Tokenizer | None

    noun = "text that an adapter wrote"
    read = staticmethod(load_own_text)
    same = "this very text"
    example = "own.jsonl"

    @cached_property
    def facts(self) -> JsonObject:
        """Describe the inputs and options as JSON; equal `plan` digests mean equal texts."""
        tree = {
            "schema": OWN_TEXT_SCHEMA,
            **model_facts(self.model, **identities(self.plan)),
            "texts": [],
            "seed": self.options.seed,
            "sequences": self.options.sequences,
            "length": self.options.length,
            "prompts": self.file,
            "starts": [list(prompt) for prompt in self.prompts],
        }
        return with_digest(tree)

    @property
    def cache_bytes(self) -> int:
        """Estimate the bytes of a sequence's keys and values."""
        return self.model.size.cached * self.options.length

    @property
    def in_files(self) -> bool:
        """Test whether the cache lies in files, because memory is limited; on another device it lies there."""
        return self.max_memory is not None and self.model.job.device == CPU

    @property
    def solving_bytes(self) -> int:
        """Estimate the memory of the cache, of the layer that runs, and of drawing tokens."""
        copies = LAYER_COPIES + self.model.size.sharing
        layer = copies * self.cache_bytes // len(self.model.layers)
        cache = layer + (0 if self.in_files else self.cache_bytes)
        each = cache + SAMPLING_BYTES * self.model.vocabulary
        return len(self.prompts) * each

    def sweeps(self, known: OwnText | None = None) -> list[Work]:
        """List a sweep for each token."""
        count = len(self.prompts)
        return [Work(count, length=1)] * (self.options.length - 1)

    def written_bytes(self, known: OwnText | None) -> tuple[int, int]:
        """Estimate the bytes of the file, and of the cache: one that is saved, a copy while it is, and what lies in files."""
        tokens = len(self.prompts) * self.options.length
        copies = 3 if self.in_files else 2
        cache = copies * len(self.prompts) * self.cache_bytes
        return 16 * tokens + len(json.dumps(self.facts)), cache

    def keep_finished(self, path: Path) -> OwnText:
        """Keep a text that is complete, without a word: the run goes on."""
        return load_own_text(path)

    def save(self, result: OwnText, path: Path) -> None:
        """Write the text."""
        write_atomic(path, result.to_json().encode())

    def compute(self, records: Records, output: Path | None) -> OwnText:
        """Let the adapter write."""
        model = self.model
        length = self.options.length
        monitor = self.run.monitor
        progress = SweepProgress(monitor, "generate")
        cost = sweep_cost(model.size, len(self.prompts))
        progress.expect(cost * (length - 1), length - 1)
        beside = Path(tempfile.gettempdir()) if output is None else output.parent
        directory = beside if self.in_files else None
        ids = write_text(
            model,
            dict(enumerate(self.prompts)),
            length,
            self.options.seed,
            monitor.checkpoint,
            lambda tokens: progress.layer(f"token {tokens}", cost),
            records.snapshot(),
            directory,
        )
        model.check_all_used()
        self.plan.check_unchanged()
        progress.finish()
        return OwnText(self.facts, [*map(self._line, self.prompts, ids)])

    def stand_in(self) -> OwnText:
        """Make a text of the same size, for forecasts: its tokens mean nothing."""
        size = len(self.prompts), self.options.length
        ids = np.random.default_rng(0).integers(self.model.vocabulary, size=size)
        return OwnText(self.facts, [{"start": 1, "ids": sequence.tolist()} for sequence in ids])

    def _line(self, prompt: Prompt, ids: Tensor) -> JsonObject:
        line = {"start": min(len(prompt), len(ids) - 1), "ids": ids.tolist()}
        if self.tokenizer is None:
            return line
        return {"text": self.tokenizer.loaded.decode(ids.tolist()), **line}


def default_starts(model: SweepModel) -> list[list[int]]:
    """List the tokens that begin a text, or separate two, by the base's config.

    Raises
    ------
    UsageError
        If the config names none.
    """
    config: Any = model.network.config
    text = config.get_text_config()
    tokens = list[Any]()
    for named in (text.bos_token_id, text.eos_token_id):
        tokens += named if isinstance(named, list) else [named]
    starts = [
        [token]
        for token in dict.fromkeys(tokens)
        if isinstance(token, int) and 0 <= token < model.vocabulary
    ]
    if not starts:
        raise UsageError(
            f"{model.job.plan.base.path}: its config names no token with which the adapter's own text could begin; give --task or --prompts"
        )
    return starts


def _check_length(
    path: Path | None, starts: Sequence[Prompt], model: SweepModel, length: int, monitor: Monitor
) -> None:
    """Refuse a length that leaves the adapter nothing to write, or that the model cannot process."""
    longest = max(map(len, starts))
    if longest >= length:
        raise UsageError(
            f"{path}: a prompt has {longest} tokens, which leave no room in sequences of {length}; give --length {2 * longest}"
        )
    if 2 * longest > length and path is not None:
        what = f"the longest prompt has {longest} of {length} tokens"
        monitor.warn([f"{path.name}: {what}; with a larger --length the adapter shows more"])
    if model.positions is not None and length > model.positions:
        raise UsageError(
            f"length: the model has {model.positions} positions, found {length}; give --length {model.positions}"
        )


def prepare_own_text(
    base: Path, adapter: Path, options: Texts, max_memory: int | None, run: Run
) -> PreparedOwnText:
    """Open and check a base and an adapter, and choose how sequences begin."""
    require_transformers()
    plan = make_plan(base, adapter, run.io, run.stated, run.architecture)
    model = model_of(plan, ENDS, options.dtype, run)
    tokenizer = None
    try:
        tokenizer = load_tokenizer(adapter, tokenizer_directory(plan))
    except (MissingInputError, UnsupportedError):
        if options.prompts is not None:
            raise
    path = None
    digest = ""
    if options.prompts is None or tokenizer is None:
        starts = default_starts(model)
    else:
        path = Path(options.prompts)
        starts = read_prompts(path, tokenizer)
        digest = sample_digest(path)
    check_generates(model)
    _check_length(path, starts, model, options.length, run.monitor)
    prompts = [starts[i % len(starts)] for i in range(options.sequences)]
    return PreparedOwnText(run, max_memory, model, options, prompts, digest, tokenizer)
