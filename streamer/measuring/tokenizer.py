"""Load a base's or adapter's tokenizer with its chat template, without running code from its directory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from streamer.errors import MissingInputError, UnsupportedError
from streamer.plan.plan import Plan
from streamer.plan.side_files import VOCABULARIES, with_tokenizer
from streamer.streaming.skeleton import quiet_transformers, require_transformers, unreadable

TEMPLATE_TIME = datetime(2024, 7, 26, 12)
"""Time given to chat templates that write the current time, so that a text has the same tokens every day. Llama 3's templates write this
date if they cannot ask for the current one."""

NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
"""Call by which a chat template asks transformers for the current time; the groups are the quote and the format."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of transformers.

    Attributes
    ----------
    directory
        Directory from which it was read.
    start
        Tokens that it puts before a text, such as ``<s>``, or ``[gMASK]`` and ``<sop>``; often none.
    loaded
        The tokenizer object of transformers.
    """

    directory: Path
    start: tuple[int, ...]
    loaded: Any

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Split a text into tokens without adding any; special tokens in the text are recognised.

        Returns
        -------
        ids, offsets
            Each token's id, and the range of characters (begin, end) that it represents.
        """
        encoding = self.loaded(
            text,
            verbose=False,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return encoding["input_ids"], encoding["offset_mapping"]

    def starts(self, ids: Sequence[int]) -> bool:
        """Test whether tokens begin with those that this tokenizer puts before a text."""
        return tuple(ids[: len(self.start)]) == self.start

    def render(self, messages: list[Any], with_prompt: bool) -> str:
        """Write messages by the chat template, at the time `TEMPLATE_TIME`; a faulty template or message may raise any exception."""

        def now(call: re.Match[str]) -> str:
            return f"{call[1]}{TEMPLATE_TIME.strftime(call[2])}{call[1]}"

        template = NOW.sub(now, self.loaded.get_chat_template())
        rendered = self.loaded.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=with_prompt
        )
        return cast(str, rendered)


def tokenizer_directory(plan: Plan) -> Path | None:
    """Choose the directory of the tokenizer and chat template: the adapter's if a merge would use them, else the base's."""
    adapter = plan.adapter
    base = plan.base.directory
    if adapter.describes_model:
        return adapter.path if _has_tokenizer(adapter.path) else base
    files = with_tokenizer([], adapter, base, plan.config, plan.edits.vocabulary)
    return adapter.path if files.tokenizer == "adapter" else base


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in VOCABULARIES)


def load_tokenizer(text: Path, directory: Path | None) -> Tokenizer:
    """Load the tokenizer in a directory, without running code from there.

    Parameters
    ----------
    text
        File that needs the tokenizer, named in messages.

    Raises
    ------
    MissingInputError, FormatError, StorageError
        If there is no tokenizer, or transformers or the system cannot read it.
    UnsupportedError
        If it does not report the positions of tokens in the text.
    MissingPackageError
        If transformers is not installed.
    """
    if directory is None or not _has_tokenizer(directory):
        where = directory or text
        raise MissingInputError(
            f"{where}: has no tokenizer, which {text.name} needs; put its files there, or give token ids (.npy)",
            where,
        )
    transformers = require_transformers()
    with quiet_transformers():
        try:
            loaded = transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            text_a = loaded("a", return_special_tokens_mask=True)
        except Exception as e:  # the tokenizers library raises Exception itself
            raise unreadable(directory, "transformers cannot read its tokenizer", e) from e
    if not loaded.is_fast:
        raise UnsupportedError(
            f"{directory}: its tokenizer ({type(loaded).__name__}) does not report positions in the text; give token ids (.npy)"
        )
    added = sum(1 for _ in takewhile(bool, text_a.special_tokens_mask))
    return Tokenizer(directory, tuple(text_a.input_ids[:added]), loaded)
