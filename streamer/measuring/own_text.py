"""Let an adapter write the text of its own task: base + adapter, sampled from start tokens, brings its modules the inputs of its task.

The file has a JSON object for each sequence: ``ids``; ``start``, the number of tokens that were given; ``text``, if there is a tokenizer.
It is a text like any other, and its first line also has ``facts``, what it was made from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import Tensor

from streamer.detection.options import Run
from streamer.errors import FormatError, MissingInputError, UnsupportedError, UsageError
from streamer.measuring import runs
from streamer.measuring.runs import Prepared, Progress, Records, Work
from streamer.measuring.statistics import ADAPTER_ROW
from streamer.measuring.texts import (
    Tokenizer,
    load_tokenizer,
    read_prompts,
    sample_digest,
    tokenizer_directory,
)
from streamer.methods import UNCHANGED
from streamer.options import Texts
from streamer.plan.plan import make_plan
from streamer.storage.atomic_file import write_atomic
from streamer.storage.files import open_regular, strict_json
from streamer.streaming.generation import Prompt, Snapshot, check_generates, write_text
from streamer.streaming.model import require_transformers
from streamer.streaming.sweep import SweepModel
from streamer.streaming.values import ADAPTER, BASE, Variant, VariantSet

SCHEMA: Final = "streamer.own_text/1"

SAMPLING_BYTES = 32
"""Bytes for each logit of a sequence's next token while it is drawn: the logits, their copies, and the noise in float64."""


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

    facts: dict[str, Any]
    lines: list[dict[str, Any]]

    def to_json(self) -> str:
        """Write the lines."""
        first, *others = self.lines
        return "".join(
            json.dumps(line, ensure_ascii=False) + "\n"
            for line in ({**first, "facts": self.facts}, *others)
        )


def load_own_text(path: Path) -> OwnText:
    """Read text that an adapter wrote.

    Raises
    ------
    FormatError
        If it is another text.
    """
    fd, _ = open_regular(path, "text that an adapter wrote")
    with os.fdopen(fd, "rb") as file:
        raw = file.read().splitlines()
    try:
        lines = [strict_json(line) for line in raw]
        facts = lines[0].pop("facts")
        if facts["schema"] != SCHEMA:
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise FormatError(
            f"{path}: expected text that an adapter wrote ({SCHEMA}), found another text"
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
    def facts(self) -> dict[str, Any]:
        """Describe the inputs and options as JSON; equal `plan` digests mean equal texts."""
        tree = {
            "schema": SCHEMA,
            **runs.model_facts(
                self.model, base={**self.plan.base_identity}, adapter={**self.plan.adapter_identity}
            ),
            "texts": [],
            "seed": self.options.seed,
            "sequences": self.options.sequences,
            "length": self.options.length,
            "prompts": self.file,
            "starts": [list(prompt) for prompt in self.prompts],
        }
        return runs.with_digest(tree)

    @property
    def cache_bytes(self) -> int:
        """Estimate the bytes of a sequence's keys and values."""
        return self.model.size.cached * self.options.length

    @property
    def solving_bytes(self) -> int:
        """Estimate the memory of the cache, of a copy of a layer's part and of what is saved of it, and of drawing tokens."""
        each = 2 * self.cache_bytes + SAMPLING_BYTES * self.model.vocabulary
        return len(self.prompts) * each

    def sweeps(self, known: OwnText | None = None) -> list[Work]:
        """List a sweep for each token."""
        count = len(self.prompts)
        return [Work(fitted=0, riding=count, length=1)] * (self.options.length - 1)

    def written_bytes(self, known: OwnText | None) -> tuple[int, int]:
        """Estimate the bytes of the file and of the saved cache."""
        tokens = len(self.prompts) * self.options.length
        return 16 * tokens + len(json.dumps(self.facts)), len(self.prompts) * self.cache_bytes

    def keep_finished(self, path: Path) -> OwnText:
        """Keep a text that is complete, without a word: the run goes on."""
        return load_own_text(path)

    def save(self, result: OwnText, path: Path) -> None:
        """Write the text."""
        write_atomic(path, result.to_json().encode())

    def compute(self, records: Records, output: Path | None) -> OwnText:
        """Let the adapter write."""
        progress, cost = (
            Progress(self.run, "generate"),
            runs.sweep_cost(self.model.size, len(self.prompts)),
        )
        steps = self.options.length - 1
        progress.expect(cost * steps, steps)
        place = records.snapshot()
        ids = write_text(
            self.model,
            ADAPTER_ROW,
            dict(enumerate(self.prompts)),
            self.options.length,
            self.options.seed,
            self.run.monitor.checkpoint,
            lambda tokens: progress.layer(f"token {tokens}", cost),
            None if place is None else Snapshot(*place),
        )
        self.model.check_all_used()
        self.plan.check_unchanged()
        progress.finish()
        return OwnText(
            self.facts, [self._line(*pair) for pair in zip(self.prompts, ids, strict=True)]
        )

    def stand_in(self) -> OwnText:
        """Make a text of the same size, for forecasts: its tokens mean nothing."""
        size = len(self.prompts), self.options.length
        ids = np.random.default_rng(0).integers(self.model.vocabulary, size=size)
        return OwnText(self.facts, [{"start": 1, "ids": sequence.tolist()} for sequence in ids])

    def _line(self, prompt: Prompt, ids: Tensor) -> dict[str, Any]:
        written = (
            {} if self.tokenizer is None else {"text": self.tokenizer.loaded.decode(ids.tolist())}
        )
        return {**written, "start": min(len(prompt), len(ids) - 1), "ids": ids.tolist()}


def default_starts(model: SweepModel) -> list[list[int]]:
    """List the tokens that begin a text, or separate two, by the base's config.

    Raises
    ------
    UsageError
        If the config names none.
    """
    config: Any = model.network.config
    text = config.get_text_config()
    named = text.bos_token_id, text.eos_token_id
    tokens = [token for name in named for token in (name if isinstance(name, list) else [name])]
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
    path: Path | None, starts: Sequence[Prompt], model: SweepModel, options: Texts, run: Run
) -> None:
    """Refuse a length that leaves the adapter nothing to write, or that the model cannot process."""
    longest = max(map(len, starts))
    if longest >= options.length:
        raise UsageError(
            f"{path}: a prompt has {longest} tokens, which leave no room in sequences of {options.length}; give --length "
            f"{2 * longest}"
        )
    if 2 * longest > options.length and path is not None:
        run.monitor.warn(
            (
                f"{path.name}: the longest prompt has {longest} of {options.length} tokens; with a larger --length the adapter shows more",
            )
        )
    if model.positions is not None and options.length > model.positions:
        raise UsageError(
            f"length: the model has {model.positions} positions, found {options.length}; give --length {model.positions}"
        )


def prepare_own_text(
    base: str | Path, adapter: Path, options: Texts, max_memory: int | None, run: Run
) -> PreparedOwnText:
    """Open and check a base and an adapter, and choose how sequences begin."""
    require_transformers()
    plan = make_plan(base, adapter, run.io, run.stated, run.architecture)
    variants = Variant(BASE, None), Variant(ADAPTER, UNCHANGED)
    model = SweepModel(
        VariantSet(plan, variants, None, False, options.dtype == "bf16", run.model_device)
    )
    directory = tokenizer_directory(plan)
    try:
        tokenizer = load_tokenizer(adapter, directory)
    except (MissingInputError, UnsupportedError):
        if options.prompts is not None:
            raise
        tokenizer = None
    path = None if options.prompts is None else Path(options.prompts)
    starts = (
        default_starts(model)
        if path is None or tokenizer is None
        else read_prompts(path, tokenizer)
    )
    check_generates(model)
    _check_length(path, starts, model, options, run)
    prompts = [starts[i % len(starts)] for i in range(options.sequences)]
    digest = "" if path is None else sample_digest(path)
    return PreparedOwnText(plan, run, max_memory, model, options, prompts, digest, tokenizer)
