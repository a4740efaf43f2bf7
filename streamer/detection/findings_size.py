"""Estimate the largest size of findings on disk, and check the free space before the first matrix is read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from streamer.detection import solvers
from streamer.detection.findings_file import FindingsHead, journal_of
from streamer.detection.findings_writer import most_bytes
from streamer.detection.intruders import Detection
from streamer.detection.matrix_finding import MatrixFinding
from streamer.detection.options import DetectionOptions
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.storage.atomic_file import partials_of
from streamer.storage.output_checks import allocated_bytes, check_space

FindingsSize = tuple[int, int]
"""Bytes of a findings file and of the journal beside it."""


def check_findings_space(paths: Sequence[Path], sizes: Sequence[FindingsSize]) -> None:
    """Refuse findings that might not fit on the disk together with their journals.

    Raises
    ------
    StorageError
        If they might not fit.
    """
    needed = 0
    for path, size in zip(paths, sizes, strict=True):
        # Files of an interrupted run: usable ones are reused, and the others are removed first.
        names = {path.name, journal_of(path).name}
        there = [journal_of(path), *(partials_of(path.parent, names) if path.parent.is_dir() else ())]
        needed += sum(size) - sum(map(allocated_bytes, there))
    check_space(paths[0].parent if len(paths) > 1 else paths[0], needed, at_most=True)


def findings_bytes(plan: Plan, options: DetectionOptions) -> FindingsSize:
    """Compute the largest size of findings, with every direction an intruder. Needs about 1 s for 10,000 matrices."""
    return most_bytes(FindingsHead.of(plan, options), (_widest(plan, target, options) for target in plan.targets))


def _widest(plan: Plan, target: Target, options: DetectionOptions) -> MatrixFinding:
    """Make a finding of the largest possible size: every direction an intruder, every figure as long as possible."""
    module, weight = target.module, plan.weights[target.tensor]
    (m, n), k = module.shape, options.directions(module.shape)
    longest, every = -sys.float_info.max, tuple(range(k))
    U, S, Vh = (torch.empty(shape, dtype=weight.compute, device="meta") for shape in ((m, k), (k,), (k, n)))
    found = Detection(singular_values=(longest,) * k, similarity=(longest,) * k, similarity_low=(longest,) * k,
                      similarity_high=(longest,) * k, base_singular_values=(longest,) * k, intruders=every, U=U, S=S,
                      Vh=Vh, certified=False, degenerate=every, solver=max(solvers.SOLVERS, key=len), escalated=False,
                      steps=10**9, products=10**9, cutoff=longest,
                      delta_norm=longest, intruder_energy=longest, dropped_at_zero=longest, precision="float64")  # fmt: skip
    return MatrixFinding(target.tensor, module.name, module.shape, weight.label, module.rank, module.scaling, found,
                         transposed=False, fingerprint="f" * 64)  # fmt: skip
