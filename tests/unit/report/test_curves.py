"""What λ takes away, and intruders against ε, are what mitigation and detection make of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import streamer
from streamer.detection.findings import Findings
from streamer.report.curves import LAMBDAS, lambda_curve, threshold_curve


def delta(adapter: Path, module: str) -> torch.Tensor:
    tensors = load_file(adapter / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{module}.lora_{f}.weight"].double() for f in "AB")
    return B @ A


def test_what_a_lambda_takes_away_is_what_the_formulas_do(pair: tuple[Path, Path], findings: Findings) -> None:
    total = {"before": 0.0, "project": 0.0, "left": 0.0, "paper": 0.0}
    lam = 0.25
    for m in findings:
        D, d = delta(pair[1], m.module), m.detection
        U, S, Vh = d.U.double(), d.S.double(), d.Vh.double()
        project = D - (1 - lam) * U @ (U.T @ D)
        paper = D + (lam - 1) * U @ torch.diag(S) @ Vh
        total["before"] += float(D.square().sum())
        total["left"] += float(project.square().sum())
        total["project"] += float((project - D).square().sum())
        total["paper"] += float((paper - D).square().sum())
    found = next(c for c in lambda_curve(findings) if c["lambda"] == lam)
    for key, square in (("norm_left", "left"), ("project", "project"), ("paper", "paper")):
        assert found[key] == pytest.approx(math.sqrt(total[square] / total["before"]), rel=1e-5)  # type: ignore[literal-required]


def test_lambda_1_takes_nothing_away(findings: Findings) -> None:
    first = lambda_curve(findings)[0]
    assert first == {"lambda": 1.0, "paper": 0.0, "project": 0.0, "norm_left": 1.0}
    assert [c["lambda"] for c in lambda_curve(findings)] == list(LAMBDAS)


def test_findings_without_a_delta() -> None:
    empty = Findings({"files": []}, {"modules": 0}, streamer.DetectionOptions(), ())
    assert {c["norm_left"] for c in lambda_curve(empty)} == {1.0}
    assert {c["most"] for c in threshold_curve(empty)} == {0}


def test_thresholds_count_what_detection_finds_there(pair: tuple[Path, Path], findings: Findings) -> None:
    curve = {c["epsilon"]: c for c in threshold_curve(findings)}
    assert curve[0.5]["intruders"] == curve[0.5]["least"] == curve[0.5]["most"] == findings.intruders
    other = streamer.detect_intruder_dimensions(*pair, threshold_epsilon=0.7)
    assert curve[0.7]["least"] <= other.intruders <= curve[0.7]["most"]
    values = list(curve.values())
    assert all(a["intruders"] <= b["intruders"] and a["most"] <= b["most"] for a, b in itertools.pairwise(values))


def test_a_threshold_between_the_steps_is_among_them(findings: Findings) -> None:
    options = dataclasses.replace(findings.options, threshold_epsilon=0.513)
    curve = threshold_curve(dataclasses.replace(findings, options=options))
    assert 0.513 in [c["epsilon"] for c in curve]
