"""Two functions of coefficients that are known in closed form, and answers to what `fit_steps` asks about them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from seeds import vary

from streamer.fitting.algorithm import Answer, FittedPoint, Gradient, HeldOutAnswer, Problem, Request, Slope, fit_steps
from streamer.measuring.statistics import SequenceSums

TOKENS, SEQUENCES = 100.0, 6


@dataclass
class World:
    """``G(c) = ½ cᵀ H c + b Σ c⁴`` and ``T(c)`` the like of ``1 − c``; both are the texts' losses above 3 and 2 nats per token.

    Attributes
    ----------
    H, K
        Curvatures of G and T at their minima: (P, P).
    quartic
        b.
    scatter
        By how much sequences held apart differ in what the adapter changes, as a share of it.
    beside
        By how much the base's loss on the task's text is above that of c = 0, and on the general text below: what an adapter does beside
        its deltas.
    """

    H: np.ndarray
    K: np.ndarray
    quartic: float = 0.0
    scatter: float = 0.1
    beside: float = 0.0
    asked: list[Request] = field(default_factory=list)

    def value(self, text: str, c: np.ndarray) -> float:
        A, x = (self.H, c) if text == "general" else (self.K, 1 - c)
        return float(0.5 * x @ A @ x + self.quartic * (x**4).sum())

    def slope(self, text: str, c: np.ndarray) -> np.ndarray:
        A, x, sign = (self.H, c, 1) if text == "general" else (self.K, 1 - c, -1)
        return sign * (A @ x + 4 * self.quartic * x**3)

    def answer(self, request: Request) -> Answer:
        self.asked.append(request)
        if isinstance(request, Gradient):
            return Slope(self.value(request.text, request.coefficients), self.slope(request.text, request.coefficients))
        P = len(self.H)
        points = [np.zeros(P), np.ones(P), *request.coefficients]
        return HeldOutAnswer(self.sums("general", points, 3.0), self.sums("task", points, 2.0))

    def sums(self, text: str, points: list[np.ndarray], least: float) -> SequenceSums:
        factors = 1 + self.scatter * np.linspace(-1, 1, SEQUENCES)
        values = [self.value(text, c) for c in points]
        values[0] += -self.beside if text == "general" else self.beside
        loss = np.stack([TOKENS * (least + factors * value) for value in values])
        none = np.zeros_like(loss)
        return SequenceSums(np.full(SEQUENCES, TOKENS), loss, none, none, none)

    def fit(self, options: Problem) -> tuple[FittedPoint, ...]:
        steps = fit_steps(options)
        request = next(steps)
        while True:
            try:
                request = steps.send(self.answer(request))
            except StopIteration as end:
                return end.value

    def one_for_all(self) -> World:
        """Functions of one coefficient that all have."""
        H, K = (np.full((1, 1), A.sum()) for A in (self.H, self.K))
        return replace(self, H=H, K=K, quartic=self.quartic * len(self.H), asked=[])

    def kept(self, c: np.ndarray) -> float:
        return 1 - self.value("task", c) / (self.value("task", np.zeros(len(c))) + self.beside)

    def forgetting(self, c: np.ndarray) -> float:
        return self.value("general", c) / self.value("general", np.ones(len(c)))


def world(P: int = 40, seed: int = 0, **options: float) -> World:
    """Curvatures with scales from 1 to a hundred, and directions that depend on one another."""
    rng = np.random.default_rng(vary(seed))

    def curvature() -> np.ndarray:
        root = rng.normal(size=(P, P // 4)) * np.exp(rng.uniform(-2, 1, P))[:, None]
        A = root @ root.T / P + np.diag(np.exp(rng.uniform(-4, 0, P)))
        return A / A.sum()

    return World(curvature(), curvature(), **options)
