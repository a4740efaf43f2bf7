"""A base, an adapter, and texts of which the adapted model finds one likelier than the base does, and one less likely."""

from pathlib import Path
from typing import Any

import numpy as np
from architectures import ATTENTION
from causal_models import make_adapter, make_base
from forks import Outcome, Server
from seeds import vary

import streamer
from streamer.fitting.prepare import FitOptions


def make_learned(home: Path, sequences: int = 24, length: int = 8, **lora: Any) -> Path:
    """Write ``base``, ``adapter``, ``general.npy`` and ``task.npy``: as if one text had been forgotten and the other learned.

    Of ``mild.npy`` a little was learned, so that what a shrink gives up of it is less than the divergence that it regains.
    """
    make_adapter(make_base("llama", home / "base"), home / "base", home / "adapter", ATTENTION, **lora)
    texts = np.random.default_rng(vary(0)).integers(3, 64, (200, length))
    np.save(home / "all.npy", texts)
    found = streamer.evaluate_variants(home / "base", home / "adapter", general=home / "all.npy", task=home / "all.npy",
                                       methods=["shrink"], lambdas=[0.5], sequences=200, length=length,
                                       on_event=lambda event: None)  # fmt: skip
    gain = found.task.loss[0] - found.task.loss[1]
    np.save(home / "task.npy", texts[np.argsort(-gain)[:sequences]])
    np.save(home / "mild.npy", texts[np.argsort(-gain)[3 * sequences // 2 : 5 * sequences // 2]])
    np.save(home / "general.npy", texts[np.argsort(gain)[:sequences]])
    return home


def evaluate(server: Server, home: Path, output: object, *options: object, before: str = "", **texts: Path) -> Outcome:
    """Run `streamer evaluate` on them, or on other texts."""
    line = ["evaluate", home / "base", home / "adapter", "-o", output, *options]
    for name in ("general", "task"):
        line += [f"--{name}", texts.get(name, home / f"{name}.npy")]
    return server.run(*line, before=before)


def held_apart(home: Path, place: Path) -> dict[str, Path]:
    """Write the sequences that a fit holds apart."""
    for name in ("general", "task"):
        ids = np.load(home / f"{name}.npy")
        shift = np.random.default_rng(FitOptions.seed).integers(len(ids))
        np.save(place / f"{name}.npy", ids[sorted(np.roll(np.arange(len(ids)), shift)[: len(ids) // 4])])
    return {name: place / f"{name}.npy" for name in ("general", "task")}
