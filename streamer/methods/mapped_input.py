"""Hold one input of a base's matrices on general text: the leading eigenvectors of its second moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.linalg.null_space import Spectrum


@dataclass(frozen=True, eq=False)
class MappedInput:
    """Inputs x (n,) of one or more matrices of the base.

    Attributes
    ----------
    names
        Names of these matrices, as in `Target.tensor`; the entry is named after the first.
    tokens
        Number of tokens over which C is a mean: all tokens of the text, even if only some of them reach an expert.
    size
        n.
    trace
        Trace of ``C = Σ x xᵀ / tokens``.
    values
        Leading eigenvalues of C (k,), descending; for one-hot inputs the frequencies (n,). Float64.
    vectors
        Eigenvectors (k, n), bfloat16; None for one-hot inputs.
    """

    names: tuple[str, ...]
    tokens: int
    size: int
    trace: float
    values: Tensor
    vectors: Tensor | None

    @property
    def key(self) -> tuple[str, bool]:
        """Return a unique key; a tied matrix has two entries, one as the embedding and one as the head."""
        return self.names[0], self.vectors is None

    @property
    def spectrum(self) -> Spectrum:
        """Return what is known of C, with the rounded vectors made orthonormal again."""
        if self.vectors is None:
            return Spectrum(self.values)
        others = self.size - len(self.values)
        rest = max(0.0, self.trace - float(self.values.sum())) / others if others else 0.0
        return Spectrum(self.values, rest, torch.linalg.qr(self.vectors.double().T)[0])
