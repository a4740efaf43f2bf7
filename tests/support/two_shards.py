"""A base of two shards, and the words with which opening one is refused."""

from pathlib import Path

import pytest
import torch
from helpers import write_sharded

from streamer.storage.checkpoint import IOMode, open_checkpoint

MODES: tuple[IOMode, ...] = ("mmap", "pread")


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def two_shards(directory: Path) -> Path:
    """Two shards: a and b in the first, c in the second."""
    return write_sharded(
        directory,
        [
            {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5)},
            {"c": torch.arange(4000, dtype=torch.int32).reshape(40, 100)},
        ],
    )


def refusal(kind: type[Exception], path: Path) -> str:
    """The one line with which opening is refused."""
    with pytest.raises(kind) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert type(caught.value) is kind
    return message
