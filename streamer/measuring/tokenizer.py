"""Load the tokenizer of a model, with the offsets of its tokens in the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

from streamer.errors import FormatError, MissingInputError, UnsupportedError
from streamer.plan.plan import Plan
from streamer.plan.tokenizer import VOCABULARIES, with_tokenizer
from streamer.streaming.extra import first_line, quiet_transformers, require_transformers

TEMPLATE_TIME = datetime(2024, 7, 26, 12)
"""Time that a chat template is given where it writes the present one, so that a text is the same tokens on every day; that day is the one
that Llama 3's templates write where they are given none."""

NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
"""Call by which a chat template asks transformers for the present time: quote, and format."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of transformers.

    Attributes
    ----------
    directory
        Where it was read from.
    start
        The tokens that it puts before a text, as ``<s>``, or ``[gMASK]`` and ``<sop>``; often none.
    loaded
        As transformers loads it.
    """

    directory: Path
    start: tuple[int, ...]
    loaded: Any

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Split a text into tokens, none added; special tokens are recognised by their text.

        Returns
        -------
        ids, offsets
            Of each token its id, and the characters that it stands for: from, to.
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
        """Split a text into tokens, those before it that the tokenizer puts there unless they are written out."""
        ids, _ = self.encode(text)
        return ids if tuple(ids[: len(self.start)]) == self.start else [*self.start, *ids]

    @property
    def prefix(self) -> int | None:
        """Return the token that a text is predicted from where nothing precedes it: the one that begins texts, or ends them."""
        begin, end = self.loaded.bos_token_id, self.loaded.eos_token_id
        found: int | None = end if begin is None else begin
        return found

    def render(self, messages: Sequence[Any], with_prompt: bool) -> str:
        """Write messages by the chat template, as at `TEMPLATE_TIME`; every fault of either raises an exception of its own."""
        text: str = self.loaded.apply_chat_template(
            list(messages),
            chat_template=NOW.sub(_at_template_time, self.loaded.get_chat_template()),
            tokenize=False,
            add_generation_prompt=with_prompt,
        )
        return text

    @property
    def has_chat_template(self) -> bool:
        """Test whether it has a chat template."""
        return bool(self.loaded.chat_template)


def _at_template_time(call: re.Match[str]) -> str:
    """Write a call for the present time as the string that it gives at `TEMPLATE_TIME`."""
    return f"{call[1]}{TEMPLATE_TIME.strftime(call[2])}{call[1]}"


def tokenizer_directory(plan: Plan) -> Path | None:
    """Choose the directory whose tokenizer and chat template are used: the adapter's, where a merge would take them, or the base's."""
    own = plan.adapter.path
    if plan.adapter.describes_model:
        return own if any((own / name).is_file() for name in VOCABULARIES) else plan.base.directory
    return own if with_tokenizer(plan, [])[1] == "adapter" else plan.base.directory


def load_tokenizer(text: Path, directory: Path | None) -> Tokenizer:
    """Load the tokenizer in a directory; code that lies there is not run.

    Parameters
    ----------
    text
        The file that it is needed for, which messages name.

    Raises
    ------
    MissingInputError, FormatError
        If there is none, or transformers cannot read it.
    UnsupportedError
        If it does not say where in the text its tokens stand.
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
        except Exception as e:  # of the tokenizers library it may be Exception itself
            raise FormatError(f"{directory}: transformers cannot read its tokenizer: {first_line(e)}") from e
    if not loaded.is_fast:
        raise UnsupportedError(
            f"{directory}: its tokenizer ({type(loaded).__name__}) does not report positions in the text; give token ids (.npy)"
        )
    start = takewhile(lambda token: token[1], zip(text_a.input_ids, text_a.special_tokens_mask, strict=True))
    return Tokenizer(directory, tuple(i for i, _ in start), loaded)
