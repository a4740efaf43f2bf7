"""Load a model's tokenizer, which also reports where each token is in the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

from streamer.errors import MissingInputError, UnsupportedError
from streamer.plan.plan import Plan
from streamer.plan.tokenizer import VOCABULARIES, with_tokenizer
from streamer.streaming.extra import quiet_transformers, require_transformers, unreadable

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
        found = self.loaded(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return found["input_ids"], found["offset_mapping"]

    def started(self, text: str) -> list[int]:
        """Split a text into tokens, and put the tokenizer's start tokens before them unless the text contains them."""
        ids, _ = self.encode(text)
        return ids if tuple(ids[: len(self.start)]) == self.start else [*self.start, *ids]

    @property
    def prefix(self) -> int | None:
        """Return the token from which a text is predicted if nothing precedes it: the begin-of-text token, else the end-of-text token."""
        begin, end = self.loaded.bos_token_id, self.loaded.eos_token_id
        found: int | None = end if begin is None else begin
        return found

    def render(self, messages: Sequence[Any], with_prompt: bool) -> str:
        """Write messages by the chat template, at the time `TEMPLATE_TIME`; a faulty template or message may raise any exception."""
        text: str = self.loaded.apply_chat_template(
            list(messages),
            chat_template=NOW.sub(_at_template_time, self.loaded.get_chat_template()),
            tokenize=False,
            add_generation_prompt=with_prompt,
        )
        return text

    @property
    def has_chat_template(self) -> bool:
        """Test whether the tokenizer has a chat template."""
        return bool(self.loaded.chat_template)


def _at_template_time(call: re.Match[str]) -> str:
    """Replace a call for the current time by the string that it returns at `TEMPLATE_TIME`."""
    return f"{call[1]}{TEMPLATE_TIME.strftime(call[2])}{call[1]}"


def tokenizer_directory(plan: Plan) -> Path | None:
    """Choose the directory of the tokenizer and chat template: the adapter's if a merge would use them, else the base's."""
    own = plan.adapter.path
    if plan.adapter.describes_model:
        return own if any((own / name).is_file() for name in VOCABULARIES) else plan.base.directory
    return own if with_tokenizer(plan, [])[1] == "adapter" else plan.base.directory


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
    if directory is None or not any((directory / name).is_file() for name in VOCABULARIES):
        where = text if directory is None else directory
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
    start = takewhile(lambda token: token[1], zip(text_a.input_ids, text_a.special_tokens_mask, strict=True))
    return Tokenizer(directory, tuple(i for i, _ in start), loaded)
