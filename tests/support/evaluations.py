"""Evaluations of made-up models, whose losses depend on method and λ in a known way."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib.resources import files
from typing import Any

import numpy as np
from jsonschema import Draft202012Validator
from seeds import vary

from streamer.detection.findings import Findings
from streamer.evaluation.evaluation import Evaluation
from streamer.measuring.sequences import TextSequences
from streamer.measuring.statistics import EvaluatedVariant, SequenceSums

SCHEMA = json.loads((files("streamer") / "schemas" / "evaluation-1.json").read_text())

COLUMNS = [
    "variant", "general", "vs", "adapter", "loss", "left", "KL", "KL", "left", "same", "top", "task", "kept", "behaviour",
    "kept", "top-1", "top-1", "kept",
]  # fmt: skip
"""Words that head the columns of the table."""

LAMBDAS = (0.9, 0.75, 0.5, 0.25, 0.0)

Curve = Callable[[float], tuple[float, float]]
"""λ → share of the forgetting that is left, share of what was learned that is kept."""

CURVES: Mapping[str, Curve] = {
    "paper": lambda x: (x + 0.4 * (1 - x), x - 0.1),
    "project": lambda x: (x**1.2, x**0.5),
    "shrink": lambda x: (x**2, 1 - (1 - x) ** 2),
}


def text_facts(name: str) -> dict[str, Any]:
    return {"name": name, "sequences": 64, "tokens": 9, "length": 512, "sha256": "0" * 64}


TEXTS = {side: text_facts(f"{side}.txt") for side in ("general", "task")}

FACTS = {
    "version": "0", "transformers": "5", "base": {"files": []}, "adapter": {"modules": 1}, "factored": True, "quantized": False,
    "detection": {"top_k": 10, "threshold_epsilon": 0.5, "solver": "auto", "max_memory": None}, "scale": "all",
    "projected": False,
    "dtype": "float32",
    "texts": TEXTS,
    "plan": "0" * 64,
}  # fmt: skip


def evaluation(
    curves: Mapping[str, Curve] = CURVES,
    *,
    forgets: float = 0.2,
    learns: float = 0.5,
    noise: float = 0.003,
    seed: int = 0,
    others: Mapping[str, float] = {},
    exact: bool = True,
) -> Evaluation:
    """Make losses of 64 sequences of 200 to 512 tokens: how hard a sequence is, plus shares of what it forgets and learns, plus noise.

    Means over tokens are exact, whatever is drawn, unless `exact` is false: the noise has none, and what is forgotten and learned on
    average is as given.
    """
    rng = np.random.default_rng(vary(seed))
    tokens = rng.integers(200, 512, 64).astype(float)
    variants = [EvaluatedVariant("base", None, None), EvaluatedVariant("adapter", None, None)]
    points = [(0.0, 0.0), (1.0, 1.0)]
    for method, curve in curves.items():
        variants += [EvaluatedVariant(f"{method} {lam:g}", method, lam) for lam in LAMBDAS]
        points += [curve(lam) for lam in LAMBDAS]
    shares = np.array(points).T

    def drawn(mean: float, spread: float, rows: int = 1) -> np.ndarray:
        found = rng.normal(0, spread, (rows, 64))
        return found + mean - exact * found @ tokens[:, None] / tokens.sum()

    def sums(share: np.ndarray, change: float) -> SequenceSums:
        hard = rng.normal(4, 0.5, 64)
        effect = share[:, None] * drawn(change, abs(change) / 6)
        scatter = drawn(0, noise, len(share)) * (np.arange(len(share)) > 0)[:, None]
        size = np.abs(effect)
        return SequenceSums(
            tokens,
            (hard + effect + scatter) * tokens,
            (size + np.abs(scatter)) * tokens,
            np.abs(effect - effect[1]) * tokens,
            np.round(np.exp(-size) * tokens),
            np.round(np.exp(-hard / 4 - effect) * tokens),
        )

    texts = sums(shares[0], forgets), sums(shares[1], -learns)
    facts = {
        **FACTS,
        "texts": {**TEXTS, **({"others": [text_facts(name) for name in others]} if others else {})},
    }
    more = {name: sums(shares[0], change) for name, change in others.items()}
    return Evaluation(tuple(variants), *texts, facts, others=more)


def of_findings(findings: Findings) -> Evaluation:
    """The evaluation, of the base and the adapter of findings."""
    return replace(
        evaluation(), facts={**FACTS, "base": {**findings.base}, "adapter": {**findings.adapter}}
    )


def faults(tree: dict[str, Any]) -> list[str]:
    return [f"{e.json_path}: {e.message}" for e in Draft202012Validator(SCHEMA).iter_errors(tree)]


def text_of(ids: Iterable[np.ndarray]) -> TextSequences:
    """A text in whose sequences every token except the first counts."""
    taken = tuple(ids)
    return TextSequences(taken, tuple(np.arange(len(one)) > 0 for one in taken))
