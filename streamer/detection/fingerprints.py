"""Identify a matrix of a base and an adapter's module by their values, independently of location and dtype.

The same model may be in files and in memory, its tensors under other names, in shards or on devices, and in a wider dtype than stored.
Findings for one apply to the other if every matrix has the same fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from streamer.adapters.modules import LoraModule, MethodModule, values_of
from streamer.detection.findings import Findings
from streamer.errors import MismatchError
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.weights.base import StoredTensor, Weight

SAMPLED = 32
"""Number of evenly spaced rows and columns of the base's matrix whose crossings are hashed."""

_NOT_OF_DELTA = {"inference_mode"}
"""Numbers and flags of an adapter's config that do not affect its delta."""


def fingerprint(plan: Plan, target: Target, tensors: Mapping[str, StoredTensor] | None = None,
                weight: Weight | None = None) -> str | None:  # fmt: skip
    """Hash (SHA-256, hex) the values that determine the findings for a matrix, all as float64.

    These are its shape, a sample of W0, and the module's scaling and whole tensors. This is not a checksum of W0: a change outside the
    sample goes unnoticed.

    Parameters
    ----------
    tensors, weight
        The module's tensors and the matrix's weight, if already read.

    Returns
    -------
    str or None
        None for a fine-tuned model used as an adapter, which is compared by its files.
    """
    if plan.adapter.describes_model:
        return None
    module = target.module
    digest = hashlib.sha256(json.dumps([list(module.shape), float(module.scaling).hex()]).encode())
    _update(digest, _sample(weight or plan.weights[target.tensor], target.transposed))
    for name, values in _module_values(tensors or plan.adapter.tensors, target):
        digest.update(name.encode())
        _update(digest, values.double())
    return digest.hexdigest()


def lacking(where: str, missing: int, count: int, first: str) -> MismatchError:
    """Make the error for findings that lack matrices of an adapter."""
    return MismatchError(
        f"{where}: has no findings on {missing} of {count} matrices, {first} first; pass those on all matrices, or run detect again"
    )


def matched_findings(plan: Plan, findings: Findings, where: str) -> Findings:
    """Change the names and identities in findings to another location of the same model, in files or in memory.

    Matrices are matched by the adapter's modules; equal fingerprints prove that they are the same.

    Raises
    ------
    MismatchError
        If the findings are for another base or adapter, or do not say.
    """
    by_module = {m.module: m for m in findings}
    without = [t.module.name for t in plan.targets if t.module.name not in by_module]
    if without:
        raise lacking(where, len(without), len(plan.targets), f"module {without[0]!r}")
    matrices = []
    for target in plan.targets:
        found = by_module[target.module.name]
        mine = fingerprint(plan, target)
        if found.fingerprint is None or mine is None:
            raise MismatchError(
                f"{where}: does not say by which values {found.tensor!r} was judged (findings on a fine-tuned model do not), so they "
                "may differ from the values here; run detect again"
            )
        if found.fingerprint != mine:
            raise MismatchError(
                f"{where}: {found.tensor!r} was judged with other values than {plan.base.path} and {plan.adapter.path} have; run "
                "detect again on these (a model that was loaded in a narrower dtype than its files has other values)"
            )
        matrices.append(replace(found, tensor=target.tensor))
    return replace(findings, base=plan.base_identity, adapter=plan.adapter_identity, matrices=tuple(matrices))


def _update(digest: hashlib._Hash, values: Tensor) -> None:
    digest.update(values.contiguous().cpu().numpy().data)


def _spaced(n: int) -> list[int]:
    """Choose up to `SAMPLED` of n indices, evenly spaced, including the first and the last."""
    count = min(n, SAMPLED)
    return [i * (n - 1) // max(1, count - 1) for i in range(count)]


def _sample(weight: Weight, transposed: bool) -> Tensor:
    """Read the crossings of some rows and columns of the matrix (out, in), in float64."""
    source, (m, n) = weight.at_hand(), weight.matrix
    columns = torch.tensor(_spaced(n))
    rows = torch.stack([source.rows(i, i + 1)[0, columns].double() for i in _spaced(m)])
    return rows.T if transposed else rows


def _module_values(tensors: Mapping[str, StoredTensor], target: Target) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's tensors by their roles; for a method other than LoRA also the numbers in its config."""
    module = target.module
    if isinstance(module, LoraModule):
        slices = (*module.expert_slices, ())
        for role, name, index in zip(("A", "B", "magnitude"), module.tensor_names, slices, strict=False):
            yield role, values_of(tensors[name], index)
        return
    assert isinstance(module, MethodModule)
    for role in sorted(module.tensors):
        yield role, values_of(module.stored(tensors[module.tensors[role]]))
    numbers = {k: float(v) for k, v in module.config.values.items() if isinstance(v, int | float)}
    for key in sorted(numbers.keys() - _NOT_OF_DELTA):
        yield key, torch.tensor(numbers[key])
