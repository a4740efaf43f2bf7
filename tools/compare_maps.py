"""Compare formulas that repair an adapter by a map of its base, without text of its task, at equal learning, by transformers and PEFT.

    python tools/train_small.py DIR --adapters high,usual         or a directory of measure_forgetting.py, which has such files too
    streamer map DIR/base --general DIR/general.txt -o MAP
    python tools/compare_maps.py OUT DIR/base DIR/high --map MAP --task DIR/task-test.txt --general DIR/general-test.txt --third TEXT
    python tools/compare_maps.py OUT                              prints the tables of all adapters that were measured

Minutes of a core for a small model, half an hour for 135 million parameters; packages: peft, scipy, transformers. OUT/NAME.json has
what was measured of an adapter.

The delta Δ of a matrix becomes Δ C_t^½ (I + μ C_t^-½ C_g C_t^-½)^-p C_t^-½; with p = 1, Δ C_t (C_t + μ C_g)^-1. C_g is the map's; C_t is a
guess of the task's second moments. The traces of C_g and of what C_t has of Δ are n. Each matrix has the μ at which a share of its
E‖Δ x‖² on general inputs stays; "one μ": all have the same. "σ₁": Δ is scaled by min(1, θ / σ₁(Δ)), or by min(1, θ σ₁(W0) / σ₁(Δ)),
with one θ for all, as in a budget of spikes (arXiv 2607.23711).

The strength that keeps a share of the gain in loss on the task's text is searched for, and log KL interpolated between two such. Errors
are those of 200 resamples of the sequences. What each delta alone diverges is compared with forecasts by ranks (Spearman).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import measure_forgetting
import numpy as np
import torch
from measure_forgetting import load, sequences
from scipy.stats import spearmanr

from streamer import load_map

KEEP = (0.9, 0.8)
TEXTS = ("task", "general", "third")
CLOSE = 0.025
STEPS = 6
"""Difference of what is kept from a share that ends the search, and the most strengths that are tried for it."""

FORMS: dict[str, tuple[str, float, float, bool]] = {
    "map": ("none", 1.0, 0.25, True),
    "I, p 1": ("none", 1.0, 1.0, True),
    "I, p 1, one μ": ("none", 1.0, 1.0, False),
    "ΔᵀΔ + I": ("delta", 1.0, 1.0, True),
    "ΔᵀΔ + I, one μ": ("delta", 1.0, 1.0, False),
    "(ΔᵀΔ)^½ + 0.3 I": ("root", 0.3, 1.0, True),
    "(ΔᵀΔ)^½ + 0.3 I, one μ": ("root", 0.3, 1.0, False),
    "rows of A + 0.1 I": ("rows", 0.1, 1.0, True),
    "rows of A + 0.1 I, one μ": ("rows", 0.1, 1.0, False),
    "ΔᵀΔ + I, p ¼": ("delta", 1.0, 0.25, True),
    "(ΔᵀΔ)^½ + 0.3 I, p ¼": ("root", 0.3, 0.25, True),
}
"""What C_t has of Δ, its ridge, p, and whether each matrix has its own μ."""

SCALES: dict[str, Callable[[Any, float], float]] = {
    "shrink": lambda _, t: 1 / (1 + math.exp(t)),
    "σ₁ to the base's": lambda one, t: min(1.0, math.exp(-t) / one.forecasts["σ₁(Δ) / σ₁(W0)"]),
    "σ₁": lambda one, t: min(1.0, math.exp(-t) / one.forecasts["σ₁(Δ)"]),
}
METHODS = (*FORMS, *SCALES)


class Module(NamedTuple):
    """The weight of lora_A in a LoRA layer, its scaled lora_B (m, r), its lora_A (r, n), C_g = V diag(e - ρ) Vᵀ + ρ I, forecasts."""

    weight: Any
    L: torch.Tensor
    A: torch.Tensor
    V: torch.Tensor
    values: torch.Tensor
    rest: float
    forecasts: dict[str, float]

    def directions(self, kind: str, ridge: float) -> tuple[torch.Tensor, ...]:
        """X, γ, Y with A C_t (C_t + μ C_g)^-1 = X diag(1 / (1 + μ γ)) Y, and the parts of E‖Δ x‖² by γ."""
        core = torch.linalg.qr(self.L)[1]
        solve = torch.linalg.solve_triangular
        Q = torch.linalg.qr(torch.cat([self.V, self.A.T], 1))[
            0
        ]  # elsewhere A is 0, and both are multiples of I
        _, S, W = torch.linalg.svd(core @ self.A @ Q, full_matrices=False)
        weights = {"none": 0 * S, "delta": S**2, "root": S, "rows": (1e-6 * S[0] < S).double()}[
            kind
        ]
        weights = weights * len(Q) / weights.sum().clamp_min(1e-300)
        one = torch.eye(Q.shape[1], dtype=Q.dtype)
        VQ = Q.T @ self.V
        root = torch.linalg.cholesky((W.T * weights) @ W + ridge * one)
        half = solve(root, (VQ * (self.values - self.rest)) @ VQ.T + self.rest * one, upper=False)
        gamma, P = torch.linalg.eigh(solve(root, half.T, upper=False))
        X = self.A @ Q @ root @ P
        Y = P.T @ solve(root, Q.T, upper=False)
        gamma = gamma.clamp_min(0)
        return X, gamma, Y, torch.linalg.vector_norm(core @ X, dim=0) ** 2 * gamma


class Measured:
    """A base with an adapter whose deltas are changed in place, and the sequences of the texts."""

    def __init__(self, args: argparse.Namespace) -> None:
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.base)
        entries = load_map(args.map)
        self.model = PeftModel.from_pretrained(load(args.base), args.adapter, "adapter").eval()
        self.modules = {}
        self.texts = {text: sequences(getattr(args, text), tokenizer) for text in TEXTS}
        for path, layer in self.model.named_modules():
            if isinstance(layer, LoraLayer):
                name = f"{path.removeprefix('base_model.model.')}.weight"
                W0 = layer.weight.detach().double()
                A, B = (
                    factors["adapter"].weight.detach().double()
                    for factors in (layer.lora_A, layer.lora_B)
                )
                L = layer.scaling["adapter"] * B
                n = A.shape[1]
                if (entry := entries.find(name, n)) is None:
                    raise SystemExit(
                        f"{args.map}: lacks the inputs of {name}; make it of more text"
                    )
                values, rest, V = (
                    getattr(entry.spectrum, key) for key in ("values", "rest", "vectors")
                )
                D = torch.linalg.qr(L)[1] @ A
                scale = n / entry.trace
                own, base = (
                    float(((M @ V) ** 2 @ (values - rest)).sum() + rest * (M**2).sum())
                    for M in (D, W0)
                )
                size = float(torch.linalg.matrix_norm(D, 2))
                base_size = float(torch.svd_lowrank(W0, 4, 8)[1][0])
                forecasts = {
                    "E‖Δx‖² / ‖Δ‖² E‖x‖²": own / float((D**2).sum()) / entry.trace,
                    "E‖Δx‖² / E‖W0 x‖²": own / base,
                    "E‖Δx‖²": own,
                    "‖Δ‖": float(D.norm()),
                    "σ₁(Δ)": size,
                    "σ₁(Δ) / σ₁(W0)": size / base_size,
                }
                weight = layer.lora_A["adapter"].weight.data
                self.modules[name] = Module(
                    weight, L, A, V, values * scale, rest * scale, forecasts
                )
        self.scale(lambda _: 0.0)
        self.base: Any = None
        self.base = self.run(TEXTS)

    def scale(self, factor: Callable[[Module], float]) -> None:
        """Multiply each delta."""
        for module in self.modules.values():
            module.weight.copy_(module.A * factor(module))

    def run(
        self, texts: Any, most: int | None = None, length: int | None = None
    ) -> dict[str, list[Any]]:
        """Sum over each sequence: the gain in the task's loss, the KL divergence from the base; of the base log-probabilities."""
        out: dict[str, list[Any]] = {text: [] for text in texts}
        for text in texts:
            for i, one in enumerate(self.texts[text][:most]):
                with torch.no_grad():
                    found = (
                        self.model(input_ids=one.ids[:, :length])
                        .logits[0, one.begin - 1 : -1]
                        .log_softmax(-1)
                    )
                found = found.gather(1, one.ids[0, one.begin :, None]) if text == "task" else found
                if self.base is not None:
                    base = self.base[text][i][: len(found)]
                    found = (
                        (found - base if text == "task" else base.exp() * (base - found))
                        .double()
                        .sum()
                        .item()
                    )
                out[text].append(found)
        return out

    def made(self, method: str) -> Callable[[float], None]:
        """Return what sets all deltas to what a method makes of them, at the logarithm of μ, of 1 / θ or of 1 / share - 1."""
        if method in SCALES:
            return lambda t: self.scale(lambda module: SCALES[method](module, t))
        kind, ridge, power, own = FORMS[method]
        parts = [(module, *module.directions(kind, ridge)) for module in self.modules.values()]

        def at(t: float) -> None:
            for module, X, gamma, Y, energies in parts:
                low, high = (-60.0, 60.0) if own else (t, t)
                for _ in range(50 if own else 0):
                    left = float(
                        (energies * (1 + math.exp((low + high) / 2) * gamma) ** (-2 * power)).sum()
                    )
                    halves = ((low + high) / 2, high), (low, (low + high) / 2)
                    low, high = halves[left < float(energies.sum()) / (1 + math.exp(t))]
                module.weight.copy_((X * (1 + math.exp(low) * gamma) ** -power) @ Y)

        return at

    def searched(self, method: str, gain: float) -> list[dict[str, Any]]:
        """Find the strengths at which a method keeps each share of the gain, and measure it there on all texts."""
        at = self.made(method)
        points = dict[float, dict[str, Any]]()
        for keep in KEEP:
            for _ in range(STEPS):
                ts = sorted(points)
                kept = np.minimum.accumulate([sum(points[t]["task"]) / gain for t in ts])
                if ts and min(abs(kept - keep)) <= CLOSE:
                    break
                t = -0.5 if not ts else ts[0] - len(ts) if kept[0] < keep else ts[-1] + len(ts)
                at(
                    t := float(np.interp(-keep, -kept, ts))
                    if ts and kept[0] > keep > kept[-1]
                    else t
                )
                points[t] = self.run(["task"])
            best = min(points, key=lambda t, keep=keep: abs(sum(points[t]["task"]) / gain - keep))
            at(best)
            points[best] |= self.run(TEXTS[1:])
        return [points[t] for t in sorted(points) if "general" in points[t]]


def compared(args: argparse.Namespace, path: Path) -> None:
    """Measure what is not in the file of an adapter yet."""
    measured = Measured(args)
    measured.scale(lambda _: 1.0)
    found = json.loads(path.read_text()) if path.exists() else {"points": {}, "alone": {}}
    found["forecasts"] = {name: module.forecasts for name, module in measured.modules.items()}
    found["adapter"] = measured.run(TEXTS)
    for method in (one for one in args.methods if one not in found["points"]):
        points = found["points"][method] = measured.searched(method, sum(found["adapter"]["task"]))
        shares = (
            f"{100 * sum(p[text]) / sum(found['adapter'][text]):.1f}"
            for p in points
            for text in TEXTS
        )
        print(
            path.stem,
            method,
            *shares,
            f"{time.process_time():.0f} CPU s",
            file=sys.stderr,
            flush=True,
        )
        path.write_text(json.dumps(found))
    for name in measured.modules if args.alone[0] and not found["alone"] else ():
        measured.scale(lambda module, only=name: float(module is measured.modules[only]))
        found["alone"][name] = sum(measured.run(["general"], *args.alone)["general"])
    path.write_text(json.dumps(found))


def left(found: dict[str, Any], method: str, keep: float, text: str, counts: Any = None) -> float:
    """The logarithm of the KL divergence left where a share is kept, of the adapter's; NaN if nothing was measured near it."""
    points = found["points"].get(method, [])
    adapter = found["adapter"]
    counts = counts or {key: np.ones(len(sums)) for key, sums in adapter.items()}
    if all(abs(sum(p["task"]) / sum(adapter["task"]) - keep) > 2 * CLOSE for p in points):
        return math.nan
    whole, *sums = [
        [np.dot(p[key], counts[key]) for key in ("task", text)] for p in (adapter, *points)
    ]
    (one, high), (two, low) = np.divide(sums if len(sums) > 1 else [whole, *sums], whole)
    return math.log(high) + math.log(low / high) * (keep - one) / (two - one)


def ratio(
    found: dict[str, Any], method: str, other: str, keep: float, text: str
) -> tuple[float, float]:
    """The logarithm of what a method leaves as a part of what another leaves where they keep as much, and its error."""
    sizes = {key: len(found["adapter"][key]) for key in ("task", text)}
    draws = np.random.default_rng(0)
    samples = [
        {key: draws.multinomial(n, np.full(n, 1 / n)) for key, n in sizes.items()}
        for _ in range(200)
    ]
    pairs = np.array(
        [
            [left(found, m, keep, text, counts) for m in (method, other)]
            for counts in (None, *samples)
        ]
    )
    value, *others = pairs[:, 0] - pairs[:, 1]
    return float(value), float(np.std(others))


def table(results: dict[str, dict[str, Any]], keep: float, text: str, other: str) -> str:
    """Format what each method leaves as a part of what another leaves, and geometric means, as Markdown."""
    lines = [
        f"| {keep:.0%} kept, {text} text | {' | '.join(results)} | mean |",
        "|---" * (len(results) + 2) + "|",
    ]
    whole = (f"{100 * math.exp(left(found, other, keep, text)):.1f}" for found in results.values())
    lines.append(f"| KL left by {other}, % of the adapter's | {' | '.join(whole)} | |")
    for method in METHODS:
        pairs = [ratio(found, method, other, keep, text) for found in results.values()]
        known = np.array([value for value, _ in pairs if not math.isnan(value)])
        cells = [
            "–" if math.isnan(x) else f"{math.exp(x):.2f} ± {math.exp(x) * error:.2f}"
            for x, error in pairs
        ]
        mean = math.exp(known.mean()) if len(known) else math.nan
        error = known.std(ddof=1) / len(known) ** 0.5 if len(known) > 1 else math.nan
        lines.append(
            f"| {method} | {' | '.join(cells)} | {mean:.2f} ± {mean * error:.2f} ({len(known)}) |"
        )
    return "\n".join(lines)


def ranks(results: dict[str, dict[str, Any]]) -> str:
    """Format the rank correlations of forecasts with what each delta alone diverges as Markdown."""
    results = {name: found for name, found in results.items() if found["alone"]}
    lines = [
        f"| forecast, Spearman's ρ | {' | '.join(results)} | mean |",
        "|---" * (len(results) + 2) + "|",
    ]
    for key in {
        key: None
        for found in results.values()
        for one in found["forecasts"].values()
        for key in one
    }:
        pairs = (
            [[f["forecasts"][name][key], own] for name, own in f["alone"].items()]
            for f in results.values()
        )
        values = [float(spearmanr(rows)[0]) for rows in pairs]
        lines.append(
            f"| {key} | {' | '.join(f'{value:.2f}' for value in values)} | {np.mean(values):.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure an adapter, if one is given, and print the tables of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory of what is measured")
    parser.add_argument("base", type=Path, nargs="?")
    parser.add_argument("adapter", type=Path, nargs="?", help="a LoRA of linear layers")
    parser.add_argument("--name", help="in the tables (default: the adapter's)")
    for name in ("map", *TEXTS):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument(
        "--methods",
        type=lambda text: text.split(";"),
        default=METHODS,
        help="with ; (default: all)",
    )
    parser.add_argument(
        "--sequences", type=int, default=12, help="of each text (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=int, default=128, help="tokens of a sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--alone",
        type=int,
        nargs=2,
        default=[4, 64],
        help="sequences and tokens for each delta alone",
    )
    args = parser.parse_args()
    measure_forgetting.SEQUENCES = args.sequences
    measure_forgetting.LENGTH = args.length
    measure_forgetting.MORE = 1
    args.out.mkdir(parents=True, exist_ok=True)
    if args.base:
        compared(args, args.out / f"{args.name or args.adapter.name}.json")
    results = {path.stem: json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))}
    for keep in KEEP:
        for text, other in (("general", "map"), ("third", "map"), ("general", "shrink")):
            print(table(results, keep, text, other), end="\n\n")
    print(ranks(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
