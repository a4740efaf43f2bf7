"""Hold what one input of a base's matrices is on general text: leading eigenvectors of its second moments."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.linalg.null_space import Spectrum


@dataclass(frozen=True, eq=False)
class MappedInput:
    """Inputs x (n,) that one matrix of the base is given, or several.

    Attributes
    ----------
    names
        Of these matrices, as `Target.tensor` has them; the first one's is the entry's own.
    tokens
        Tokens of the text, over which C is a mean; of an expert's inputs not all of them reached it.
    size
        n.
    trace
        Of ``C = Σ x xᵀ / tokens``.
    values
        Leading eigenvalues of C (k,), falling; of one-hot inputs the frequencies (n,). Float64.
    vectors
        Their eigenvectors (k, n), in bfloat16; None of one-hot inputs.
    """

    names: tuple[str, ...]
    tokens: int
    size: int
    trace: float
    values: Tensor
    vectors: Tensor | None

    @property
    def key(self) -> tuple[str, bool]:
        """Tell it from others: a tied matrix is an embedding's and the head's."""
        return self.names[0], self.vectors is None

    @property
    def spectrum(self) -> Spectrum:
        """Return what is known of C; what rounding took of the vectors' orthonormality is put right."""
        if self.vectors is None:
            return Spectrum(self.values)
        others = self.size - len(self.values)
        rest = max(0.0, self.trace - float(self.values.sum())) / others if others else 0.0
        return Spectrum(self.values, rest, torch.linalg.qr(self.vectors.double().T)[0])


def digest_of(inputs: Iterable[MappedInput]) -> str:
    """SHA-256 (hex) over all arrays, their names, and the figures beside them."""
    digest = hashlib.sha256()
    for one in sorted(inputs, key=lambda one: one.key):
        digest.update(f"{one.names} {one.tokens} {one.size} {one.trace!r}\n".encode())
        digest.update(one.values.numpy().astype("<f8").tobytes())
        if one.vectors is not None:
            digest.update(one.vectors.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
