"""Against PEFT itself, on adapters that PEFT trained on a pretrained model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import minilm
import pytest
import torch
from minilm import Trained
from pairs import merge, mitigate
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import load_file
from transformers import AutoModel

LAMBDAS = [0.0, 0.75]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖; the absolute error where b is zero (a module that training did not reach)."""
    norm = float(torch.linalg.matrix_norm(b.double()))
    return float(torch.linalg.matrix_norm(a.double() - b.double())) / (norm or 1.0)


def deltas(model: torch.nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """PEFT's own delta of every layer, by module path in the base."""
    return {
        path.removeprefix("base_model.model."): layer.get_delta_weight(name).detach().clone()
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


class Reference:
    """PEFT's mitigation in memory: its deltas and its outputs."""

    def __init__(self, adapter: Path, lam: float) -> None:
        model = minilm.load_peft(adapter)
        reduce_intruder_dimension(model, mitigation_lambda=lam, logging_sink=lambda line: None)
        self.deltas = deltas(model, "intruder_reduced")
        self.outputs = minilm.outputs(model)


@cache
def reference(adapter: Path, lam: float) -> Reference:
    return Reference(adapter, lam)


@cache
def dense_formula(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Singular values of base + delta and similarities of the ten leading directions in float64, by module."""
    base = minilm.load_base().state_dict()
    before = deltas(minilm.load_peft(adapter))
    out = {}
    for name, delta in before.items():
        W0 = base[f"{name}.weight"].double()
        U0 = torch.linalg.svd(W0, full_matrices=False).U
        U, S, _ = torch.linalg.svd(W0 + delta.double(), full_matrices=False)
        out[name] = S[:10], (U0.T @ U[:, :10]).abs().amax(0)
    return out


@pytest.mark.long
@pytest.mark.parametrize("solver", ["auto", "certified"])
def test_decisions_equal_the_dense_formula_in_float64(trained: Trained, solver: str) -> None:
    findings = trained.findings if solver == "auto" else trained.certified
    compared = 0
    assert findings.intruders >= 5
    for m in findings:
        S, similarity = dense_formula(trained.adapter)[m.module]
        torch.testing.assert_close(
            torch.tensor(m.detection.singular_values, dtype=torch.float64), S, rtol=1e-5, atol=0
        )
        assert m.detection.certified == bool(((similarity - 0.5).abs() > 1e-6).all()), m.tensor
        for j, s in enumerate(similarity.tolist()):
            assert (
                m.detection.similarity_low[j] - 1e-4 <= s <= m.detection.similarity_high[j] + 1e-4
            ), (m.tensor, j)
            if abs(s - 0.5) > 1e-4:
                assert (j in m.detection.intruders) == (s < 0.5), (m.tensor, j, s)
                compared += 1
    assert compared >= 10 * len(trained.findings) - 2


@pytest.mark.long
@pytest.mark.parametrize("lam", [0.0, 0.75])
def test_the_certified_solver_mitigates_as_the_dense_one(
    trained: Trained, lam: float, tmp_path: Path
) -> None:
    mitigated = []
    for name, findings in (("dense", trained.findings), ("certified", trained.certified)):
        mitigate(minilm.BASE, trained.adapter, tmp_path / name, lam, findings=findings)
        mitigated.append(deltas(minilm.load_peft(tmp_path / name)))
    expected, found = mitigated
    assert max(relative(found[name], expected[name]) for name in expected) < 1e-4
    assert {m.detection.solver for m in trained.findings} == {"dense"}
    assert sum(m.detection.escalated for m in trained.certified) < len(trained.certified) / 4


@pytest.mark.long
@pytest.mark.parametrize("lam", LAMBDAS)
def test_mitigated_delta_and_outputs_equal_pefts(
    trained: Trained, lam: float, tmp_path: Path
) -> None:
    record = mitigate(
        minilm.BASE, trained.adapter, tmp_path / "out", lam, findings=trained.findings
    )
    theirs = reference(trained.adapter, lam)
    model = minilm.load_peft(tmp_path / "out")
    ours = deltas(model)
    assert ours.keys() == theirs.deltas.keys()
    worst = max(relative(ours[name], theirs.deltas[name]) for name in ours)
    assert worst < 1e-4, worst
    assert relative(minilm.outputs(model).flatten(1), theirs.outputs.flatten(1)) < 1e-4
    assert (minilm.outputs(model) - theirs.outputs).abs().max() < 1e-4 * theirs.outputs.abs().max()
    assert record["totals"]["intruders"] == trained.findings.intruders


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance in units in the last place, for values of one sign."""
    kind = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}[
        a.dtype
    ]

    def ordered(t: torch.Tensor) -> torch.Tensor:
        i = t.contiguous().view(kind).long()
        return torch.where(i < 0, -(i & torch.iinfo(kind).max), i)

    return int((ordered(a) - ordered(b)).abs().max())


def test_merge_at_lambda_one_equals_merge_and_unload(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    merge(minilm.BASE, trained.adapter, out, 1.0)
    by_peft = minilm.load_peft(trained.adapter).merge_and_unload().state_dict()
    base = load_file(minilm.BASE / "model.safetensors")
    ours = load_file(out / "model.safetensors")
    adapted = {m.tensor for m in trained.findings}
    assert list(base) == list(ours)
    for name, tensor in ours.items():
        if name in adapted:
            # The sums round once in either program, but B·A is summed in another order: a few units of the *larger* term.
            bound = torch.finfo(torch.float32).eps * (
                base[name].abs() + (by_peft[name] - base[name]).abs()
            )
            assert bool(((tensor - by_peft[name]).abs() <= 4 * bound).all()), name
        else:
            assert torch.equal(tensor.view(torch.uint8), base[name].view(torch.uint8)), name
    loaded = AutoModel.from_pretrained(out).eval()
    model = minilm.load_peft(trained.adapter)
    torch.testing.assert_close(minilm.outputs(loaded), minilm.outputs(model), rtol=1e-4, atol=1e-4)
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json"):
        assert (out / name).read_bytes() == (minilm.BASE / name).read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_merge_is_the_exact_sum_rounded_once(
    trained: Trained, dtype: torch.dtype, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    minilm.load_base().to(dtype).save_pretrained(half)
    out = tmp_path / "merged"
    merge(half, trained.adapter, out, 1.0)
    base = load_file(half / "model.safetensors")
    ours = load_file(out / "model.safetensors")
    before = deltas(minilm.load_peft(trained.adapter))
    for m in trained.findings:
        exact = base[m.tensor].double() + before[m.module].double()
        assert ours[m.tensor].dtype == dtype
        # Where a sum all but cancels, float32's error in it is more than one unit of what is left.
        near = exact.abs() > 2**-12 * (
            base[m.tensor].double().abs() + before[m.module].double().abs()
        )
        assert ulps(ours[m.tensor][near], exact.to(dtype)[near]) <= 1, m.tensor
        torch.testing.assert_close(
            ours[m.tensor].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-7
        )
        # float32 sums may fall on the other side of a tie, but rarely: a second rounding would show in many values.
        assert (ours[m.tensor] != exact.to(dtype)).float().mean() < 1e-3, m.tensor
