"""Measure the losses of all variants on a batch of sequences, from logits that arrive one block of the vocabulary at a time.

For the logits z at a token and the next token y, ``loss = log Σ exp z − z_y``. With the base's z⁰ and p⁰ = softmax(z⁰),
``KL(p⁰ ‖ p) = Σ p⁰ (z⁰ − z) − (log Σ exp z⁰ − log Σ exp z)``. Sums over the vocabulary are float64 and scaled by the largest logit so far.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from streamer.measuring.divergences import counted_bins
from streamer.measuring.sequences import TextSequences
from streamer.measuring.statistics import SequenceSums
from streamer.streaming.model import StreamingModel


class _Accumulator:
    """Sums over the vocabulary for each token; shapes are (variants, sequences, length), with the base as the first variant."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.largest = torch.full(shape, -torch.inf, device=device)
        self.top = torch.zeros(shape, dtype=torch.int64, device=device)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.cross = torch.zeros(shape, dtype=torch.float64, device=device)
        """``Σ exp(z⁰ − largest⁰) (z⁰ − z)``."""
        self.label = torch.zeros(shape, device=device)

    def add(self, z: Tensor, i: int, labels: Tensor) -> None:
        """Add the logits (…, j − i) of vocabulary entries i to j."""
        most, at = z.max(-1)
        self.top = torch.where(most > self.largest, at + i, self.top)
        largest = torch.maximum(most, self.largest)
        factor = torch.exp(self.largest.double() - largest.double())
        self.largest = largest
        self.total *= factor
        self.cross *= factor[:1]
        base = torch.exp(z[0] - largest[0, ..., None])
        for v in range(len(z)):
            weights = base if v == 0 else torch.exp(z[v] - largest[v, ..., None])
            self.total[v] += weights.sum(-1)
            self.cross[v] += (base * (z[0] - z[v])).sum(-1)
        here = ((labels >= i) & (labels < i + z.shape[-1])).expand(len(z), -1, -1)
        found = z.gather(-1, (labels - i).clamp(0, z.shape[-1] - 1).expand(len(z), -1, -1)[..., None])[..., 0]
        self.label = torch.where(here, found, self.label)

    def results(self, labels: Tensor) -> dict[str, Tensor]:
        """Return for each token the loss, the KL, whether the likeliest token is the base's or the text's own, and the change of p."""
        log_sum = self.largest.double() + self.total.log()
        kl = self.cross / self.total[:1] - (log_sum[:1] - log_sum)
        loss = log_sum - self.label.double()
        change = torch.exp(-loss) - torch.exp(-loss[:1])
        agree, right = (self.top == self.top[:1]).double(), (self.top == labels).double()
        return {"loss": loss, "kl": kl, "agree": agree, "right": right, "p_change": change, "p_square": change**2}


def measure(model: StreamingModel, text: TextSequences, block: int) -> SequenceSums:
    """Run one pass over all sequences of a text, padded at their ends, where no counted token attends to the padding.

    Parameters
    ----------
    block
        Number of vocabulary entries whose logits are computed together.
    """
    length, device = text.longest, model.job.device
    ids, counted = map(torch.from_numpy, text.padded(length))
    labels = torch.roll(ids, -1, 1).to(device)
    sums = _Accumulator((model.batch.variants, len(text.ids), length), device)
    with torch.inference_mode():
        for i, _, z in model.logits(ids, model.vocabulary_blocks(block)):
            sums.add(z.float(), i, labels)
        results = {name: t.cpu() for name, t in sums.results(labels).items()}
        found = {name: (t * counted).sum(-1).numpy() for name, t in results.items()}
        kl = results["kl"].numpy()
    bins = counted_bins(kl, counted.numpy())
    most = np.where(counted.numpy(), kl, 0.0).max(-1)
    return SequenceSums(counted.sum(-1).double().numpy(), **found, kl_max=most, kl_bins=bins)
