"""Keep what each chunk of a fit gave, in a journal, so that a killed run is taken up and ends at the same bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from streamer.evaluation.result_file import ResultFile, RunJournal, State, of_others
from streamer.fitting.prepare import PreparedFit
from streamer.methods.coefficients import Floats
from streamer.methods.coefficients_file import load_coefficients

Arrays = Mapping[str, Floats]
"""Sums of a chunk, by name."""


def result_file(prepared: PreparedFit, output: Path) -> ResultFile:
    """Describe the file of coefficients that a fit writes."""
    one, digest = "coefficients", prepared.facts["plan"]

    def is_whole(path: Path) -> bool:
        if load_coefficients(path).facts.get("plan") != digest:
            raise of_others(path, one)
        return True

    return ResultFile(output, one, "these very coefficients", "coefficients.safetensors", prepared.plan, prepared.run, digest,
                      is_whole)  # fmt: skip


def inspect(prepared: PreparedFit, output: Path) -> State:
    """Check, read-only, whether a fit can be written to a file, and whether it stands there or was begun."""
    file = result_file(prepared, output)
    file.check_path()
    prepared.check_budget()
    return file.state()


def key(request: int, chunk: int, asked: Iterable[Floats]) -> str:
    """Name what a chunk of a request gives: by their numbers, and a digest of the parameters that were asked about."""
    digest = hashlib.sha256()
    for theta in asked:
        digest.update(theta.astype("<f8").tobytes())
    return f"{request}.{chunk} {digest.hexdigest()[:32]}"


def pack(name: str, arrays: Arrays) -> bytes:
    """Write arrays as a line of JSON with their shapes, and their bytes, so that they are read as the same bits."""
    head = {"key": name, "shapes": {array: list(values.shape) for array, values in arrays.items()}}
    return b"\n".join(
        [json.dumps(head).encode(), b"".join(values.astype("<f8").tobytes() for values in arrays.values())]
    )


def unpack(payload: bytes) -> tuple[str, dict[str, Floats]]:
    """Read what `pack` wrote."""
    line, _, raw = payload.partition(b"\n")
    head, values, at = json.loads(line), np.frombuffer(raw, "<f8").astype(np.float64), 0
    arrays = {}
    for name, shape in head["shapes"].items():
        size = int(np.prod(shape, dtype=int))
        arrays[name] = values[at : at + size].reshape(shape)
        at += size
    return head["key"], arrays


class InMemory:
    """Records of this run alone, none of which is asked for twice.

    Attributes
    ----------
    taken_up
        Chunks that an interrupted run has recorded.
    """

    taken_up = 0

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()

    def find(self, name: str) -> Arrays | None:
        """Find what an interrupted run recorded under a key."""
        return None

    def add(self, name: str, arrays: Arrays) -> None:
        """Record what a chunk gave."""


class Journalled(InMemory):
    """Records that a journal keeps, those of an interrupted run among them; they are read when they are asked for."""

    def __init__(self, own: RunJournal) -> None:
        self._journal, self.threads = own.journal, own.threads
        self._at = {unpack(record)[0]: i for i, record in enumerate(own.records(), 1)}
        self.taken_up = sum(name[0].isdigit() for name in self._at)

    def find(self, name: str) -> Arrays | None:
        """Find what was recorded under a key."""
        at = self._at.get(name)
        return None if at is None else unpack(self._journal[at])[1]

    def add(self, name: str, arrays: Arrays) -> None:
        """Record what a chunk gave, durably."""
        self._at[name] = len(self._journal)
        self._journal.append(pack(name, arrays))
