"""Hold the sequences of tokens of a text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from streamer.errors import FormatError
from streamer.json_types import Count, JsonObject, Sha256

GENERAL = "general"
TASK = "task"
"""Names of the two texts: what the base can do, and what the adapter was trained for."""

IDENTIFYING = (
    "architecture",
    "files",
    "weights_sha256",
    "base_is_residual",
    "lora_b_layout",
    "ignored_keys",
)
"""Keys that identify a base or an adapter, in findings and in evaluations, besides its config."""


def same_input(ours: JsonObject, recorded: JsonObject) -> bool:
    """Test whether two identities are those of the same base or adapter."""
    return all(ours.get(key) == recorded.get(key) for key in IDENTIFYING)


TokenIds = NDArray[np.int64]
"""Tokens of a sequence: (t,)."""

Marks = NDArray[np.bool_]
"""Which tokens of a sequence count: (t,)."""

TokenSequence = tuple[TokenIds, Marks]


def unexpected(where: object, wanted: str, found: object) -> FormatError:
    """Make the error for contents other than wanted; what was found may say what to do."""
    return FormatError(f"{where}: expected {wanted}, found {found}")


# fmt: off
class TextFacts(TypedDict):
    """A text."""
    name: Annotated[str, "Name of the file; never a path."]
    sequences: Annotated[Count, "Sequences taken from it."]
    tokens: Annotated[Count, "Their tokens that count, never the first of a sequence."]
    length: Annotated[Count, "Tokens of the longest sequence."]
    sha256: Annotated[Sha256, "Digest of the token ids and of the positions that count (SHA-256, hexadecimal)."]
    drawn: NotRequired[Annotated[Literal[True], "That base + adapter wrote it; `loss` is then its expectation over their distribution."]]
    samples: NotRequired[Annotated[list[str], "Of such a text: its first sequences."]]
# fmt: on


@dataclass(frozen=True)
class TextSequences:
    """Sequences of tokens, and which tokens' losses count.

    Attributes
    ----------
    ids
        Token ids of each sequence: (t,), t ≥ 2.
    counted
        For each sequence (t,): whether the loss of predicting this token from the tokens before it counts. The first token has nothing
        before it and never counts; at least one token counts.
    name
        Name of the file from which they were read.
    drawn
        Whether an adapter drew the tokens from its own distribution.
    samples
        Some of what it drew, as text.
    """

    ids: tuple[TokenIds, ...]
    counted: tuple[Marks, ...]
    name: str = ""
    drawn: bool = False
    samples: tuple[str, ...] = ()

    def take(self, rows: Iterable[int]) -> TextSequences:
        """Take some of the sequences, by number."""
        chosen = tuple(rows)
        return replace(
            self,
            ids=tuple(self.ids[i] for i in chosen),
            counted=tuple(self.counted[i] for i in chosen),
        )

    @property
    def padded_ids(self) -> Tensor:
        """Return all sequences in one batch, (sequences, length), with zeros at their ends, where no counted token attends to them."""
        return pad_sequence([*map(torch.from_numpy, self.ids)], batch_first=True)

    @property
    def padded_next(self) -> Tensor:
        """Return whether the loss of predicting the next token counts, of all sequences: (sequences, length)."""
        marks = [torch.from_numpy(np.append(counted[1:], False)) for counted in self.counted]
        return pad_sequence(marks, batch_first=True)

    @property
    def rows(self) -> int:
        """Count the tokens of all sequences."""
        return sum(map(len, self.ids))

    @property
    def tokens(self) -> int:
        """Count the tokens whose losses count."""
        return sum(int(c.sum()) for c in self.counted)

    @property
    def longest(self) -> int:
        """Count the tokens of the longest sequence."""
        return max(len(ids) for ids in self.ids)

    def facts(self) -> JsonObject:
        """Describe the sequences as JSON: `TextFacts`."""
        return {
            "name": self.name,
            "sequences": len(self.ids),
            "tokens": self.tokens,
            "length": self.longest,
            "sha256": self.digest(),
            **({"drawn": True, "samples": list(self.samples)} if self.drawn else {}),
        }

    def digest(self) -> str:
        """Hash (SHA-256, hex) all sequences: the ids, which of them count, and whether they were drawn."""
        digest = hashlib.sha256(b"drawn" if self.drawn else b"")
        for ids, counted in zip(self.ids, self.counted, strict=True):
            digest.update(
                len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes() + counted.tobytes()
            )
        return digest.hexdigest()


TextsByName = Mapping[str, TextSequences]


def evenly(count: int, wanted: int) -> list[int]:
    """Choose at most `wanted` of `count` things at even distances, including the first.

    >>> evenly(10, 4), evenly(3, 4)
    ([0, 2, 5, 7], [0, 1, 2])
    """
    taken = min(count, wanted)
    return [i * count // taken for i in range(taken)]
