"""Tell a matrix of a base with an adapter's module from others by its values, wherever they are and in whatever dtype.

The same model may be in files and in memory, its tensors under other names, in shards or on devices, and in a wider dtype than they were
stored in. Findings on one serve the other where each matrix has the same fingerprint.
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
"""Rows and columns of the base's matrix, evenly spaced, whose crossings are hashed."""

_NOT_OF_DELTA = {"inference_mode"}
"""Numbers and flags of an adapter's config that do not decide its delta."""


def fingerprint(plan: Plan, target: Target, tensors: Mapping[str, StoredTensor] | None = None,
                weight: Weight | None = None) -> str | None:  # fmt: skip
    """Hash (SHA-256, hex) what decides the findings on a matrix, all values as float64.

    That is its shape, a sample of W0, and the module's scaling and tensors, whole. It is no checksum of W0: a change outside of the
    sample is not seen.

    Parameters
    ----------
    tensors, weight
        The module's tensors and the matrix' weight, where they have been read.

    Returns
    -------
    str or None
        None for a fine-tuned model in an adapter's place, which is compared as files are.
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
    """Make the error of findings that lack matrices of an adapter."""
    return MismatchError(
        f"{where}: has no findings on {missing} of {count} matrices, {first} first; pass those on all matrices, or run detect again"
    )


def matched_findings(plan: Plan, findings: Findings, where: str) -> Findings:
    """Give findings the names and identities of another place of the same model: of files, or of a model in memory.

    Matrices are matched by the adapter's modules, and proven the same by their fingerprints.

    Raises
    ------
    MismatchError
        If they are not findings on this base and adapter, or do not say.
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
                f"{where}: does not say by which values {found.tensor!r} was judged, as findings on a fine-tuned "
                "model do not, so it is unknown whether they are the same here; run detect again"
            )
        if found.fingerprint != mine:
            raise MismatchError(
                f"{where}: {found.tensor!r} was judged with other values than {plan.base.path} and {plan.adapter.path} have; run "
                "detect again on these (a model that was loaded in a narrower dtype than it is stored in has other values)"
            )
        matrices.append(replace(found, tensor=target.tensor))
    return replace(findings, base=plan.base_identity, adapter=plan.adapter_identity, matrices=tuple(matrices))


def _update(digest: hashlib._Hash, values: Tensor) -> None:
    digest.update(values.contiguous().cpu().numpy().data)


def _spaced(n: int) -> list[int]:
    """Choose up to `SAMPLED` of n indices, evenly spaced, the first and the last among them."""
    count = min(n, SAMPLED)
    return [i * (n - 1) // max(1, count - 1) for i in range(count)]


def _sample(weight: Weight, transposed: bool) -> Tensor:
    """Read the crossings of some rows and columns of the matrix as (out, in), in float64."""
    source, (m, n) = weight.at_hand(), weight.matrix
    columns = torch.tensor(_spaced(n))
    rows = torch.stack([source.rows(i, i + 1)[0, columns].double() for i in _spaced(m)])
    return rows.T if transposed else rows


def _module_values(tensors: Mapping[str, StoredTensor], target: Target) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of a module by their roles; of another method than LoRA the numbers of its config besides."""
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
