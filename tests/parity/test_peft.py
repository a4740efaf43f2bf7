"""Against PEFT itself, on adapters that PEFT trained on a pretrained model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import minilm
import pytest
import torch
from minilm import Trained
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import load_file
from seeds import vary
from transformers import AutoModel

import streamer

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
    """PEFT's mitigation in memory: what it decided, its deltas, its outputs."""

    def __init__(self, adapter: Path, lam: float) -> None:
        self.log: list[str] = []
        model = minilm.load_peft(adapter)
        reduce_intruder_dimension(model, mitigation_lambda=lam, logging_sink=self.log.append)
        self.deltas = deltas(model, "intruder_reduced")
        self.outputs = minilm.outputs(model)

    @property
    def counts(self) -> dict[str, int]:
        out = {}
        for line in self.log:
            path, _, rest = line.partition(": ")
            if rest:
                out[path.removeprefix("base_model.model.")] = 0 if "No" in rest else int(rest.split()[-1])
        return out


@cache
def reference(adapter: Path, lam: float) -> Reference:
    return Reference(adapter, lam)


@pytest.mark.long
def test_training_made_intruders(trained: Trained) -> None:
    assert trained.findings.intruders >= 5


@pytest.mark.long
def test_as_many_intruders_as_peft_finds_in_every_layer(trained: Trained) -> None:
    ours = {m.module: len(m.detection.intruders) for m in trained.findings}
    assert ours == reference(trained.adapter, 0.75).counts


@cache
def dense_formula(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Singular values of base + delta and similarities of the ten leading directions in float64, by module."""
    base, before = minilm.load_base().state_dict(), deltas(minilm.load_peft(adapter))
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
    for m in findings:
        S, similarity = dense_formula(trained.adapter)[m.module]
        torch.testing.assert_close(torch.tensor(m.detection.singular_values, dtype=torch.float64), S, rtol=1e-5, atol=0)
        assert m.detection.certified == bool(((similarity - 0.5).abs() > 1e-6).all()), m.tensor
        for j, s in enumerate(similarity.tolist()):
            assert m.detection.similarity_low[j] - 1e-4 <= s <= m.detection.similarity_high[j] + 1e-4, (m.tensor, j)
            if abs(s - 0.5) > 1e-4:
                assert (j in m.detection.intruders) == (s < 0.5), (m.tensor, j, s)
                compared += 1
    assert compared >= 10 * len(trained.findings) - 2


@pytest.mark.parametrize("lam", [0.0, 0.75])
def test_the_certified_solver_mitigates_as_the_dense_one(
    trained: Trained, lam: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mitigated = []
    for name, findings in (("dense", trained.findings), ("certified", trained.certified)):
        streamer.reduce_intruder_dimension(
            minilm.BASE, trained.adapter, tmp_path / name, findings=findings, mitigation_lambda=lam
        )
        mitigated.append(deltas(minilm.load_peft(tmp_path / name)))
    expected, found = mitigated
    assert max(relative(found[name], expected[name]) for name in expected) < 1e-4
    escalated = sum(m.detection.escalated for m in trained.certified)
    with capsys.disabled():
        print(f"\nMiniLM r={trained.rank}: {len(trained.certified)} matrices, {escalated} escalated")
    assert {m.detection.solver for m in trained.findings} == {"dense"}
    assert escalated < len(trained.certified) / 4


@pytest.mark.long
@pytest.mark.parametrize("lam", LAMBDAS)
def test_mitigated_delta_and_outputs_equal_pefts(trained: Trained, lam: float, tmp_path: Path) -> None:
    record = streamer.reduce_intruder_dimension(
        minilm.BASE, trained.adapter, tmp_path / "out", findings=trained.findings, mitigation_lambda=lam
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


@pytest.mark.long
@pytest.mark.parametrize("lam", [*LAMBDAS, 1.5])
def test_project_is_exact_at_the_adapters_own_rank(trained: Trained, lam: float, tmp_path: Path) -> None:
    options = {"findings": trained.findings, "mitigation_lambda": lam, "method": "project", "amplify": lam > 1}
    record = streamer.reduce_intruder_dimension(minilm.BASE, trained.adapter, tmp_path / "adapter", **options)
    streamer.merge_with_reduced_intruder_dimensions(minilm.BASE, trained.adapter, tmp_path / "merged", **options)
    assert record["totals"]["dropped_max"] == 0
    by_peft = minilm.load_peft(tmp_path / "adapter").merge_and_unload().state_dict()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    for m in trained.findings:
        scale = by_peft[m.tensor].abs().max()
        torch.testing.assert_close(ours[m.tensor], by_peft[m.tensor], rtol=0, atol=float(scale) * 2e-6)
    # The base's own component stays: only Δ is scaled.
    base, before = load_file(minilm.BASE / "model.safetensors"), deltas(minilm.load_peft(trained.adapter))
    for m in trained.findings:
        U = m.detection.U.double()
        left = U.T @ (ours[m.tensor].double() - base[m.tensor].double())
        expected = lam * (U.T @ before[m.module].double())
        torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-5)


def test_shrink_scales_every_delta_and_detects_nothing(trained: Trained, tmp_path: Path) -> None:
    record = streamer.reduce_intruder_dimension(
        minilm.BASE, trained.adapter, tmp_path / "out", mitigation_lambda=0.6, method="shrink"
    )
    before, after = deltas(minilm.load_peft(trained.adapter)), deltas(minilm.load_peft(tmp_path / "out"))
    assert max(relative(after[name], 0.6 * before[name]) for name in before) < 1e-6
    assert record["totals"]["equal_norm_shrink"] == pytest.approx(0.6)
    assert record["totals"]["intruders"] == 0


def test_first_scales_only_the_highest_ranked(trained: Trained, tmp_path: Path) -> None:
    streamer.reduce_intruder_dimension(
        minilm.BASE,
        trained.adapter,
        tmp_path / "out",
        findings=trained.findings,
        mitigation_lambda=0.0,
        method="project",
        select="first",
    )
    before, after = deltas(minilm.load_peft(trained.adapter)), deltas(minilm.load_peft(tmp_path / "out"))
    for m in trained.findings:
        U = m.detection.U.double()[:, :1]
        D = before[m.module].double()
        expected = D - U @ (U.T @ D)
        assert relative(after[m.module], expected) < 1e-5, m.module


def test_lambda_one_changes_nothing(trained: Trained, tmp_path: Path) -> None:
    streamer.reduce_intruder_dimension(minilm.BASE, trained.adapter, tmp_path / "out", mitigation_lambda=1.0)
    before, after = deltas(minilm.load_peft(trained.adapter)), deltas(minilm.load_peft(tmp_path / "out"))
    assert max(relative(after[name], before[name]) for name in before) <= 1e-6


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance in units in the last place, for values of one sign."""
    kind = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}[a.dtype]

    def ordered(t: torch.Tensor) -> torch.Tensor:
        i = t.contiguous().view(kind).long()
        return torch.where(i < 0, -(i & torch.iinfo(kind).max), i)

    return int((ordered(a) - ordered(b)).abs().max())


def test_merge_at_lambda_one_equals_merge_and_unload(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    streamer.merge_with_reduced_intruder_dimensions(minilm.BASE, trained.adapter, out, mitigation_lambda=1.0)
    by_peft = minilm.load_peft(trained.adapter).merge_and_unload().state_dict()
    base, ours = load_file(minilm.BASE / "model.safetensors"), load_file(out / "model.safetensors")
    adapted = {m.tensor for m in trained.findings}
    assert list(base) == list(ours)
    for name, tensor in ours.items():
        if name in adapted:
            # The sums round once in either program, but B·A is summed in another order: a few units of the *larger* term.
            bound = torch.finfo(torch.float32).eps * (base[name].abs() + (by_peft[name] - base[name]).abs())
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
    streamer.merge_with_reduced_intruder_dimensions(half, trained.adapter, out, mitigation_lambda=1.0)
    base, ours = load_file(half / "model.safetensors"), load_file(out / "model.safetensors")
    before = deltas(minilm.load_peft(trained.adapter))
    for m in trained.findings:
        exact = base[m.tensor].double() + before[m.module].double()
        assert ours[m.tensor].dtype == dtype
        # Where a sum all but cancels, float32's error in it is more than one unit of what is left.
        near = exact.abs() > 2**-12 * (base[m.tensor].double().abs() + before[m.module].double().abs())
        assert ulps(ours[m.tensor][near], exact.to(dtype)[near]) <= 1, m.tensor
        torch.testing.assert_close(ours[m.tensor].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-7)
        # float32 sums may fall on the other side of a tie, but rarely: a second rounding would show in many values.
        assert (ours[m.tensor] != exact.to(dtype)).float().mean() < 1e-3, m.tensor


def test_iter_merged_yields_what_merge_writes(trained: Trained, tmp_path: Path) -> None:
    options = {"findings": trained.findings, "mitigation_lambda": 0.5}
    streamer.merge_with_reduced_intruder_dimensions(minilm.BASE, trained.adapter, tmp_path / "out", **options)
    written = load_file(tmp_path / "out" / "model.safetensors")
    seen = []
    for name, tensor in streamer.iter_merged(minilm.BASE, trained.adapter, **options):
        assert torch.equal(tensor, written[name]), name
        seen.append(name)
    assert sorted(seen) == sorted(written)


def test_conv1d_bases_are_transposed_as_peft_does(tmp_path: Path) -> None:
    """GPT-2 stores (in, out): c_attn is 64 x 192 there, c_proj square, which only the config can tell."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(vary(0))
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=100, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        r=4, lora_alpha=64, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False
    )
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), lora)
    model.save_pretrained(tmp_path / "adapter")
    streamer.merge_with_reduced_intruder_dimensions(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", mitigation_lambda=1.0
    )
    by_peft = model.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, by_peft[name if name in by_peft else f"transformer.{name}"], rtol=1e-5, atol=1e-5
        )
    findings = streamer.detect_intruder_dimensions(tmp_path / "base", tmp_path / "adapter")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert len(findings) == 6
    for m in findings:
        W0, W = (
            base[m.tensor].double().T,
            by_peft[m.tensor if m.tensor in by_peft else f"transformer.{m.tensor}"].double().T,
        )
        assert m.shape == tuple(W0.shape)
        U0, U = torch.linalg.svd(W0, full_matrices=False).U, torch.linalg.svd(W, full_matrices=False).U
        similarity = (U0.T @ U[:, :10]).abs().amax(0)
        clear = [j for j in range(10) if abs(float(similarity[j]) - 0.5) > 1e-3]
        assert [j for j in m.detection.intruders if j in clear] == [j for j in clear if similarity[j] < 0.5], m.tensor
