"""What became of intruders: after mitigation, with directions planted, and against the full SVD's vectors."""

import dataclasses
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from seeds import vary

import streamer
from streamer.cli.tables import MANY, NO_LIMIT, SHOWN, diff_table
from streamer.detection.findings import Findings
from streamer.errors import MismatchError
from streamer.report.diff import FATES, Direction, FindingsDiff, IntruderFate, diff_findings

Pair = tuple[Path, Path]


def with_directions(findings: Findings, columns: torch.Tensor) -> Findings:
    """The findings on the first matrix alone, with these left singular vectors in place of its intruders'."""
    d, q = findings[0].detection, columns.shape[1]
    made = dataclasses.replace(
        d, U=columns.float(), S=torch.ones(q), Vh=torch.eye(q, d.Vh.shape[1]), intruders=tuple(range(q))
    )
    return dataclasses.replace(findings, matrices=(dataclasses.replace(findings[0], detection=made),))


def test_findings_against_themselves_keep_all(findings: Findings) -> None:
    diff = diff_findings(findings, findings)
    assert [diff.count(fate) for fate in FATES] == [findings.intruders, 0, 0, 0]
    # u is a unit vector but for the roundings of float32, many in an SVD; what it has in common with itself is ‖u‖².
    lengths = [float(u @ u) for m in findings for u in m.detection.U.double().T]
    assert [one.overlap for one in diff.intruders] == pytest.approx(np.minimum(lengths, 1), rel=1e-12)
    assert all(one.before == one.after for one in diff.intruders)
    assert repr(diff) == "<FindingsDiff: 9 remain, 0 mixed, 0 gone, 0 new, in 9 matrices>"


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_paper_leaves_its_share_of_an_intruder(pair: Pair, findings: Findings, lam: float, tmp_path: Path) -> None:
    """Rank 5 holds what is written: the delta, of rank 4, and the base's part of an intruder. So no direction turns."""
    streamer.reduce_intruder_dimension(
        *pair, tmp_path / "out", findings=findings, mitigation_lambda=lam, method="paper", to_lora=5
    )
    # A half may rank anywhere. At 0, u belongs to σ = 0, the last.
    after = streamer.detect_intruder_dimensions(pair[0], tmp_path / "out", top_k=1.0 if lam else 10)
    fates = [one for one in diff_findings(findings, after).intruders if one.fate != "new"]
    assert len(fates) == findings.intruders
    assert {one.fate for one in fates} == {"kept" if lam else "gone"}
    for one in fates if lam else ():
        assert one.before is not None
        assert one.after is not None
        # The SVDs before and after each err by some roundings of σ_1 ≈ 1, at most as many as W has rows.
        assert one.after.singular_value == pytest.approx(lam * one.before.singular_value, abs=2 * 96 * 2**-23)


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_project_leaves_the_bases_part_of_an_intruder(lam: float, tmp_path: Path) -> None:
    """With z = W0ᵀu and Δ = (a u − (I − uuᵀ) W0 z / ‖z‖) zᵀ / ‖z‖, Wᵀu = (‖z‖ + a) z / ‖z‖ and Wz ∥ u: project changes only a."""
    W0, u, a = torch.diag(torch.linspace(1, 0.5, 9)), torch.full((9, 1), 1 / 3), 0.5
    z = W0.T @ u
    size, turned = z.norm(), W0 @ z / z.norm()
    (tmp_path / "base").mkdir()
    save_file({"layers.0.weight": W0}, tmp_path / "base" / "model.safetensors")
    factors = z.T / size, a * u - turned + u @ (u.T @ turned)
    pair = tmp_path / "base", helpers.write_adapter(tmp_path / "adapter", {"layers.0": factors}, r=1)
    before = streamer.detect_intruder_dimensions(*pair)
    streamer.reduce_intruder_dimension(
        *pair, tmp_path / "out", findings=before, mitigation_lambda=lam, method="project"
    )
    after = streamer.detect_intruder_dimensions(pair[0], tmp_path / "out")
    (one,) = diff_findings(before, after).intruders
    assert one.before is not None
    assert one.after is not None
    assert one.overlap == pytest.approx(1, abs=1e-6)
    assert one.before.singular_value == pytest.approx(float(size) + a, abs=1e-6)
    assert one.after.singular_value == pytest.approx(float(size) + lam * a, abs=1e-6)


def test_overlaps_are_those_of_the_full_svds(pair: Pair, findings: Findings, tmp_path: Path) -> None:
    """The second adapter has other directions in part: B is turned."""
    base = load_file(pair[0] / "model-00001-of-00003.safetensors")
    tensors = load_file(pair[1] / "adapter_model.safetensors")
    turned = {k: t + 0.5 * t.norm() / t.numel() ** 0.5 * torch.randn(t.shape, generator=torch.Generator().manual_seed(vary(1)))
              if "lora_B" in k else t for k, t in tensors.items()}  # fmt: skip
    modules = sorted({k.removeprefix("base_model.model.").partition(".lora_")[0] for k in tensors})
    factors = {m: tuple(turned[f"base_model.model.{m}.lora_{f}.weight"] for f in "AB") for m in modules}
    after = streamer.detect_intruder_dimensions(pair[0], helpers.write_adapter(tmp_path / "turned", factors, r=4))  # type: ignore[arg-type]
    diff = diff_findings(findings, after)
    checked = 0
    for one in diff.intruders:
        if one.fate != "kept" or one.tensor not in base:
            continue
        module = one.tensor.removesuffix(".weight")
        vectors = []
        for found, side in ((tensors, one.before), (turned, one.after)):
            A, B = (found[f"base_model.model.{module}.lora_{f}.weight"].double() for f in "AB")
            assert side is not None
            vectors.append(np.linalg.svd((base[one.tensor].double() + B @ A).numpy())[0][:, side.rank])
        assert one.overlap == pytest.approx(abs(vectors[0] @ vectors[1]), abs=1e-4)
        checked += 1
    assert checked >= 2


def test_matches_are_one_to_one_and_mixtures_are_told(findings: Findings) -> None:
    generator = torch.Generator().manual_seed(vary(0))
    Q = torch.linalg.qr(torch.randn(findings[0].shape[0], 6, generator=generator, dtype=torch.float64)).Q
    turn = torch.eye(3, dtype=torch.float64) - 2 / 3  # no square of an entry is above 4/9
    first = with_directions(findings, Q[:, :5])
    second = with_directions(findings, torch.cat([Q[:, :1], Q[:, 1:4] @ turn, Q[:, 5:]], 1))
    diff = diff_findings(first, second)
    assert [one.fate for one in diff.intruders] == ["kept", "mixed", "mixed", "mixed", "gone", "new"]
    assert [one.share for one in diff.intruders] == pytest.approx([1, 1, 1, 1, 0, 0], abs=1e-5)
    assert [one.overlap for one in diff.intruders] == pytest.approx([1, 2 / 3, 2 / 3, 2 / 3, 0, 0], abs=1e-5)
    assert [one.before is None for one in diff.intruders] == [False] * 5 + [True]


def test_matrices_of_one_alone_are_named(findings: Findings) -> None:
    diff = diff_findings(findings.select("*layers.[01].*"), findings.select("*layers.[12].*"))
    assert (diff.matrices, len(diff.only_first), len(diff.only_second)) == (3, 3, 3)
    assert {one.tensor.split(".")[2] for one in diff.intruders} == {"1"}


def test_other_options_are_noted_and_other_bases_refused(pair: Pair, findings: Findings, tmp_path: Path) -> None:
    other = streamer.detect_intruder_dimensions(*pair, threshold_epsilon=0.4)
    (note,) = diff_findings(findings, other).notes
    assert "epsilon=0.5 and top_k=10, epsilon=0.4" in note
    foreign = streamer.detect_intruder_dimensions(*helpers.three_shards(tmp_path, hidden=32))
    with pytest.raises(MismatchError, match="expected two on one base, found bases with different content"):
        diff_findings(findings, foreign)
    live = dataclasses.replace(findings, base={**findings.base, "in_memory": True})
    with pytest.raises(MismatchError, match="found one on files and one on a model in memory"):
        diff_findings(findings, live)


def test_open_decisions_are_counted(findings: Findings) -> None:
    def opened(count: int) -> Findings:
        rest = [
            dataclasses.replace(m, detection=dataclasses.replace(m.detection, certified=False))
            for m in findings.matrices[:count]
        ]
        return dataclasses.replace(findings, matrices=(*rest, *findings.matrices[count:]))

    assert diff_findings(opened(1), opened(2)).notes == (
        "1 matrix of the first findings is not certified",
        "2 matrices of the second findings are not certified",
    )


def test_of_many_the_table_shows_those_that_changed(findings: Findings) -> None:
    def fates(*after: float) -> FindingsDiff:
        rows = [
            IntruderFate(f"layers.{i}.weight", "kept", Direction(1, 2.0, 0.1), Direction(1, sigma, 0.1), 1.0, 1.0)
            for i, sigma in enumerate(after)
        ]
        return dataclasses.replace(diff_findings(findings, findings), intruders=tuple(rows))

    many = MANY + 1
    text = diff_table(fates(*[2.0] * many), NO_LIMIT)
    assert text.splitlines()[0] == f"none of {many} intruders has changed; --all shows every one"
    lines = diff_table(fates(*[2.0] * (many - 2), 1.0, 1.5), NO_LIMIT).splitlines()
    assert [line.split()[0] for line in lines[2:4]] == [f"layers.{many - 2}.weight", f"layers.{many - 1}.weight"]
    assert f"the 2 that have changed, of {many}; --all shows every one" in lines
    lines = diff_table(fates(*[1.0] * many), NO_LIMIT).splitlines()
    assert f"the {SHOWN} whose singular values changed most, of {many}; --all shows every one" in lines
