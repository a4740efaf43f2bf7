"""Targets for the files that `map`, `fit` and `evaluate` write."""

from __future__ import annotations

from pathlib import Path

from fuzz_inputs import Target
from helpers import sealed
from learned import make_learned
from mutate import mutate_json, mutate_safetensors

import streamer
from streamer.cli.evaluation_table import evaluation_table
from streamer.evaluation.view import Names

SEQUENCES = 24


def _learned(home: Path) -> dict[str, object]:
    """A base, an adapter and two texts; the keywords of the texts."""
    make_learned(home, SEQUENCES)
    return {
        "general": home / "general.npy",
        "task": home / "task.npy",
        "sequences": SEQUENCES,
        "on_event": lambda _: None,
    }


def input_map(home: Path) -> Target:
    """A map of a base's inputs: read, and applied."""
    texts = _learned(home)
    del texts["task"]
    path = home / "m.map.safetensors"
    streamer.map_inputs(home / "base", path, vectors=2, **texts)

    def run(data: bytes) -> None:
        path.write_bytes(sealed(data))
        repr(streamer.load_map(path))
        for _ in streamer.iter_merged(home / "base", home / "adapter", map=path):
            pass

    return Target([path.read_bytes()], mutate_safetensors, run)


def coefficients(home: Path) -> Target:
    """A file of right factors: read, and applied."""
    texts, path = _learned(home), home / "c.safetensors"
    streamer.fit_coefficients(home / "base", home / "adapter", path, **texts)

    def run(data: bytes) -> None:
        path.write_bytes(sealed(data))
        keep = streamer.load_coefficients(path).keeps[0]
        for _ in streamer.iter_merged(home / "base", home / "adapter", coefficients=path, keep=keep):
            pass

    return Target([path.read_bytes()], mutate_safetensors, run)


def evaluation(home: Path) -> Target:
    """The file of an evaluation: read, and shown."""
    path = home / "e.json"
    streamer.evaluate_variants(
        home / "base", home / "adapter", path, methods=["shrink"], lambdas=[0.5], **_learned(home)
    )

    def run(data: bytes) -> None:
        path.write_bytes(data)
        evaluation_table(streamer.load_evaluation(path), Names())

    return Target([path.read_bytes()], mutate_json, run)
