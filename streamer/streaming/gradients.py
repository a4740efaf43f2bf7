"""Compute gradients with respect to the coefficients of the deltas' directions, streaming weights and activations.

The layers below the head run once and leave their inputs in a spool. The logits are computed a block of the vocabulary at a time: first for
the sum over the vocabulary, then for their gradient (``p − q`` for the divergence from q), which is accumulated in the last hidden states.
From there the layers run again, last to first; each records activations only for its own backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from streamer.errors import NumericError, UnsupportedError
from streamer.linalg.allocation import CPU
from streamer.methods import UNCHANGED
from streamer.methods.coefficient_set import CoefficientSet
from streamer.plan.plan import Plan
from streamer.streaming.differentiable import CoefficientDeltas, DifferentiableReader, Setting
from streamer.streaming.extra import refused_errors
from streamer.streaming.installed import is_rounded
from streamer.streaming.layers import SpooledLayer, layer_modules
from streamer.streaming.lazy import LazyTensor
from streamer.streaming.model import LoadedModel, giving, vocabulary_block
from streamer.streaming.spool import Spool, Spooled
from streamer.streaming.values import VariantSet
from streamer.streaming.variants import ADAPTER, BASE, Variant

if TYPE_CHECKING:
    from streamer.measuring.sequences import TextSequences

Against = Literal["base", "adapter", "labels"]
"""What the fitted model is compared with: next-token distributions of the base or of the adapted model, or the actual tokens."""

GRADIENT_LOGIT_BYTES = 8 << 20
"""Bytes of logits that exist at once; intermediate results may need up to eight times as much."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TextGradient:
    """An objective's value and gradient on some sequences.

    Attributes
    ----------
    value
        Sum over the counted tokens, in nats.
    tokens
        Number of counted tokens.
    gradient
        Gradient of the sum by `Target.tensor`: (p,), one entry for each direction.
    """

    value: float
    tokens: int
    gradient: Mapping[str, Floats]


_TENSOR = object()
"""Placeholder for a tensor that is in a spool."""


@dataclass(frozen=True)
class _Reference:
    """Result of a reference model's layers, in a spool, with the logarithms of its sums over the vocabulary."""

    leaves: list[Any]
    spec: TreeSpec
    place: Spooled
    log_sum: Tensor


class GradientModel(LoadedModel):
    """Model of a base with an adapter whose deltas have coefficients.

    Parameters
    ----------
    plan
        The base and the adapter.
    rounds_products
        Whether products of the base's weights with activations use factors rounded to bfloat16.
    directory
        Directory for temporary files: activations at layer boundaries, the references' last hidden states, and the deltas' singular
        directions.
    block
        Vocabulary tokens to compute together; by default as many as fit in `GRADIENT_LOGIT_BYTES`.
    device
        See `VariantSet`.

    Raises
    ------
    UnsupportedError
        If the model's class has no layers that its authors declare safe to run again.
    """

    def __init__(self, plan: Plan, *, rounds_products: bool = False, directory: Path | None = None,
                 block: int | None = None, device: torch.device = CPU) -> None:  # fmt: skip
        variants = Variant(BASE, None), Variant(ADAPTER, UNCHANGED)
        super().__init__(VariantSet(plan, variants, None, rounds_products=rounds_products, device=device), together=1)
        self.block = block
        self.setting = Setting(self.values, CoefficientDeltas(plan, directory, device), self.batch)
        self.spool, self.states = Spool(directory), Spool(directory)
        self._references: dict[tuple[Against, str], _Reference] = {}
        self._anchor = torch.zeros((), requires_grad=True, device=device)
        for _, module, own in self.modules:
            for name, tensor in own.items():
                rounded = name == "weight" and is_rounded(self.values, module, tensor)  # as in the passes that measure
                reader = DifferentiableReader(self.setting, tensor, head=module is self._head, rounded=rounded)
                module._parameters[name] = LazyTensor.of(reader)  # type: ignore[assignment]  # torch types a Parameter, which this stands in for
        layers = layer_modules(self._model)
        if not layers:
            raise UnsupportedError(
                f"{plan.base.path}: {type(self._model).__name__} has no layers that can run again for a backward pass; not supported by fit"
            )
        for path, layer in layers.items():
            adapted = any(map(self.values.targets, self.inside(path)))
            SpooledLayer(path, layer, self.spool, self._anchored if adapted else lambda: None)

    def close(self) -> None:
        """Free the blocks of temporary files; no gradient can be computed afterwards."""
        for spool in (self.spool, self.states, self.setting.deltas.spool):
            spool.close()

    def _anchored(self) -> Tensor | None:
        return self._anchor if self.setting.deltas.coefficients is not None else None

    def gradient(self, text: TextSequences, coefficients: CoefficientSet | Mapping[str, Floats],
                 against: Against) -> TextGradient:  # fmt: skip
        """Compute an objective's value and gradient on sequences that run together.

        Parameters
        ----------
        text
            The sequences. They are padded at the end, which no counted token sees.
        coefficients
            Coefficients (p,) by `Target.tensor`.
        against
            ``base``: Σ KL(base ‖ fitted) over the counted tokens. ``adapter``: Σ KL(adapted ‖ fitted). ``labels``: Σ −log p(token).

        Raises
        ------
        NumericError
            If the value or a gradient is NaN or Inf, or the text does not use everything that the adapter changes.
        """
        device = self.job.device
        ids, counted = (torch.from_numpy(array).to(device) for array in text.padded(text.longest))
        if isinstance(coefficients, CoefficientSet):
            coefficients = {name: matrix.values for name, matrix in coefficients.matrices.items()}
        leaves = {
            target.tensor: torch.tensor(
                coefficients[target.tensor], dtype=torch.float64, device=device, requires_grad=True
            )
            for target in self.job.plan.targets
        }
        self.batch.sequences, self.batch.length = ids.shape
        reference = None if against == "labels" else self._reference(ids, text.digest(), against)
        self.spool.end = 0  # the last gradient's tensors are no longer needed
        self.setting.variant, self.setting.deltas.coefficients = 1, leaves
        try:
            value = self._backward(ids, counted, leaves, reference, _variant_of(against))
        finally:
            self.setting.deltas.coefficients = None
        self.check_all_used()
        gradient = {
            name: np.zeros(len(leaf)) if leaf.grad is None else leaf.grad.cpu().numpy().copy()
            for name, leaf in leaves.items()
        }
        self._check_finite(text, value, gradient)
        return TextGradient(value, int(counted.sum()), gradient)

    def _backward(self, ids: Tensor, counted: Tensor, leaves: Mapping[str, Tensor], reference: _Reference | None,
                  variant: int) -> float:  # fmt: skip
        """Compute the value and leave the gradients in the coefficients."""
        weight = counted.to(torch.float32)
        labels = torch.roll(ids, -1, 1)
        total = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
        with self._captured() as results, torch.enable_grad():
            self._run(ids, (0, 1))
            outer = self._outermost(results)
            out, spec = tree_flatten(results[outer])
            results[outer] = None  # `out` holds the graph of the layers
            cut = [t.detach().requires_grad_() if _has_gradient(t) else t for t in out]
            own = giving(tree_unflatten(cut, spec))
            outer.forward = own
            log_sum = self._log_sum(ids)
            theirs = None if reference is None else giving(self._state(reference))
            for i, j in self.vocabulary_blocks(self._block(ids)):
                q, z_q = None, None
                if reference is not None and theirs is not None:
                    outer.forward = theirs
                    with torch.no_grad(), self.setting.reference(variant):
                        z_q = self._run(ids, (i, j)).float()
                    q = _probabilities(z_q, reference.log_sum)
                    outer.forward = own
                z = self._run(ids, (i, j))
                values = z.detach().float()
                dz = _probabilities(values, log_sum)
                if q is None or z_q is None:
                    here = (labels >= i) & (labels < j)
                    at = (labels - i).clamp(0, j - i - 1)[..., None]
                    total -= torch.where(here, values.gather(-1, at)[..., 0], 0).double()
                    dz.scatter_add_(-1, at, -here.to(dz.dtype)[..., None])
                else:
                    total += z_q.sub_(values).mul_(q).sum(-1).double()
                    dz -= q
                if z.requires_grad:
                    torch.autograd.backward(z, dz.mul_(weight[..., None]).to(z.dtype))
            total += log_sum if reference is None else log_sum - reference.log_sum
            pairs = [(t, c.grad) for t, c in zip(out, cut, strict=True) if _has_gradient(t) and c.grad is not None]
            outer.__dict__.pop("forward", None)
            if pairs:
                with refused_errors(self.job.plan.base.path, self._model):
                    torch.autograd.backward([t for t, _ in pairs], [grad for _, grad in pairs])
        return float((total * counted).sum())

    def _log_sum(self, ids: Tensor) -> Tensor:
        """Compute ``log Σ exp z`` for each token in float64, from the layers' given result."""
        most = torch.full(ids.shape, -torch.inf, dtype=torch.float64, device=ids.device)
        total = torch.zeros_like(most)
        with torch.no_grad():
            for block in self.vocabulary_blocks(self._block(ids)):
                z = self._run(ids, block).float()
                top = z.max(-1).values
                largest = torch.maximum(most, top.double())
                total *= torch.exp(most - largest)
                total += torch.exp(z - top[..., None]).sum(-1).double() * torch.exp(top.double() - largest)
                most = largest
        return most + total.log()

    def _reference(self, ids: Tensor, digest: str, against: Against) -> _Reference:
        """Run the layers of a reference model, or return the result of an earlier run."""
        key = against, digest
        if key not in self._references:
            with self._captured() as results, torch.no_grad(), self.setting.reference(_variant_of(against)):
                self._run(ids, (0, 1))
                outer = self._outermost(results)
                result = results[outer]
                outer.forward = giving(result)
                log_sum = self._log_sum(ids)
            leaves, spec = tree_flatten(result)
            place = self.states.write([t for t in leaves if isinstance(t, Tensor)])
            leaves = [_TENSOR if isinstance(t, Tensor) else t for t in leaves]
            self._references[key] = _Reference(leaves, spec, place, log_sum)
        return self._references[key]

    def _state(self, reference: _Reference) -> Any:
        """Read the result of a reference model's layers from the spool."""
        tensors = iter(self.states.read(reference.place))
        return tree_unflatten([next(tensors) if leaf is _TENSOR else leaf for leaf in reference.leaves], reference.spec)

    def _block(self, ids: Tensor) -> int:
        return self.block or vocabulary_block(ids.numel(), GRADIENT_LOGIT_BYTES)

    def _check_finite(self, text: TextSequences, value: float, gradient: Mapping[str, Floats]) -> None:
        path = self.job.plan.base.path
        if not np.isfinite(value):
            raise NumericError(
                f"{path}: the objective is NaN or Inf on {text.name or 'the text'}; check the adapter's scale"
            )
        for name, values in gradient.items():
            if not np.isfinite(values).all():
                raise NumericError(
                    f"{path}: the gradient of {name!r} on {text.name or 'the text'} has NaN or Inf; check the adapter's scale"
                )


def _variant_of(against: Against) -> int:
    return 0 if against == "base" else 1


def _probabilities(z: Tensor, log_sum: Tensor) -> Tensor:
    """Compute ``exp(z − log_sum)`` in float32, correcting for the rounding of `log_sum` to float32."""
    rounded = log_sum.to(torch.float32)
    return torch.exp(z - rounded[..., None]).mul_(torch.exp(rounded.double() - log_sum).to(torch.float32)[..., None])


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
